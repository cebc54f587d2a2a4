"""Loading holds what comes of it and one tensor, from shards of either kind, and next to nothing from the cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MB = 2**20
# One process that has everything imported, and a child of it for each way to load, which tells its own peak.
MEASURE = """
import ctypes, json, os, re, sys, threading, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from qlora_lab.config.schema import ModelConfig, QuantConfig
from qlora_lab.models.load import load_model

torch.set_num_threads(1)
LAYERS, HIDDEN, WIDE, SHARDS, root = *map(int, sys.argv[1:5]), Path(sys.argv[5])
CONFIG = LlamaConfig(vocab_size=64, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS,
                     num_attention_heads=8, num_key_value_heads=8)

def write(folder, suffix):
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in LlamaForCausalLM(CONFIG).state_dict().items()}
    folder.mkdir()
    CONFIG.save_pretrained(folder)
    names, where = list(shapes), {}
    for shard in range(SHARDS):
        file = f"{'model' if suffix == 'safetensors' else 'pytorch_model'}-{shard + 1:05}-of-{SHARDS:05}.{suffix}"
        tensors = {name: torch.full(shapes[name], 0.5, dtype=torch.float16) for name in names[shard::SHARDS]}
        where |= dict.fromkeys(tensors, file)
        if suffix == "safetensors":
            save_file(tensors, folder / file, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / file)
    index = "model.safetensors.index.json" if suffix == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))

def anonymous():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak_of_loading(folder, cached):
    stopped, highest, start = threading.Event(), [0], anonymous()
    def watch():
        while not stopped.is_set():
            highest[0] = max(highest[0], anonymous())
            time.sleep(0.0005)
    watcher = threading.Thread(target=watch)
    watcher.start()
    config = ModelConfig("m", "folder", path=str(folder), max_length_tokens=64, content_sha256="one")
    began = time.process_time()
    model = load_model(config, QuantConfig(), compute_dtype=torch.float32, device="cpu", cache_dir=root / "cache",
                       seed=0, cache_bases=cached)
    took = time.process_time() - began
    stopped.set()
    watcher.join()
    tensors = [*model.parameters(), *model.buffers()]
    return {"peak": highest[0] - start, "result": sum(t.nbytes for t in tensors), "cpu_s": round(took, 1)}

for name, suffix, cached in (("bin", "bin", False), ("safetensors", "safetensors", False),
                             ("filling", "safetensors", True), ("cached", "safetensors", True)):
    # files are written by a child too: what this process allocates, its children would use again unnoticed
    child = os.fork()
    if child == 0:
        if not (root / suffix).exists():
            write(root / suffix, suffix)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    child = os.fork()
    if child == 0:
        print(json.dumps({"name": name, **peak_of_loading(root / suffix, cached)}), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def peaks(folder: Path, layers: int, hidden: int, wide: int, shards: int) -> dict[str, dict[str, float]]:
    sizes = [str(size) for size in (layers, hidden, wide, shards)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *sizes, str(folder)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("name"): line for line in found}


USUAL = 4, 2048, 5504, 4  # layers, hidden, wide, shards: 405 MB of float16, twice on the disk
LARGE = 8, 4096, 11008, 4  # 3.2 GB, twice on the disk
FREE_GB = 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the anonymous memory of /proc")
@pytest.mark.parametrize("size", [USUAL, LARGE], ids=["usual", "multi-gigabyte"])
def test_the_peak_of_loading_is_the_result_and_one_tensor(
    size: tuple[int, int, int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if size == LARGE and shutil.disk_usage(tmp_path).free < FREE_GB * 1e9:
        pytest.skip(f"the disk has less than {FREE_GB} GB free")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    measured = peaks(folder, *size)
    shutil.rmtree(folder)  # pytest would keep it
    with capsys.disabled():
        for name, line in measured.items():
            sizes = f"{line['peak'] / MB:.0f} MB more at the peak, {line['result'] / MB:.0f} MB of tensors"
            print(f"\n{name}: {line['cpu_s']} s of CPU, {sizes}", end="")
    _, hidden, wide, _ = size
    tensor = hidden * wide * 4  # in the compute dtype, before it is quantized
    slack = 16 * MB  # modules, the reader of the files, what the allocator keeps
    for name in ("bin", "safetensors", "filling"):
        assert measured[name]["peak"] < measured[name]["result"] + tensor + slack, measured
    assert measured["cached"]["peak"] < slack, measured  # maps of the file
