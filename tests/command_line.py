"""A command of this project called in the test's own process, which spares the start of another one."""

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import submitit  # noqa: F401  (now, since its import closes all handlers of logs that there are)
from hydra.core.global_hydra import GlobalHydra

KEPT = (signal.SIGTERM, signal.SIGINT)


def call(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Do what `python -m MODULE ARGUMENTS` would do in the folder `cwd`, and leave the process as it was."""
    main = importlib.import_module(module).main
    handlers = [signal.getsignal(signum) for signum in KEPT]
    out, err, status = io.StringIO(), io.StringIO(), 0
    GlobalHydra.instance().clear()
    with (
        mock.patch.object(sys, "argv", [f"{module}.py", *arguments]),
        mock.patch.object(sys, "path", [*sys.path]),
        mock.patch.dict(os.environ),
        # Hydra would close all handlers and disable all loggers there are; our configurations ask it to be silent.
        mock.patch("hydra._internal.logging_config.configure_logging"),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    for signum, handler in zip(KEPT, handlers, strict=True):
        signal.signal(signum, handler)
    return subprocess.CompletedProcess(list(arguments), status, out.getvalue(), err.getvalue())
