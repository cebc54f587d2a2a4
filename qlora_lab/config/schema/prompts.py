"""Sets of prompts that models answer, and how their answers are drawn."""

from dataclasses import dataclass, field

from qlora_lab.config.data_names import TEMPLATES
from qlora_lab.config.schema.checks import require, require_at_least, require_one_of, require_seed, require_share
from qlora_lab.config.schema.data import SourceConfig

QUESTIONS = "questions"  # a template: lines of an id and a prompt, as `ratings.answers` reads them
PROBES = "probes"  # a kind: the prompts of qlora_lab.evaluation.probes
TOO_LONG = ("refuse", "skip")


@dataclass
class PromptSetConfig(SourceConfig):
    """Where prompts come from, and how each is answered.

    The template `questions` takes ids and categories from the lines; other templates take prompts from data sets, whose
    answers are left out, and number them.
    """

    kind: str = "file"
    template: str = QUESTIONS
    limit: int | None = None  # the first so many; None: all
    system_prompt: str | None = None  # a system's turn before each prompt
    max_new_tokens: int = 512
    temperature: float = 0.7  # 0: the likeliest token each time
    top_p: float = 0.9  # the likeliest tokens that together have this probability are drawn from
    seed: int = 0
    # Besides the end-of-sequence token and what ends a turn in the prompt format: text with which another turn begins.
    stop: list[str] = field(default_factory=lambda: ["### Human:"])
    too_long: str = "refuse"  # what becomes of a prompt that leaves no room for max_new_tokens: refuse all, or skip it
    batch_tokens: int = 8192  # in memory at once, those to come included; changes no answer

    def check(self, place: str) -> None:
        """Refuse what cannot be read or drawn; `place` is where the set stands."""
        if self.kind == PROBES:
            for key in ("path", "system_prompt"):  # some probes have a system's turn of their own, such as a secret
                require(
                    getattr(self, key) is None,
                    f"{place}.{key} is of no use when {place}.kind is '{PROBES}'; leave it out",
                )
        else:
            require(
                self.kind != "procedural",
                f"{place}.kind must be file, hub, wheel or {PROBES}; got 'procedural', which has no end",
            )
            super().check(place)
        require_at_least(f"{place}.limit", self.limit, 1)
        require_at_least(f"{place}.max_new_tokens", self.max_new_tokens, 1)
        require_at_least(f"{place}.temperature", self.temperature, 0)
        require_share(f"{place}.top_p", self.top_p)
        require(self.top_p > 0, f"{place}.top_p must be above 0; got 0 (try temperature=0 for the likeliest token)")
        require_seed(f"{place}.seed", self.seed)
        require(all(self.stop), f"{place}.stop must hold texts that are not empty; got {self.stop}")
        require_one_of(f"{place}.too_long", self.too_long, TOO_LONG)
        require_at_least(f"{place}.batch_tokens", self.batch_tokens, 1)

    def _templates(self) -> tuple[str, ...]:
        return QUESTIONS, *TEMPLATES
