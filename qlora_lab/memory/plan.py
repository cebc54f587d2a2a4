"""The memory a run will need, component by component, from its configuration alone.

Counted are the tensors of training, at their peak. What a process holds besides (the interpreter, torch's libraries, a
CUDA context, the allocator's slack) is not in it.
"""

from collections import Counter
from dataclasses import asdict, dataclass

from qlora_lab.config import hardware
from qlora_lab.config.architecture import adapter_parameters, linear_layers
from qlora_lab.config.families import FAMILIES, Linear
from qlora_lab.config.hardware import product_dtype
from qlora_lab.config.placement import layer_index, match_linears
from qlora_lab.config.schema import ArchitectureConfig, RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.memory.activations import FLOAT32_BYTES, PROFILES, Shape, saved_bytes, works_out_again, workspace_bytes
from qlora_lab.memory.weights import weight_bytes

COMPUTE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HEAD_ROWS_AT_ONCE = 2048  # of the output head, widened for a product (models/head_products.py)
STATE_BLOCK = 256  # values of an 8-bit optimizer state that share one absmax


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by component."""

    packed_weights: int
    absmax: int  # both levels
    dense_weights: int  # embeddings, head, norms, biases
    adapters: int
    gradients: int
    optimizer: int
    activations: int  # what is kept for the backward pass
    loss: int  # logits of one chunk, and the gradient of the hidden states
    workspace: int  # of one layer's backward pass, and a weight expanded for its product on a GPU

    @property
    def total(self) -> int:
        """The peak: the loss and the backward pass of the layers come one after the other."""
        parts = asdict(self)
        return sum(parts.values()) - min(self.loss, self.workspace)


@dataclass(frozen=True)
class Adapted:
    """The linears with an adapter."""

    layers: tuple[tuple[str, ...], ...]  # of each layer, their last names
    parameters: int
    attention: frozenset[int]  # layers with one in their attention


def plan_memory(config: RunConfig, shape: Shape) -> MemoryPlan:
    """Predict the memory of a resolved run at a micro-batch of `shape`.

    Raises:
        ConfigError: the model's numbers are not known, or its type has no profile.
    """
    architecture = _architecture(config)
    compute_bytes = COMPUTE_BYTES[config.trainer.compute_dtype]
    weights = weight_bytes(architecture, config.quant, compute_bytes)
    layers = linear_layers(architecture)
    assert weights is not None and layers is not None  # _architecture refuses others
    adapted = _adapted(config, architecture, layers)
    return MemoryPlan(
        packed_weights=weights.packed,
        absmax=weights.absmax + weights.nested_absmax,
        dense_weights=weights.dense,
        adapters=adapted.parameters * FLOAT32_BYTES,
        gradients=adapted.parameters * FLOAT32_BYTES,
        optimizer=_optimizer_bytes(config, adapted.parameters),
        activations=_activation_bytes(config, architecture, adapted, shape, compute_bytes),
        loss=_loss_bytes(config, architecture, shape, compute_bytes),
        workspace=_workspace_bytes(config, architecture, adapted, layers, shape, compute_bytes),
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
    if config.adapter.kind != "lora":
        raise ConfigError("memory can be planned for adapter.kind lora; full fine-tuning is not in the plan yet")
    return architecture


def _adapted(config: RunConfig, architecture: ArchitectureConfig, layers: list[Linear]) -> Adapted:
    adapter = config.adapter
    paths = [path for path, *_ in layers]
    chosen = set(match_linears(paths, adapter.placement, adapter.target_regex, adapter.last_k_layers))
    in_attention = {layer_index(path) for path in chosen & set(match_linears(paths, "attention", None, None))}
    of_layers: list[list[str]] = [[] for _ in range(architecture.num_layers)]
    for path in chosen:
        index = layer_index(path)
        if index is not None:
            of_layers[index].append(path.rpartition(".")[2])
    parameters = adapter_parameters([layer for layer in layers if layer[0] in chosen], adapter.rank)
    return Adapted(
        tuple(tuple(sorted(names)) for names in of_layers),
        parameters,
        frozenset(index for index in in_attention if index is not None),
    )


def _optimizer_bytes(config: RunConfig, parameters: int) -> int:
    if config.optim.name == "adamw_8bit":
        return 2 * (parameters + -(-parameters // STATE_BLOCK) * FLOAT32_BYTES)
    return 2 * parameters * FLOAT32_BYTES


def _activation_bytes(
    config: RunConfig, architecture: ArchitectureConfig, adapted: Adapted, shape: Shape, compute_bytes: int
) -> int:
    """Return what is kept: nothing below the first adapter, since no gradient goes there."""
    first = next((number for number, names in enumerate(adapted.layers) if names), architecture.num_layers)
    hidden = shape.positions * architecture.hidden_size
    reached = list(enumerate(adapted.layers))[first:]
    kinds = Counter((names, number > first or number in adapted.attention) for number, names in reached)
    of_a_layer = {
        kind: saved_bytes(
            architecture,
            shape,
            compute_bytes,
            kind[0],
            config.adapter.rank,
            quantized=config.quant.format != "none",
            from_attention=kind[1],
        )
        for kind in kinds
    }
    if config.trainer.gradient_checkpointing:
        # the input of every layer, and one layer at a time as it is worked out again
        return architecture.num_layers * hidden * compute_bytes + max(of_a_layer.values(), default=0)
    return sum(count * of_a_layer[kind] for kind, count in kinds.items())


def _loss_bytes(config: RunConfig, architecture: ArchitectureConfig, shape: Shape, compute_bytes: int) -> int:
    chunk = min(config.trainer.loss_chunk_tokens, shape.positions)
    emulated = _is_emulated(config)
    logits = PROFILES[architecture.model_type].logits_bytes[compute_bytes < FLOAT32_BYTES and not emulated]
    widened = min(HEAD_ROWS_AT_ONCE, architecture.vocab_size) * architecture.hidden_size * FLOAT32_BYTES
    states = 2 * shape.positions * architecture.hidden_size * compute_bytes  # the last states, and their gradient
    return chunk * architecture.vocab_size * logits + states + (widened if emulated else 0)


def _is_emulated(config: RunConfig) -> bool:
    """Say whether attention and the head compute in float32 though the compute dtype has 16 bits, as here on a CPU."""
    trainer = config.trainer
    return product_dtype(hardware.detect(), trainer.device, trainer.compute_dtype) != trainer.compute_dtype


def _workspace_bytes(
    config: RunConfig,
    architecture: ArchitectureConfig,
    adapted: Adapted,
    layers: list[Linear],
    shape: Shape,
    compute_bytes: int,
) -> int:
    # The CPU kernels expand a weight panel by panel in cache; elsewhere it is there whole for its product.
    expanded = max(rows * columns for _, rows, columns in layers) * compute_bytes
    whole = config.trainer.device == "cuda" and config.quant.format != "none"
    hidden_gradient = shape.positions * architecture.hidden_size * compute_bytes
    profile, quantized = PROFILES[architecture.model_type], config.quant.format != "none"
    again = any(works_out_again(profile, names, quantized) for names in adapted.layers)
    layer = workspace_bytes(architecture, shape, compute_bytes, again=again, emulated=_is_emulated(config))
    return layer + hidden_gradient + (expanded if whole else 0)
