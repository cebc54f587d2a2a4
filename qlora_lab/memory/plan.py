"""The memory a run will need, component by component, from its configuration alone.

Counted are the tensors of a run at their peak, to within 5 % (tests/memory counts them), and on a CPU what its process
needs besides, which is measured (`process`). On a GPU the context and the allocator's slack are apart, as
`fit.RESERVED_GB`.
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace

from qlora_lab.config import hardware
from qlora_lab.config.architecture import adapter_parameters, linear_layers, total_parameters
from qlora_lab.config.families import CLASSES, FAMILIES, Linear
from qlora_lab.config.hardware import product_dtype
from qlora_lab.config.placement import match_linears
from qlora_lab.config.schema import CLASSIFICATION, ArchitectureConfig, RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.memory.activations import (
    FLOAT32_BYTES,
    Numbers,
    Shape,
    saved_bytes,
    works_out_again,
    workspace_bytes,
)
from qlora_lab.memory.evaluation import evaluation_bytes
from qlora_lab.memory.optimizer import on_card, optimizer_bytes
from qlora_lab.memory.process import process_bytes
from qlora_lab.memory.profiles import PROFILES
from qlora_lab.memory.stacks import Stack, stacks_of
from qlora_lab.memory.trained_modules import TrainedModules, trained_modules
from qlora_lab.memory.weights import weight_bytes

COMPUTE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HEAD_ROWS_AT_ONCE = 2048  # of the output head, widened for a product (models/head_products.py)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by component."""

    packed_weights: int
    absmax: int  # both levels
    dense_weights: int  # embeddings, head, norms, biases
    adapters: int  # and what is trained beside them: a classifier's head, adapter.trained_modules
    gradients: int
    optimizer: int
    activations: int  # what is kept for the backward pass
    loss: int  # logits of one chunk, and the gradient of the hidden states
    workspace: int  # of one layer's backward pass, and a weight expanded for its product on a GPU
    evaluation: int = 0  # what evaluation takes above all that
    process: int = 0  # what a process on a CPU takes besides tensors

    @property
    def total(self) -> int:
        """The peak of the run: the loss and the backward pass of the layers come one after the other."""
        parts = asdict(self)
        return sum(parts.values()) - min(self.loss, self.workspace)

    @property
    def base(self) -> int:
        """The model's weights."""
        return self.packed_weights + self.absmax + self.dense_weights

    @property
    def training(self) -> int:
        """The peak while it trains."""
        return self.total - self.evaluation

    @property
    def tensors(self) -> int:
        """The peak of training's tensors."""
        return self.training - self.process


@dataclass(frozen=True)
class Run:
    """What every component is worked out from."""

    config: RunConfig
    architecture: ArchitectureConfig
    numbers: Numbers
    linears: list[Linear]
    stacks: list[Stack]
    modules: TrainedModules
    trained_parameters: int

    @property
    def embedding_bytes(self) -> int:
        """Return the bytes of the embeddings, or of the head of a language model, in float32."""
        width = self.architecture.embedding_size or self.architecture.hidden_size
        return self.architecture.vocab_size * width * FLOAT32_BYTES


def plan_memory(config: RunConfig, shape: Shape) -> MemoryPlan:
    """Predict the memory of a resolved run at a micro-batch of `shape`.

    Args:
        shape: the tokens of an encoder-decoder are its source and target, shared as data.max_source_tokens and
            data.max_target_tokens are.

    Raises:
        ConfigError: the model's numbers are not known, or its type has no profile.
    """
    run = _run(config, shape)
    trained = run.trained_parameters * FLOAT32_BYTES
    packed, absmax, dense = _weights(run)
    activations = _activation_bytes(run)
    plan = MemoryPlan(
        packed_weights=packed,
        absmax=absmax,
        dense_weights=dense,
        adapters=0 if run.numbers.trained else trained,
        gradients=trained,
        optimizer=on_card(config, optimizer_bytes(config, run.trained_parameters)),
        activations=activations,
        loss=_loss_bytes(run),
        workspace=_workspace_bytes(run, activations),
        process=process_bytes(config, run.architecture, shape, run.numbers.compute_bytes),
    )
    held = plan.base + plan.adapters + plan.optimizer
    evaluation = evaluation_bytes(config, run.architecture, run.linears, run.numbers.compute_bytes)
    return replace(plan, evaluation=max(0, held + evaluation - plan.tensors))


def paged_bytes(config: RunConfig) -> int:
    """Return the bytes of paged optimizer states that a GPU which is full leaves to the host's memory."""
    states = optimizer_bytes(config, _run(config, Shape(1, 2)).trained_parameters)
    return states - on_card(config, states)


def _run(config: RunConfig, shape: Shape) -> Run:
    architecture = _architecture(config)
    linears, total = linear_layers(architecture), total_parameters(architecture)
    assert linears is not None and total is not None  # _architecture refuses others
    trainer, full = config.trainer, config.adapter.kind == "none"
    numbers = Numbers(
        compute_bytes=COMPUTE_BYTES[trainer.compute_dtype],
        rank=config.adapter.rank,
        quantized=config.quant.format != "none",
        trained=full,
        on_gpu=trainer.device == "cuda",
        emulated=product_dtype(hardware.detect(), trainer.device, trainer.compute_dtype) != trainer.compute_dtype,
    )
    chosen = [] if full else _adapted_paths(config, linears)
    adapted = [linear for linear in linears if linear[0] in set(chosen)]
    parameters = adapter_parameters(adapted, config.adapter.rank) + _classifier(config, len(config.data.labels))
    if full:
        modules = TrainedModules(embeddings=True, head=config.model.task != CLASSIFICATION, parameters=0)
    else:
        modules = trained_modules(config.adapter, architecture)
    return Run(
        config,
        architecture,
        numbers,
        linears,
        list(stacks_of(config, architecture, linears, chosen, shape)),
        modules,
        total if full else parameters + modules.parameters,
    )


def _architecture(config: RunConfig) -> ArchitectureConfig:
    architecture = config.model.architecture
    if architecture is None:
        raise ConfigError(
            f"memory can only be planned where model.architecture says the model's numbers; {config.model.name} has "
            "none; `python -m qlora_lab.models` lists the models that do"
        )
    if architecture.model_type not in PROFILES or architecture.model_type not in FAMILIES:
        raise ConfigError(
            f"memory can be planned for models of type {', '.join(PROFILES)}; got '{architecture.model_type}'"
        )
    return architecture


def _adapted_paths(config: RunConfig, linears: list[Linear]) -> list[str]:
    adapter = config.adapter
    paths = [path for path, *_ in linears]
    return match_linears(paths, adapter.placement, adapter.target_regex, adapter.last_k_layers)


def _classifier(config: RunConfig, classes: int) -> int:
    """Return the parameters of a classifier's head, a dense layer and the output; 0 for other models."""
    assert config.model.architecture is not None
    hidden = config.model.architecture.hidden_size
    return (hidden + 1) * (hidden + classes) if config.model.task == CLASSIFICATION else 0


def _weights(run: Run) -> tuple[int, int, int]:
    """Return the bytes of packed weights, of both levels of absmax, and of all that is not quantized."""
    numbers = run.numbers
    found = weight_bytes(
        run.architecture, run.config.quant, FLOAT32_BYTES if numbers.trained else numbers.compute_bytes
    )
    assert found is not None
    # a classifier's head and adapter.trained_modules are among the trained parameters
    counted = 0 if numbers.trained else _classifier(run.config, CLASSES) + run.modules.parameters
    dense = found.dense - counted * numbers.compute_bytes
    if numbers.trained and numbers.short:  # autocast's copies of what is multiplied, of one layer with checkpointing
        copies = sum(rows * columns for _, rows, columns in run.linears) * numbers.compute_bytes
        dense += copies // (sum(len(s.adapted) for s in run.stacks) if run.config.trainer.gradient_checkpointing else 1)
    return found.packed, found.absmax + found.nested_absmax, dense


def _activation_bytes(run: Run) -> int:
    """Return what is kept: nothing below the first adapter, since no gradient goes there."""
    hidden = run.architecture.hidden_size
    kept, inputs, checkpointed, reached_before = 0, 0, 0, run.modules.embeddings
    for number_of_stack, stack in enumerate(run.stacks):
        first = 0 if reached_before else stack.first_adapted
        # with checkpointing, the input of every layer
        inputs += len(stack.adapted) * stack.shape.positions * hidden * run.numbers.compute_bytes
        if first is None:
            continue
        kinds = Counter(
            (names, run.modules.embeddings or number > first or number in stack.attention)
            for number, names in enumerate(stack.adapted)
            if number >= first
        )
        of_a_layer = {
            kind: saved_bytes(
                run.architecture,
                stack.profile,
                stack.shape,
                run.numbers,
                kind[0],
                from_attention=kind[1],
                source_tokens=stack.source_tokens,
            )
            for kind in kinds
        }
        kept += sum(count * of_a_layer[kind] for kind, count in kinds.items())
        # ... and one layer at a time as it is worked out again, when all that came after it is gone
        again = inputs + max(of_a_layer.values()) + _between_stacks(run, number_of_stack)
        checkpointed = max(checkpointed, again)
        reached_before = True  # what an encoder wrote goes into every layer of the decoder
    if run.config.trainer.gradient_checkpointing:
        return checkpointed
    return kept + _between_stacks(run, len(run.stacks) - 1)


def _between_stacks(run: Run, last_stack: int) -> int:
    """Return what an encoder-decoder keeps besides its layers: the encoder's last norm, and biases of positions.

    Args:
        last_stack: that is there at the time; the first one is the encoder.
    """
    if len(run.stacks) == 1:
        return 0
    source, target = run.stacks[0].shape, run.stacks[1].shape
    last = source.positions * run.architecture.hidden_size * (FLOAT32_BYTES + run.numbers.compute_bytes)
    if not (run.numbers.on_gpu or run.config.trainer.gradient_checkpointing):
        return last
    places = source.tokens**2
    if last_stack == 0:
        last = 0
    else:
        places += target.tokens**2 + source.tokens * target.tokens
    return last + source.rows * run.architecture.num_heads * places * run.numbers.compute_bytes


def _loss_bytes(run: Run) -> int:
    architecture, numbers, shape = run.architecture, run.numbers, run.stacks[-1].shape
    if run.config.model.task == CLASSIFICATION:
        return 2 * shape.rows * architecture.hidden_size * FLOAT32_BYTES
    chunk = min(run.config.trainer.loss_chunk_tokens, shape.positions)
    in_float32 = numbers.emulated or (run.modules.head and not numbers.trained)
    bytes_of_one = PROFILES[architecture.model_type].logits_bytes[numbers.short and not in_float32]
    logits = chunk * architecture.vocab_size * bytes_of_one
    states = 2 * shape.positions * architecture.hidden_size * numbers.compute_bytes  # the last, and their gradient
    if run.modules.head:  # its gradient, which is scaled into another one
        return states + run.embedding_bytes + max(logits, run.embedding_bytes)
    widened = min(HEAD_ROWS_AT_ONCE, architecture.vocab_size) * architecture.hidden_size * FLOAT32_BYTES
    return logits + states + (widened if numbers.emulated else 0)


def _workspace_bytes(run: Run, activations: int) -> int:
    """Return what the backward pass of one layer takes at its peak."""
    numbers, architecture = run.numbers, run.architecture
    largest = max(rows * columns for _, rows, columns in run.linears)
    # The CPU kernels expand a weight panel by panel in cache; elsewhere it is there whole for its product.
    expanded = largest * numbers.compute_bytes if numbers.on_gpu and numbers.quantized else 0
    of_layers = [
        workspace_bytes(
            architecture,
            stack.profile,
            stack.shape,
            numbers,
            again=any(works_out_again(stack.profile, numbers, names) for names in stack.adapted),
        )
        for stack in run.stacks
    ]
    backward = max(of_layers) + expanded + (largest * FLOAT32_BYTES if numbers.trained else 0)
    held, size = 0, run.embedding_bytes
    waits = run.modules.head and architecture.tie_embeddings
    if run.modules.head:  # its gradient as the loss left it, and one that waits for that of the embeddings it is
        held = 2 * size if waits else size
    if run.modules.embeddings:  # their gradient, and the sum of both, when all that was kept for the layers is gone
        backward = max(backward, (2 * size if waits else size) - activations)
    return backward + held
