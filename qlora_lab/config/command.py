"""Run a Hydra command line on conf/ and sweeps/, with every refusal worded as one sentence."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from qlora_lab.config.load import explain_omegaconf, known_keys, unknown_key
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, QloraLabError, nearest

PACKAGE = Path(__file__).resolve().parents[1]
PLUGINS = PACKAGE / "plugins"
REFUSED, FAILED, STOPPED = 2, 1, 130  # exit statuses: bad input, failed runs, Ctrl-C


def shipped(name: str) -> Path:
    """Return the folder conf/ or sweeps/: at the top of a checkout, inside an installed package."""
    installed = PACKAGE / f"_{name}"
    return installed if installed.is_dir() else PACKAGE.parent / name


def command(config_name: str, task: Callable[[DictConfig], None]) -> None:
    """Compose `config_name` of conf/ from the command line, call `task`, and exit with a true status.

    Exit status: 0 done, 1 failed runs (raised by `task` as SystemExit), 2 bad input, 130 Ctrl-C.
    """
    # Hydra looks for its plugins (our sweeper, the search path of studies) below sys.path.
    sys.path.append(str(PLUGINS))
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    refused: list[QloraLabError] = []

    def guarded(node: DictConfig) -> None:
        # An error that leaves the task would make Hydra print a line of its own first.
        try:
            task(node)
        except QloraLabError as error:
            refused.append(error)

    show_trace = os.environ.get("HYDRA_FULL_ERROR", "0") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach us; Hydra's own report is several lines
    try:
        hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name=config_name)(guarded)()
        if refused:
            raise refused[0]
    except (HydraException, OmegaConfBaseException, QloraLabError) as error:
        if show_trace:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        print("stopped; what is finished stays finished, and the same command goes on", file=sys.stderr)
        sys.exit(STOPPED)


def explain(error: BaseException) -> str:
    """Say in one sentence what was refused and what is allowed."""
    if isinstance(error, QloraLabError):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}'; write key=value, and quote values with special characters"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return str(cause)
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
            return unknown_key(str(cause.full_key))
        if isinstance(cause, OmegaConfBaseException):
            return explain_omegaconf(cause)
        cause = cause.__cause__
    return _hydra_sentence(str(error))


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or [])
    if not group or not options:
        return _hydra_sentence(str(error))
    return f"{group} must be one of {', '.join(options)}; got '{option}'{nearest(option, options)}"


def _hydra_sentence(message: str) -> str:
    """Shorten Hydra's message; a mistyped key or group gets its nearest name."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    first = lines[0] if lines else "the configuration could not be composed"
    for start in ("Could not override '", "Could not append to config. An item is already at '"):
        if first.startswith(start):
            key = first[len(start) :].split("'")[0].lstrip("+~")
            if key not in known_keys():
                return unknown_key(key)
    if first.startswith("Ambiguous value for argument"):
        given = first.split("'")[1]
        return (
            f"{given} holds several values, and this command executes one run; "
            "to sweep over them use python -m qlora_lab.sweep, or write key=[a,b] for a list"
        )
    return " ".join(lines)
