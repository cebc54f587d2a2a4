"""How a run is scored."""

from dataclasses import dataclass, field

from qlora_lab.config.schema.benchmarks import BenchmarkConfig
from qlora_lab.config.schema.checks import MISSING, require, require_at_least, require_seed
from qlora_lab.config.schema.data import SourceConfig
from qlora_lab.config.schema.prompts import PromptSetConfig

HELD_OUT = "held_out"  # the evaluation set's name where its rows come from the run's own source


@dataclass
class EvaluationSetConfig(SourceConfig):
    """A set of held-out rows with a source of its own."""

    exact_match: bool = False  # whether a row's target is the only right answer


@dataclass
class HarnessConfig:
    """Tasks of lm-evaluation-harness."""

    tasks: list[str] = MISSING  # names of tasks, groups or tags
    definitions: str | None = None  # a folder of YAML files with tasks, below paths.data_dir; None: the harness's own
    shots: int | None = None  # worked examples before each question; None: as each task says
    rows: int | None = None  # the first so many of each task; None: all
    batch_size: int = 8  # rows in memory at once

    def check(self) -> None:
        require(bool(self.tasks), "evaluation.harness.tasks must name tasks, such as [boolq]; got none")
        require_at_least("evaluation.harness.shots", self.shots, 0)
        require_at_least("evaluation.harness.rows", self.rows, 1)
        require_at_least("evaluation.harness.batch_size", self.batch_size, 1)


@dataclass
class EvaluationConfig:
    rows: int = 128  # held out of training, the same in every run of a study
    seed: int = 20230523  # draws the held-out rows; not the run's seed
    # By name; empty: rows of the run's own data source, as the set `held_out`.
    sets: dict[str, EvaluationSetConfig] = field(default_factory=dict)
    benchmarks: dict[str, BenchmarkConfig] = field(default_factory=dict)  # run at the end, by name
    # Answered by python -m qlora_lab.evaluate, by name; a run that trains has none.
    prompts: dict[str, PromptSetConfig] = field(default_factory=dict)
    harness: HarnessConfig | None = None  # asked by python -m qlora_lab.evaluate, too
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
        for name, benchmark in self.benchmarks.items():
            benchmark.check(f"evaluation.benchmarks.{name}")
            require(
                name.strip(". ") != "" and not set(name) & set("/\\"),
                f"evaluation.benchmarks must have names of files, without slashes; got '{name}'",
            )
            require(
                name not in self.sets and name != HELD_OUT,
                f"evaluation.benchmarks must not be named as a set is; got '{name}'; call it otherwise",
            )
        for name, prompts in self.prompts.items():
            require(
                name.strip(". ") != "" and not set(name) & set("/\\"),
                f"evaluation.prompts must have names of folders, without slashes; got '{name}'",
            )
            prompts.check(f"evaluation.prompts.{name}")
        if self.harness is not None:
            self.harness.check()
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
