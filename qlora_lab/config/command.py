"""Run a Hydra command line on conf/ and sweeps/, with every refusal worded as one sentence."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qlora_lab.config.exit_status import FAILED, REFUSED, STOPPED, TERMINATED
from qlora_lab.config.refusals import explain
from qlora_lab.config.scale import with_scale
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import QloraLabError, RunFailedError

PACKAGE = Path(__file__).resolve().parents[1]
PLUGINS = PACKAGE / "plugins"
GOES_ON = "this command was stopped; what is finished stays finished, and the same command goes on"


def shipped(name: str) -> Path:
    """Return the folder conf/ or sweeps/: at the top of a checkout, inside an installed package."""
    installed = PACKAGE / f"_{name}"
    return installed if installed.is_dir() else PACKAGE.parent / name


def command(
    config_name: str,
    task: Callable[[DictConfig], object],
    *,
    schema: type = RunConfig,
    schema_name: str = "run_schema",
) -> None:
    """Compose `config_name` of conf/ from the command line, call `task`, and exit with a true status.

    Args:
        schema: of the whole configuration, which that file names first, as `schema_name`.

    Exit status: 0 done, 1 failed runs (raised by `task` as SystemExit), 2 bad input, 130 Ctrl-C, 143 SIGTERM.
    """
    signal.signal(signal.SIGTERM, _terminate)
    # Hydra looks for its plugins (our sweeper, the search path of studies) below sys.path.
    sys.path.append(str(PLUGINS))
    # Jobs of stock launchers unpickle what Hydra knows of them.
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*paths, str(PLUGINS)]))
    ConfigStore.instance().store(name=schema_name, node=schema)
    refused: list[QloraLabError] = []

    def guarded(node: DictConfig) -> object:
        # An error that leaves the task would make Hydra print a line of its own first. Of several runs it must, so that
        # the sweeper hears of it, which goes on or ends as it does for anybody's.
        try:
            return task(node)
        except QloraLabError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            refused.append(error)
            return None

    show_trace = os.environ.get("HYDRA_FULL_ERROR", "0") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach us; Hydra's own report is several lines
    try:
        sys.argv[1:] = with_scale(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name=config_name)(guarded)()
        if refused:
            raise refused[0]
    except (HydraException, OmegaConfBaseException, QloraLabError, yaml.YAMLError, OSError, ValueError) as error:
        if show_trace or (isinstance(error, ValueError) and not _raised_by_hydra(error)):
            raise
        print(f"error: {explain(error, schema)}", file=sys.stderr)
        sys.exit(FAILED if isinstance(error, RunFailedError) else REFUSED)
    except KeyboardInterrupt:
        print(GOES_ON, file=sys.stderr)
        sys.exit(STOPPED)
    except SystemExit as end:
        if end.code == TERMINATED:
            print(GOES_ON, file=sys.stderr)
        raise


def _terminate(signum: int, frame: FrameType | None) -> None:
    """End on SIGTERM as on Ctrl-C: whoever is at work records it and passes it on."""
    sys.exit(TERMINATED)


def _raised_by_hydra(error: BaseException) -> bool:
    """Say whether an error of a general kind is about the command line, rather than a fault of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(hydra.__file__).parent in Path(frames[-1].filename).parents
