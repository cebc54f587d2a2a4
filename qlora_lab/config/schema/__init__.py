"""The typed configuration of one run: one dataclass per group of conf/, ranges checked.

Hydra merges YAML onto these classes, so a wrong type is refused while it is composed; `__post_init__`
checks ranges and names, and `RunConfig.__post_init__` what spans groups. A field that is None or "auto"
is resolved by `config.resolve` before the run gets its id.
"""

from qlora_lab.config.schema.benchmarks import BenchmarkConfig
from qlora_lab.config.schema.checks import (
    MAX_SEED,
    require,
    require_above_zero,
    require_at_least,
    require_one_of,
    require_seed,
    require_share,
)
from qlora_lab.config.schema.data import (
    DATA_SOURCES,
    OWN_PART,
    DataConfig,
    FilterConfig,
    MixPartConfig,
    RowsConfig,
    SourceConfig,
)
from qlora_lab.config.schema.evaluate import BASE, TRAINED, EvaluateConfig
from qlora_lab.config.schema.evaluation import HELD_OUT, EvaluationConfig, EvaluationSetConfig, HarnessConfig
from qlora_lab.config.schema.merge import DEQUANTIZED, ORIGINAL, QUANTIZED, MergeConfig
from qlora_lab.config.schema.model import (
    BYTE_LEVEL,
    CAUSAL,
    CLASSIFICATION,
    MODEL_SOURCES,
    PLACEMENTS,
    PROMPT_FORMATS,
    QUANT_FORMATS,
    SEQ2SEQ,
    TASKS,
    AdapterConfig,
    ArchitectureConfig,
    ModelConfig,
    QuantConfig,
)
from qlora_lab.config.schema.prompts import PROBES, QUESTIONS, PromptSetConfig
from qlora_lab.config.schema.run import RunConfig
from qlora_lab.config.schema.serve import ChatConfig, OpenConfig, ServeConfig
from qlora_lab.config.schema.study import (
    SWEEP_ACTIONS,
    LauncherConfig,
    PathsConfig,
    SlurmConfig,
    StudyConfig,
    SweepConfig,
    TrackingConfig,
)
from qlora_lab.config.schema.training import (
    AUTO,
    COMPUTE_DTYPES,
    DEVICES,
    OPTIMIZERS,
    SCHEDULES,
    OptimConfig,
    TrainerConfig,
)

__all__ = [
    "AUTO",
    "BASE",
    "BYTE_LEVEL",
    "CAUSAL",
    "CLASSIFICATION",
    "COMPUTE_DTYPES",
    "DATA_SOURCES",
    "DEQUANTIZED",
    "DEVICES",
    "HELD_OUT",
    "MAX_SEED",
    "MODEL_SOURCES",
    "OPTIMIZERS",
    "ORIGINAL",
    "OWN_PART",
    "PLACEMENTS",
    "PROBES",
    "PROMPT_FORMATS",
    "QUANTIZED",
    "QUANT_FORMATS",
    "QUESTIONS",
    "SCHEDULES",
    "SEQ2SEQ",
    "SWEEP_ACTIONS",
    "TASKS",
    "TRAINED",
    "AdapterConfig",
    "ArchitectureConfig",
    "BenchmarkConfig",
    "ChatConfig",
    "DataConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "EvaluationSetConfig",
    "FilterConfig",
    "HarnessConfig",
    "LauncherConfig",
    "MergeConfig",
    "MixPartConfig",
    "ModelConfig",
    "OpenConfig",
    "OptimConfig",
    "PathsConfig",
    "PromptSetConfig",
    "QuantConfig",
    "RowsConfig",
    "RunConfig",
    "ServeConfig",
    "SlurmConfig",
    "SourceConfig",
    "StudyConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainerConfig",
    "require",
    "require_above_zero",
    "require_at_least",
    "require_one_of",
    "require_seed",
    "require_share",
]
