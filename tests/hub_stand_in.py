"""A server that refuses as the Hugging Face hub does, and serves data sets as it does; and a set without any server."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest

Commits = Mapping[str, Mapping[str, str]]  # files by name and text of each commit; main is the last one
FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
INFO = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(/.*)?)?")


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for repositories that one may not see, by their names."""

    sets: Mapping[str, Commits] = {}  # by hub id; those of the server at hand

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = unquote(urlsplit(self.path).path)
        file, info = FILE.fullmatch(path), INFO.fullmatch(path)
        found = file or info
        if found is None or found[1] not in self.sets:
            gated, revision = "gated" in self.path, "old" in self.path
            self._refuse("GatedRepo" if gated else "RevisionNotFound" if revision else "RepoNotFound")
            return
        commits = self.sets[found[1]]
        asked = (file[2] if file else info and info[3]) or "main"
        commit = list(commits)[-1] if asked == "main" else asked
        if commit not in commits:
            self._refuse("RevisionNotFound")
        elif info and info[4]:  # no set here has folders
            self._refuse("EntryNotFound", commit)
        elif file:
            self._file(commits[commit].get(file[3]), commit)
        else:
            assert info is not None
            self._answer(json.dumps(self._listed(info, commit, commits[commit], body)).encode())

    do_HEAD = do_POST = do_GET

    def _file(self, text: str | None, commit: str) -> None:
        if text is None:
            self._refuse("EntryNotFound", commit)
        else:
            self._answer(text.encode(), ETag=f'"{_digest(text)}"', **{"X-Repo-Commit": commit})

    @staticmethod
    def _listed(info: re.Match[str], commit: str, files: Mapping[str, str], body: str) -> Any:
        if info[2] in ("tree", "paths-info"):
            asked = parse_qs(body).get("paths", []) if info[2] == "paths-info" else list(files)
            return [
                {"type": "file", "path": name, "size": len(text), "oid": _digest(text)}
                for name, text in files.items()
                if name in asked
            ]
        return {"id": info[1], "sha": commit, "siblings": [{"rfilename": name} for name in files]}

    def _refuse(self, code: str, commit: str = "") -> None:
        self._answer(b"", 403 if code == "GatedRepo" else 404, **{"X-Error-Code": code, "X-Repo-Commit": commit})

    def _answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def hub_server(sets: Mapping[str, Commits] | None = None) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubOfSets", (Hub,), {"sets": sets or {}}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def give_rows(monkeypatch: pytest.MonkeyPatch, rows: Any, commit: str | None = None) -> None:
    """Let `datasets` prepare these rows, whatever set it is asked for; `rows` and `commit` may be functions.

    Args:
        rows: a list of columns.
        commit: that the set is at; None where it is not known.
    """

    def load_dataset_builder(*_: Any, **__: Any) -> Any:
        given, at = (value() if callable(value) else value for value in (rows, commit))
        return SimpleNamespace(
            hash=at,
            dataset_name="set",
            cache_dir=str(Path("/nonexistent/default/0.0.0") / (at or "unknown")),
            download_and_prepare=lambda: None,
            as_dataset=lambda split: datasets.Dataset.from_list(given),
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()
