"""Which runs are published, and what each is called."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import DataError, RunFolderError
from qlora_lab.hashing import file_sha256
from qlora_lab.publishing.public import paths_in, public, slug
from qlora_lab.runs.find import find_run
from qlora_lab.runs.folder import FINISHED, RunFolder
from qlora_lab.sweep.status import find_study

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STUDY = "study="


@dataclass(frozen=True)
class PublishedRun:
    """A finished run with an adapter.

    Attributes:
        place: its values on the study's axes; empty of a run alone.
    """

    folder: RunFolder
    place: Mapping[str, str]

    @cached_property
    def config(self) -> RunConfig:
        return self.folder.config()

    @cached_property
    def result(self) -> dict[str, Any]:
        return self.folder.result()

    @property
    def run_id(self) -> str:
        return self.folder.run_id

    @property
    def shown_place(self) -> dict[str, str]:
        """Its place with paths cut to their last names."""
        told: dict[str, str] = public(dict(self.place))
        return told

    @property
    def paths(self) -> set[str]:
        """What its settings and its place say of this machine's folders."""
        tokenizer = self.config.model.tokenizer or ""
        own = {tokenizer} if "/" in tokenizer and Path(tokenizer).exists() else set()  # or an id of the hub
        return own | paths_in(asdict(self.config)) | paths_in(dict(self.place))

    @property
    def name(self) -> str:
        """What its folder and its repository are called: unique by the run's id, readable by its place."""
        words = [value if axis in ("data", "model") else f"{axis}-{value}" for axis, value in self.shown_place.items()]
        return slug("-".join([*words, self.run_id]))

    def check(self) -> None:
        """Refuse a run whose adapter is gone or changed.

        Raises:
            DataError: names the file.
        """
        file = self.folder.adapter / ADAPTER_WEIGHTS
        if not file.is_file() or not file.with_name(ADAPTER_CONFIG).is_file():
            raise DataError(f"run {self.run_id} has no adapter in {self.folder.adapter}; restore it, or run it again")
        found, expected = file_sha256(file), str(self.result.get("adapter_sha256"))
        if found != expected:
            raise DataError(
                f"{file} is not what run {self.run_id} ended with (SHA-256 {found[:12]}, in its result "
                f"{expected[:12]}); restore the file, or run it again"
            )


@dataclass(frozen=True)
class Selection:
    """What is published together.

    Attributes:
        study: the name of the study; None of runs alone.
        study_folder: with its plan.
        left_out: what is not, with the reason, by run id.
    """

    runs: list[PublishedRun]
    left_out: dict[str, str]
    study: str | None = None
    study_folder: Path | None = None

    @property
    def paths(self) -> set[str]:
        """What must not be published of this machine's folders: those in settings, of the runs, and where it works."""
        folders = [Path.cwd(), *(run.folder.path.absolute().parent for run in self.runs)]
        named = {str(folder) for folder in folders if folder != folder.parent}
        return named.union(*(run.paths for run in self.runs))


def select_runs(names: Sequence[str], runs_dir: Path) -> Selection:
    """Return the runs that are asked for: `study=NAME`, or ids, first digits and folders of runs.

    Raises:
        DataError: none of them has an adapter to publish, or an adapter is gone or changed.
        RunFolderError: there is no such study or run.
    """
    studies = [name.removeprefix(STUDY) for name in names if name.startswith(STUDY)]
    if studies and len(names) > 1:
        raise DataError(f"give one study=NAME alone, or runs; got {' '.join(names)}")
    if studies:
        study = find_study(runs_dir, studies[0])
        selected = _sorted_out([PublishedRun(RunFolder(runs_dir / run_id), at) for run_id, at in study.places.items()])
        chosen = Selection(selected.runs, selected.left_out, study.name, study.path)
    else:
        chosen = _sorted_out([PublishedRun(find_run(runs_dir, name), {}) for name in dict.fromkeys(names)])
    if not chosen.runs:
        reasons = "; ".join(f"{run_id}: {reason}" for run_id, reason in chosen.left_out.items())
        raise DataError(f"nothing to export: {reasons}")
    for run in chosen.runs:
        run.check()
    return chosen


def _sorted_out(runs: Sequence[PublishedRun]) -> Selection:
    kept, left_out = [], {}
    for run in runs:
        try:
            state = run.folder.state()
        except RunFolderError as error:
            state = str(error).replace(f"{run.folder.path.parent}/", "")
        if state != FINISHED:
            left_out[run.run_id] = f"it is {state}"
        elif run.config.adapter.kind == "none":
            left_out[run.run_id] = "it trained every weight and has no adapter"
        else:
            kept.append(run)
    return Selection(kept, left_out)
