"""Tokens per second of one batch with 1, 8 and 64 adapters, ours and PEFT's mixed batch, in the same run.

    python tests/benchmarks/serving.py [--adapters 1,8,64] [--rows 64] [--prompt 8] [--tokens 12] [--rank 16]

The model is SmolLM2-135M with random adapters on every linear layer; every row has the same number of tokens, read and
written greedily, and nothing ends early. `nf4` multiplies by the packed weights, `nf4, expanded` by a dense copy of
them as serving does with a small model, and PEFT by the same dense values in a plain model of transformers, through
`generate(adapter_names=...)`. A pass before the timed one makes the adapters ready and builds their stack; what that
takes is told apart.
"""

import argparse
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qlora_lab.adapters.placement import linear_names
from qlora_lab.config import hardware
from qlora_lab.config.schema import OpenConfig, QuantConfig
from qlora_lab.evaluation.candidates import alone, asked_base
from qlora_lab.evaluation.run_model import RunModel, open_model
from qlora_lab.models.load import load_model
from qlora_lab.quant.linear import QuantizedLinear, cached_weights
from qlora_lab.serving.batch import Batch
from qlora_lab.serving.shared_base import SharedBase
from qlora_lab.wheels import default_cache_dir
from tests.helpers import composed

SETTINGS = '{"peft_type": "LORA", "r": %d, "lora_alpha": %d, "base_model_name_or_path": "smollm2_135m"}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", default="1,8,64")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=8, help="tokens")
    parser.add_argument("--tokens", type=int, default=12, help="written to each row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--no-peft", action="store_true")
    options = parser.parse_args()
    counts = [int(count) for count in options.adapters.split(",")]
    config = composed("model=smollm2_135m")
    base = asked_base(OpenConfig(model=config.model, quant=QuantConfig(), device="cpu"), hardware.detect())
    opened = open_model(alone(base, Path("runs")))
    prompts = torch.randint(1000, 40000, (options.rows, options.prompt), generator=torch.Generator().manual_seed(0))
    plain = None if options.no_peft else dense_copy(opened)
    print(f"{options.rows} rows, {options.prompt} tokens read and {options.tokens} written, rank {options.rank}, "
          f"{torch.get_num_threads()} threads, {base.compute_dtype}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        found = ours(opened, Path(folder), prompts, counts, options)
        if plain is not None:
            found |= theirs(plain, Path(folder), prompts, counts, options)
    one = {way: speed for (way, count), speed in found.items() if count == counts[0]}
    for (way, count), speed in found.items():
        print(f"{way:16} {count:3} adapters {speed:8.1f} tokens/s  {speed / one.get(way, speed):5.2f} of one adapter's"
              + (f"  {speed / found['PEFT', count]:5.2f} of PEFT's" if ("PEFT", count) in found else ""))  # fmt: skip


def ours(opened: RunModel, folder: Path, prompts: Tensor, counts: list[int], options: Any) -> dict[Any, float]:
    linears = {name: opened.model.get_submodule(name) for name in linear_names(opened.model)}
    shared = SharedBase(opened, folder)
    for number in range(max(counts)):
        write_adapter(folder / f"a{number}", linears, options.rank, number)
        shared.register(f"a{number}", folder / f"a{number}")
    print(f"bytes of a further adapter: {shared.pool.registered['a0'].ready_bytes:,}; in a mixed batch as many again")
    found: dict[Any, float] = {}
    written = prompts.shape[0] * options.tokens
    for way, kept in (("nf4", nullcontext()), ("nf4, expanded", cached_weights(opened.model))):
        with kept:
            for count in [0, *counts]:
                names = [f"a{row % count}" if count else None for row in range(options.rows)]
                first_s = timed(generate, shared, prompts, names, 2)
                found[way, count] = written / timed(generate, shared, prompts, names, options.tokens)
                again_s = timed(generate, shared, prompts, names, 2)
                print(
                    f"{way}, {count} adapters: {found[way, count]:.1f} tokens/s; {first_s - again_s:.2f} s to be ready "
                    "and stacked",
                    flush=True,
                )
    switches = 1000
    started = time.perf_counter()
    for number in range(switches):
        shared.switch(f"a{number % max(counts)}")
    switched = (time.perf_counter() - started) / switches
    print(f"a switch takes {switched * 1e6:.1f} microseconds", flush=True)
    return found


def generate(shared: SharedBase, prompts: Tensor, names: list[str | None], tokens: int) -> None:
    batch = Batch(shared)
    logits = batch.join(prompts.tolist(), names)
    for _ in range(tokens - 1):
        logits = batch.step(logits.argmax(1).tolist())


def theirs(plain: Any, folder: Path, prompts: Tensor, counts: list[int], options: Any) -> dict[Any, float]:
    warnings.simplefilter("ignore")
    settings = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: PeftModel = get_peft_model(plain, settings, adapter_name="a0")
    fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}

    def write(names: list[str], tokens: int) -> None:
        with torch.inference_mode():
            mask = torch.ones_like(prompts)
            model.generate(input_ids=prompts, attention_mask=mask, adapter_names=names, max_new_tokens=tokens, **fixed)

    found, loaded = {}, 1
    for count in counts:
        for number in range(loaded, count):
            model.load_adapter(str(folder / f"a{number}"), adapter_name=f"a{number}", low_cpu_mem_usage=True)
        loaded = max(loaded, count)
        model.eval()
        names = [f"a{row % count}" for row in range(options.rows)]
        write(names, 2)
        found["PEFT", count] = prompts.shape[0] * options.tokens / timed(write, names, options.tokens)
        print(f"PEFT, {count} adapters: {found['PEFT', count]:.1f} tokens/s", flush=True)
    return found


def dense_copy(opened: RunModel) -> Any:
    """Return a plain model of transformers with the values that the quantized one computes with."""
    plain = load_model(
        opened.base.model,
        QuantConfig(format="none", double_quant=False),
        compute_dtype=torch.float32,
        device="cpu",
        cache_dir=default_cache_dir(),
        seed=0,
    )
    with torch.no_grad():
        for name, layer in opened.model.named_modules():
            if isinstance(layer, QuantizedLinear):
                plain.get_submodule(name).weight.copy_(layer.dequantize(torch.float32))
    return plain


def write_adapter(folder: Path, linears: dict[str, Any], rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = {}
    for name, layer in linears.items():
        for matrix, shape in (("lora_A", (rank, layer.in_features)), ("lora_B", (layer.out_features, rank))):
            key = f"base_model.model.{name}.{matrix}.weight"
            tensors[key] = torch.empty(shape).normal_(0, 0.02, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = SETTINGS % (rank, rank)
    targets = sorted({name.rpartition(".")[2] for name in linears})
    listed = ", ".join(f'"{target}"' for target in targets)
    (folder / "adapter_config.json").write_text(f'{settings[:-1]}, "target_modules": [{listed}]}}')


def timed(work: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
