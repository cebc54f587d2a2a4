"""A model's linear layers and parameter counts from the numbers in its config: no download, no torch."""

from collections.abc import Iterator

from qlora_lab.config.families import FAMILIES, HEAD_SIZES, Family, Linear, head_size
from qlora_lab.config.schema import CLASSIFICATION, ArchitectureConfig, ModelConfig
from qlora_lab.errors import ConfigError


def linear_layers(architecture: ArchitectureConfig) -> list[Linear] | None:
    """Return every linear layer below the head, in the order transformers holds them.

    Returns:
        (module path, out_features, in_features) each; None for a model type that is not in `FAMILIES`.

    Raises:
        ConfigError: numbers of heads that cannot be.
    """
    if architecture.model_type not in FAMILIES:
        return None
    check_heads(architecture)
    found: list[Linear] = []
    for stack, num_layers in stacks(architecture):
        found += stack.outer_linears(architecture)
        of_a_layer = stack.linears(architecture)
        found += [
            (f"{stack.layers}.{layer}.{name}", out_features, in_features)
            for layer in range(num_layers)
            for name, out_features, in_features in of_a_layer
        ]
    return found


def stacks(architecture: ArchitectureConfig) -> Iterator[tuple[Family, int]]:
    """Give each list of layers with its length: one, or an encoder and a decoder."""
    family = FAMILIES[architecture.model_type]
    yield family, architecture.num_layers
    if family.decoder is not None:
        yield family.decoder, architecture.num_decoder_layers or architecture.num_layers


def total_parameters(architecture: ArchitectureConfig) -> int | None:
    """Return the number of parameters, tied embeddings counted once; None where `linear_layers` is None.

    A classifier is counted with a head for two classes.
    """
    layers = linear_layers(architecture)
    if layers is None:
        return None
    hidden = architecture.hidden_size
    matrices = 2 if has_own_head(architecture) else 1
    total = matrices * architecture.vocab_size * (architecture.embedding_size or hidden)
    total += sum(out_features * in_features for _, out_features, in_features in layers)
    for stack, num_layers in stacks(architecture):
        biases = sum(width for name, width, _ in stack.linears(architecture) if name.rpartition(".")[2] in stack.biased)
        norm_width = stack.norms * hidden + stack.head_norms * head_size(architecture)
        total += num_layers * (biases + stack.norm_vectors * norm_width)
        total += stack.norm_vectors * stack.outer_norms * hidden + stack.further(architecture)
    return total


def has_own_head(architecture: ArchitectureConfig) -> bool:
    """Say whether the vocabulary has a matrix for the output beside its embeddings; a classifier has none."""
    return not architecture.tie_embeddings and FAMILIES[architecture.model_type].task != CLASSIFICATION


def check_heads(architecture: ArchitectureConfig) -> None:
    """Refuse numbers of attention heads that cannot be.

    Raises:
        ConfigError: they do not divide the hidden size, or the key-value heads do not divide the heads.
    """
    hidden, heads, kv_heads = architecture.hidden_size, architecture.num_heads, architecture.num_kv_heads
    own_size = architecture.head_size is not None or architecture.model_type in HEAD_SIZES
    if heads < 1 or (not own_size and hidden % heads != 0):
        raise ConfigError(f"model.architecture.num_heads must divide hidden_size ({hidden}); got {heads}")
    if kv_heads < 1 or heads % kv_heads != 0:
        raise ConfigError(f"model.architecture.num_kv_heads must divide num_heads ({heads}); got {kv_heads}")


def check_task(model: ModelConfig) -> None:
    """Refuse a task that models of the architecture do not do.

    Raises:
        ConfigError: with the task they do.
    """
    architecture = model.architecture
    family = FAMILIES.get(architecture.model_type) if architecture is not None else None
    if architecture is not None and family is not None and model.task != family.task:
        raise ConfigError(
            f"model.task must be {family.task} for a model of type '{architecture.model_type}'; got '{model.task}'"
        )


def adapter_parameters(layers: list[Linear], rank: int) -> int:
    """Return how many parameters LoRA of `rank` adds to `layers`: rank x (in + out) each."""
    return sum(rank * (out_features + in_features) for _, out_features, in_features in layers)
