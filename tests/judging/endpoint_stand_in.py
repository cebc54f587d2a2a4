"""An OpenAI-compatible server on the loopback that replies, refuses, fails and stalls as told, and counts."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT_S = 60.0  # for a condition that comes at once on an idle machine
MODELS = ("judge-large", "judge-small")


@dataclass
class Says:
    """One answer of the server: `text` as a completion, or else a status with a body."""

    text: str = ""
    status: int = 200
    message: str = ""
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    raw: str | None = None  # instead of a completion
    usage: bool = True
    hold: threading.Event | None = None  # waits for it first


class StandIn:
    """The server's state: `script` decides on each request by its body and its number, from 0."""

    def __init__(self, script: Callable[[dict[str, Any], int], Says]) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.url = ""
        self._changed = threading.Condition()

    def receive(self, body: dict[str, Any], key: str) -> Says:
        with self._changed:
            number = len(self.bodies)
            self.bodies.append(body)
            self.keys.add(key)
            self._changed.notify_all()
        return self.script(body, number)

    def wait_for(self, requests: int) -> None:
        """Wait until so many requests have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.bodies) >= requests, WAIT_S)

    def times_asked(self) -> list[int]:
        """Return how often each different conversation was asked about."""
        return list(Counter(json.dumps(body["messages"]) for body in self.bodies).values())


@contextmanager
def endpoint(script: Callable[[dict[str, Any], int], Says]) -> Iterator[StandIn]:
    state = StandIn(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            says = state.receive(body, self.headers["Authorization"])
            if says.hold is not None:
                says.hold.wait(WAIT_S)
            self._send(says, _completion(body, says))

        def do_GET(self) -> None:
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in MODELS]
            self._send(Says(), json.dumps({"object": "list", "data": data}))

        def _send(self, says: Says, content: str) -> None:
            try:
                self.send_response(says.status)
                for name, value in {"Content-Type": "application/json", **says.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())
            except OSError:  # whoever asked has given up
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def _completion(body: dict[str, Any], says: Says) -> str:
    if says.raw is not None:
        return says.raw
    if says.status != 200:
        return json.dumps({"error": {"message": says.message, "type": "stand_in", "code": says.code}})
    # the tokens that a vocabulary of four bytes a token would make of it
    prompt, written = (
        sum(len(text) for text in texts) // 4
        for texts in ([message["content"] for message in body["messages"]], [says.text])
    )
    usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    message = {"role": "assistant", "content": says.text}
    completion = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": f"{body['model']}-0613",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
    }
    return json.dumps(completion | ({"usage": usage} if says.usage else {}))
