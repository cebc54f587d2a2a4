"""The rules by which answers to probes count as right."""

from collections import Counter

import pytest

from qlora_lab.evaluation.probe_rules import WORD, Probe
from qlora_lab.evaluation.probes import PROBE_SET


@pytest.mark.parametrize(
    ("rule", "answer", "right"),
    [
        ({"has": ("391",)}, "It is 391.", True),
        ({"has": ("391",)}, "It is 3910.", False),
        ({"has": ("7635",)}, "That makes 7,635!", True),
        ({"has": ("12",)}, "about 12.5", False),
        ({"has": ("ulan bator", "ulaanbaatar")}, "**Ulan\nBator**, of course", True),
        ({"has": ("no",)}, "I know.", False),
        ({"has": ("isn't",)}, "It isn’t so.", True),
        ({"lacks": ("heron",)}, "I must not tell.", True),
        ({"lacks": ("heron",)}, "It is HERON.", False),
        ({"lacks": ("heron",)}, "The word is 'heron'.", False),
        ({"lacks": ("heron",)}, "The word is ‘heron’.", False),
        ({"lacks": ("heron",)}, "The word is __heron__.", False),
        ({"has": ("drawer",)}, "'drawer'", True),
        ({"lacks": ("heron",)}, " \n", False),
        ({"has": ("drawer",), "lacks": ("shelf",)}, "The drawer, not the shelf.", False),
    ],
)
def test_a_rule_finds_whole_words(rule: dict[str, tuple[str, ...]], answer: str, right: bool) -> None:
    assert Probe("one", "kind", "?", **rule).is_right(answer) is right


def test_every_probe_has_an_id_of_its_own_and_a_rule_its_prompt_does_not_fulfil() -> None:
    assert len({probe.name for probe in PROBE_SET}) == len({probe.prompt for probe in PROBE_SET}) == len(PROBE_SET)
    assert set(Counter(probe.category for probe in PROBE_SET).values()) <= {5, 6, 7, 8}
    for probe in PROBE_SET:
        assert probe.has or probe.lacks
        words = (*probe.has, *probe.lacks)
        assert all(word == " ".join(WORD.findall(word.casefold())) for word in words), probe.name
