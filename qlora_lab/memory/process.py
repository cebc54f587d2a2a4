"""What a process that trains on a CPU needs besides its tensors: measured, not derived.

Of the resident memory at a run's peak (`tests/benchmarks/process_memory.py` measures it again; the parts were told
apart with glibc's mallinfo2 and /proc/PID/smaps) these remain when its tensors are taken off:

- Python, torch and the other libraries: 506 to 513 MB on an AMD machine, whatever the run, and 510 on an Intel one. A
  quarter is in pages of files, the others in the heap and in Python's own arenas.
- The tokenizer.
- What glibc's heap has free between tensors: a share of what a step keeps there, more in float32 than in 16 bits (0.08
  to 0.32 and 0.08 to 0.25 of it where that is much); why so, is not known. Batches had padding, as they mostly have.
- Where embeddings are trained whose matrix glibc maps apart from its heap: what was kept, of which the heap has given
  nothing back when their gradient is made. (Of SmolLM2-135M mallinfo2 then counts six such matrices, weights and
  optimizer states among them, beside a heap as large as ever.)

Not in it: what the first run of a model takes while it quantizes (the result, one tensor, and pages of the checkpoint,
which the system takes back), and random weights, which are there unquantized first.
"""

from qlora_lab.config.schema import BYTE_LEVEL, CLASSIFICATION, ArchitectureConfig, RunConfig
from qlora_lab.memory.layer import FLOAT32_BYTES
from qlora_lab.memory.step import Step

LIBRARIES_BYTES = 510_000_000
SHARED_BYTES = 134_000_000  # of these, in pages of files
TOKENIZER_BYTES = 850  # of each token of a vocabulary; half of them are used, the others loading leaves free
# Of what is kept for the backward pass, in float32 and in 16 bits: about the means of five runs each that keep much.
HEAP_SHARE = (0.22, 0.15)
LARGEST_IN_HEAP_BYTES = 2**25  # on 64 bits (mallopt(3), M_MMAP_THRESHOLD)


def process_bytes(config: RunConfig, architecture: ArchitectureConfig, step: Step, *, short: bool) -> int:
    """Return the bytes of a run's process that are no tensors; 0 on a GPU, whose memory they do not take.

    Args:
        step: its tensors.
        short: whether it computes in 16 bits.
    """
    if config.trainer.device == "cuda":
        return 0
    tokens = 0 if config.model.tokenizer == BYTE_LEVEL else architecture.vocab_size
    matrix = architecture.vocab_size * (architecture.embedding_size or architecture.hidden_size) * FLOAT32_BYTES
    beyond = max(0, step.at_embeddings - step.peak) if matrix > LARGEST_IN_HEAP_BYTES else 0
    return LIBRARIES_BYTES + tokens * TOKENIZER_BYTES + round(HEAP_SHARE[short] * step.kept) + beyond


def shared_bytes(config: RunConfig, base_bytes: int) -> int:
    """Return what of a run on a CPU is in memory once for all such runs: files of libraries, and a base from the cache.

    Args:
        base_bytes: of the model's weights.
    """
    cached = config.paths.cache_bases and config.quant.format != "none" and config.model.source != "random"
    return SHARED_BYTES + (base_bytes if cached and config.model.task != CLASSIFICATION else 0)
