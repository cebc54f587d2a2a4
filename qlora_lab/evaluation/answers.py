"""A set of prompts answered by a model: a line for each in answers.jsonl, which survives being killed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_lab.config.schema import CLASSIFICATION, PROBES, PromptSetConfig
from qlora_lab.data.prompts import find_prompt_format
from qlora_lab.errors import ConfigError
from qlora_lab.evaluation.candidates import Candidate
from qlora_lab.evaluation.generate import Generation, generate_batch, generation_batches, prompt_room
from qlora_lab.evaluation.probes import PROBE_SET
from qlora_lab.evaluation.prompt_sets import Prompt, encode_prompts, fitting, prompts_digest, read_prompts, turn_ends
from qlora_lab.evaluation.run_model import RunModel
from qlora_lab.evaluation.sampling import Sampling, prompt_seed
from qlora_lab.models.tasks import task_of
from qlora_lab.ratings.answers import Answer, answer_line
from qlora_lab.runs.evaluations import EvaluationFolder, settings_hash
from qlora_lab.runs.progress import progress_bar

Line = dict[str, Any]
# What decides the answers, besides the prompts and the model.
SETTINGS = ("max_new_tokens", "temperature", "top_p", "seed", "stop", "too_long")


@dataclass(frozen=True)
class PromptTask:
    """One set of prompts to answer; see `tasks.Task` for what its methods are called with."""

    name: str
    config: PromptSetConfig
    prompts: Sequence[Prompt]
    revisions: Mapping[str, str] = field(default_factory=dict)  # commits of hub sets, by their ids

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the folder's hash is of."""
        values = {key: getattr(self.config, key) for key in SETTINGS}
        if self.config.temperature == 0:
            del values["top_p"], values["seed"]  # nothing is drawn
        if self.config.kind == PROBES:
            values["rules"] = settings_hash({probe.name: [probe.has, probe.lacks] for probe in PROBE_SET})
        return {"kind": "prompts", "prompts": len(self.prompts), "content": prompts_digest(self.prompts), **values}

    def check(self, candidate: Candidate) -> None:
        if candidate.base.model.task == CLASSIFICATION:
            raise ConfigError(
                f"{candidate.name} is a classifier, which answers no prompts; evaluate it with a benchmark of classes"
            )

    def execute(self, subject: RunModel, folder: EvaluationFolder) -> dict[str, Any]:
        """Answer what an earlier attempt has not, and return counts, for probes the share of right answers.

        Batches are the same in every attempt, so that one that was killed ends with the same answers.

        Raises:
            DataError: a prompt is too long, and not to be skipped.
        """
        formatted = find_prompt_format(subject.base.prompt_format, subject.tokenizer)
        encoded = encode_prompts(self.prompts, formatted, subject.tokenizer)
        room = prompt_room(task_of(subject.model), subject.base.model.max_length_tokens, self.config.max_new_tokens)
        places = fitting(self.name, self.prompts, encoded, room, skip=self.config.too_long == "skip")
        lines = {line["question"]: line for line in folder.answers()}
        self._answer(
            [self.prompts[place] for place in places], [encoded[place] for place in places], lines, subject, folder
        )
        ordered = [{**lines[self.prompts[place].question], "system": subject.name} for place in places]
        folder.write_answers(ordered)
        counts = _counts(ordered, skipped=len(self.prompts) - len(places))
        return {"metrics": {**counts, **_right_shares(ordered)}, "revisions": dict(self.revisions)}

    def _answer(
        self,
        prompts: Sequence[Prompt],
        encoded: Sequence[Sequence[int]],
        lines: dict[str, Line],
        subject: RunModel,
        folder: EvaluationFolder,
    ) -> None:
        """Answer the prompts that have no line yet, batch by batch, and give them one."""
        config = self.config
        stops = turn_ends(subject.base.prompt_format, subject.tokenizer, config.stop)
        batches = generation_batches(encoded, config.max_new_tokens, config.batch_tokens)
        what = f"{self.name} of {subject.name}"
        with progress_bar(len(prompts), done=len(lines), what=what, unit="prompt") as bar:
            for batch in batches:
                left = [row for row in batch if prompts[row].question not in lines]
                if not left:
                    continue
                written = generate_batch(
                    subject.model,
                    subject.tokenizer,
                    [encoded[row] for row in batch],
                    max_new_tokens=config.max_new_tokens,
                    device=subject.model.device,
                    sampling=self._sampling([prompts[row] for row in batch]),
                    stops=stops,
                )
                answers = dict(zip(batch, written, strict=True))
                new = [self._line(prompts[row], answers[row], subject.name) for row in left]
                folder.append_answers(new)
                lines.update({line["question"]: line for line in new})
                bar.update(len(new))

    def _sampling(self, prompts: Sequence[Prompt]) -> Sampling | None:
        config = self.config
        if config.temperature == 0:
            return None
        return Sampling(
            config.temperature, config.top_p, [prompt_seed(config.seed, prompt.question) for prompt in prompts]
        )

    def _line(self, prompt: Prompt, written: Generation, system: str) -> Line:
        answer = Answer(prompt.question, prompt.category, prompt.shown, written.text, system)
        line: Line = {
            **answer_line(answer),
            "stop_reason": written.stop_reason,
            "tokens": len(written.token_ids),
            "seed": None if self.config.temperature == 0 else prompt_seed(self.config.seed, prompt.question),
        }
        if self.config.kind == PROBES:
            line["right"] = _RULES[prompt.question].is_right(written.text)
        return line


_RULES = {probe.name: probe for probe in PROBE_SET}


def prompt_tasks(sets: Mapping[str, PromptSetConfig], *, data_dir: Path, cache_dir: Path) -> list[PromptTask]:
    """Read every set of prompts, before any model is loaded.

    Raises:
        DataError: one is missing or broken.
    """
    tasks = []
    for name, config in sets.items():
        revisions: dict[str, str] = {}
        prompts = read_prompts(name, config, data_dir=data_dir, cache_dir=cache_dir, revisions=revisions)
        tasks.append(PromptTask(name, config, prompts, revisions))
    return tasks


def _counts(lines: Sequence[Line], skipped: int) -> dict[str, float]:
    reasons = Counter(line["stop_reason"] for line in lines)
    tokens = sum(line["tokens"] for line in lines)
    return {
        "answers": len(lines),
        "skipped_too_long": skipped,
        "tokens_per_answer": tokens / len(lines) if lines else float("nan"),
        **{f"ended_by_{reason}": reasons[reason] for reason in ("eos", "turn", "length")},
    }


def _right_shares(lines: Sequence[Line]) -> dict[str, float]:
    """Return the share of answers that keep their rules, by category and over all; nothing without rules."""
    found: dict[str, list[bool]] = {}
    for line in lines:
        if "right" in line:
            found.setdefault(line["category"], []).append(line["right"])
    shares = {f"right/{category}": sum(rights) / len(rights) for category, rights in found.items()}
    every = [right for rights in found.values() for right in rights]
    return {**shares, **({"right": sum(every) / len(every)} if every else {})}
