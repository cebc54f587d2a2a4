"""python -m qlora_lab.memory model=llama_65b trainer.micro_batch_size=1 ...: what a run will need, before it starts."""

from dataclasses import asdict, replace

from omegaconf import DictConfig

from qlora_lab.config import hardware
from qlora_lab.config.command import command
from qlora_lab.config.load import from_hydra
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import AUTO, RunConfig
from qlora_lab.memory.fit import CARDS_GB, RESERVED_GB, largest_rows, longest_tokens
from qlora_lab.memory.layer import Shape
from qlora_lab.memory.plan import paged_bytes, plan_memory
from qlora_lab.memory.room import largest_micro_batch_size, room_of

GB, GIB = 1e9, 2**30  # a card of 24 GB has 24 GiB
NOTES = {
    "packed_weights": "codes of the quantized weights",
    "absmax": "first level, of each block",
    "nested_absmax": "second level, and offsets",
    "dense_weights": "norms, biases, positions, and what else is not quantized",
    "adapters": "in adapter.dtype, and what is trained beside them in float32",
    "activations": "kept for the backward pass",
    "loss": "logits of a chunk, and gradients of hidden states",
    "workspace": "of one layer's backward pass, or of the embeddings'",
    "not_at_once": "of these, what is never there together",
    "evaluation": "above training: weights that stay expanded while rows are scored",
    "process": "Python, libraries, tokenizer, and what the heap has free: measured",
}
DEVICES = {"cuda": "GPU", "cpu": "CPU"}
COLUMNS = [("cuda", True), ("cuda", False), ("cpu", True), ("cpu", False)]  # device, gradient checkpointing


def report(own: RunConfig, on: dict[str, RunConfig]) -> str:
    """Return the components of a run's peak on both devices, with checkpointing and without, and what fits cards.

    Args:
        own: the run as it is, resolved.
        on: the same run on each device, resolved.
    """
    rows, tokens = own.trainer.micro_batch_size or 1, own.data.longest_row_tokens
    configs = {(device, checkpointing): _checkpointing(on[device], checkpointing) for device, checkpointing in COLUMNS}
    plans = {column: plan_memory(config, Shape(rows, tokens)) for column, config in configs.items()}
    names = [f"{DEVICES[device]}, {config.trainer.compute_dtype}" for device, config in on.items()]
    lines = [
        f"{own.model.name}, {own.quant.format}, rank {own.adapter.rank}, {rows} rows of {tokens} tokens, in GB",
        " " * 16 + "".join(f"{name:>24}" for name in names),
        f"{'checkpointing':16}" + "".join(f"{'with' if with_it else 'without':>12}" for _, with_it in COLUMNS),
    ]
    sizes = {column: asdict(plan) for column, plan in plans.items()}
    for name in sizes[COLUMNS[0]]:
        lines.append(_line(name, [sizes[column][name] for column in COLUMNS], NOTES.get(name, "")))
    peaks = [plans[column].total for column in COLUMNS]
    lines.append(_line("peak", peaks, "of tensors on a GPU, of the process on a CPU"))
    device, with_it = own.trainer.device, own.trainer.gradient_checkpointing
    lines += [
        f"This run is on a {DEVICES[device]} {'with' if with_it else 'without'} checkpointing: its peak is "
        f"{plans[device, with_it].total / GB:.3f} GB.",
        "Loss and workspace come one after the other, and in a step of one micro-batch the gradients come as the",
        "activations go. While a model is quantized for the first time, a CPU may need more.",
    ]
    config = configs["cuda", own.trainer.gradient_checkpointing]
    if paged := paged_bytes(config):
        lines.append(f"Paged optimizer states: {paged / GB:.3f} GB, in the host's memory if need be.")
    lines += ["", *_cards(config, rows, tokens)]
    return "\n".join(lines)


def _cards(config: RunConfig, rows: int, tokens: int) -> list[str]:
    """Return what fits cards of the usual sizes, and the one that the launcher has."""
    with_it = "with" if config.trainer.gradient_checkpointing else "without"
    lines = [
        f"Training that fits a card {with_it} checkpointing, {RESERVED_GB:g} GB set aside for the CUDA context and the "
        "allocator",
        "(a run is refused by its whole peak, what evaluation takes above training among it):",
        f"card     rows of {tokens} tokens    tokens at {rows} rows",
    ]
    own = config.launcher.gpu_memory_gb
    for card in sorted({*CARDS_GB, *([] if own is None else [own])}):
        budget = card * GIB - RESERVED_GB * GB
        most = largest_rows(config, tokens, budget)
        longest = longest_tokens(config, rows, budget)
        lines.append(f"{card:3g} GB{most or 'none':>12}{longest or 'none':>24}")
    return lines


def _checkpointing(config: RunConfig, on: bool) -> RunConfig:
    trainer = config.trainer
    offloads = on and trainer.offload_activations
    return replace(config, trainer=replace(trainer, gradient_checkpointing=on, offload_activations=offloads))


def _line(name: str, sizes: list[int], note: str) -> str:
    numbers = "".join(f"{size / GB:12.3f}" for size in sizes)
    return f"{name.replace('_', ' '):16}{numbers}" + (f"  {note}" if note else "")


def memory(node: DictConfig) -> None:
    """Print the plan of the run that the configuration describes, on a GPU unless trainer.device says otherwise."""
    composed = from_hydra(node)
    machine = hardware.detect()
    on = {device: resolve(_on(composed, device), machine, lambda source: None) for device in ("cuda", "cpu")}
    own = on["cpu" if composed.trainer.device == "cpu" else "cuda"]
    if own.trainer.micro_batch_size == AUTO:
        size = largest_micro_batch_size(own, room_of(own, machine, 1))
        own = replace(own, trainer=replace(own.trainer, micro_batch_size=size))
    print(report(own, on))


def _on(config: RunConfig, device: str) -> RunConfig:
    return replace(config, trainer=replace(config.trainer, device=device))


def main() -> None:
    command("train", memory)


if __name__ == "__main__":
    main()
