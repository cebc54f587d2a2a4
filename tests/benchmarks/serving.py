"""Tokens per second of one batch with 1, 8 and 64 adapters, ours and PEFT's mixed batch, in the same run.

    python tests/benchmarks/serving.py [--adapters 1,8,64] [--rows 64] [--prompt 4] [--tokens 8] [--rank 16]
        [--rounds 2] [--dtype float32] [--cpu-time]

The model is SmolLM2-135M with random adapters on every linear layer; every row has the same number of tokens, read and
written greedily, and nothing ends early. `packed` multiplies by the 4-bit weights, `expanded` by a dense copy of them
as serving does with a small model, and `PEFT` by the same dense values in a plain model of transformers, through
`generate(adapter_names=...)`; all compute in the same dtype, but that PEFT keeps its adapters in float32. For each
number of adapters the ways take turns, after a pass that makes adapters ready and builds their stack; the figures are
medians of the rounds, and it is said how many rows all ways wrote alike. Loading is not measured.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qlora_lab.adapters.placement import linear_names
from qlora_lab.config import hardware
from qlora_lab.config.schema import OpenConfig, QuantConfig
from qlora_lab.evaluation.candidates import alone, asked_base
from qlora_lab.evaluation.run_model import RunModel, open_model
from qlora_lab.models.load import load_model
from qlora_lab.ops.blockwise.checks import DTYPES
from qlora_lab.quant.linear import QuantizedLinear, cached_weights
from qlora_lab.serving.batch import Batch
from qlora_lab.serving.shared_base import SharedBase
from qlora_lab.wheels import default_cache_dir
from tests.helpers import composed

SETTINGS = '{"peft_type": "LORA", "r": %d, "lora_alpha": %d, "base_model_name_or_path": "smollm2_135m"}'
WARM_UP_TOKENS = 2
Write = Callable[[Sequence[str], int], Tensor]  # adapters of the rows, tokens -> (rows, tokens) written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", default="1,8,64")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=4, help="tokens")
    parser.add_argument("--tokens", type=int, default=8, help="written to each row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="in which all compute")
    parser.add_argument(
        "--cpu-time", action="store_true", help="instead of the clock's; for one thread, others computing"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    config = composed("model=smollm2_135m")
    asked = OpenConfig(model=config.model, quant=QuantConfig(), device="cpu", compute_dtype=options.dtype)
    base = asked_base(asked, hardware.detect())
    opened = open_model(alone(base, Path("runs")))
    prompts = torch.randint(1000, 40000, (options.rows, options.prompt), generator=torch.Generator().manual_seed(0))
    print(f"{options.rows} rows, {options.prompt} tokens read and {options.tokens} written, rank {options.rank}, "
          f"{torch.get_num_threads()} threads, {base.compute_dtype}, medians of {options.rounds} rounds"
          + ", seconds of CPU" * options.cpu_time, flush=True)  # fmt: skip
    counts = [int(count) for count in options.adapters.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(dense_copy(opened), Path(folder), prompts, options.rank)
        ours = Ours(opened, Path(folder), prompts, max(counts), options.rank)
        speeds: dict[str, list[float]] = {}
        for count in counts:
            theirs.load(count)
            for way, speed in measured(ours, theirs, count, options).items():
                speeds.setdefault(way, []).append(speed)
    print(f"{'adapters':10}" + "".join(f"{count:>8}" for count in counts))
    for way, found in speeds.items():
        print(f"{way:10}" + "".join(f"{speed:8.0f}" for speed in found) + " tokens/s")
    for way in ours.ways:
        ratios = "".join(f"{mine / other:8.2f}" for mine, other in zip(speeds[way], speeds["PEFT"], strict=True))
        print(f"{way:10}{ratios} of PEFT's")
    print(f"bytes of a further adapter: {ours.adapter_bytes:,}; in a mixed batch as many again")
    print(f"a switch takes {ours.switch_s() * 1e6:.1f} microseconds; all this {time.perf_counter() - started:.0f} s")


def measured(ours: "Ours", theirs: "Theirs", count: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the tokens per second of each way with so many adapters."""
    names = [f"a{row % count}" for row in range(options.rows)]
    ways: dict[str, tuple[Write, Callable[[], AbstractContextManager[object]]]] = {
        **{way: (ours.write, context) for way, context in ours.ways.items()},
        "PEFT": (theirs.write, nullcontext),
    }
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    written: dict[str, Tensor] = {}
    for turn in range(options.rounds + 1):
        for way, (write, context) in ways.items():
            with context():
                begun = clock()
                written[way] = write(names, options.tokens if turn else WARM_UP_TOKENS)
                if turn:
                    seconds[way].append(clock() - begun)
    alike = (written["packed"] == written["PEFT"]).all(1) & (written["expanded"] == written["PEFT"]).all(1)
    speeds = {way: options.rows * options.tokens / statistics.median(found) for way, found in seconds.items()}
    told = ", ".join(f"{way} {', '.join(f'{one:.2f}' for one in found)} s" for way, found in seconds.items())
    print(f"{count} adapters: {told}; {int(alike.sum())} of {len(alike)} rows are the same in all ways", flush=True)
    return speeds


class Ours:
    """One quantized base, and random adapters in a folder."""

    def __init__(self, opened: RunModel, folder: Path, prompts: Tensor, count: int, rank: int) -> None:
        linears = {name: opened.model.get_submodule(name) for name in linear_names(opened.model)}
        self.shared, self._prompts, self._count = SharedBase(opened, folder), prompts.tolist(), count
        self.ways = {"packed": nullcontext, "expanded": lambda: cached_weights(opened.model)}
        for number in range(count):
            write_adapter(folder / f"a{number}", linears, rank, number)
            self.shared.register(f"a{number}", folder / f"a{number}")

    @property
    def adapter_bytes(self) -> int:
        return self.shared.pool.registered["a0"].ready_bytes

    def write(self, names: Sequence[str], tokens: int) -> Tensor:
        batch, written = Batch(self.shared), []
        logits = batch.join(self._prompts, names)
        for _ in range(tokens - 1):
            written.append(logits.argmax(1))
            logits = batch.step(written[-1].tolist())
        return torch.stack([*written, logits.argmax(1)], 1)

    def switch_s(self, times: int = 1000) -> float:
        begun = time.perf_counter()
        for number in range(times):
            self.shared.switch(f"a{number % self._count}")
        return (time.perf_counter() - begun) / times


class Theirs:
    """PEFT on a plain model, with as many of the adapters in the folder as were asked for."""

    def __init__(self, plain: Any, folder: Path, prompts: Tensor, rank: int) -> None:
        self._settings = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(plain, self._settings, adapter_name="unused")
        self._folder, self._prompts, self._loaded = folder, prompts, 0

    def load(self, count: int) -> None:
        begun = time.perf_counter()
        for number in range(self._loaded, count):
            self._add(f"a{number}")
        self._loaded = count
        self.model.eval()
        print(f"PEFT has {count} adapters after {time.perf_counter() - begun:.1f} s", flush=True)

    def _add(self, name: str) -> None:
        """Leave the model as `load_adapter` does, which walks all of it several times for every further adapter."""
        settings = replace(self._settings, init_lora_weights=False)
        tensors = load_file(self._folder / name / "adapter_model.safetensors")
        self.model.peft_config[name] = replace(settings, inference_mode=True)
        for path, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer):
                layer.update_layer(name, settings.r, lora_alpha=settings.lora_alpha, config=settings)
                for matrix in ("lora_A", "lora_B"):
                    values = nn.Parameter(tensors.pop(f"{path}.{matrix}.weight"), requires_grad=False)
                    getattr(layer, matrix)[name].weight = values
        assert not tensors, f"PEFT's model has no layers for {', '.join(tensors)}"

    @torch.inference_mode()
    def write(self, names: Sequence[str], tokens: int) -> Tensor:
        found: Tensor = self.model.generate(
            input_ids=self._prompts,
            attention_mask=torch.ones_like(self._prompts),
            adapter_names=list(names),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        return found[:, self._prompts.shape[1] :]


def dense_copy(opened: RunModel) -> Any:
    """Return a plain model of transformers with the values that the quantized one computes with."""
    plain = load_model(
        opened.base.model,
        QuantConfig(format="none", double_quant=False),
        compute_dtype=DTYPES[opened.base.compute_dtype],
        device="cpu",
        cache_dir=default_cache_dir(),
        seed=0,
    )
    with torch.no_grad():
        for name, layer in opened.model.named_modules():
            if isinstance(layer, QuantizedLinear):
                plain.get_submodule(name).weight.copy_(layer.dequantize(layer.compute_dtype))
    return plain


def write_adapter(folder: Path, linears: dict[str, Any], rank: int, seed: int, *, spread: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = {}
    for name, layer in linears.items():
        for matrix, shape in (("lora_A", (rank, layer.in_features)), ("lora_B", (layer.out_features, rank))):
            key = f"base_model.model.{name}.{matrix}.weight"
            tensors[key] = torch.empty(shape).normal_(0, spread, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = SETTINGS % (rank, rank)
    targets = sorted({name.rpartition(".")[2] for name in linears})
    listed = ", ".join(f'"{target}"' for target in targets)
    (folder / "adapter_config.json").write_text(f'{settings[:-1]}, "target_modules": [{listed}]}}')


if __name__ == "__main__":
    main()
