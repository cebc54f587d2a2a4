"""Where adapters come from: finished runs, folders in PEFT's format, and PEFT repositories of the local hub cache."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from qlora_lab.adapters.saved_adapter import CONFIG, WEIGHTS
from qlora_lab.errors import ModelError, RunFolderError
from qlora_lab.evaluation.candidates import Base, Candidate, trained
from qlora_lab.evaluation.run_model import check_weights
from qlora_lab.runs.files import read_json
from qlora_lab.runs.find import find_run
from qlora_lab.runs.folder import RunFolder

EXPORTED = "settings.json"  # what qlora_lab.export writes beside an adapter
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Source:
    """An adapter on disk.

    Attributes:
        folder: with its weights and adapter_config.json.
        description: for people.
        base: what it was trained on, where a run tells.
        prompt_format: in which it was trained, where that is known.
    """

    folder: Path
    description: str
    base: Base | None = None
    prompt_format: str | None = None


def find_source(where: str, runs_dir: Path) -> Source:
    """Return an adapter by a folder (of a run or in PEFT's format), a run's id, or a hub id as ORG/NAME[@REVISION].

    The folder in which a run keeps its adapter is that run's.

    Raises:
        ModelError: there is none, it is not in the hub's local cache, or a run's weights are gone or changed.
        RunFolderError: the run is not finished.
    """
    if (Path(where) / CONFIG).is_file():
        folder = Path(where).resolve()
        its_run = RunFolder(folder.parent)
        if folder == its_run.adapter and its_run.config_file.is_file():
            return source_of(trained(its_run))
        return Source(folder, "a folder in PEFT's format", prompt_format=_exported_prompt_format(folder))
    try:
        run = find_run(runs_dir, where)
    except RunFolderError as error:
        hub_id = HUB_ID.fullmatch(where)
        if hub_id is None or Path(where).exists():
            raise ModelError(
                f"'{where}' must be a run, a folder with {CONFIG}, or a hub id such as ORG/NAME; {error}"
            ) from error
        return _from_hub_cache(hub_id["repository"], hub_id["revision"])
    return source_of(trained(run))


def source_of(candidate: Candidate) -> Source:
    """Return the adapter of a finished run.

    Raises:
        ModelError: it trained no adapter, or its weights are gone or changed.
    """
    run = candidate.run
    assert isinstance(run, RunFolder)
    if run.config().adapter.kind == "none":
        raise ModelError(
            f"run {run.run_id} trained every weight and has no adapter; such a model is served alone: model=folder "
            f"quant=none model.path={run.adapter}, with model.tokenizer set to that of its base"
        )
    check_weights(run)
    return Source(run.adapter, candidate.name, candidate.base, candidate.base.prompt_format)


def _exported_prompt_format(folder: Path) -> str | None:
    """Return what an adapter that qlora_lab.export wrote says of itself; None of others."""
    try:
        config = read_json(folder / EXPORTED)["config"]
        return config["data"]["prompt_format"] or config["model"]["prompt_format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _from_hub_cache(repository: str, revision: str | None) -> Source:
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=[CONFIG, WEIGHTS], local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError) as error:
        at = "" if revision is None else f" --revision {revision}"
        raise ModelError(
            f"'{repository}' is no run and no folder, and not in the hub's cache here; is it spelt as on the hub? "
            f"`hf download {repository}{at} {CONFIG} {WEIGHTS}` fetches it"
        ) from error
    return Source(Path(folder), f"{repository} of the hub")
