"""How a run is trained."""

from dataclasses import dataclass
from typing import Any

from qlora_lab.config.schema.checks import require, require_above_zero, require_at_least, require_one_of, require_share

AUTO = "auto"
SCHEDULES = ("constant", "linear", "cosine")
COMPUTE_DTYPES = (AUTO, "float32", "bfloat16", "float16")
DEVICES = (AUTO, "cpu", "cuda")
# Paged: the states of either kind in memory that moves between GPU and host by pages.
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")


@dataclass
class OptimConfig:
    name: str = "adamw"
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 0.3
    schedule: str = "constant"
    warmup_share: float = 0.03  # of all steps

    def __post_init__(self) -> None:
        require_one_of("optim.name", self.name, OPTIMIZERS)
        require_one_of("optim.schedule", self.schedule, SCHEDULES)
        require_above_zero("optim.learning_rate", self.learning_rate)
        require_at_least("optim.weight_decay", self.weight_decay, 0)
        require_share("optim.beta1", self.beta1, below_one=True)
        require_share("optim.beta2", self.beta2, below_one=True)
        require_above_zero("optim.eps", self.eps)
        require_above_zero("optim.max_grad_norm", self.max_grad_norm)
        require_share("optim.warmup_share", self.warmup_share)


@dataclass
class TrainerConfig:
    batch_size: int = 16  # rows in one optimizer step
    # Rows in memory at once: a whole number, None (resolved from the row length) or auto (the most that fit, dividing
    # batch_size). OmegaConf cannot copy a node of `int | str | None`.
    micro_batch_size: Any = None
    max_steps: int | None = 100
    max_train_tokens: int | None = None  # stop once this many tokens were trained on
    group_by_length: bool = True
    gradient_checkpointing: bool = False
    offload_activations: bool = False  # with checkpointing on a GPU: inputs of layers wait in the host's memory
    device: str = AUTO
    compute_dtype: str = AUTO
    threads: int | None = None  # CPU threads; None: the launcher's share of the cores
    checkpoint_every_steps: int = 50
    keep_checkpoints: int = 2
    log_every_steps: int = 1
    loss_chunk_tokens: int = 128  # rows of logits in memory at once

    def __post_init__(self) -> None:
        require_at_least("trainer.batch_size", self.batch_size, 1)
        require_at_least("trainer.max_steps", self.max_steps, 0)
        require_at_least("trainer.max_train_tokens", self.max_train_tokens, 1)
        require(
            self.max_steps is not None or self.max_train_tokens is not None,
            "trainer.max_steps and trainer.max_train_tokens are both null; set at least one",
        )
        require(
            self.gradient_checkpointing or not self.offload_activations,
            "trainer.offload_activations=true needs trainer.gradient_checkpointing=true, which leaves one tensor of "
            "each layer to be moved; set both, or neither",
        )
        self._check_micro_batch_size()
        require_one_of("trainer.device", self.device, DEVICES)
        require_one_of("trainer.compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        for key in ("threads", "checkpoint_every_steps", "keep_checkpoints", "log_every_steps", "loss_chunk_tokens"):
            require_at_least(f"trainer.{key}", getattr(self, key), 1)

    def _check_micro_batch_size(self) -> None:
        key, given = "trainer.micro_batch_size", self.micro_batch_size
        if given is None or given == AUTO:
            return
        is_number = isinstance(given, int) and not isinstance(given, bool)
        require(is_number, f"{key} must be a whole number, {AUTO} or null; got '{given}'")
        require_at_least(key, given, 1)
        require(given <= self.batch_size, f"{key} must not exceed trainer.batch_size ({self.batch_size}); got {given}")
