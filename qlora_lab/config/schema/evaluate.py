"""What `python -m qlora_lab.evaluate` is asked: which models, and what of them."""

from dataclasses import dataclass, field
from typing import Any

from qlora_lab.config.schema.checks import MISSING, require, require_at_least, require_one_of
from qlora_lab.config.schema.evaluation import EvaluationConfig
from qlora_lab.config.schema.model import ModelConfig, QuantConfig
from qlora_lab.config.schema.study import PathsConfig
from qlora_lab.config.schema.training import AUTO, COMPUTE_DTYPES, DEVICES

BASE = "base"  # as a run: a model without a run; as its weights: without what was trained
TRAINED = "trained"
OF_A_BASE = ("model", "quant", "device", "compute_dtype")  # keys that only a model or an adapter without a run takes


@dataclass
class EvaluateConfig:
    """The keys of conf/evaluate.yaml."""

    run: Any = None  # an id, the first digits of one, a run folder, or a list of these; "base": model, without a run
    study: str | None = None  # instead: all finished runs of a study
    adapter_folder: str | None = None  # instead: an adapter in PEFT's format, on model
    weights: str = TRAINED  # "base": what the runs started from
    system: str | None = None  # what the answers of the one model are signed with; None: a name of the run
    model: ModelConfig | None = None
    quant: QuantConfig | None = None  # None: nf4
    device: str = AUTO
    compute_dtype: str = AUTO
    threads: int | None = None  # None: as many as torch takes
    evaluation: EvaluationConfig = MISSING
    paths: PathsConfig = field(default_factory=PathsConfig)

    def __post_init__(self) -> None:
        require_one_of("weights", self.weights, (TRAINED, BASE))
        require_one_of("device", self.device, DEVICES)
        require_one_of("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        require_at_least("threads", self.threads, 1)
        asked = (self.run not in (None, []), self.study is not None, self.adapter_folder is not None)
        require(
            sum(asked) == 1,
            "give either run=ID (or a folder, a list of them, or base), study=NAME or adapter_folder=FOLDER, and only "
            "one of them",
        )
        without_run = self.run == BASE or self.adapter_folder is not None
        given = [key for key in OF_A_BASE if getattr(self, key) not in (None, AUTO)]
        require(
            without_run or not given,
            f"{', '.join(given)} can be given with run=base or adapter_folder only: a run keeps the model, format, "
            "device and dtype that it was trained with",
        )
        what = "run=base" if self.run == BASE else "adapter_folder"
        require(
            not without_run or self.model is not None,
            f"{what} needs a model, such as model=smollm2_135m",
        )
        require(
            not without_run or self.weights == TRAINED,
            f"weights=base is for runs; with {what} leave it out",
        )
        require(
            self.system is None or (self.study is None and not isinstance(self.run, list)),
            f"system names the answers of one model; got system='{self.system}' for several runs",
        )
