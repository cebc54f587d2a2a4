"""Finished runs as adapters to publish: python -m qlora_lab.export study=NAME --out FOLDER

Every adapter in PEFT's format with its model card, an index over them, and manifest.json with the SHA-256 of each file.
`--verify` checks a folder. `--namespace` shows what would be sent to the Hugging Face hub, and `--upload` sends it.
Nothing private goes in, as with qlora_lab.release.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.report.study_report import read_study
from qlora_lab.errors import DataError
from qlora_lab.publishing.card import base_name, base_revision, model_card, settings_of
from qlora_lab.publishing.hub import planned_uploads, upload
from qlora_lab.publishing.manifest import MANIFEST, publish, verify
from qlora_lab.publishing.numbers import arm_sentence, measured
from qlora_lab.publishing.public import command_line, public
from qlora_lab.publishing.runs import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PublishedRun, Selection, select_runs
from qlora_lab.publishing.study_index import ADAPTERS, write_index
from qlora_lab.ratings.command import run
from qlora_lab.runs.files import read_json, write_json

FORMAT = "qlora_lab.export 1"


def write_export(out: Path, chosen: Selection, *, command: str) -> None:
    """Write the folder `out`; until it is whole it has another name.

    Raises:
        DataError: `out` is there already, or something private would be published.
    """
    publish(out, lambda folder: _write(folder, chosen), layout=FORMAT, command=command, paths=chosen.paths)


def _write(folder: Path, chosen: Selection) -> dict[str, Any]:
    metrics = {one.run_id: measured(one) for one in chosen.runs}
    study = None
    if chosen.study_folder is not None:
        study = read_study(chosen.study_folder, chosen.runs[0].folder.path.parent)
    for one in chosen.runs:
        place = folder / ADAPTERS / one.name
        place.mkdir(parents=True)
        arm = None if study is None else arm_sentence(study.answer, one.run_id)
        shutil.copyfile(one.folder.adapter / ADAPTER_WEIGHTS, place / ADAPTER_WEIGHTS)
        write_json(place / ADAPTER_CONFIG, adapter_config(one))
        write_json(place / "settings.json", _settings(one))
        card = public(model_card(one, metrics[one.run_id], arm), one.paths)
        (place / "README.md").write_text(str(card), encoding="utf-8")
    write_index(folder, chosen, metrics, study)
    return {"study": chosen.study, "runs": [one.run_id for one in chosen.runs]}


def adapter_config(one: PublishedRun) -> dict[str, Any]:
    """Return PEFT's settings of an adapter, its base named as others can find it."""
    settings: dict[str, Any] = public(read_json(one.folder.adapter / ADAPTER_CONFIG), one.paths)
    revision = base_revision(one) if one.config.model.hub_id else None
    return settings | {"base_model_name_or_path": base_name(one.config.model), "revision": revision}


def _settings(one: PublishedRun) -> dict[str, Any]:
    environment = one.folder.environment() or {}
    kept = {name: environment.get(name) for name in ("packages", "python", "git_commit", "device", "compute_dtype")}
    return {
        "run": one.run_id,
        "config": settings_of(one),
        "result": public(one.result, one.paths),
        "environment": public(kept, one.paths),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_lab.export", description="Write the adapters of finished runs, to publish them."
    )
    parser.add_argument("runs", nargs="*", metavar="study=NAME | RUN", help="a study, or ids or folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, or with --verify to check")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--verify", action="store_true", help="check that a folder is as it was exported")
    parser.add_argument("--namespace", metavar="NAME", help="show what would be sent to this account of the hub")
    parser.add_argument("--upload", action="store_true", help="send it, with --namespace")
    parser.add_argument("--private", action="store_true", help="send it to private repositories")
    options = parser.parse_args(arguments)
    run(lambda: _work(options, sys.argv[1:] if arguments is None else arguments))


def _work(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    if options.upload and options.namespace is None:
        raise DataError("--upload needs --namespace NAME: the user or organisation of the hub that it goes to")
    if not options.runs and not (options.verify or options.namespace):
        raise DataError("an export needs study=NAME, or ids or folders of runs; name some")
    if options.runs:
        command = command_line("qlora_lab.export", arguments)
        write_export(options.out, select_runs(options.runs, options.runs_dir), command=command)
    said = [verify(options.out)]
    if options.namespace is not None:
        told = read_json(options.out / MANIFEST)
        if told["format"] != FORMAT:
            raise DataError(f"{options.out} must be written by qlora_lab.export to be sent; it is a {told['format']}")
        uploads = planned_uploads(options.out, options.namespace, told["study"])
        if options.upload:
            said += upload(uploads, private=options.private)
        else:
            said += [f"would send {one}{', private' if options.private else ''}" for one in uploads]
            said.append("nothing was sent; --upload sends it, with a token in HF_TOKEN")
    return "\n".join(said)


if __name__ == "__main__":
    main()
