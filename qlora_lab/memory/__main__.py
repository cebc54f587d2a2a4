"""python -m qlora_lab.memory model=llama_65b trainer.micro_batch_size=1 ...: what a run will need, before it starts."""

from dataclasses import asdict, replace

from omegaconf import DictConfig

from qlora_lab.config import hardware
from qlora_lab.config.command import command
from qlora_lab.config.load import from_hydra
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import AUTO, RunConfig
from qlora_lab.memory.activations import Shape
from qlora_lab.memory.fit import CARDS_GB, RESERVED_GB, largest_rows, longest_tokens
from qlora_lab.memory.plan import paged_bytes, plan_memory
from qlora_lab.memory.room import largest_micro_batch_size, room_of

GB, GIB = 1e9, 2**30  # a card of 24 GB has 24 GiB
NOTES = {
    "adapters": "and what is trained beside them, as weights in float32",
    "evaluation": "above training: weights that stay expanded while rows are scored",
    "process": "Python, libraries, tokenizer, and what the heap has free: measured, not derived",
}
ON_GPU = f"of tensors; {RESERVED_GB:g} GB is set aside below for the CUDA context and the allocator"
ON_CPU = "of the process; while a model is quantized for the first time it may be more"


def report(config: RunConfig) -> str:
    """Return the components of a resolved run's peak, and what fits cards of the usual sizes."""
    rows, tokens = config.trainer.micro_batch_size or 1, config.data.longest_row_tokens
    plan = plan_memory(config, Shape(rows, tokens))
    checkpointing = "with" if config.trainer.gradient_checkpointing else "without"
    lines = [
        f"{config.model.name}, {config.quant.format}, rank {config.adapter.rank}, {rows} rows of {tokens} tokens in "
        f"{config.trainer.compute_dtype} on {config.trainer.device}, {checkpointing} gradient checkpointing",
        *(_line(name, size, NOTES.get(name, "")) for name, size in asdict(plan).items() if size or name != "process"),
        _line("peak", plan.total, ON_GPU if config.trainer.device == "cuda" else ON_CPU),
        "Loss and workspace come one after the other, so the peak holds the larger one.",
        _with_the_other_checkpointing(config, Shape(rows, tokens)),
    ]
    if config.trainer.device == "cuda":
        paged = paged_bytes(config)
        if paged:
            lines.append(_line("paged", paged, "of optimizer states, in the host's memory if need be"))
        lines += ["", f"card     rows of {tokens} tokens    tokens at {rows} rows"]
        own = config.launcher.gpu_memory_gb
        for card in sorted({*CARDS_GB, *([] if own is None else [own])}):
            budget = card * GIB - RESERVED_GB * GB
            most = largest_rows(config, tokens, budget)
            longest = longest_tokens(config, rows, budget)
            lines.append(f"{card:3g} GB{most or 'none':>12}{longest or 'none':>24}")
    return "\n".join(lines)


def _with_the_other_checkpointing(config: RunConfig, shape: Shape) -> str:
    other = not config.trainer.gradient_checkpointing
    plan = plan_memory(replace(config, trainer=replace(config.trainer, gradient_checkpointing=other)), shape)
    return (
        f"{'With' if other else 'Without'} gradient checkpointing activations take {plan.activations / GB:.3f} GB, and "
        f"the peak is {plan.total / GB:.3f} GB."
    )


def _line(name: str, size: int, note: str) -> str:
    return f"{name.replace('_', ' '):16}{size / GB:10.3f} GB" + (f"  {note}" if note else "")


def memory(node: DictConfig) -> None:
    """Print the plan of the run that the configuration describes, on a GPU unless trainer.device says otherwise."""
    config = from_hydra(node)
    if config.trainer.device == "auto":
        config.trainer.device = "cuda"
    machine = hardware.detect()
    config = resolve(config, machine, lambda source: None)
    if config.trainer.micro_batch_size == AUTO:
        size = largest_micro_batch_size(config, room_of(config, machine, 1))
        config = replace(config, trainer=replace(config.trainer, micro_batch_size=size))
    print(report(config))


def main() -> None:
    command("train", memory)


if __name__ == "__main__":
    main()
