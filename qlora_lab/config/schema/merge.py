"""What `python -m qlora_lab.merge` is asked: which adapter, into which form of its base."""

from dataclasses import dataclass, field
from typing import Any

from qlora_lab.config.schema.checks import MISSING, require, require_above_zero, require_at_least, require_one_of
from qlora_lab.config.schema.model import CLASSIFICATION, ModelConfig, QuantConfig
from qlora_lab.config.schema.study import PathsConfig
from qlora_lab.config.schema.training import AUTO, COMPUTE_DTYPES

DEQUANTIZED, ORIGINAL, QUANTIZED = "dequantized", "original", "quantized"
FORMS = (DEQUANTIZED, ORIGINAL, QUANTIZED)
OF_AN_ADAPTER = ("model", "quant")  # keys that only an adapter without a run takes


@dataclass
class MergeConfig:
    """The keys of conf/merge.yaml."""

    out: str = MISSING  # the folder to write
    run: Any = None  # an id, the first digits of one, or a run folder
    adapter_folder: str | None = None  # instead: a folder in PEFT's format, with its model and quant
    model: ModelConfig | None = None
    quant: QuantConfig | None = None  # what the adapter's base was quantized to while it was trained
    # dequantized: the base as it was trained on; original: the base before it was quantized; quantized: original (of a
    # base that comes quantized: dequantized), merged, and quantized to the same format.
    into: str = DEQUANTIZED
    dtype: str = AUTO  # of what is not quantized; auto: what the run computed in
    tolerance: float | None = None  # of the logits, as a share of their spread; None: by dtype and `into`
    # Held-out rows on which base, adapter and merged model are compared, for which each must fit into memory, one after
    # the other; 0: not compared, and memory for one file suffices.
    check_rows: int = 16
    shard_gb: float = 4.0  # of one file, and of what is in memory at once
    threads: int | None = None  # None: as many as torch takes
    paths: PathsConfig = field(default_factory=PathsConfig)

    def __post_init__(self) -> None:
        require_one_of("into", self.into, FORMS)
        require_one_of("dtype", self.dtype, COMPUTE_DTYPES)
        require_at_least("check_rows", self.check_rows, 0)
        require_at_least("threads", self.threads, 1)
        require_above_zero("shard_gb", self.shard_gb)
        if self.tolerance is not None:
            require_above_zero("tolerance", self.tolerance)
        require(
            (self.run is None) != (self.adapter_folder is None),
            "give either run=ID (or a run's folder), or adapter_folder=FOLDER with its model and quant, and not both",
        )
        given = [key for key in OF_AN_ADAPTER if getattr(self, key) is not None]
        require(
            self.run is None or not given,
            f"{', '.join(given)} can be given with adapter_folder only: a run knows what it was trained on",
        )
        require(
            self.adapter_folder is None or len(given) == len(OF_AN_ADAPTER),
            "adapter_folder needs the base it was trained on: model=NAME, and quant=nf4 (or another format, or none), "
            "which the folder does not say",
        )
        require(
            self.model is None or self.model.task != CLASSIFICATION,
            "a classifier can be merged with run=ID only, which knows its classes",
        )
