"""The index over what is exported: one line an adapter, as Markdown, CSV and JSON."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.report.study_report import Study
from analysis.report.terminal import remarks
from qlora_lab.publishing.card import base_name
from qlora_lab.publishing.numbers import Measured
from qlora_lab.publishing.public import public
from qlora_lab.publishing.runs import ADAPTER_WEIGHTS, PublishedRun, Selection
from qlora_lab.runs.files import write_json

ADAPTERS = "adapters"  # the folder of all of them
README, TABLES = "README.md", ("index.csv", "index.json")


def index_rows(runs: Sequence[PublishedRun], metrics: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    """Return one row an adapter: where it lies, its place, its metrics with their intervals, and its hash."""
    rows = []
    for run in runs:
        row: dict[str, Any] = {"adapter": f"{ADAPTERS}/{run.name}", "run": run.run_id, **run.shown_place}
        row |= {"base": base_name(run.config.model), "quantization": run.config.quant.format}
        row |= {"rank": run.config.adapter.rank, "seed": run.config.seed}
        for one in metrics[run.run_id]:
            row |= {one.metric: one.value, f"{one.metric} low": one.low, f"{one.metric} high": one.high}
        row |= {"sha256": run.result["adapter_sha256"], "bytes": (run.folder.adapter / ADAPTER_WEIGHTS).stat().st_size}
        rows.append(row)
    return rows


def write_index(
    folder: Path,
    chosen: Selection,
    metrics: Mapping[str, Sequence[Measured]],
    study: Study | None,
) -> None:
    """Write README.md, index.csv and index.json."""
    rows = index_rows(chosen.runs, metrics)
    said = None if study is None else {"name": chosen.study, **_said(study)}
    told = public({"study": said, "adapters": rows, "left_out": chosen.left_out}, chosen.paths)
    write_json(folder / "index.json", told)
    rows = told["adapters"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(rows)
    (folder / "index.csv").write_text(table.getvalue(), encoding="utf-8")
    (folder / README).write_text(_readme(chosen, metrics, study), encoding="utf-8")


def _said(study: Study) -> dict[str, Any]:
    """Return the answer with all that it must be read with."""
    plan, answer = study.plan, study.answer
    kept = {"answer": answer.sentence, "remarks": remarks(plan), "pipeline_check": plan.pipeline_check}
    return {"metric": answer.metric, "question": plan.question, **kept}


def _readme(chosen: Selection, metrics: Mapping[str, Sequence[Measured]], study: Study | None) -> str:
    metric = study.plan.metric if study is not None else "eval/loss"
    axes = list(dict.fromkeys(axis for run in chosen.runs for axis in run.place))
    head = ["adapter", *axes, metric, "SHA-256"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for run in chosen.runs:
        found = next((one.text for one in metrics[run.run_id] if one.metric == metric), "–")
        cells = [run.shown_place.get(axis, "") for axis in axes]
        link = f"[{run.name}]({ADAPTERS}/{run.name}/{README})"
        lines.append(f"| {' | '.join([link, *cells, found, run.result['adapter_sha256'][:12]])} |")
    title = f"Adapters of the study {chosen.study}" if chosen.study else "Adapters"
    said = "" if study is None else "".join(f"{line}\n\n" for line in [study.answer.sentence, *remarks(study.plan)])
    left = "".join(f"- run {run_id} is left out: {reason}\n" for run_id, reason in chosen.left_out.items())
    text = (
        f"# {title}\n\n{said}"
        f"{len(chosen.runs)} LoRA adapters in PEFT's format, each with its model card. `index.csv` and `index.json` "
        "have all metrics with their 95 % intervals over held-out rows; in the exported folder `manifest.json` has the "
        "SHA-256 of every file, and `python -m qlora_lab.export --verify --out .` checks them.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    return str(public(text + (f"\n{left}" if left else ""), chosen.paths))
