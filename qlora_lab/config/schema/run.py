"""The whole configuration of one run, and what spans its groups."""

from dataclasses import dataclass, field

from qlora_lab.config.schema.checks import MISSING, require, require_seed
from qlora_lab.config.schema.data import DataConfig
from qlora_lab.config.schema.evaluation import EvaluationConfig
from qlora_lab.config.schema.model import CAUSAL, CLASSIFICATION, AdapterConfig, ModelConfig, QuantConfig
from qlora_lab.config.schema.study import LauncherConfig, PathsConfig, StudyConfig, SweepConfig, TrackingConfig
from qlora_lab.config.schema.training import OptimConfig, TrainerConfig


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
        require(
            self.evaluation.harness is None,
            "evaluation.harness is asked of finished runs, by python -m qlora_lab.evaluate run=ID evaluation=harness; "
            "leave it out where a run is trained",
        )
        require(
            not self.evaluation.prompts,
            f"evaluation.prompts ({', '.join(self.evaluation.prompts)}) are answered by finished runs, with python -m "
            "qlora_lab.evaluate run=ID evaluation=...; leave them out where a run is trained",
        )
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
        for name, benchmark in self.evaluation.benchmarks.items():
            benchmark.check_model(f"evaluation.benchmarks.{name}", task)
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
