"""The server in a thread of the test's process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn

from qlora_lab.listening import listen
from qlora_lab.serving.app import Limits, create_app
from qlora_lab.serving.engine import Engine
from qlora_lab.serving.scheduler import Job, Scheduler
from qlora_lab.serving.shared_base import SharedBase

WAIT_S = 60


@dataclass
class Served:
    address: str
    shared: SharedBase
    engine: Engine
    jobs: list[Job] = field(default_factory=list)  # all that came


@contextmanager
def served(
    shared: SharedBase, limits: Limits | None = None, *, token: str | None = None, max_rows: int = 64
) -> Iterator[Served]:
    engine = Engine(shared, Scheduler(shared, max_rows=max_rows))
    app = create_app(shared, engine, limits or Limits(), token=token)
    with listen("127.0.0.1", 0) as listening:
        found = Served(f"http://127.0.0.1:{listening.getsockname()[1]}", shared, engine)
        submit = engine.submit
        engine.submit = lambda job: (found.jobs.append(job), submit(job))  # type: ignore[method-assign]
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        engine.start()
        thread.start()
        try:
            yield found
        finally:
            engine.stop()
            engine.join()
            server.should_exit = True
            thread.join()
    assert engine.error is None
