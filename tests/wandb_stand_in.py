"""A stand-in for the W&B server on this machine: enough of it for runs, `wandb sync` and the public API, with faults.

What W&B's clients ask is GraphQL over HTTP, a stream of history lines for each run, and uploads. Only the operations
that they were seen to use are answered; an unknown one is an error that names it, so that a new version of W&B is
noticed. Everything is kept in memory.
"""

import base64
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ENTITY = "team"
KEY = "0" * 40
OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")


@dataclass
class StoredRun:
    """What the server knows of a run."""

    entity: str
    project: str
    name: str  # the id, in W&B's words
    display_name: str = ""
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    config: str = "{}"  # JSON: {key: {"value": ...}}
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    state: str = "running"
    created_at: str = "2026-01-01T00:00:00Z"
    heartbeat: int = 0  # changes with every request about the run

    def storage_id(self) -> str:
        return base64.b64encode(f"Run:v1:{self.name}:{self.project}:{self.entity}".encode()).decode()


@dataclass
class Faults:
    """What goes wrong from now on; what fails requests holds for the next `count` of them, or for all (None)."""

    status: int | None = None  # answer with it, such as 500 or 429
    drop: bool = False  # close the connection without an answer
    silent: bool = False  # take the request and say nothing; these faults gone, close the connection
    delay_s: float = 0.0
    count: int | None = None

    def strike(self) -> bool:
        """Say whether this request fails."""
        if self.status is None and not self.drop and not self.silent:
            return False
        if self.count is None:
            return True
        self.count -= 1
        return self.count >= 0


class _Server(ThreadingHTTPServer):
    def handle_error(self, *arguments: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that are killed hang up
            super().handle_error(*arguments)


class WandbStandIn:
    """A server on a free port of the loopback address."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str, str], StoredRun] = {}  # by entity, project and id
        self.files: dict[str, bytes] = {}
        self.artifacts: list[str] = []  # their names
        self.views: list[dict[str, Any]] = []
        self.operations: list[str] = []  # every request, by the name of its operation
        self.faults = Faults()
        self.struck = 0  # requests that a fault met
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.faults = Faults(drop=True)
        self._server.shutdown()
        self._server.server_close()

    def run(self, entity: str, project: str, name: str) -> StoredRun:
        """Return a run, which is created where it is not there."""
        return self.runs.setdefault((entity, project, name), StoredRun(entity, project, name, display_name=name))

    def of_project(self, entity: str, project: str) -> list[StoredRun]:
        return [run for (owner, where, _), run in self.runs.items() if (owner, where) == (entity, project)]

    def history(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a run's curves that have arrived, in whatever project it is."""
        return [line for run in self.runs.values() if run.name == name for line in run.history]

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a process for which this server is W&B, and `home` its home."""
        own = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        return own | {"HOME": str(home), "WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def count_struck(self) -> None:
        with self.lock:
            self.struck += 1

    def fail(self) -> int | None:
        """Let the faults meet a request: return the status to answer with, if any; None hangs up."""
        faults = self.faults
        self.count_struck()
        while faults.silent and self.faults is faults:
            time.sleep(0.02)
        return None if faults.drop or faults.silent else faults.status

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL request."""
        found = OPERATION.search(query)
        name = found[1] if found else "unnamed"
        if name == "Runs" and "summaryMetrics" not in query:
            name = "RunsListed"  # the same, without what is heavy
        self.operations.append(name)
        resolve = getattr(self, f"_{name}", None)
        if resolve is None:
            return {"errors": [{"message": f"the stand-in does not know the operation {name}"}]}
        with self.lock:
            return {"data": resolve(variables)}

    def stream(self, run: StoredRun, body: dict[str, Any]) -> None:
        """Take lines of a run's history and summary, and its end."""
        with self.lock:
            run.heartbeat += 1
            for file, chunk in body.get("files", {}).items():
                lines = [json.loads(line) for line in chunk["content"] if line.strip()]
                if file == "wandb-history.jsonl":
                    offset = chunk.get("offset", len(run.history))
                    run.history[offset : offset + len(lines)] = lines
                elif file == "wandb-summary.json":
                    run.summary = lines[-1]
            if body.get("preempting"):
                run.state = "preempting"
            if body.get("complete"):
                run.state = "finished" if body.get("exitcode") == 0 else "failed"

    def _Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY, "id": "1"}}]}
        return {
            "viewer": {
                "id": "1",
                "entity": ENTITY,
                "username": "somebody",
                "email": "somebody@example.org",
                "flags": "{}",
                "admin": False,
                "teams": teams,
                "apiKeys": {"edges": []},
            },
            "serverInfo": {"cliVersionInfo": {"max_cli_version": "99.0.0"}, "latestLocalVersionInfo": None},
        }

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.run(variables["entity"] or ENTITY, variables["project"], variables["name"])
        inserted = run.heartbeat == 0
        run.heartbeat += 1
        for attribute, given in (
            ("display_name", "displayName"),
            ("group", "groupName"),
            ("job_type", "jobType"),
            ("tags", "tags"),
            ("config", "config"),
            ("state", "state"),
        ):
            if variables.get(given) is not None:
                setattr(run, attribute, variables[given])
        if variables.get("summaryMetrics") is not None:
            run.summary = json.loads(variables["summaryMetrics"])
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": inserted}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        place = f"{self.url}/storage/{variables['entity']}/{variables['project']}/{variables['run']}"
        files = [{"name": name, "uploadUrl": f"{place}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        entity, project = variables["entity"] or ENTITY, variables["project"]
        run = self.runs.get((entity, project, variables["name"]))
        bucket = None
        if run is not None:
            bucket = {
                "id": run.storage_id(),
                "name": run.name,
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.display_name,
                "logLineCount": 0,
                "historyLineCount": len(run.history),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(line) for line in run.history[-1:]]),
                "eventsTail": "[]",
                "config": run.config,
                "tags": run.tags,
                "notes": None,
                "wandbConfig": "{}",
            }
        return {"model": {"id": "2", "name": project, "entity": {"id": "1", "name": entity}, "bucket": bucket}}

    def _GetDefaultEntity(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": ENTITY}}

    def _Runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Return a page of a project's runs; the cursor is how many came before."""
        runs = self.of_project(variables["entity"], variables["project"])
        if not runs:
            return {"project": None}
        wanted = json.loads(variables.get("filters") or "{}").get("name", {}).get("$in")
        runs = [run for run in runs if wanted is None or run.name in wanted]
        first = int(variables.get("cursor") or 0)
        page = runs[first : first + (variables.get("perPage") or 50)]
        edges = [{"node": self._node(run), "cursor": str(first + n)} for n, run in enumerate(page, start=1)]
        more = {"endCursor": str(first + len(page)), "hasNextPage": first + len(page) < len(runs)}
        whole = {"internalId": "2", "runCount": len(runs), "readOnly": False}
        return {"project": {**whole, "runs": {"edges": edges, "pageInfo": more}}}

    def _RunsListed(self, variables: dict[str, Any]) -> dict[str, Any]:
        found = self._Runs(variables)
        for edge in found["project"]["runs"]["edges"] if found["project"] else ():
            for heavy in ("config", "summaryMetrics", "systemMetrics", "historyKeys"):
                del edge["node"][heavy]
        return found

    def _node(self, run: StoredRun) -> dict[str, Any]:
        """Return a run as the public API sees it."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.heartbeat))
        return {
            "id": run.storage_id(),
            "projectId": "2",
            "tags": run.tags,
            "name": run.name,
            "displayName": run.display_name,
            "sweepName": None,
            "state": run.state,
            "config": run.config,
            "group": run.group,
            "jobType": run.job_type,
            "commit": None,
            "readOnly": False,
            "createdAt": run.created_at,
            "heartbeatAt": at,
            "description": None,
            "notes": None,
            "systemMetrics": "{}",
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "user": {"name": "Some Body", "username": "somebody"},
            "historyKeys": {"keys": {}, "lastStep": len(run.history) - 1, "sets": []},
        }

    def _RunHistoryKeys(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.run(variables["entity"], variables["project"], variables["name"])
        keys = {key: {"typeCounts": [{"type": "number"}]} for line in run.history for key in line}
        return {"project": {"run": {"historyKeys": {"keys": keys, "lastStep": len(run.history) - 1, "sets": []}}}}

    def _RunParquetHistory(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Say that nothing is in Parquet yet: all lines are live."""
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}

    def _HistoryPage(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or variables.get("run") or variables.get("runName")
        run = self.run(variables["entity"], variables["project"], str(name))
        first, last = variables["minStep"], variables["maxStep"]
        lines = [json.dumps(line) for line in run.history if first <= line["_step"] < last]
        return {"project": {"run": {"history": lines[: variables.get("pageSize") or len(lines)]}}}

    def _ServerFeaturesQuery(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Take an artifact as one that is there already, so that its files need not be sent."""
        sequence = {"latestArtifact": {"id": "7"}}
        self.artifacts.append(variables["input"]["artifactCollectionName"])
        return {"createArtifact": {"artifact": {"id": "7", "state": "COMMITTED", "artifactSequence": sequence}}}

    def _ProjectInternalId(self, variables: dict[str, Any]) -> dict[str, Any]:
        there = self.of_project(variables["entityName"], variables["projectName"])
        return {"project": {"id": "2", "internalId": "2"} if there else None}

    def _GetProjects(self, variables: dict[str, Any]) -> dict[str, Any]:
        names = dict.fromkeys(project for entity, project, _ in self.runs if entity == variables["entity"])
        common = {"__typename": "Project", "entityName": variables["entity"], "createdAt": "2026-01-01T00:00:00Z"}
        edges = [{"node": {**common, "id": name, "name": name, "isBenchmark": False, "user": None}} for name in names]
        ends = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": ends, "edges": edges}}

    def _upsertView(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Keep a report."""
        self.views.append(variables)
        project = {"id": "2", "name": variables["projectName"], "entityName": variables["entityName"]}
        named = {key: variables[key] for key in ("name", "displayName", "description", "spec", "type")}
        view = {"id": f"view{len(self.views)}", **named, "project": project, "updatedAt": "2026-01-01T00:00:00Z"}
        return {"upsertView": {"view": view, "inserted": True}}

    def _bucket(self, run: StoredRun) -> dict[str, Any]:
        """Return a run as the clients that write it see it."""
        return {
            "id": run.storage_id(),
            "name": run.name,
            "displayName": run.display_name,
            "description": None,
            "config": run.config,
            "sweepName": None,
            "project": {"id": "2", "name": run.project, "entity": {"id": "1", "name": run.entity}},
            "historyLineCount": len(run.history),
        }


def _handler(stand_in: WandbStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            self._handle()

        def do_PUT(self) -> None:
            self._handle()

        def do_GET(self) -> None:
            self._handle()

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if stand_in.faults.delay_s:
                stand_in.count_struck()
                time.sleep(stand_in.faults.delay_s)
            if stand_in.faults.strike():
                status = stand_in.fail()
                if status is None:
                    self.close_connection = True
                    self.connection.close()
                else:
                    self._reply(status, b"{}")
                return
            path = urlsplit(self.path).path
            if path == "/graphql":
                request = json.loads(body)
                self._reply(200, json.dumps(stand_in.answer(request["query"], request.get("variables") or {})).encode())
            elif path.endswith("/file_stream"):
                _, _, entity, project, name, _ = map(unquote, path.split("/"))
                stand_in.operations.append("file_stream")
                stand_in.stream(stand_in.run(entity, project, name), json.loads(body))
                self._reply(200, b'{"exitcode": null, "limits": {}}')
            elif self.command == "PUT":
                stand_in.files[unquote(path)] = body
                self._reply(200, b"")
            elif path in stand_in.files:
                self._reply(200, stand_in.files[path])
            elif path.startswith("/sdk/otel"):  # how its client fares
                self._reply(200, b"{}")
            else:
                stand_in.operations.append(f"{self.command} {path}")
                self._reply(404, b"{}")

        def _reply(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


@contextmanager
def wandb_stand_in() -> Iterator[WandbStandIn]:
    stand_in = WandbStandIn()
    try:
        yield stand_in
    finally:
        stand_in.close()
