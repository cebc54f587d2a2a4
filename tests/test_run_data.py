"""What a run does with its data settings, from the configuration to the run folder."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lab import run
from qlora_lab.config.hardware import Hardware
from qlora_lab.config.resolve import resolve
from qlora_lab.runs.folder import FAILED, FINISHED, RunFolder
from qlora_lab.runs.identity import run_id
from tests.helpers import tiny
from tests.hub_stand_in import give_rows
from tests.tiny_models import LLAMA


@pytest.fixture
def source(tmp_path: Path) -> list[str]:
    """Rows of 20 to 100 tokens, each question twice."""
    rows = [{"input": f"Question {n}?" + " Well?" * (n % 5), "output": f"{n} " * (1 + n % 16)} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, *rows]))
    return ["data=file", f"data.source.path={tmp_path}/rows.jsonl", "data.source.template=input_output"]


def planned(tmp_path: Path, *overrides: str) -> RunFolder:
    config = tiny(tmp_path, "trainer.device=cpu", "trainer.threads=1", "adapter.dropout=0.0", *overrides)
    resolved = resolve(config, Hardware("some CPU", frozenset(), 2, ()), lambda source: None)
    return RunFolder.create(tmp_path, run_id(resolved), resolved)


def losses(folder: RunFolder) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    names = ("train/loss", "train/grad_norm", "train/tokens", "train/target_tokens")
    return [
        {name: value for name, value in record.items() if name in names or name.startswith("train/loss_")}
        for record in records
        if "train/loss" in record
    ]


def test_a_packed_run_takes_the_same_steps(tmp_path: Path, source: list[str]) -> None:
    apart, packed = (planned(tmp_path, *source, f"data.packing={packing}") for packing in ("false", "true"))
    for folder in (apart, packed):
        assert run.execute(folder.path) == FINISHED, folder.status()
    assert len(losses(apart)) == 3
    for expected, actual in zip(losses(apart), losses(packed), strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)
    ends = [folder.result()["metrics"]["eval/loss"] for folder in (apart, packed)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
    assert len([path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]) == 1


def test_packing_is_refused_where_it_cannot_be_right(tmp_path: Path, source: list[str]) -> None:
    bloom = ["model.architecture.model_type=bloom", "model.architecture.num_kv_heads=4"]
    folder = planned(tmp_path, *source, "data.packing=true", *bloom, "model.architecture.feed_forward_size=256")
    assert run.execute(folder.path) == FAILED
    status = folder.status()
    assert status is not None and "set data.packing=false" in status["error"]["message"]


def test_what_was_removed_is_counted_and_listed_in_the_run_folder(tmp_path: Path, source: list[str]) -> None:
    folder = planned(tmp_path, *source, "data.filter.duplicates=exact", "data.filter.max_target_characters=40")
    assert run.execute(folder.path) == FINISHED, folder.status()
    counts = folder.result()["data"]
    assert counts["overlap_removed"] == {"held_out": 16}  # the second time that each held-out question is asked
    assert sum(counts["filtered"].values()) == 48 - counts["train"]["rows"]
    listed = [json.loads(line) for line in (folder.path / "data" / "removed.jsonl").read_text().splitlines()]
    by_reason = {reason: sum(entry["reason"] == reason for entry in listed) for reason in counts["filtered"]}
    assert by_reason == counts["filtered"]
    assert len(listed) == 16 + sum(by_reason.values())


def test_runs_of_one_data_set_share_the_list_of_what_was_removed(tmp_path: Path, source: list[str]) -> None:
    chosen = (*source, "data.filter.max_target_characters=40")
    folders = [planned(tmp_path, *chosen, f"seed={seed}") for seed in (0, 1)]
    for folder in folders:
        assert run.execute(folder.path) == FINISHED, folder.status()
    files = [folder.path / "data" / "removed.jsonl" for folder in folders]
    (pool,) = (tmp_path / "cache" / "tokens").glob("*/removed.jsonl")
    assert files[0].samefile(files[1]) and files[0].samefile(pool)
    shutil.rmtree(tmp_path / "cache" / "tokens")
    assert files[0].read_text().count("\n") > 16


def test_the_commits_of_model_and_data_are_in_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--some--model"
    LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": 384})).save_pretrained(repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "tuned").write_text("1" * 40)
    rows = [{"input": f"Question {n}?", "output": f"{n}"} for n in range(20)]
    give_rows(monkeypatch, rows, commit="2" * 40)
    model = ["model=hub", "model.hub_id=some/model", "model.revision=tuned", "model.tokenizer=byte_level"]
    data = ["data=hub", "data.source.hub_id=some/set", "model.prompt_format=plain", "evaluation.rows=4"]
    folder = planned(tmp_path, *model, *data)
    assert run.execute(folder.path) == FINISHED, folder.status()
    result = folder.result()
    assert result["model_revision"] == "1" * 40
    assert result["data"]["train"]["revisions"] == {"some/set": "2" * 40}
