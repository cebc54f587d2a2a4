"""What was planned before: a plan is found again by the hash of everything that it was made of."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import hydra
import omegaconf
from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

from qlora_lab.config import hardware
from qlora_lab.config.schema import ModelConfig, RowsConfig, RunConfig
from qlora_lab.errors import RunFolderError
from qlora_lab.runs.files import read_json, write_json
from qlora_lab.runs.fingerprint import source_fingerprint
from qlora_lab.sweep.independence import study_files
from qlora_lab.sweep.plan import Plan, planned
from qlora_lab.sweep.plan_file import Row, code_sha256, read_plan_file
from qlora_lab.sweep.prepare import check_inputs
from qlora_lab.wheels import default_cache_dir

REMEMBERED_PLANS = 100
VARIABLE = re.compile(r"oc\.env:\s*([A-Za-z_]\w*)")
# They say what to do with a plan, not what it is.
NO_PART = tuple(f"sweep.{key}=" for key in ("action", "json", "run", "cause"))
CHANGING = ("${now:", "${hydra:", "${random")  # references whose value no file holds


class PlanMemory:
    """Finds the plan that the same command made of the same files, in runs/studies/planned.json.

    Args:
        runs_dir: the folder of all runs.
        key: of `command_key`; None where a plan cannot be told from its inputs.
    """

    def __init__(self, runs_dir: Path, key: str | None) -> None:
        self._studies = runs_dir / "studies"
        self._file = self._studies / "planned.json"
        self._key = key

    def find(self) -> Plan | None:
        """Return the plan with its runs' present states, or None where it must be made.

        Raises:
            ModelError, DataError: a model or data file that it needs is gone.
        """
        found = self._entries().get(self._key) if self._key is not None else None
        if found is None:
            return None
        try:
            record = read_plan_file(self._studies / found["file"])
        except RunFolderError:
            return None  # removed or changed: made again
        if not _inputs_are_the_same(record.rows):
            return None
        return planned(record.study, record.rows, repeated=found["repeated"])

    def folder(self) -> Path | None:
        """Return the folder of the plan, were it is known, without looking at what it was made of."""
        found = self._entries().get(self._key)
        return (self._studies / found["file"]).parent if found is not None else None

    def keep(self, plan: Plan, configs: str) -> None:
        """Remember a plan that was written.

        Args:
            configs: the name of its immutable file.
        """
        if self._key is None:
            return
        entry = {"file": str((plan.folder / configs).relative_to(self._studies)), "repeated": plan.repeated}
        entries = self._entries()
        if entries.get(self._key) != entry:
            others = {key: value for key, value in entries.items() if key != self._key}
            newest = list((others | {self._key: entry}).items())[-REMEMBERED_PLANS:]
            write_json(self._file, dict(newest))

    def _entries(self) -> dict[str | None, dict[str, Any]]:
        try:
            return read_json(self._file)
        except (FileNotFoundError, json.JSONDecodeError):
            return {}


def command_key(loader: ConfigLoader, config: DictConfig, arguments: list[str]) -> str | None:
    """Return a hash of all that a plan is made of but the models and data that it names: configuration files,
    command line, the variables of the environment that they read, this machine, and the code.

    Args:
        config: what the loader composed for the whole study.
        arguments: the command line's overrides that are not Hydra's own.

    Returns:
        None where configuration comes from elsewhere than files that can be hashed.
    """
    files = study_files(loader, config)
    if files is None:
        return None
    texts = {str(file): file.read_text(encoding="utf-8") for file in files}
    overrides = [*config.hydra.overrides.hydra, *arguments]
    typed = [override for override in overrides if not override.startswith(NO_PART)]
    everything = "\n".join([*texts.values(), *typed])
    if any(word in everything for word in CHANGING):
        return None
    made_of = {
        "files": texts,
        "overrides": typed,
        "primary": config.hydra.job.config_name,
        "variables": {name: os.environ.get(name) for name in sorted(set(VARIABLE.findall(everything)))},
        "code": code_sha256(),
        "packages": [hydra.__version__, omegaconf.__version__],
        "machine": repr(_sorted_flags(hardware.detect())),
        "folders": [str(Path.cwd()), str(default_cache_dir())],
    }
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _sorted_flags(machine: hardware.Hardware) -> tuple[object, ...]:
    memory = machine.memory_bytes
    return machine.cpu_model, sorted(machine.cpu_flags), machine.cores, machine.gpus, machine.gpu_ids, memory


def _inputs_are_the_same(rows: list[Row]) -> bool:
    """Say whether models and data are those that were planned with, looking once at what runs share."""
    distinct: dict[tuple[int, ...], RunConfig] = {}
    for _, _, config in rows:
        distinct.setdefault((id(config.model), id(config.data), id(config.evaluation), id(config.paths)), config)
    for config in distinct.values():
        check_inputs(config)
        sources: list[RowsConfig | ModelConfig] = [
            config.model,
            config.data.source,
            *config.data.mix.values(),
            *config.evaluation.sets.values(),
            *(rows for benchmark in config.evaluation.benchmarks.values() for rows in benchmark.sources()),
        ]
        data_dir = Path(config.paths.data_dir)
        if any(source_fingerprint(source, data_dir) != source.content_sha256 for source in sources):
            return False
    return True
