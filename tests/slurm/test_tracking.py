"""W&B's server is silent from the start, or turns everything away once a run has begun: the curve is complete anyway.

No cluster is needed, but time-outs are waited for.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.wandb_file import records

ROOT = Path(__file__).parents[2]
ID = "0" * 12
STEPS = 50
# In a process of its own, as runs are: it has to come to its end too, whatever W&B's client still tries.
RUN = f"""
import sys
from pathlib import Path
from qlora_lab.tracking.session import open_session
from tests.helpers import tiny

folder = Path(sys.argv[1])
config = tiny(folder, "tracking=wandb_online", "tracking.init_timeout_s=3", "tracking.finish_timeout_s=1")
session = open_session(config, "{ID}", "a_study", folder)
for step in range({STEPS}):
    session.log(step, {{"train/loss": float(step)}})
session.finish("finished", {{"eval/loss": 1.0}})
"""


class Server(ThreadingHTTPServer):
    """As much of W&B's server, on this machine, as it takes to start a run.

    Args:
        answers: False: it takes every request, and says nothing. True: it answers until a run has begun, and then every
            further request with 429.
    """

    daemon_threads = True

    def __init__(self, *, answers: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.begun = False
        self.turned_away = 0
        self.over = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.server.answers:
            self.server.turned_away += 1
            self.server.over.wait()
        elif self.server.begun:
            self.server.turned_away += 1
            self._answer(429, {"error": "rate limit exceeded"})
        else:
            self._answer(200, self._answer_to(json.loads(asked)) if self.path.endswith("/graphql") else {})

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer_to(self, question: dict[str, str]) -> dict[str, object]:
        """Answer the one question that W&B's client must have an answer to: where the run is on the server."""
        operation = re.search(r"(?:query|mutation)\s+(\w+)", question["query"])
        if operation is None or operation[1] != "UpsertBucket":
            return {"data": {}}
        self.server.begun = True
        project = {"id": "UA==", "name": "project", "entity": {"id": "RQ==", "name": "entity"}}
        bucket = {"id": "Qg==", "name": ID, "displayName": "run", "config": "{}", "project": project}
        return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    started = Server(answers=request.param)
    threading.Thread(target=started.serve_forever, daemon=True).start()
    yield started
    started.over.set()
    started.shutdown()
    started.server_close()


def curve(file: Path) -> list[float]:
    rows = [record.history for record in records(file) if record.WhichOneof("record_type") == "history"]
    values = [{item.key or ".".join(item.nested_key): item.value_json for item in row.item} for row in rows]
    return [json.loads(row["train/loss"]) for row in values]


@pytest.mark.parametrize("server", [False, True], indirect=True, ids=["silent", "busy"])
def test_an_outage_costs_no_point_of_the_curve(server: Server, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | {
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path / "home"),
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_API_KEY": "0" * 40,
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert server.turned_away > 0
    assert "tracking stopped" not in done.stdout
    assert ("tracking goes on offline" in done.stdout) == (not server.answers)
    kind = "run" if server.answers else "offline-run"  # `wandb sync` takes either
    (file,) = tmp_path.glob(f"wandb/{kind}-*/run-{ID}.wandb")
    assert curve(file) == [float(step) for step in range(STEPS)]
