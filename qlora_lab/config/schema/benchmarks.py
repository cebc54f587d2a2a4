"""A benchmark: which rows, and how they are put to the model."""

from dataclasses import dataclass

from qlora_lab.config.benchmark_names import METRICS, metric_prefix
from qlora_lab.config.schema.checks import MISSING, require, require_at_least, require_one_of
from qlora_lab.config.schema.data import RowsConfig
from qlora_lab.config.schema.model import CAUSAL, CLASSIFICATION, SEQ2SEQ

MMLU_HEADER = "The following are multiple choice questions (with answers) about  {subject}.\n\n"
OF_CAUSAL_MODELS = ("mmlu", "crows_pairs", "perplexity")  # whose every token, or last one, is scored


@dataclass
class BenchmarkConfig(RowsConfig):
    """A benchmark's rows and settings; `split` is a part of the names of its metrics, of a local file too."""

    task: str = MISSING
    rows: int | None = None  # at most so many, spread evenly over the set; None: all
    # mmlu: worked examples before each question, from `examples` unless a row brings its own
    shots: int = 0
    examples: RowsConfig | None = None
    header: str = MMLU_HEADER  # before the examples; two spaces as in the original's code, where lm-eval has one
    # perplexity: the column of the text; tokens scored in one window (None: as many as the model takes), and from one
    # window's end to the next's (None: as many as a window has, no overlap)
    text_column: str = "text"
    window_tokens: int | None = None
    stride_tokens: int | None = None
    # natural_instructions, and glue with a model that writes: the limits of prompt and answer
    max_source_tokens: int = 1024
    max_new_tokens: int = 128
    bootstrap_seed: int = 0  # crows_pairs: of the resampled pairs

    def check(self, place: str) -> None:
        super().check(place)
        require_one_of(f"{place}.task", self.task, tuple(METRICS))
        for key, least in (
            ("rows", 1),
            ("shots", 0),
            ("window_tokens", 1),
            ("stride_tokens", 1),
            ("max_source_tokens", 1),
            ("max_new_tokens", 1),
        ):
            require_at_least(f"{place}.{key}", getattr(self, key), least)
        require(
            self.shots == 0 or self.task == "mmlu",
            f"{place}.shots must be 0, since {self.task} is asked without worked examples; got {self.shots}",
        )
        if self.examples is not None:
            self.examples.check(f"{place}.examples")
        if self.window_tokens is not None and self.stride_tokens is not None:
            require(
                self.stride_tokens <= self.window_tokens,
                f"{place}.stride_tokens must be at most {place}.window_tokens ({self.window_tokens}), or tokens "
                f"between windows would not be scored; got {self.stride_tokens}",
            )

    def check_model(self, place: str, model_task: str) -> None:
        """Refuse a benchmark that the kind of model cannot be asked."""
        allowed = {
            CAUSAL: tuple(METRICS),
            SEQ2SEQ: tuple(task for task in METRICS if task not in OF_CAUSAL_MODELS),
            CLASSIFICATION: tuple(task for task in METRICS if task.startswith("glue_")),
        }[model_task]
        require(
            self.task in allowed,
            f"{place}.task '{self.task}' cannot be asked of a model whose model.task is '{model_task}'; "
            f"such models are scored on {', '.join(allowed)}",
        )
        if model_task == CLASSIFICATION:
            require(
                self.task != "glue_stsb",
                f"{place}.task 'glue_stsb' needs a model that writes scores: classifiers here choose among classes and "
                "have no regression head; try a causal or seq2seq model.task",
            )

    @property
    def is_answered_in_words(self) -> bool:
        """Whether the model writes answers, or chooses classes, instead of being scored on given ones."""
        return self.task == "natural_instructions" or self.task.startswith("glue_")

    def sources(self) -> list[RowsConfig]:
        """Return where its rows come from, those of the worked examples too."""
        return [self] if self.examples is None else [self, self.examples]

    def metric_names(self, name: str) -> list[str]:
        """Return the names of the benchmark's metrics, where it is called `name`."""
        prefix = self.metric_prefix(name)
        return [f"{prefix}/{metric}" for metric in METRICS[self.task]]

    def metric_prefix(self, name: str) -> str:
        return metric_prefix(name, self.task, self.split, self.rows, self.shots)
