"""What a process that trains on a CPU needs besides its tensors: measured, not derived.

`tests/benchmarks/process_memory.py` measures it again: SmolLM2-135M and tiny models, one thread and two, torch's CPU
build, with the heap settings of `runs/heap.py`. Not in it: what the first run of a model takes while it quantizes (the
result, one tensor, and pages of the checkpoint, which the system takes back), and random weights, which are there
unquantized first.
"""

from qlora_lab.config.schema import BYTE_LEVEL, CLASSIFICATION, ArchitectureConfig, RunConfig
from qlora_lab.memory.layer import Shape

LIBRARIES_BYTES = 510_000_000  # Python, torch and the other libraries
SHARED_BYTES = 134_000_000  # of these, in pages of files
TOKENIZER_BYTES = 850  # of each token of a vocabulary
HEAP_VECTORS = 15  # of feed-forward width for each position: what the heap has free between tensors at the peak


def process_bytes(config: RunConfig, architecture: ArchitectureConfig, shape: Shape, compute_bytes: int) -> int:
    """Return the bytes of a run's process that are no tensors; 0 on a GPU, whose memory they do not take."""
    if config.trainer.device == "cuda":
        return 0
    tokens = 0 if config.model.tokenizer == BYTE_LEVEL else architecture.vocab_size
    heap = HEAP_VECTORS * shape.positions * architecture.feed_forward_size * compute_bytes
    return LIBRARIES_BYTES + tokens * TOKENIZER_BYTES + heap


def shared_bytes(config: RunConfig, base_bytes: int) -> int:
    """Return what of a run on a CPU is in memory once for all such runs: files of libraries, and a base from the cache.

    Args:
        base_bytes: of the model's weights.
    """
    cached = config.paths.cache_bases and config.quant.format != "none" and config.model.source != "random"
    return SHARED_BYTES + (base_bytes if cached and config.model.task != CLASSIFICATION else 0)
