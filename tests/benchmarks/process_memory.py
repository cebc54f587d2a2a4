"""The memory of whole runs on a CPU beside their plans: what of a process is in `qlora_lab.memory`, and how well.

    python tests/benchmarks/process_memory.py [--threads 2] [--compute-dtype bfloat16] [--only WORD]

Each run is `python -m qlora_lab.train` in a process of its own, of SmolLM2-135M or of a model with random weights, on
rows that are as long as they may be, or a few tokens shorter. Printed are the peaks while training and of the whole
run, in MB, and by how much the plan is off.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from qlora_lab.memory.layer import Shape
from qlora_lab.memory.plan import plan_memory
from qlora_lab.runs.folder import RunFolder

ROWS, WORDS = 80, "the of and to in is that it for as with on be at by this from or have an they which one you all"
LENGTHS_OF_ROWS = 8  # so that nearly every batch has padding, as of real rows, and with it a mask
TARGET_LIMIT = "data.max_target_tokens="
LENGTHS = "data.max_source_tokens=96 data.max_target_tokens=32"
RANDOM = (
    "model=tiny_random model.architecture.hidden_size=768 model.architecture.num_layers=10 "
    "model.architecture.num_heads=12 model.architecture.num_kv_heads=12 model.architecture.feed_forward_size=2048"
)
SETTINGS = {
    "smallest": f"model=tiny_random {LENGTHS} trainer.batch_size=4",
    "4 rows": f"{LENGTHS} trainer.batch_size=4",
    "8 rows": f"{LENGTHS} trainer.batch_size=8",
    "8 micro-batches of 2": f"{LENGTHS} trainer.batch_size=16 trainer.micro_batch_size=2",
    "long rows": "data.max_source_tokens=256 data.max_target_tokens=256 trainer.batch_size=4",
    "checkpointing": f"{LENGTHS} trainer.batch_size=8 trainer.gradient_checkpointing=true",
    "not quantized": f"{LENGTHS} trainer.batch_size=8 quant=none",
    "attention": f"{LENGTHS} trainer.batch_size=2 adapter=attention",
    "last layers": f"{LENGTHS} trainer.batch_size=16 trainer.micro_batch_size=16 adapter.last_k_layers=10",
    "embeddings": f"{LENGTHS} trainer.batch_size=4 adapter.trained_modules=[embed_tokens]",
    "random weights": f"{RANDOM} {LENGTHS} trainer.batch_size=8",
    "full fine-tuning": f"{RANDOM} {LENGTHS} trainer.batch_size=8 adapter=none quant=none",
}


def write_rows(path: Path, target_tokens: int) -> None:
    """Write rows whose prompts are cut, and whose targets are as long as they may be or up to 7 words shorter."""
    rng, words = random.Random(0), WORDS.split()
    rows = [
        {
            "input": f"{number} {' '.join(rng.choices(words, k=600))}",
            "output": " ".join(rng.choices(words, k=target_tokens - 1 - number % LENGTHS_OF_ROWS)),  # a token each
        }
        for number in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def target_tokens(settings: str) -> int:
    return next(int(each.partition("=")[2]) for each in settings.split() if each.startswith(TARGET_LIMIT))


def run(settings: str, folder: Path, threads: int, dtype: str) -> RunFolder:
    """Execute a run of two steps, which must be the only one in `folder`."""
    command = [
        *(sys.executable, "-m", "qlora_lab.train", f"paths.runs_dir={folder}", "tracking=none", "trainer.device=cpu"),
        *("data=file", f"data.source.path={folder.parent}/rows.jsonl", "data.source.template=input_output"),
        *("evaluation.rows=16", "evaluation.max_source_tokens=96", "evaluation.max_target_tokens=32"),
        *("trainer.group_by_length=false", "trainer.max_steps=2", "trainer.checkpoint_every_steps=100"),
        *(f"trainer.threads={threads}", f"trainer.compute_dtype={dtype}", *settings.split()),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    (path,) = folder.iterdir()
    return RunFolder(path)


def compared(name: str, folder: RunFolder) -> str:
    config, result = folder.config(), folder.result()
    longest = result["data"]["train"]["longest_row_tokens"]
    assert isinstance(config.trainer.micro_batch_size, int)
    plan = plan_memory(config, Shape(config.trainer.micro_batch_size, longest))
    measured = [result["metrics"][f"{part}/peak_rss_bytes"] for part in ("train", "memory")]
    cells = [
        f"{peak / 1e6:7,.0f} {planned / 1e6:7,.0f} {planned / peak - 1:+6.1%}"
        for peak, planned in zip(measured, (plan.training, plan.total), strict=True)
    ]
    return f"{name:22} {plan.tensors / 1e6:7,.0f}   {'   '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    given = parser.parse_args()
    print(f"{'MB':22} tensors   training    plan    off   whole run   plan    off")
    for name, settings in SETTINGS.items():
        if given.only in name:
            with tempfile.TemporaryDirectory() as folder:
                write_rows(Path(folder) / "rows.jsonl", target_tokens(settings))
                finished = run(settings, Path(folder) / "runs", given.threads, given.compute_dtype)
                print(compared(name, finished), flush=True)


if __name__ == "__main__":
    main()
