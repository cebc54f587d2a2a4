"""The self-written probes of probes.yaml."""

from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import yaml

from qlora_lab.evaluation.probe_rules import Probe


def read_probes() -> tuple[Probe, ...]:
    """Return every probe, in the order of the file."""
    told = yaml.safe_load(resources.files(__package__).joinpath("probes.yaml").read_text(encoding="utf-8"))
    return tuple(
        Probe(
            name,
            category,
            rule["prompt"],
            has=tuple(_words(rule.get("has", ()))),
            lacks=tuple(_words(rule.get("lacks", ()))),
            system=rule.get("system", ""),
        )
        for category, probes in told["probes"].items()
        for name, rule in probes.items()
    )


def _words(listed: Sequence[Any]) -> Iterator[str]:
    """Yield words, those of lists inside the list too."""
    for word in listed:
        if isinstance(word, str):
            yield word
        else:
            yield from word


PROBE_SET = read_probes()
