"""A stand-in for the Hugging Face hub on this machine: what its own client asks to make repositories and commits.

An address that is not known here is a 404 that names it, so that a new version of the client is noticed. Large files
go by the LFS protocol; the hub's newer one, Xet, is compiled code that talks to servers of its own.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_of_a_test"
REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"


class Refused(Exception):
    """An answer that is no success: its status, what the hub says, and perhaps what else it tells."""


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class HubStandIn:
    """What it holds, and what goes wrong.

    Attributes:
        asked: method and path of each request, in their order.
        hangs_up: where this is part of a commit's path, the connection is closed without an answer.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    owners: tuple[str, ...] = ("me",)
    hangs_up: str = ""
    asked: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256

    def answer(self, method: str, path: str, token: str, body: bytes) -> Any:
        self.asked.append(f"{method} {path}")
        for (of_method, pattern), handler in HANDLERS.items():
            found = re.fullmatch(pattern, path)
            if found is not None and method == of_method:
                if token != f"Bearer {TOKEN}" and not path.startswith("/storage/"):
                    raise Refused(401, "Invalid username or password.")
                return handler(self, body, **found.groupdict())
        raise Refused(404, f"the stand-in knows no {method} {path}")

    def info(self, _: bytes, repository: str) -> Any:
        if repository not in self.repositories:
            raise Refused(404, "Repository not found")
        return {"id": repository, "private": self.repositories[repository].private, "sha": "0" * 40}

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        repository = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.owners:
            said = f'You don\'t have the rights to create a model under the namespace "{asked["organization"]}"'
            raise Refused(403, said)
        if repository in self.repositories:
            raise Refused(409, "You already created this model repo", {"url": f"{self.address}/{repository}"})
        self.repositories[repository] = Repository(asked.get("visibility") == "private")
        return {"url": f"{self.address}/{repository}"}

    def validate_card(self, body: bytes) -> Any:
        assert json.loads(body)["repoType"] == "model"
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repository: str) -> Any:
        there = self.repositories[repository].files
        return {
            "files": [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": _git_id(there[one["path"]]) if one["path"] in there else None,
                }
                for one in json.loads(body)["files"]
            ]
        }

    def batch(self, body: bytes, repository: str) -> Any:
        wanted = json.loads(body)["objects"]
        upload = {one["oid"]: {"upload": {"href": f"{self.address}/storage/{one['oid']}"}} for one in wanted}
        return {
            "transfer": "basic",
            "objects": [one if one["oid"] in self.large else one | {"actions": upload[one["oid"]]} for one in wanted],
        }

    def store(self, body: bytes, oid: str) -> Any:
        assert hashlib.sha256(body).hexdigest() == oid
        self.large[oid] = body
        return {}

    def commit(self, body: bytes, repository: str) -> Any:
        if self.hangs_up and self.hangs_up in repository:
            raise ConnectionAbortedError
        header, *files = (json.loads(line) for line in body.splitlines())
        assert header["key"] == "header" and header["value"]["summary"]
        for one in (line["value"] for line in files):
            content = base64.b64decode(one["content"]) if "content" in one else self.large[one["oid"]]
            self.repositories[repository].files[one["path"]] = content
        return {"commitUrl": f"{self.address}/{repository}/commit/{'1' * 40}", "commitOid": "1" * 40}


HANDLERS = {
    ("GET", rf"/api/models/{REPOSITORY}(/revision/main)?"): HubStandIn.info,
    ("POST", "/api/repos/create"): HubStandIn.create,
    ("POST", "/api/validate-yaml"): HubStandIn.validate_card,
    ("POST", rf"/api/models/{REPOSITORY}/preupload/main"): HubStandIn.preupload,
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch"): HubStandIn.batch,
    ("PUT", r"/storage/(?P<oid>\w{64})"): HubStandIn.store,
    ("POST", rf"/api/models/{REPOSITORY}/commit/main"): HubStandIn.commit,
}


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    hub = HubStandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path, headers = urlsplit(self.path).path, {}
            try:
                status, answer = 200, hub.answer(self.command, path, self.headers.get("Authorization", ""), body)
            except Refused as refused:
                status, said, *further = refused.args
                answer, headers = {"error": said, **dict(*further)}, {"X-Error-Message": said}
                if said == "Repository not found":
                    headers["X-Error-Code"] = "RepoNotFound"
            except ConnectionAbortedError:
                self.close_connection = True
                return
            content = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = reply

        def log_message(self, *_: Any) -> None:
            """Tests look at what was asked instead."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
