"""The memory a run will need, component by component, from its configuration alone.

Counted are the tensors of a run at their peak, to within 5 % (tests/memory counts them), and on a CPU what its process
needs besides, which is measured (`process`). On a GPU the context and the allocator's slack are apart, as
`fit.RESERVED_GB`.
"""

from dataclasses import asdict, dataclass, replace

from qlora_lab.config.architecture import has_own_head
from qlora_lab.config.families import CLASSES
from qlora_lab.config.schema import RunConfig
from qlora_lab.memory.evaluation import evaluation_bytes
from qlora_lab.memory.layer import FLOAT32_BYTES, Shape
from qlora_lab.memory.optimizer import on_card, optimizer_bytes
from qlora_lab.memory.planned_run import PlannedRun, classifier_parameters, planned_run
from qlora_lab.memory.process import process_bytes
from qlora_lab.memory.step import plan_step
from qlora_lab.memory.weights import weight_bytes

BASE = ("packed_weights", "absmax", "nested_absmax", "embeddings", "head", "dense_weights")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by component."""

    packed_weights: int  # codes
    absmax: int  # first level, of each block
    nested_absmax: int  # second level, and the offset of each layer
    embeddings: int  # 0 where they are trained beside the adapters, which then count them
    head: int  # 0 also where it is the embeddings
    dense_weights: int  # all other weights: norms, biases, positions, and the linear layers where none is quantized
    adapters: int  # and what is trained beside them: a classifier's head, adapter.trained_modules
    gradients: int
    optimizer: int
    activations: int  # what is kept for the backward pass
    loss: int  # logits of one chunk, and the gradient of the hidden states
    workspace: int  # of one layer's backward pass, with a weight expanded for its product on a GPU; or of embeddings
    not_at_once: int  # less what of these and the gradients is never there together: a negative number
    evaluation: int = 0  # what evaluation takes above all that
    process: int = 0  # what a process on a CPU takes besides tensors

    @property
    def total(self) -> int:
        """The peak of the run, to which its components add up."""
        return sum(asdict(self).values())

    @property
    def base(self) -> int:
        """The model's weights."""
        return sum(getattr(self, name) for name in BASE)

    @property
    def training(self) -> int:
        """The peak while it trains."""
        return self.total - self.evaluation

    @property
    def tensors(self) -> int:
        """The peak of training's tensors."""
        return self.training - self.process


def plan_memory(config: RunConfig, shape: Shape) -> MemoryPlan:
    """Predict the memory of a resolved run at a micro-batch of `shape`.

    Args:
        shape: the tokens of an encoder-decoder are its source and target, shared as data.max_source_tokens and
            data.max_target_tokens are.

    Raises:
        ConfigError: the model's numbers are not known, or its type has no profile.
    """
    run = planned_run(config, shape)
    trained = run.trained_bytes
    step = plan_step(run)
    plan = MemoryPlan(
        **_weights(run),
        adapters=0 if run.numbers.trained else trained,
        gradients=trained,
        optimizer=on_card(config, optimizer_bytes(config, run.trained_parameters)),
        activations=step.kept,
        loss=step.loss,
        workspace=step.workspace,
        not_at_once=step.peak - (trained + step.kept + step.loss + step.workspace),
        process=process_bytes(config, run.architecture, step, short=run.numbers.short),
    )
    held = plan.base + plan.adapters + plan.optimizer
    evaluation = evaluation_bytes(config, run.architecture, run.linears, run.numbers.compute_bytes)
    return replace(plan, evaluation=max(0, held + evaluation - plan.tensors))


def paged_bytes(config: RunConfig) -> int:
    """Return the bytes of paged optimizer states that a GPU which is full leaves to the host's memory."""
    states = optimizer_bytes(config, planned_run(config, Shape(1, 2)).trained_parameters)
    return states - on_card(config, states)


def _weights(run: PlannedRun) -> dict[str, int]:
    """Return the bytes of the components in BASE; what is trained beside adapters counts with those."""
    numbers, modules = run.numbers, run.modules
    size = FLOAT32_BYTES if numbers.trained else numbers.compute_bytes
    found = weight_bytes(run.architecture, run.config.quant, size)
    assert found is not None
    one = run.embedding_parameters
    apart = has_own_head(run.architecture)
    counted = 0 if numbers.trained else classifier_parameters(run.config, CLASSES) + modules.parameters
    embeddings = one * size if numbers.trained or not modules.embeddings else 0
    head = one * size if apart and (numbers.trained or not modules.head) else 0
    dense = found.dense - counted * size - embeddings - head
    if numbers.trained and numbers.short:  # autocast's copies of what is multiplied, of one layer with checkpointing
        copies = sum(rows * columns for _, rows, columns in run.linears) * numbers.compute_bytes
        dense += copies // (sum(len(s.adapted) for s in run.stacks) if run.config.trainer.gradient_checkpointing else 1)
    return dict(zip(BASE, (found.packed, found.absmax, found.nested_absmax, embeddings, head, dense), strict=True))
