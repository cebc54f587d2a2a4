"""Checkpoints from which training goes on bit for bit.

A checkpoint is a folder `step_000050` with what a step reads and changes: the trainable parameters, the
optimizer's state, the random generators and the counters. It is written under another name, flushed to the
disk and renamed, so a folder of that name is whole unless the disk itself failed; its manifest holds the
SHA-256 of every file to find that out. Tensors are in safetensors and the rest in JSON: reading a checkpoint
runs no code from it.
"""

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from qlora_lab.errors import RunFolderError, TrainingError
from qlora_lab.hashing import file_sha256
from qlora_lab.ops.adamw.optimizer import AdamW
from qlora_lab.runs.lease import Lease
from qlora_lab.train.optimizer import ScaledStep
from qlora_lab.train.rng import RngState
from qlora_lab.train.tensor_file import write_hashed, write_tensors

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
STEP_FOLDER = re.compile(r"step_(\d{6,})")
TEMPORARY_PREFIX = ".writing-"
PARAMETERS, OPTIMIZER, RNG = "parameters.safetensors", "optimizer.safetensors", "rng.safetensors"
COUNTERS = "counters.json"  # and the random states that are no tensors
MANIFEST = "manifest.json"


@dataclass
class Counters:
    """What training has done so far, over all attempts of a run."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # input tokens, padding left out
    target_tokens: int = 0  # tokens with a loss
    time_s: float = 0.0  # wall time inside the training loop


@dataclass(frozen=True)
class Checkpoint:
    counters: Counters
    parameters: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]  # parameter name -> torch's names of its state -> value
    rng: RngState


@dataclass
class TrainingState:
    """What a step changes: the trainable parameters by name, their optimizer, the counters."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: AdamW | ScaledStep
    counters: Counters

    def optimizer_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the optimizer's state by parameter name, then by torch's name of the value."""
        state = self.optimizer.state
        return {name: dict(state[weight]) for name, weight in self.parameters.items() if weight in state}

    def check_finite(self) -> None:
        """Refuse to keep weights that an update has spoilt.

        The step's loss and gradients were finite, but the update itself can overflow; without a further step
        nothing else would notice.

        Raises:
            TrainingError: naming the parameter and the step.
        """
        for name, parameter in self.parameters.items():
            if not parameter.isfinite().all():
                raise TrainingError(
                    f"training stopped after step {self.counters.step}: {name} is not finite; the step is not saved; "
                    "try a lower optim.learning_rate or trainer.compute_dtype=float32"
                )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint's values into the parameters, the optimizer and the counters.

        Raises:
            RunFolderError: the checkpoint is of other parameters.
        """
        _check_parameters(checkpoint.parameters, self.parameters)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(checkpoint.parameters[name])
        names = {parameter: name for name, parameter in self.parameters.items()}
        state_dict = self.optimizer.state_dict()  # torch numbers the parameters, in the order of their groups
        for numbered, group in zip(state_dict["param_groups"], self.optimizer.param_groups, strict=True):
            for number, parameter in zip(numbered["params"], group["params"], strict=True):
                values = checkpoint.optimizer.get(names[parameter])
                if values is not None:  # cloned: the checkpoint's tensors are maps of its files
                    state_dict["state"][number] = {key: value.clone() for key, value in values.items()}
        self.optimizer.load_state_dict(state_dict)
        self.counters = replace(checkpoint.counters)


class DamagedCheckpointError(Exception):
    """A checkpoint folder whose files are not what its manifest says; `load_newest` takes the one before."""


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def save_checkpoint(folder: Path, state: TrainingState, rng: RngState, keep: int, lease: Lease | None = None) -> Path:
    """Write the checkpoint of the state's step into `folder` and keep the newest `keep`.

    Args:
        lease: of the run; without it the checkpoint is written whatever others do.

    Raises:
        LeaseLostError: a later attempt has the run; its checkpoints are as they were.
        RunFolderError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    target = step_folder(folder, state.counters.step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lease.staged(target) if lease is not None else _staged_beside(target) as temporary:
            temporary.mkdir()
            _write_files(temporary, state, rng)
            _sync_folder(temporary)
        _sync_folder(folder)  # the new name must survive a power cut before an old checkpoint is deleted
    except OSError as error:
        kept = ", ".join(f"step {step}" for step in _saved_steps(folder)) or "none"
        raise RunFolderError(
            f"could not save the checkpoint of step {state.counters.step} in {folder}: "
            f"{error.strerror or error}; earlier checkpoints are as they were ({kept}); "
            "free some space and start the run again"
        ) from error
    _prune(folder, state.counters.step, keep, lease)
    return target


def load_newest(folder: Path) -> Checkpoint | None:
    """Read the newest whole checkpoint of `folder`, or None if there is none.

    A damaged one is reported in one line and the one before is taken: training repeats some steps and ends
    with the same result.
    """
    steps = _saved_steps(folder)
    for number, step in enumerate(reversed(steps), start=1):
        try:
            return _read(step_folder(folder, step))
        except DamagedCheckpointError as error:
            rest = "going back to the one before" if number < len(steps) else "training starts from the beginning"
            logger.warning("checkpoint of step %d is damaged (%s); %s", step, error, rest)
    return None


def _write_files(folder: Path, state: TrainingState, rng: RngState) -> None:
    optimizer = {
        f"{name}:{key}": value for name, values in state.optimizer_tensors().items() for key, value in values.items()
    }
    generators = {"torch_cpu": rng.torch_cpu, "torch_cuda": rng.torch_cuda}
    plain = {"counters": asdict(state.counters), "python": rng.python, "numpy": rng.numpy}
    digests = {
        PARAMETERS: write_tensors(folder / PARAMETERS, state.parameters),
        OPTIMIZER: write_tensors(folder / OPTIMIZER, optimizer),
        RNG: write_tensors(folder / RNG, {key: value for key, value in generators.items() if value is not None}),
        COUNTERS: write_hashed(folder / COUNTERS, iter([json.dumps(plain).encode()])),
    }
    manifest = {"format": FORMAT_VERSION, "step": state.counters.step, "sha256": digests}
    write_hashed(folder / MANIFEST, iter([json.dumps(manifest, indent=2).encode()]))


@contextmanager
def _staged_beside(target: Path) -> Iterator[Path]:
    """Give a hidden folder to fill, and put it in place of `target` when the block ends well."""
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        if target.exists():  # damaged, or this step would not have been trained again
            target.rename(target.with_name(f"{TEMPORARY_PREFIX}replaced-{uuid.uuid4().hex[:8]}"))
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _saved_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    matches = (STEP_FOLDER.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def _prune(folder: Path, step: int, keep: int, lease: Lease | None) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, and what a killed process left half written.

    Checkpoints beyond `step` are damaged ones that were passed over when this run was resumed.
    """
    kept = [saved for saved in _saved_steps(folder) if saved <= step][-keep:]
    stale = [step_folder(folder, saved) for saved in _saved_steps(folder) if saved not in kept]
    for path in [*stale, *folder.glob(f"{TEMPORARY_PREFIX}*")]:
        if lease is not None:
            lease.remove(path)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _read(folder: Path) -> Checkpoint:
    """Read one checkpoint, every file checked against the manifest."""
    manifest = _read_manifest(folder)
    for name, digest in manifest["sha256"].items():
        if _sha256(folder / name) != digest:
            raise DamagedCheckpointError(f"{name} does not have the SHA-256 of the manifest")
    plain = json.loads((folder / COUNTERS).read_text(encoding="utf-8"))
    rng = safetensors.torch.load_file(folder / RNG)
    optimizer: dict[str, dict[str, Tensor]] = {}
    for joined, value in safetensors.torch.load_file(folder / OPTIMIZER).items():
        name, key = joined.rsplit(":", 1)
        optimizer.setdefault(name, {})[key] = value
    return Checkpoint(
        counters=Counters(**plain["counters"]),
        parameters=safetensors.torch.load_file(folder / PARAMETERS),
        optimizer=optimizer,
        rng=RngState(
            torch_cpu=rng["torch_cpu"],
            torch_cuda=rng.get("torch_cuda"),
            python=plain["python"],
            numpy=plain["numpy"],
        ),
    )


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DamagedCheckpointError(f"{path.name} cannot be read: {error.strerror}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} cannot be read: {error}") from error
    if manifest.get("format") != FORMAT_VERSION:
        raise RunFolderError(
            f"checkpoint {folder} has format {manifest.get('format')}; this version reads {FORMAT_VERSION}; "
            "finish the run with the version that started it, or delete its checkpoints"
        )
    return dict(manifest)


def _check_parameters(saved: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name in sorted(saved.keys() ^ parameters.keys()):
        where = "only in the checkpoint" if name in saved else "only in the model"
        raise RunFolderError(f"the checkpoint is of another run: parameter {name} is {where}; use a new run folder")
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape or saved[name].dtype != parameter.dtype:
            raise RunFolderError(
                f"the checkpoint is of another run: parameter {name} is {tuple(saved[name].shape)} "
                f"{saved[name].dtype} there and {tuple(parameter.shape)} {parameter.dtype} in the model; "
                "use a new run folder"
            )
