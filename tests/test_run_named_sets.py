"""Every data set with a name trains: from its file through the run function to a result, in a tiny random model.

Each reads the few rows of its schema in tests/data/fixtures; the sets of which there are real slices read those too.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from qlora_lab import run
from qlora_lab.config.catalogue import data_sets
from qlora_lab.config.hardware import Hardware
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import RunConfig
from qlora_lab.runs.folder import FINISHED, RunFolder
from qlora_lab.runs.identity import run_id
from tests.data.conftest import chat_tokenizer  # noqa: F401  # a fixture
from tests.data.test_named_sets import fixture_of, local_copy
from tests.helpers import composed

SETS = data_sets()
SMALL = [
    *("model=tiny_random", "model.architecture.hidden_size=32", "model.architecture.feed_forward_size=64"),
    *("adapter.rank=2", "trainer.max_steps=2", "trainer.batch_size=2", "trainer.device=cpu", "tracking=none"),
    # Held-out rows of our own, so that every row of a fixture is trained on.
    *("+evaluation.sets={tasks: {kind: procedural, template: procedural}}", "evaluation.rows=1"),
    *("evaluation.max_source_tokens=64", "evaluation.max_target_tokens=32", "evaluation.max_new_tokens=4"),
]
CLASSIFIER = [
    *("model=roberta_base", "model.source=random", "model.tokenizer=byte_level", "model.architecture.vocab_size=384"),
    *("model.architecture.num_layers=1", "model.architecture.num_heads=2", "model.architecture.num_kv_heads=2"),
    *("data.labels=[no,yes]", "data.max_source_tokens=64", "data.max_target_tokens=8"),  # of a set that is replaced
]
Train = Callable[..., dict[str, float]]
composed_once = cache(composed)  # Hydra takes longer than such a run


@pytest.fixture
def train(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> Train:  # noqa: F811
    """Train on a local copy of a set; return the run's metrics with the counts of its training rows."""

    def go(name: str, file: Path, config: RunConfig, rows: int | None = None, template: str | None = None):
        config, data = copy.deepcopy(config), local_copy(name, file)
        data.source.template = template or data.source.template
        config.paths.runs_dir, config.paths.cache_dir = str(tmp_path), str(tmp_path / "cache")
        if data.prompt_format == "chat_template":
            chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
            config.model.tokenizer = str(tmp_path / "tokenizer")
        config.data = replace(data, rows=rows, max_source_tokens=250, max_target_tokens=250)
        config = resolve(config, Hardware("some CPU", frozenset(), 2, ()), lambda source: None)
        config.trainer.threads = 1
        folder = RunFolder.create(tmp_path, run_id(config), config)
        assert run.execute(folder.path) == FINISHED, folder.status()
        result = folder.result()
        return {**result["metrics"], **{name: result["data"]["train"][name] for name in ("rows", "tokens")}}

    return go


@pytest.mark.parametrize("name", sorted(name for name in SETS if fixture_of(name).exists()))
def test_a_named_set_is_trained_on(name: str, train: Train) -> None:
    found = train(name, fixture_of(name), composed_once(*SMALL))
    # two steps of two rows
    assert found["train/rows_seen"] == min(found["rows"], 4)
    everything = SETS[name].loss_on == "everything"
    assert (found["train/target_tokens"] == found["train/tokens"] - 4) == everything  # all but each row's first


@pytest.mark.parametrize("name", ["glue_cola", "glue_sst2", "glue_mnli"])
def test_a_task_of_glue_trains_a_classifier(name: str, train: Train) -> None:
    config = composed_once(*SMALL, *CLASSIFIER)
    found = train(name, fixture_of(name), replace(config, evaluation=replace(config.evaluation, sets={})))
    assert found["train/rows_seen"] == 1 and found["eval/exact_match"] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "file", "template"),
    [
        ("alpaca", "alpaca", None),
        ("dolly", "dolly_3k", "alpaca_chat"),  # with other names for two of its columns
        ("hh_rlhf", "hh_rlhf_harmless_test", None),
        ("oasst1", "oasst1_guanaco_style", None),
        ("oasst1_chat", "oasst1_messages", None),
        ("flan_v2", "flan_v2_cot", None),
        ("self_instruct", "flan_v2_t0_mix", None),  # another set of its repository, in the same columns
    ],
)
def test_real_rows_of_a_named_set_are_trained_on(
    name: str, file: str, template: str | None, train: Train, data_slices: Path
) -> None:
    path = data_slices / "instruct" / f"{file}.jsonl.gz"
    found = train(name, path, composed_once(*SMALL), rows=16, template=template)
    assert (found["train/rows_seen"], found["rows"]) == (4, 16) and found["train/target_tokens"] > 4
