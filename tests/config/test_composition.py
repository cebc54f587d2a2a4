"""Every option of conf/ composes, and bad input gets one sentence."""

import itertools
import re
from pathlib import Path

import pytest
from hydra import compose

from qlora_lab.config.command import shipped
from qlora_lab.config.load import typed_from_hydra
from qlora_lab.config.schema import EvaluateConfig, RunConfig
from qlora_lab.errors import ConfigError
from tests.command_line import call
from tests.helpers import composed, hydra_on_conf

NEEDS = {  # options that are incomplete on purpose, and what completes them
    "model/hub": ["model.hub_id=some/model"],
    "model/folder": ["model.path=/models/mine"],
    "model/gguf": ["model.path=/models/mine.gguf"],
    "model/roberta_base": ["data.labels=[negative,positive]"],
    "adapter/regex": ["adapter.target_regex=.*q_proj"],
    "adapter/none": ["quant=none"],
    "data/chat": ["data.source.path=chats.jsonl"],
    "data/file": ["data.source.path=rows.jsonl"],
    "data/hub": ["data.source.hub_id=some/rows"],
    "evaluation/harness": ["evaluation.harness.tasks=[boolq]"],
    "evaluation/prompts": ["evaluation.prompts.own.path=mine.jsonl"],
}
OF_FINISHED_RUNS = {f"evaluation/{name}" for name in ("harness", "open_assistant", "probes", "prompts", "vicuna")}


def of_a_family() -> dict[str, str]:
    """Return one size of each family of models: files of one family differ in numbers only."""
    sizes: dict[str, str] = {}
    for file in sorted((shipped("conf") / "model").glob("*.yaml")):
        family = re.search("family/(.+)@_here_", file.read_text())
        sizes.setdefault(family[1] if family else file.name, file.name.removesuffix(".yaml"))
    return sizes


GROUPS = [folder for folder in shipped("conf").iterdir() if folder.is_dir()]
OPTIONS = sorted(
    f"{group.name}/{name}"
    for group in GROUPS
    for name in (of_a_family().values() if group.name == "model" else (file.stem for file in group.glob("*.yaml")))
)


ALONE = {"adapter/none", "model/roberta_base", *OF_FINISHED_RUNS}  # what other options do not go with
# Composing takes a while, and these groups know nothing of each other.
TOGETHER = [("data", "adapter", "launcher", "optim", "quant", "tracking", "trainer"), ("evaluation", "model")]


def rows() -> list[tuple[str, ...]]:
    """Return every option once, with one of each group that may stand beside it."""
    found = [(option,) for option in sorted(ALONE)]
    for groups in TOGETHER:
        columns = [[each for each in OPTIONS if each.split("/")[0] == group and each not in ALONE] for group in groups]
        found += [tuple(filter(None, row)) for row in itertools.zip_longest(*columns)]
    return found


@pytest.mark.parametrize("options", rows(), ids=" ".join)
def test_every_option_composes(options: tuple[str, ...]) -> None:
    overrides = [word for option in options for word in (option.replace("/", "="), *NEEDS.get(option, []))]
    if OF_FINISHED_RUNS & set(options):
        with hydra_on_conf(evaluate_schema=EvaluateConfig):
            node = compose("evaluate", ["run=0123456789ab", *overrides])
        evaluation = typed_from_hydra(node, EvaluateConfig).evaluation
        assert evaluation.prompts or evaluation.harness
    else:
        assert isinstance(composed(*overrides), RunConfig)


def test_no_option_is_left_out() -> None:
    assert sorted(option for row in rows() for option in row) == OPTIONS


def test_overrides_reach_the_typed_config() -> None:
    config = composed("adapter.rank=4", "quant=none", "seed=7", "optim.learning_rate=2e-4")
    assert (config.adapter.rank, config.quant.format, config.seed) == (4, "none", 7)
    assert config.optim.learning_rate == 2e-4  # a number, although PyYAML would read text


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluation=vicuna"], "evaluation.prompts (vicuna) are answered by finished runs, with python -m"),
        (["quant.block_size=48"], "quant.block_size must be a power of two from 32 to 4096; got 48"),
        (["adapter.rank=0"], "adapter.rank must be 1 or more; got 0"),
        (["adapter.dropout=1.0"], "adapter.dropout must be from 0 to below 1; got 1.0"),
        (["quant=none", "quant.double_quant=true"], "quant.double_quant must be false when quant.format is 'none'"),
        (["adapter=none"], "quant.format must be 'none' when adapter.kind is 'none'"),
        (["quant.format=nf5"], "got 'nf5'; did you mean 'nf4'?"),
        (["trainer.micro_batch_size=9"], "trainer.micro_batch_size must not exceed trainer.batch_size (8); got 9"),
        (["trainer.micro_batch_size=2.5"], "trainer.micro_batch_size must be a whole number, auto or null; got '2.5'"),
        (["trainer.micro_batch_size=0"], "trainer.micro_batch_size must be 1 or more; got 0"),
        (["launcher.gpu_memory_gb=0"], "launcher.gpu_memory_gb must be the GiB of one card, such as 24 or 80; got 0.0"),
        (["trainer.max_steps=null"], "trainer.max_steps and trainer.max_train_tokens are both null"),
        (["data.wrong_answer_share=1.5"], "data.wrong_answer_share must be from 0 to 1; got 1.5"),
        (["model=hub"], "model.hub_id is needed when model.source is 'hub'"),
        (["adapter.target_regex=x"], "adapter.target_regex is needed when adapter.placement is 'regex', and only then"),
        (["model.max_length_tokens=100"], "must fit model.max_length_tokens (100); got 96 + 32"),
        (["+adapter.rnk=8"], "adapter.rnk is no configuration key"),
        (["+adaptr=8"], "did you mean 'adapter'?"),
    ],
)
def test_bad_values_are_refused_by_name(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        composed(*overrides)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model=smolm2_135m", "got 'smolm2_135m'; did you mean 'smollm2_135m'?"),
        ("adapter.rnk=8", "adapter.rnk is no configuration key; adapter has the keys kind, rank"),
        ("modl=x", "did you mean 'model'?"),
        ("adapter.rank=abc", "adapter.rank must be a whole number; got 'abc'"),
        ("+experiment=datset_quality", "did you mean 'dataset_quality'?"),
        ("adapter=regex adapter.target_regex=qq_proj", "adapter.target_regex"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(override: str, sentence: str, tmp_path: Path) -> None:
    done = call("qlora_lab.train.__main__", f"paths.runs_dir={tmp_path}", *override.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir()), "nothing may be written for a refused run"
