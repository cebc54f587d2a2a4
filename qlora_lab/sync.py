"""Upload offline W&B runs: python -m qlora_lab.sync [FOLDER]

`wandb sync` does the work, several runs at a time. Here the runs of a study are found and sent in batches, so that
stopping loses no more than one of them: what W&B has is marked beside its file, and the same command goes on. No more
files a minute are sent than W&B is to be asked for; where it says all the same that they are too many (429), its client
waits and tries again.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from qlora_lab.config.exit_status import FAILED, REFUSED
from qlora_lab.errors import LaunchError, QloraLabError, RunFolderError
from qlora_lab.runs.files import write_atomic
from qlora_lab.runs.folder import RunFolder, held
from qlora_lab.tracking.wandb_file import Damage, framed, records

EMPTY_BYTES = 7  # a file with its header only: the run was killed before W&B wrote anything
MENDED = "mended"  # beside a torn file, the folder of what is sent for it, until W&B has it
MINUTES = 60
QUIET_S = 60.0  # W&B's service may write the end of a file after its run has ended
ANSWER_S = 30


@dataclass
class Found:
    """Files of offline runs, and those that are left alone, by the reason."""

    files: list[Path] = field(default_factory=list)
    synced: int = 0
    empty: int = 0
    running: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Say what was found, in one line."""
        parts = [f"{len(self.files)} to upload", f"{self.synced} uploaded already"]
        if self.empty:
            parts.append(f"{self.empty} empty, of runs killed in their first seconds")
        if self.running:
            parts.append(f"{len(self.running)} still running ({', '.join(self.running[:3])})")
        return f"{len(self.files) + self.synced + self.empty + len(self.running)} W&B files: {', '.join(parts)}"


def find(folder: Path, *, include_online: bool = False) -> Found:
    """Return the offline W&B files below a folder of runs, a run's folder, or a `wandb` folder; one run's are in a row.

    Args:
        include_online: also those of runs that were online; what the server has already it does not take twice.

    Raises:
        RunFolderError: there is no such folder, or no W&B file in it.
    """
    files: list[Path] = []
    folder = folder.resolve()  # of `.` too, files have a run folder above them
    for place in ("*/wandb/", "wandb/", ""):
        for name in ("offline-run-*", *(["run-*-*"] if include_online else [])):
            files += folder.glob(f"{place}{name}/run-*.wandb")
    if not files:
        raise RunFolderError(
            f"no offline W&B run in {folder}; give the folder that holds the run folders (paths.runs_dir), or a "
            "wandb folder; tracking=wandb_offline writes them"
        )
    found = Found()
    owners = {file.parents[2] for file in files if not is_uploaded(file)}  # run folders, where files are their mirrors
    # held, not running: a run says that it is finished before its mirror does
    writing = {run.path for run in held(RunFolder(one) for one in owners if (one / "status.json").exists())}
    # by the time in the folder's name, whether the attempt was online or not
    for file in sorted(files, key=lambda file: (file.name, file.parent.name.removeprefix("offline-"))):
        owner = file.parents[2]
        if is_uploaded(file):
            found.synced += 1
        elif file.stat().st_size <= EMPTY_BYTES:
            found.empty += 1
        elif owner in writing or ((owner / "status.json").exists() and _is_being_written(file)):
            found.running.append(owner.name)
        else:
            found.files.append(file)
    return found


def batches(files: Sequence[Path], size: int) -> list[list[Path]]:
    """Cut files into batches of about `size`; files of one run, which W&B must get in their order, stay together."""
    cut: list[list[Path]] = []
    for file in files:
        if not cut or (len(cut[-1]) >= size and cut[-1][-1].name != file.name):
            cut.append([])
        cut[-1].append(file)
    return cut


def upload(files: Sequence[Path], parallel: int, limit_s: float) -> str:
    """Give files to `wandb sync`, and return the last error that it told of, or else the last thing it said."""
    # `find` has chosen which runs; of those that were online `wandb sync` would take none without the option.
    options = ["--yes", "--include-online", "-n", str(parallel)]
    command = [sys.executable, "-m", "wandb", "sync", *options, *map(str, files)]
    with tempfile.TemporaryDirectory() as logs:  # it leaves a folder of logs wherever it runs
        own = {**os.environ, "WANDB_DIR": logs, "WANDB_SILENT": "false"}  # it is asked why it did not take a file
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s, env=own)
        except subprocess.TimeoutExpired:
            return f"it did not end in {limit_s / MINUTES:g} minutes"
    said = [line.strip().removeprefix("wandb: ") for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR ") for line in said if line.startswith("ERROR ")]
    return (errors or said or [f"exit status {done.returncode}"])[-1]


def is_uploaded(file: Path) -> bool:
    return _mark(file).exists()


def mended(file: Path) -> Path:
    """Return the file, or, of a run that was killed in the middle of a record, one beside it of its whole records.

    W&B takes what a torn file holds, but never says that it has it, and so would be sent it again by every call.
    """
    if not (file.parents[2] / "status.json").exists():
        return file  # no run folder says whether the run has ended: it may be writing its next record now
    data, damage = file.read_bytes(), Damage()
    whole = list(records(data, damage))
    if not damage.count or not whole:
        return file
    copy = file.parent / MENDED / file.name
    copy.parent.mkdir(exist_ok=True)
    write_atomic(copy, framed(whole, data))
    return copy


def _is_being_written(file: Path) -> bool:
    """Say whether a file ends inside a record, and has only just been written to."""
    if time.time() - file.stat().st_mtime > QUIET_S:
        return False
    damage = Damage()
    deque(records(file.read_bytes(), damage), maxlen=0)
    return damage.torn


def _mark(file: Path) -> Path:
    return file.with_name(f"{file.name}.synced")  # as W&B does


def send(files: Sequence[Path], parallel: int, limit_s: float) -> tuple[list[Path], str]:
    """Upload files; return those that W&B did not take, and what it said."""
    sent = {file: mended(file) for file in files}
    said = upload(list(sent.values()), parallel, limit_s)
    for file, copy in sent.items():
        if copy != file and is_uploaded(copy):
            _mark(file).touch()
            shutil.rmtree(copy.parent)
    return [file for file in files if not is_uploaded(file)], said


def check_server() -> None:
    """Ask W&B who we are.

    Raises:
        LaunchError: it does not say, so that there is no use in sending it anything.
    """
    import wandb

    try:
        if wandb.Api(timeout=ANSWER_S).default_entity is None:
            raise ValueError("it knows no user of this key")
    except (wandb.errors.Error, wandb.sdk.lib.service.service_connection.WandbApiFailedError, ValueError) as error:
        raise LaunchError(
            f"W&B cannot be reached ({' '.join(str(error).split())}); check WANDB_API_KEY, WANDB_BASE_URL and the "
            "network; what is uploaded stays so, and the same command goes on"
        ) from error


def sync(
    folder: Path, *, parallel: int, batch: int, per_minute: float, limit_s: float, include_online: bool = False
) -> None:
    """Upload what is not uploaded yet, with a progress bar.

    A file that W&B does not take keeps none of the others back.

    Args:
        per_minute: files that are sent in a minute at most, over the batches.

    Raises:
        RunFolderError: there is nothing to upload from.
        LaunchError: W&B did not take everything, or cannot be reached; what it took before is marked.
    """
    found = find(folder, include_online=include_online)
    print(found.summary(), flush=True)
    left: list[Path] = []
    reason = ""
    not_before = time.monotonic()
    with tqdm(total=len(found.files), unit="file", disable=None) as bar:
        for files in batches(found.files, batch):
            time.sleep(max(0.0, not_before - time.monotonic()))
            not_before = time.monotonic() + len(files) * MINUTES / per_minute
            missing, said = send(files, parallel, limit_s)
            bar.update(len(files) - len(missing))
            if missing:
                left += missing
                reason = said
            if len(missing) == len(files):
                check_server()
    if left:
        raise LaunchError(
            f"{len(left)} of {len(found.files)} W&B files were not taken, such as {left[-1]} ({reason}); the same "
            "command tries them again"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.sync", description="Upload offline W&B runs.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--parallel", type=int, default=8, help="runs at a time; default: %(default)s")
    parser.add_argument("--batch", type=int, default=100, help="runs a call of `wandb sync`; default: %(default)s")
    parser.add_argument(
        "--per-minute", type=_positive, default=300.0, help="files sent in a minute at most; default: %(default)g"
    )
    parser.add_argument("--limit-min", type=float, default=30.0, help="minutes for a batch; default: %(default)g")
    parser.add_argument(
        "--include-online", action="store_true", help="also runs that were online, some of whose data W&B may not have"
    )
    parser.add_argument("--plan", action="store_true", help="say what would be uploaded, and upload nothing")
    options = parser.parse_args(arguments)
    try:
        if options.plan:
            print(find(options.folder, include_online=options.include_online).summary())
            return
        sync(
            options.folder,
            parallel=options.parallel,
            batch=options.batch,
            per_minute=options.per_minute,
            limit_s=options.limit_min * MINUTES,
            include_online=options.include_online,
        )
    except QloraLabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED if isinstance(error, LaunchError) else REFUSED)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
    return value


if __name__ == "__main__":
    main()
