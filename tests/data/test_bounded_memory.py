"""Hundreds of thousands of rows are read, tokenized and served in memory that grows by an index of them alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FEW, MANY = 10_000, 100_000
# Of each row a process may hold where its tokens lie, how many they are, and which of them it drew; a row itself, as
# text or as tokens in objects of Python, takes several times that.
BYTES_PER_ROW = 150  # 120 are measured
SLACK_BYTES = 8e6  # by which the peak of one process differs from that of the next

# Anonymous memory: pages of mapped files are the system's to take back. What is held stays long enough to be seen.
PART = """
import re, sys, threading, time
from pathlib import Path

import torch

from qlora_lab.config.schema import DataConfig, EvaluationConfig, SourceConfig
from qlora_lab.data.batching import plan_steps
from qlora_lab.data.prepare import prepare_data
from qlora_lab.models.byte_level import ByteLevelTokenizer
from qlora_lab.train.steps import StepDataset, step_loader

def watch():
    while True:
        status = Path("/proc/self/status").read_text()
        seen.append(1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
        time.sleep(0.01)

seen, folder = [], Path(sys.argv[1])
threading.Thread(target=watch, daemon=True).start()
data = prepare_data(
    DataConfig("large", SourceConfig("file", template="input_output", path=str(folder / "rows.jsonl"))),
    EvaluationConfig(rows=16),
    prompt_format="chatml",
    tokenizer=ByteLevelTokenizer(),
    seed=0,
    cache_dir=folder / "cache",
    data_dir=folder,
)
plan = plan_steps(data.train_lengths, batch_size=16, max_steps=100, max_tokens=None, seed=0, group_by_length=True)
with step_loader(StepDataset(data.train, plan, 0, 16, 0), torch.device("cpu")) as steps:
    served = sum(len(batch.micro_batches[0]["input_ids"]) for batch in steps)
print(len(data.train), served, max(seen))
"""


def peak_bytes(folder: Path, rows: int) -> int:
    """Return the most anonymous memory of a process that fills the cache with so many rows and loads some of them."""
    folder.mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(rows):
            file.write(json.dumps({"input": f"What is {number}?", "output": f"It is {7919 * number % 99_991}."}) + "\n")
    command = [sys.executable, "-c", PART, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    trained, served, peak = map(int, done.stdout.split())
    assert (trained, served) == (rows - 16, 1600)
    return peak


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_ten_times_the_rows_take_an_index_of_them_more(tmp_path: Path) -> None:
    few, many = (peak_bytes(tmp_path / str(rows), rows) for rows in (FEW, MANY))
    assert many - few < BYTES_PER_ROW * (MANY - FEW) + SLACK_BYTES
