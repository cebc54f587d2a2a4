"""Run folders and studies as the training side writes them, with numbers that a test chooses."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from analysis.load import load_runs
from analysis.study.answer import Answer, compare

FAMILIES = ("add_two_numbers", "sort_four_words", "largest_of_four", "reverse_list")


@dataclass
class FakeRun:
    """What a run folder is to hold; `mean_loss` sets how well it does on every row."""

    run_id: str
    data: str = "procedural_clean_128"
    seed: int = 0
    state: str = "finished"
    mean_loss: float = 0.5
    noise: float = 0.02  # of each row's loss a token, on its own for each run
    rows: int = 128
    steps: int = 30
    sets: Sequence[str] = ("held_out",)
    exact_match: bool = True
    token_scale: int = 1  # target tokens of every row times this, as with another tokenizer
    byte_scale: int = 1
    metrics: dict[str, float | None] = field(default_factory=dict)  # in result.json instead of what the rows give
    counts: dict[str, Any] = field(default_factory=dict)  # of the data, in result.json
    config: dict[str, Any] = field(default_factory=dict)  # merged into the groups
    axes: dict[str, str] = field(default_factory=dict)  # in the plan; empty: data and seed


def write_run(runs_dir: Path, run: FakeRun) -> Path:
    """Write the folder of a run that is finished, failed, interrupted, running or not_started."""
    folder = runs_dir / run.run_id
    config: dict[str, Any] = {
        "run_id": run.run_id,
        "model": {"name": "smollm2_135m", "source": "wheel"},
        "quant": {"format": "nf4", "block_size": 64, "double_quant": True},
        "adapter": {"kind": "lora", "rank": 8, "placement": "all_linear"},
        "data": {"name": run.data, "source": {"kind": "procedural", "families": list(FAMILIES)}},
        "optim": {"learning_rate": 2e-4},
        "seed": run.seed,
    }
    for group, values in run.config.items():
        config[group] = {**config.get(group, {}), **values}
    write(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    if run.state == "not_started":
        return folder
    write_json(folder / "environment.json", _environment())
    write_json(folder / "status.json", _status(run.state))
    losses = _curve(run)
    lines = [
        {"step": step, "time_s": 1.5 * step, "train/loss": loss, "train/tokens": 240 * step}
        for step, loss in enumerate(losses, start=1)
    ]
    if run.state != "finished":
        write_lines(folder / "metrics.jsonl", lines[:12])
        return folder
    rows = _rows(run)
    metrics = _metrics(run, rows) | run.metrics
    evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
    write_lines(folder / "metrics.jsonl", [*lines, {"step": run.steps, "time_s": 46.0, **evaluation}])
    write_lines(folder / "evaluation" / "rows.jsonl", rows)
    write_lines(folder / "generations" / "held_out.jsonl", _generations(run, rows))
    result = {"metrics": metrics, "trainable_parameters": 2_442_240, "total_parameters": 136_957_248}
    data = {"train": {"rows": 128}} | run.counts
    write_json(folder / "result.json", {**result, "data": data, "adapter_sha256": "ab" * 32})
    return folder


def write_study(runs_dir: Path, runs: Sequence[FakeRun], plan_id: str = "0a1b2c3d", **study: Any) -> Path:
    """Write the runs and the folder of their plan; returns that folder."""
    for run in runs:
        if run.state != "missing":
            write_run(runs_dir, run)
    plan: dict[str, Any] = {
        "study": {
            "name": "dataset_quality",
            "question": "Does a small clean data set beat a sixteen times larger one with half its answers wrong?",
            "metric": "eval/loss",
            "goal": "min",
            **study,
        },
        "paper": study.pop("paper", None),
        "axes": list(runs[0].axes or {"data": "", "seed": ""}),
        "fixed": {"model.name": "smollm2_135m", "quant.format": "nf4", "adapter.rank": 8, "optim.learning_rate": 2e-4},
        "runs": [
            {
                "run_id": run.run_id,
                "axes": run.axes or {"data": run.data, "seed": str(run.seed)},
                "status_at_plan": "new",
            }
            for run in runs
        ],
        "created_at": "2026-01-31T12:00:00+00:00",
        "command": "python -m qlora_lab.sweep +experiment=dataset_quality",
    }
    folder = runs_dir / "studies" / plan["study"]["name"] / plan_id
    write_json(folder / "plan.json", plan)
    return folder


def two_arms(seeds: int = 2, gap: float = 0.31) -> list[FakeRun]:
    """Return the embedded study: a clean arm that is ahead by `gap` nats, and a half-wrong one."""
    clean = [FakeRun(f"clean{seed}", seed=seed, mean_loss=0.43 + 0.01 * seed) for seed in range(seeds)]
    wrong = [
        FakeRun(f"wrong{seed}", "procedural_half_wrong_2048", seed, mean_loss=0.43 + gap - 0.01 * seed)
        for seed in range(seeds)
    ]
    return clean + wrong


def row_key(number: int) -> str:
    return f"{number:016x}"


def _rows(run: FakeRun) -> list[dict[str, Any]]:
    shared = np.random.default_rng(7)  # the rows are the same in every run
    own = np.random.default_rng([run.seed, *run.run_id.encode()])
    rows = []
    for name in run.sets:
        tokens = shared.integers(2, 12, run.rows)
        hardness = shared.gamma(4, 0.25, run.rows)
        hardness /= (hardness * tokens).sum() / tokens.sum()
        loss = np.maximum(run.mean_loss * hardness + run.noise * own.standard_normal(run.rows), 1e-3)
        right = own.random(run.rows) < np.exp(-2 * loss)
        rows += [
            {
                "set": name,
                "key": row_key(number),
                "family": FAMILIES[number % len(FAMILIES)],
                "exact_match": bool(right[number]) if run.exact_match else None,
                "loss_sum": float(loss[number] * tokens[number]),
                "target_tokens": int(run.token_scale * tokens[number]),
                "target_bytes": int(run.byte_scale * 3 * tokens[number]),
            }
            for number in range(run.rows)
        ]
    return rows


def _metrics(run: FakeRun, rows: list[dict[str, Any]]) -> dict[str, float]:
    by_set: dict[str, dict[str, float]] = {}
    for name in run.sets:
        of_set = [row for row in rows if row["set"] == name]
        nats = sum(row["loss_sum"] for row in of_set)
        by_set[name] = {
            "loss": nats / sum(row["target_tokens"] for row in of_set),
            "bits_per_byte": nats / np.log(2) / sum(row["target_bytes"] for row in of_set),
        }
        if run.exact_match:
            by_set[name]["exact_match"] = float(np.mean([row["exact_match"] for row in of_set]))
    names = by_set[run.sets[0]]
    metrics = {f"eval/{name}": float(np.mean([found[name] for found in by_set.values()])) for name in names}
    if list(run.sets) != ["held_out"]:
        metrics |= {f"eval/{s}/{name}": value for s, found in by_set.items() for name, value in found.items()}
    return metrics | {
        "train/tokens": 7217 + 85 * run.seed,
        "train/steps": run.steps,
        "train/time_s": 45.2 + run.seed,
        "eval/time_s": 14.0,
        "memory/peak_rss_bytes": 1_450_000_000,
    }


def _curve(run: FakeRun) -> list[float]:
    rng = np.random.default_rng([run.seed, *run.run_id.encode()])
    steps = np.arange(1, run.steps + 1)
    falling = 2.4 * np.exp(-steps / max(2.0, 0.2 * run.steps)) + run.mean_loss
    return [float(loss) for loss in falling * (1 + 0.15 * rng.standard_normal(run.steps))]


def _generations(run: FakeRun, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "set": row["set"],
            "key": row["key"],
            "prompt": f"Sort these words: pear, apple & <b>fig</b>, row {number}.",
            "target": "apple, fig, pear",
            "generation": "apple, fig, pear" if row["exact_match"] else "pear, <script>alert(1)</script> fig",
            "stop_reason": "eos",
            "exact_match": row["exact_match"],
        }
        for number, row in enumerate(rows[:12])
    ]


def _environment() -> dict[str, Any]:
    return {
        "packages": {"torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "device": "cpu",
        "compute_dtype": "float32",
        "threads": 1,
        "kernels": "reference (pure torch)",
        "cpu": "Some CPU @ 2.00 GHz",
    }


def _status(state: str) -> dict[str, Any]:
    error = None
    if state == "failed":
        message = "the loss is not finite at step 12 (nan in lora_B <model.layers.3>)"
        error = {"type": "TrainingError", "message": message, "traceback": "Traceback ...\nTrainingError: nan\n"}
    ended = None if state == "running" else "2026-01-31T12:01:04+00:00"
    times = {"started_at": "2026-01-31T12:00:00+00:00", "ended_at": ended}
    return {"state": state, **times, "host": "here", "pid": 1, "attempt": 1, "error": error}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value))


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(record) + "\n" for record in records))


def answered(
    folder: Path, runs: Sequence[FakeRun], metric: str = "eval/loss", goal: str = "min", axes: str = "data"
) -> Answer:
    for run in runs:
        write_run(folder, run)
    return compare(load_runs(folder), [axes, "seed"], metric, goal)


def runs_of(arm: str, losses: dict[int, float], **fields: Any) -> list[FakeRun]:
    """Return an arm's runs, one a seed, that hardly differ but in what is asked for."""
    return [FakeRun(f"{arm}{seed}", arm, seed, mean_loss=loss, noise=0.001, **fields) for seed, loss in losses.items()]
