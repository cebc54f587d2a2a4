"""python -m qlora_lab.models [WORD ...]: the models of conf/model/, or those whose name holds one of the words."""

import sys

from qlora_lab.config.architecture import total_parameters
from qlora_lab.config.catalogue import described_models
from qlora_lab.config.schema import ModelConfig, QuantConfig
from qlora_lab.memory.plan import plan_memory
from qlora_lab.memory.usual import RANK, TOKENS, USUAL_SHAPE, usual_run
from qlora_lab.memory.weights import weight_bytes

HEADER = ["model=", "task", "hub id", "parameters", "in 16 bits", "in NF4", "QLoRA"]
WORDS = 3  # columns on the left; numbers on the right
BFLOAT16_BYTES = 2


def table(models: list[ModelConfig]) -> str:
    """Return one line a model: its parameters, the bytes of its weights, and the predicted peak of training it.

    NF4 is what a run holds: linear layers in blocks of 64 with double quantization, everything else in 16 bits. QLoRA
    is the run of `memory.usual`.
    """
    rows = [HEADER, *(_row(model) for model in sorted(models, key=_size))]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < WORDS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _size(model: ModelConfig) -> int:
    assert model.architecture is not None  # the catalogue's models have one
    return total_parameters(model.architecture) or 0


def _row(model: ModelConfig) -> list[str]:
    assert model.architecture is not None
    bytes_of = [
        weight_bytes(model.architecture, quant, BFLOAT16_BYTES)
        for quant in (QuantConfig("none", double_quant=False), QuantConfig())
    ]
    sizes = ["" if found is None else f"{found.total / 1e9:.2f} GB" for found in bytes_of]
    peak = f"{plan_memory(usual_run(model), USUAL_SHAPE).training / 1e9:.2f} GB"
    return [model.name, model.task, model.hub_id or model.source, f"{_size(model) / 1e6:,.1f} M", *sizes, peak]


if __name__ == "__main__":
    words = sys.argv[1:]
    chosen = [model for model in described_models() if not words or any(word in model.name for word in words)]
    if not chosen:
        sys.exit(f"no model of conf/model/ has {' or '.join(words)} in its name; without a word all are listed")
    print(table(chosen))
    print(
        "\nQLoRA: the predicted peak of training in NF4 on a GPU, with bfloat16 adapters of rank "
        f"{RANK} on every linear layer,\n32-bit AdamW and gradient checkpointing, one row of {TOKENS} tokens; "
        "python -m qlora_lab.memory has more."
    )
