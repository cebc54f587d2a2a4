"""A server that refuses as the Hugging Face hub does."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for repositories that one may not see, by their names."""

    def do_GET(self) -> None:
        gated, revision = "gated" in self.path, "old" in self.path
        self.send_response(403 if gated else 404)
        code = "GatedRepo" if gated else "RevisionNotFound" if revision else "RepoNotFound"
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def hub_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
