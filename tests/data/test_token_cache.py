"""Pools in the cache: found again by content, made once, made anew when damaged."""

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from qlora_lab.config.schema import (
    BenchmarkConfig,
    DataConfig,
    EvaluationConfig,
    EvaluationSetConfig,
    FilterConfig,
    MixPartConfig,
    RowsConfig,
    SourceConfig,
)
from qlora_lab.data import token_cache
from qlora_lab.data.drawn_rows import DrawnRows, lengths_of, rows_of
from qlora_lab.data.layout import token_rows
from qlora_lab.data.pool import write_pool
from qlora_lab.data.prepare import PreparedData, prepare_data
from qlora_lab.data.prompts import find_prompt_format
from qlora_lab.data.token_cache import pool_key
from qlora_lab.data.tokenization import Encoder, Limits
from qlora_lab.errors import DataError
from tests.hub_stand_in import give_rows

EVALUATION = EvaluationConfig(rows=5)


def write_rows(path: Path, count: int = 40, word: str = "Question") -> SourceConfig:
    lines = [json.dumps({"question": f"{word} {n}?", "answer": f"Answer {n}"}) for n in range(count)]
    path.write_text("\n".join(lines))
    return SourceConfig(kind="file", template="question_answer", path=str(path))


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that pools were written to."""
    written: list[Path] = []

    def write(folder: Path, *args: Any) -> None:
        written.append(folder)
        write_pool(folder, *args)

    monkeypatch.setattr("qlora_lab.data.prepare.write_pool", write)
    return written


@pytest.fixture
def prepare(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Any:
    def run(
        source: SourceConfig, evaluation: EvaluationConfig = EVALUATION, seed: int = 0, **data: Any
    ) -> PreparedData:
        return prepare_data(
            DataConfig(name="some_set", source=source, **data),
            evaluation,
            prompt_format="chatml",
            tokenizer=byte_tokenizer,
            seed=seed,
            cache_dir=tmp_path / "cache",
            data_dir=tmp_path,
        )

    return run


def contents(prepared: PreparedData) -> list[tuple[Any, ...]]:
    return [(list(e.input_ids), e.target_start, e.loss_start, e.key, e.target_bytes) for e in prepared.train]


def test_runs_that_differ_in_what_is_drawn_share_a_pool(prepare: Any, tmp_path: Path, writes: list[Path]) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    first = prepare(source, rows=20)
    again = prepare(source, rows=20)
    assert contents(again) == contents(first)
    assert again.report == first.report
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    prepare(
        replace(source, path=str(moved)), rows=7, seed=3, wrong_answer_share=0.5, loss_on="everything", packing=True
    )
    assert len(writes) == 1


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("loss_on", ["target", "everything"])
def test_rows_of_a_pool_come_at_once_as_they_do_one_by_one(
    prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, loss_on: str
) -> None:
    monkeypatch.setattr("qlora_lab.data.prepare.SMALL_DRAW", 0)
    train = prepare(write_rows(tmp_path / "rows.jsonl"), rows=20, wrong_answer_share=share, loss_on=loss_on).train
    assert isinstance(train, DrawnRows)
    for places in ([3, 19, 0, 3], [7], list(range(20))):
        one_by_one = token_rows([train[place] for place in places])
        for actual, expected in zip(rows_of(train, places), one_by_one, strict=True):
            assert actual.tolist() == expected.tolist()
        assert lengths_of(train, places).tolist() == lengths_of(list(train), places).tolist()
        assert lengths_of(train, places).tolist() == one_by_one.lengths.tolist()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_rows_out_of_a_pool_in_tokens_are_those_tokenized_in_the_run(
    prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    settings = {"rows": 20, "wrong_answer_share": share, "max_target_tokens": 9, "loss_on": "everything"}
    here = prepare(source, **settings)
    assert isinstance(here.train, list)
    monkeypatch.setattr("qlora_lab.data.prepare.SMALL_DRAW", 0)
    mapped = prepare(source, **settings)
    assert not isinstance(mapped.train, list)
    assert contents(mapped) == contents(here)
    assert (
        list(mapped.train_lengths) == list(here.train_lengths) == [len(example.input_ids) for example in mapped.train]
    )
    assert mapped.report == here.report
    assert mapped.report.train.targets_truncated > 0


def test_what_changes_rows_or_tokens_is_another_pool(prepare: Any, tmp_path: Path, writes: list[Path]) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    prepare(source)
    prepare(source, max_target_tokens=9)
    prepare(source, filter=FilterConfig(max_target_characters=8))
    prepare(source, EvaluationConfig(rows=6))
    prepare(write_rows(tmp_path / "rows.jsonl", 41))
    assert len(writes) == 5


def key_of(source: SourceConfig, tokenizer: PreTrainedTokenizerBase, data_dir: Path) -> str | None:
    encoder = Encoder(find_prompt_format("chatml", tokenizer), tokenizer, Limits(64, 64), "causal", [], "set")
    return pool_key(DataConfig(name="set", source=source), EVALUATION, encoder, data_dir)


def test_the_tokenizer_counts_and_what_is_not_pinned_is_not_kept(
    byte_tokenizer: PreTrainedTokenizerBase, chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    more = ByT5Tokenizer(additional_special_tokens=["<new>"], extra_ids=0)
    keys = {key_of(source, tokenizer, tmp_path) for tokenizer in (byte_tokenizer, chat_tokenizer, more)}
    assert len(keys) == 3 and None not in keys
    hub = SourceConfig(kind="hub", template="alpaca", hub_id="some/set", revision="main")
    assert key_of(hub, byte_tokenizer, tmp_path) is None
    assert key_of(replace(hub, revision="0123456789" * 4), byte_tokenizer, tmp_path) is not None


def hub_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Stand for the hub; what is returned says at which commit its sets are, None where that is not told."""
    branches: dict[str, str | None] = {"main": "1" * 40}

    def rows() -> list[dict[str, str]]:
        return [{"question": f"Question {n}?", "answer": f"{branches['main']}{n}"} for n in range(40)]

    give_rows(monkeypatch, rows, lambda: branches["main"])
    return branches


HUB = SourceConfig(kind="hub", template="question_answer", hub_id="some/set")


def test_a_hub_set_is_kept_by_the_commit_that_was_read(
    prepare: Any, writes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    branches = hub_of(monkeypatch)
    first = prepare(HUB)
    again = prepare(HUB, seed=2)
    prepare(replace(HUB, revision="1" * 40), seed=1)
    assert len(writes) == 1
    assert again.report.train.revisions == first.report.train.revisions == {"some/set": "1" * 40}
    branches["main"] = "2" * 40
    assert prepare(HUB).report.train.revisions == {"some/set": "2" * 40}
    assert len(writes) == 2
    with pytest.raises(DataError, match=f"at commit {'2' * 40}, and not at data.source.revision '{'3' * 40}'"):
        prepare(replace(HUB, revision="3" * 40))


def test_every_hub_set_of_a_run_counts_and_one_of_unknown_commit_is_not_kept(
    prepare: Any,
    tmp_path: Path,
    writes: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    branches = hub_of(monkeypatch)
    own = write_rows(tmp_path / "rows.jsonl", word="Riddle")
    evaluation = EvaluationConfig(
        rows=5,
        sets={"exam": EvaluationSetConfig(kind="hub", template="question_answer", hub_id="some/set")},
        benchmarks={"quiz": BenchmarkConfig(kind="hub", hub_id="some/set", task="mmlu")},
    )
    part = MixPartConfig(kind="hub", template="question_answer", hub_id="some/set")
    rules = FilterConfig(contamination_words=8, contamination_sets={"more": RowsConfig("hub", hub_id="some/set")})
    for commit in ("1" * 40, "1" * 40, "2" * 40):
        branches["main"] = commit
        prepare(own, evaluation, mix={"part": part}, filter=rules)
    assert len(writes) == 2 and capsys.readouterr().err == ""
    branches["main"] = None
    for _ in range(2):
        prepare(HUB)
        said = "the commit of data.source.hub_id 'some/set' is not known, so its rows are tokenized in every run; set"
        assert capsys.readouterr().err == f"{said} data.source.revision to a commit\n"
    assert len(writes) == 4


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "file gone", "no checksums"])
def test_a_damaged_pool_is_made_anew(
    prepare: Any, tmp_path: Path, writes: list[Path], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    expected = contents(prepare(source))
    (folder,) = (path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())
    tokens = folder / "tokens.i32"
    whole = tokens.read_bytes()
    if damage == "flipped byte":
        tokens.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    elif damage == "cut short":
        tokens.write_bytes(whole[:-8])
    else:
        (tokens if damage == "file gone" else folder / token_cache.CHECKSUMS_FILE).unlink()
    assert contents(prepare(source)) == expected
    assert len(writes) == 2
    assert capsys.readouterr().err == f"{folder} is damaged; its rows are tokenized again\n"


def test_runs_that_start_at_once_make_one_pool(prepare: Any, tmp_path: Path, writes: list[Path]) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    found: list[list[tuple[Any, ...]]] = []
    threads = [threading.Thread(target=lambda: found.append(contents(prepare(source)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(writes) == 1
    assert len(found) == 4 and all(each == found[0] for each in found)


@pytest.mark.parametrize(("locks", "age_s", "goes"), [(True, 1e6, True), (True, 0, False), (False, 1e6, False)])
def test_what_a_process_left_that_died_goes_where_nobody_can_be_writing_it(
    prepare: Any,
    tmp_path: Path,
    writes: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    locks: bool,
    age_s: float,
    goes: bool,
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError("no locks here")

    if not locks:
        monkeypatch.setattr(token_cache.fcntl, "flock", no_locks)
    source = write_rows(tmp_path / "rows.jsonl")
    prepare(source)
    (folder,) = (path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())
    left = folder.rename(folder.with_name(f".{folder.name}.0123abcd"))
    for path in (*left.iterdir(), left):
        os.utime(path, (time.time() - age_s,) * 2)
    other = folder.with_name(".another.0123abcd")
    other.mkdir()
    prepare(source)
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == sorted(
        [folder.name, other.name, *([] if goes else [left.name])]
    )


def test_without_locks_the_first_to_finish_stays(
    prepare: Any, tmp_path: Path, writes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(token_cache.fcntl, "flock", no_locks)
    source = write_rows(tmp_path / "rows.jsonl")
    both_write = threading.Barrier(2, timeout=60)
    fill = token_cache._fill

    def fill_together(folder: Path, write: Any) -> None:
        both_write.wait()
        fill(folder, write)

    monkeypatch.setattr(token_cache, "_fill", fill_together)
    found: list[list[tuple[Any, ...]]] = []
    threads = [threading.Thread(target=lambda: found.append(contents(prepare(source)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(writes) == 2 and found[0] == found[1]
    assert len([path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]) == 1


def test_nothing_is_left_of_a_pool_that_failed(prepare: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    source = write_rows(path)
    path.write_text(path.read_text() + '\n{"question": "no answer"}')
    with pytest.raises(DataError, match="line 41: column 'answer' is missing"):
        prepare(source)
    assert [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(prepare: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be used .* set paths\.cache_dir"):
        prepare(write_rows(tmp_path / "rows.jsonl"))


def test_a_mix_draws_by_weight_and_holds_out_what_its_own_source_does(
    prepare: Any, tmp_path: Path, writes: list[Path]
) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    alone = prepare(source, rows=20)
    other = write_rows(tmp_path / "other.jsonl", 30, word="Riddle")
    part = MixPartConfig(kind="file", template="question_answer", path=other.path, weight=0.25)
    mixed = prepare(source, rows=20, mix={"riddles": part})
    assert mixed.report.parts == {"source": 16, "riddles": 4}
    assert contents(mixed)[:16] == contents(alone)[:16]
    held_out = [[item.prompt for item in prepared.held_out["held_out"]] for prepared in (alone, mixed)]
    assert held_out[0] == held_out[1]
    prepare(source, rows=20, mix={"riddles": replace(part, weight=1.0)})
    assert len(writes) == 2  # alone and mixed: weights are no matter of the pool


def test_a_question_held_out_is_removed_from_every_part(prepare: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    part = MixPartConfig(kind="file", template="question_answer", path=str(source.path))
    mixed = prepare(source, mix={"again": part}, filter=FilterConfig(max_source_characters=11))
    assert mixed.report.overlap_removed == {"held_out": 5}
    assert mixed.report.filtered["length"] > 40
    reasons = {entry["reason"] for entry in mixed.removed}
    assert reasons == {"asks what an evaluation row asks", "length"}


@pytest.mark.parametrize("rows", [None, 8])
def test_rows_over_a_token_limit_go_rather_than_being_cut(prepare: Any, tmp_path: Path, rows: int | None) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    limits = {"rows": rows, "max_target_tokens": 9}  # "Answer 7" and eos, and no more
    cut = prepare(source, **limits)
    assert cut.report.train.targets_truncated > 0
    whole = prepare(source, filter=FilterConfig(drop_truncated=True), **limits)
    assert whole.report.train.targets_truncated == whole.report.train.sources_truncated == 0
    assert whole.report.filtered == {"over a token limit": sum(entry["because"] == "target" for entry in whole.removed)}
    assert {entry["row"] for entry in whole.removed} <= {f"Question {n}?" for n in range(10, 40)}
    short = 10 - sum(item.target in {f"Answer {n}" for n in range(10)} for item in whole.held_out["held_out"])
    assert len(whole.train) == (rows or short) and len(whole.removed) == 35 - short


def test_a_filter_that_leaves_nothing_says_why(prepare: Any, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"leaves no row of part 'source' of some_set \(35 removed: length\); loosen it"
    ):
        prepare(write_rows(tmp_path / "rows.jsonl"), filter=FilterConfig(min_target_characters=50))
