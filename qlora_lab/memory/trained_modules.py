"""What `adapter.trained_modules` trains as a whole beside the adapters: the embeddings, the output head, or both."""

from dataclasses import dataclass

from qlora_lab.config.families import FAMILIES
from qlora_lab.config.schema import CLASSIFICATION, AdapterConfig, ArchitectureConfig
from qlora_lab.errors import ConfigError

# Last names of the modules of a model type, as transformers calls them.
EMBEDDINGS = {
    "gpt_neox": ("embed_in",),
    "bloom": ("word_embeddings",),
    "mpt": ("wte",),
    "t5": ("shared", "embed_tokens"),  # one weight by three paths
    "roberta": ("word_embeddings",),
}


@dataclass(frozen=True)
class TrainedModules:
    """Whether the embeddings of tokens are trained, and the head of a language model, and the weights they have."""

    embeddings: bool
    head: bool
    parameters: int


def trained_modules(adapter: AdapterConfig, architecture: ArchitectureConfig) -> TrainedModules:
    """Return what of the vocabulary's weights is trained; where embeddings and head are one, both are.

    Raises:
        ConfigError: another module is to be trained.
    """
    embeddings = EMBEDDINGS.get(architecture.model_type, ("embed_tokens",))
    heads = () if FAMILIES[architecture.model_type].task == CLASSIFICATION else ("lm_head",)
    last_names = {name.rpartition(".")[2] for name in adapter.trained_modules}
    others = sorted(last_names.difference(embeddings, heads))
    if others:
        raise ConfigError(
            f"memory can be planned for adapter.trained_modules among {', '.join((*embeddings, *heads))}; got "
            f"'{others[0]}', whose weights, gradients and optimizer states no plan counts"
        )
    has_embeddings, has_head = not last_names.isdisjoint(embeddings), not last_names.isdisjoint(heads)
    matrices = has_embeddings + has_head
    if architecture.tie_embeddings and heads and matrices:
        has_embeddings, has_head, matrices = True, True, 1
    width = architecture.embedding_size or architecture.hidden_size
    return TrainedModules(has_embeddings, has_head, matrices * architecture.vocab_size * width)
