"""SLURM's commands: run, timed, and their refusals told apart."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from qlora_lab.errors import LaunchError

TIMEOUT_S = 90.0  # against a controller that is down they take 19 s to say so
# Words of a controller that cannot be reached, or is too busy: the same command may work a little later.
UNREACHABLE = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "connection reset",
    "communication",
    "transport endpoint",
    "zero bytes",
    "resource temporarily unavailable",
    "slurm backup controller in standby",
)
LIMITED = ("qos policy", "accounting/qos", "maxsubmitjob", "submit job limit", "job submit limit", "limit on jobs")
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
OURS = {"SLURM_BITSTR_LEN": "0"}  # the tasks of an array whole, rather than cut to "1,3,5,..." after 64 characters
FORGOTTEN = "job dependency problem"
UNKNOWN_JOB = "invalid job id"


class UnreachableError(LaunchError):
    """SLURM's controller, or its accounting, does not answer."""


class ForgottenError(LaunchError):
    """SLURM does not know the job that another is to wait for: its controller died soon after it had taken it."""


class LimitError(LaunchError):
    """More jobs than the site lets one user have."""


def run(
    *command: str,
    stdin: str | None = None,
    keep_open: Sequence[int] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Run one of SLURM's commands, as if from outside of any job, and return what it prints.

    The SLURM_* variables of a job around us would become options of what we submit, all but the one that says where the
    cluster's configuration is (which `submitit.helpers.clean_env` takes away too).

    Args:
        variables: of the environment, besides our own.

    Raises:
        UnreachableError, ForgottenError, LimitError: as they say.
        LaunchError: the command is not on this machine, or refuses.
    """
    environment = {key: value for key, value in os.environ.items() if key in KEPT or not key.startswith("SLURM_")}
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            env={**environment, **OURS, **variables},
            pass_fds=keep_open,
        )
    except FileNotFoundError as error:
        raise LaunchError(
            f"launcher=slurm needs sbatch, squeue and scontrol on this machine; got no {command[0]}; "
            "run from a login node, or use launcher=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        heard = _last_line((error.stderr or b"").decode(errors="replace"))  # such as that SLURM's queue is full
        why = f" ({heard})" if heard else ""
        raise UnreachableError(f"{command[0]} did not answer within {TIMEOUT_S:.0f} s{why}; try again later") from error
    if done.returncode == 0:
        return done.stdout
    said = _last_line(done.stderr) or "no reason given"
    lower = done.stderr.lower()
    if any(words in lower for words in UNREACHABLE):
        raise UnreachableError(f"{command[0]} cannot reach SLURM ({said}); try again later")
    if FORGOTTEN in lower:
        raise ForgottenError(f"{command[0]} refused ({said}): SLURM has forgotten the job before it; try again")
    if any(words in lower for words in LIMITED):
        raise LimitError(f"{command[0]} refused: {said}")
    raise LaunchError(f"{command[0]} refused ({said})")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
