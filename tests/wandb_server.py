"""As much of W&B's server, on this machine, as it takes to start, stream, end and sync runs; it can be made to fail."""

import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWERS, SILENT, BUSY, HANGS_UP = "answers", "silent", "busy", "hangs up"
HISTORY = "wandb-history.jsonl"


class Server(ThreadingHTTPServer):
    """Attributes:
    mode: ANSWERS, or takes every request and says nothing (SILENT), turns it away with 429 (BUSY), or ends the
        connection (HANGS_UP).
    failed: requests that got no answer, or 429.
    begun: ids of the runs that were started, resumed or synced.
    """

    daemon_threads = True

    def __init__(self, mode: str = ANSWERS) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = mode
        self.failed = 0
        self.begun: list[str] = []
        self._released = threading.Event()
        self._lines: dict[str, dict[int, str]] = defaultdict(dict)

    def turn(self, mode: str) -> None:
        """Behave otherwise from now on; requests that waited in silence are hung up on."""
        released, self._released = self._released, threading.Event()
        self.mode = mode
        released.set()

    def history(self, run_id: str) -> list[dict[str, object]]:
        """Return the lines of a run's curves that have arrived, in order."""
        lines = self._lines[run_id]
        return [json.loads(lines[number]) for number in sorted(lines)]

    def take_lines(self, run_id: str, offset: int, lines: list[str]) -> None:
        self._lines[run_id].update(enumerate(lines, start=offset))

    def wait_in_silence(self) -> None:
        self._released.wait()

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients that are killed hang up."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        mode = self.server.mode
        if mode == ANSWERS:
            self._answer(200, self._answer_to(asked))
            return
        self.server.failed += 1
        if mode == BUSY:
            self._answer(429, {"error": "rate limit exceeded"})
            return
        if mode == SILENT:
            self.server.wait_in_silence()
        self.close_connection = True

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer_to(self, asked: bytes) -> dict[str, object]:
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if stream is not None:
            history = json.loads(asked).get("files", {}).get(HISTORY)
            if history is not None:
                self.server.take_lines(stream[1], history["offset"], history["content"])
            return {}
        if self.path.endswith("/graphql"):
            return self._answer_to_query(json.loads(asked))
        return {}

    def _answer_to_query(self, asked: dict[str, Any]) -> dict[str, object]:
        """Answer what W&B's client must have an answer to: where the run is, where its files go, and its artifact."""
        operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        name, given = operation[1] if operation is not None else "", asked.get("variables") or {}
        if name == "UpsertBucket":
            self.server.begun.append(given["name"])
            project = {"id": "UA==", "name": "project", "entity": {"id": "RQ==", "name": "entity"}}
            bucket = {"id": "Qg==", "name": given["name"], "displayName": "run", "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"http://{self.headers['Host']}/upload"} for file in given["files"]]
            return {"data": {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}}
        if name == "CreateArtifact":  # it is there already, so that nothing is uploaded
            artifact = {"id": "QQ==", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "QQ=="}}}
            return {"data": {"createArtifact": {"artifact": artifact}}}
        return {"data": {}}


@contextmanager
def serving(mode: str = ANSWERS) -> Iterator[Server]:
    """Start a server on a free port, and end it with the block."""
    server = Server(mode)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.turn(HANGS_UP)
        server.shutdown()
        server.server_close()
