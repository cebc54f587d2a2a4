"""python -m qlora_lab.data list [WORD ...]: the data sets of conf/data/, or those whose name holds one of the words."""

import sys
from collections.abc import Mapping

from omegaconf import DictConfig

from qlora_lab.config.catalogue import data_sets

HEADER = ["data=", "rows", "from", "licence", "template", "scored"]
NUMBERS = (1,)  # columns that are set on the right


def main(words: list[str]) -> None:
    chosen = {name: data for name, data in data_sets().items() if not words or any(word in name for word in words)}
    if not chosen:
        sys.exit(
            f"error: no data set of conf/data/ has {' or '.join(words)} in its name; without a word all are listed"
        )
    print(table(chosen))


def table(sets: Mapping[str, DictConfig]) -> str:
    """Return one line a set.

    Rows are those for training: as the QLoRA study counts them, or for other sets their publishers. Scored is the part
    of a row that has a loss: the target that the template makes, a class, or every token.
    """
    rows = [HEADER, *(_row(name, data) for name, data in sets.items())]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(name: str, data: DictConfig) -> list[str]:
    source = data.source
    rows = source.published_rows or (data.rows if source.kind == "procedural" else None)
    return [
        name,
        "" if rows is None else f"{rows:,}",
        _origin(source),
        source.licence or "",
        source.template,
        _scored(data),
    ]


def _origin(source: DictConfig) -> str:
    if source.kind == "hub":
        config = f", {source.hub_config}" if source.hub_config is not None else ""
        return f"{source.hub_id or 'data.source.hub_id=...'}{config}"
    if source.kind == "wheel":
        return f"wheel {source.wheel}"
    return source.path or "data.source.path=..." if source.kind == "file" else "made here"


def _scored(data: DictConfig) -> str:
    if data.loss_on == "everything":
        return "every token"
    if data.labels:
        return f"one of {len(data.labels)} classes"
    return {"messages_every_reply": "every reply", "oasst_best_replies": "every reply"}.get(
        data.source.template, "target"
    )
