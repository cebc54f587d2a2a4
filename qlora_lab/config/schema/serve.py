"""What `python -m qlora_lab.serve` and `python -m qlora_lab.chat` are asked."""

from dataclasses import dataclass, field
from typing import Any

from qlora_lab.config.schema.checks import require, require_above_zero, require_at_least, require_one_of, require_share
from qlora_lab.config.schema.model import ModelConfig, QuantConfig
from qlora_lab.config.schema.study import PathsConfig
from qlora_lab.config.schema.training import AUTO, COMPUTE_DTYPES, DEVICES

HIGHEST_TEMPERATURE = 2.0


@dataclass
class OpenConfig:
    """Which base is opened, and which adapters are put on it."""

    run: Any = None  # an id, the first digits of one, a run folder, or a list of these; they are called by their ids
    study: str | None = None  # all finished runs of a study that have this base
    adapters: dict[str, str] = field(default_factory=dict)  # by name: runs, folders in PEFT's format, hub ids
    model: ModelConfig | None = None  # the base; None: that of the first run
    quant: QuantConfig | None = None  # with model; None: nf4
    device: str = AUTO  # with model
    compute_dtype: str = AUTO  # with model
    threads: int | None = None  # None: as many as torch takes
    # Of adapters that are ready; a batch with several of them takes that of these once more. None: no limit.
    adapter_budget_mb: float | None = None
    paths: PathsConfig = field(default_factory=PathsConfig)

    def __post_init__(self) -> None:
        require_one_of("device", self.device, DEVICES)
        require_one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        require_at_least("threads", self.threads, 1)
        if self.adapter_budget_mb is not None:
            require_above_zero("adapter_budget_mb", self.adapter_budget_mb)
        given = [key for key in ("quant", "device", "compute_dtype") if getattr(self, key) not in (None, AUTO)]
        require(
            self.model is not None or not given,
            f"{', '.join(given)} can be given with model=NAME only: without it the base is that of the first run",
        )
        require(
            self.model is not None or self.run not in (None, []) or self.study is not None or bool(self.adapters),
            "say what to open: run=ID, study=NAME, or model=NAME, perhaps with +adapters.NAME=FOLDER",
        )


@dataclass
class ServeConfig(OpenConfig):
    """The keys of conf/serve.yaml."""

    host: str = "127.0.0.1"  # this machine alone; another one wants a token
    port: int = 8000  # 0: any that is free
    token_variable: str = "QLORA_LAB_TOKEN"  # the environment variable with the token that requests must bring
    max_rows: int = 32  # answers that are written together
    max_waiting: int = 128  # requests that wait besides
    max_new_tokens: int = 512  # of an answer; also where a request does not say
    max_body_kb: int = 1024  # of a request
    # Keys and values of all answers that are written together; what would exceed it waits. None: half of a GPU's free
    # memory once the base is loaded, or a quarter of the host's.
    cache_budget_mb: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("max_rows", "max_waiting", "max_new_tokens", "max_body_kb"):
            require_at_least(key, getattr(self, key), 1)
        if self.cache_budget_mb is not None:
            require_above_zero("cache_budget_mb", self.cache_budget_mb)
        require(0 <= self.port < 2**16, f"port must be from 0 to 65535; got {self.port}")


@dataclass
class ChatConfig(OpenConfig):
    """The keys of conf/chat.yaml."""

    adapter: str | None = None  # that answers first; None: the first one, or the base where there is none
    system: str | None = None  # a system's message before the conversation
    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 0.9
    seed: int | None = None  # None: another answer each time
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("max_new_tokens", self.max_new_tokens, 1)
        require(
            0 <= self.temperature <= HIGHEST_TEMPERATURE,
            f"temperature must be from 0 to {HIGHEST_TEMPERATURE:g}; got {self.temperature}",
        )
        require_share("top_p", self.top_p)
        require(self.top_p > 0, f"top_p must be above 0; got {self.top_p}")
