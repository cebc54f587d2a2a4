"""The rows of a run: where they come from, which are taken, what of them is learned."""

from dataclasses import dataclass, field

from qlora_lab.config.data_names import FILE_KINDS, ITS_TASKS, PROCEDURAL_FAMILIES, SMALLEST_FAMILY, TEMPLATES
from qlora_lab.config.schema.checks import (
    MISSING,
    require,
    require_above_zero,
    require_at_least,
    require_one_of,
    require_share,
)
from qlora_lab.config.schema.model import PROMPT_FORMATS

DUPLICATES = ("keep", "exact", "near")
DATA_SOURCES = ("procedural", "file", "hub", "wheel")


@dataclass
class RowsConfig:
    """Where rows come from.

    A hub set whose `path` is given is read from that local file instead: its `kind` becomes "file".
    """

    kind: str = MISSING
    path: str | None = None  # a .json, .jsonl, .csv or .parquet file, or a .gz of the first three; a local copy
    hub_id: str | None = None
    hub_config: str | None = None
    hub_files: str | None = None  # the only file of the repository to load, or a pattern of several
    split: str = "train"  # of the hub; a local file is one split
    revision: str | None = None
    wheel: str | None = None  # a name of qlora_lab.fetch
    member: str | None = None  # the file inside the wheel
    content_sha256: str | None = None  # resolved from the file, so that changed data is a new run

    def __post_init__(self) -> None:
        if self.kind == "hub" and self.path is not None:
            self.kind = "file"

    def check(self, place: str) -> None:
        """Refuse what cannot be read; `place` is where the rows are configured, such as data.source."""
        require_one_of(f"{place}.kind", self.kind, self._kinds())
        needs = {"file": ("path",), "hub": ("hub_id",), "wheel": ("wheel", "member"), "procedural": ()}
        for key in needs[self.kind]:
            require(
                getattr(self, key) is not None,
                f"{place}.{key} is needed when {place}.kind is '{self.kind}'; got nothing",
            )
        file = self.path if self.kind == "file" else self.member if self.kind == "wheel" else None
        if file is not None:
            compressed = file.endswith(".gz") and not file.endswith(".parquet.gz")
            name = file.removesuffix(".gz") if compressed else file
            require(
                name.lower().endswith(FILE_KINDS),
                f"{place}.{'path' if self.kind == 'file' else 'member'} must end in one of {', '.join(FILE_KINDS)}, "
                f"all but the last also with .gz; got '{file}'",
            )

    def _kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in DATA_SOURCES if kind != "procedural")


@dataclass
class SourceConfig(RowsConfig):
    """Where rows come from, and the template that makes each into a (source, target) pair."""

    template: str = MISSING
    families: list[str] = field(default_factory=list)  # procedural: task families, empty for all
    licence: str | None = None  # this and the next describe the set and change no run
    published_rows: int | None = None  # training rows that the study, or else the publisher, counts

    def check(self, place: str) -> None:
        super().check(place)
        require_one_of(f"{place}.template", self.template, self._templates())
        require(
            self.kind != "procedural" or self.template == "procedural",
            f"{place}.template must be procedural when {place}.kind is 'procedural'; got '{self.template}'",
        )
        for family in self.families:
            require_one_of(f"{place}.families", family, PROCEDURAL_FAMILIES)

    def _kinds(self) -> tuple[str, ...]:
        return DATA_SOURCES

    def _templates(self) -> tuple[str, ...]:
        return TEMPLATES

    def check_different_rows(self, key: str, rows: int) -> None:
        """Refuse more different rows than there are of a procedural source."""
        families = self.families or list(PROCEDURAL_FAMILIES)
        most = ITS_TASKS * len(families)
        require(
            self.kind != "procedural" or SMALLEST_FAMILY not in families or rows <= most,
            f"{key} must be at most {most}, since task family {SMALLEST_FAMILY} has no more different tasks; got {rows}"
            "; ask for fewer, or name other data.source.families",
        )


OWN_PART = "source"  # the name of data.source among the parts of a mix


@dataclass
class MixPartConfig(SourceConfig):
    """A further source of a mix."""

    weight: float = 1.0  # rows of it for every row of data.source, whose weight is 1


@dataclass
class FilterConfig:
    """Which rows may be trained on; evaluation rows are chosen before, and are the same whatever is filtered."""

    languages: list[str] = field(default_factory=list)  # codes as the rows say them in `lang` or `language`; empty: all
    detect_language: bool = False  # guess it where a row does not say it (needs py3langid)
    min_source_characters: int = 0
    max_source_characters: int | None = None
    min_target_characters: int = 0
    max_target_characters: int | None = None
    drop_truncated: bool = False  # leaves out rows over data.max_source_tokens or max_target_tokens: none is cut
    duplicates: str = "keep"  # what of equal rows is removed: keep (nothing), exact, near (also what is much alike)
    near_duplicate_similarity: float = 0.8  # of the sets of word triples of two rows
    # Removes rows that share so many words in a run with a row of evaluation.sets or evaluation.benchmarks, or of
    # further sets by name, such as prompts that finished runs will answer.
    contamination_words: int | None = None
    contamination_sets: dict[str, RowsConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_one_of("data.filter.duplicates", self.duplicates, DUPLICATES)
        share = self.near_duplicate_similarity
        require(0 < share <= 1, f"data.filter.near_duplicate_similarity must be above 0 and at most 1; got {share}")
        require_at_least("data.filter.contamination_words", self.contamination_words, 4)
        for name, rows in self.contamination_sets.items():
            rows.check(f"data.filter.contamination_sets.{name}")
        require(
            self.contamination_words is not None or not self.contamination_sets,
            "data.filter.contamination_sets is of no use without data.filter.contamination_words, such as 13",
        )
        for part in ("source", "target"):
            least, most = (getattr(self, f"{bound}_{part}_characters") for bound in ("min", "max"))
            require_at_least(f"data.filter.min_{part}_characters", least, 0)
            require_at_least(f"data.filter.max_{part}_characters", most, max(1, least))
        require(
            bool(self.languages) or not self.detect_language,
            "data.filter.detect_language is of no use without data.filter.languages, such as [en]",
        )


@dataclass
class DataConfig:
    name: str = MISSING
    source: SourceConfig = MISSING
    mix: dict[str, MixPartConfig] = field(default_factory=dict)  # further sources by name; see MixPartConfig.weight
    filter: FilterConfig = field(default_factory=FilterConfig)
    rows: int | None = None  # rows drawn for training; None: all there are, in a mix as many as its weights allow
    wrong_answer_share: float = 0.0  # rows whose answer is swapped for another row's
    max_source_tokens: int = 256
    max_target_tokens: int = 256
    prompt_format: str | None = None  # None: the model's; chat_template where the rows are chat
    loss_on: str = "target"
    packing: bool = False  # several rows in one row of a batch, none of which sees another
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
        for name, part in self.mix.items():
            part.check(f"data.mix.{name}")
            require_above_zero(f"data.mix.{name}.weight", part.weight)
            require(
                name != OWN_PART, f"data.mix must not name a part '{OWN_PART}', which data.source is; call it otherwise"
            )
        if self.mix or self.filter != FilterConfig():
            kinds = {"data.source": self.source, **{f"data.mix.{name}": part for name, part in self.mix.items()}}
            for place, source in kinds.items():
                require(
                    source.kind != "procedural",
                    f"data.mix and data.filter are for sources with an end; {place}.kind is 'procedural', whose rows "
                    "are made to be different; leave data.mix and data.filter out",
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

    @property
    def longest_row_tokens(self) -> int:
        """Tokens that a row of training can have."""
        return self.max_source_tokens + self.max_target_tokens
