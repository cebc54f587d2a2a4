"""What the arms wrote for the same held-out prompts, chosen without a look at who was right."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.load import load_rows
from analysis.sources.run_folders import read_json_lines
from analysis.study.answer import Answer
from qlora_lab.errors import RunFolderError

SAMPLES = 4
MOST_ARMS = 8
CHATML = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")  # as data/prompts.py, which needs torch
Generations = dict[str, dict[str, Any]]  # by the row's key


@dataclass(frozen=True)
class Written:
    arm: str
    run_id: str
    text: str
    exact_match: bool | None
    stopped_by_length: bool


@dataclass(frozen=True)
class Sample:
    prompt: str
    target: str
    written: list[Written]


def choose_samples(answer: Answer, count: int = SAMPLES) -> list[Sample]:
    """Return what the first run of each arm wrote for the first rows that all of them answered.

    One row of each task family comes first, in the order of the file, so that every kind is seen.
    """
    runs: list[tuple[str, str, Generations]] = []
    families: dict[str, object] = {}
    prompt_format: object = None  # of the run whose prompts are shown
    for arm in answer.arms:
        if len(runs) == MOST_ARMS:
            break
        for run in answer.counted_runs(arm).head(1).to_dict("records"):
            folder = Path(str(run["folder"]))
            found = _generations(folder)
            if found:
                prompt_format = run.get("config.model.prompt_format") if not runs else prompt_format
                runs.append((arm, str(run["run_id"]), found))
                families = families or _families(folder)
    if not runs:
        return []
    shared = [key for key in runs[0][2] if all(key in found for _, _, found in runs)]
    return [_sample(key, runs, prompt_format) for key in _varied(shared, families, count)]


def _generations(folder: Path) -> Generations:
    path = folder / "generations" / "held_out.jsonl"
    if not path.exists():
        return {}
    return {str(line["key"]): line for _, line in read_json_lines(path) if line is not None and "key" in line}


def _families(folder: Path) -> dict[str, object]:
    try:
        rows = load_rows(folder)
    except RunFolderError:  # already a note of the answer
        return {}
    return dict(zip(rows["key"], rows["family"], strict=True))


def _varied(keys: list[str], families: dict[str, object], count: int) -> list[str]:
    first_of_family = list({families.get(key): key for key in reversed(keys)}.values())[::-1]
    others = [key for key in keys if key not in first_of_family]
    return sorted([*first_of_family, *others][:count], key=keys.index)


def _sample(key: str, runs: list[tuple[str, str, Generations]], prompt_format: object) -> Sample:
    row = runs[0][2][key]
    written = [
        Written(
            arm=arm,
            run_id=run_id,
            text=str(found[key].get("generation", "")),
            exact_match=found[key].get("exact_match"),
            stopped_by_length=found[key].get("stop_reason") == "length",
        )
        for arm, run_id, found in runs
    ]
    prompt = without_markup(str(row.get("prompt", "")), prompt_format)
    return Sample(prompt, target=str(row.get("target", "")), written=written)


def without_markup(prompt: str, prompt_format: object) -> str:
    """Return the source alone, where the run's configuration says what was put around it.

    A model's own chat template is not in the run folder, so such prompts are shown as they are.
    """
    if prompt_format == "chatml" and prompt.startswith(CHATML[0]) and prompt.endswith(CHATML[1]):
        return prompt[len(CHATML[0]) : -len(CHATML[1])]
    return prompt
