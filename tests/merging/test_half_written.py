"""A merge that stops goes on or begins anew, and is taken for whole by nobody; its memory is one file's."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_lab.adapters.saved_adapter import read_adapter
from qlora_lab.errors import ModelError
from qlora_lab.evaluation.candidates import Base
from qlora_lab.merging import write
from qlora_lab.merging.base import open_base
from qlora_lab.merging.merge import Request
from qlora_lab.merging.tensors import MergedTensors
from qlora_lab.models.load import load_model
from tests.memory.live_bytes import LiveBytes
from tests.merging.bases import PLAIN, request, saved_base, trained
from tests.merging.conftest import merged

SMALL_FILES = 20_000  # bytes, so that the tiny model has several


def stopped_after(files: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let the disk be full after some files; returns how many were asked for."""
    real, count = write.write_tensors, 0

    def until_full(path: Path, *arguments: Any) -> str:
        nonlocal count
        count += 1
        if count > files:
            raise OSError(28, "No space left on device")
        return real(path, *arguments)

    monkeypatch.setattr(write, "write_tensors", until_full)
    return lambda: count


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def test_a_stopped_merge_goes_on_and_ends_with_the_same_bytes(
    asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(asked, shard_bytes=SMALL_FILES)
    whole = replace(asked, out=tmp_path / "whole")
    merged(whole)
    files = len(hashes(whole.out))
    assert files > 4 and (whole.out / "model.safetensors.index.json").is_file()
    stopped_after(3, monkeypatch)
    with pytest.raises(OSError, match="No space"):
        merged(asked)
    partial = tmp_path / ".out.partial"
    assert not asked.out.exists() and not (partial / "config.json").exists() and len(hashes(partial)) == 3
    half = replace(asked.base.model, path=str(partial))
    with pytest.raises(ModelError, match="is a merge that was not finished; the same"):
        load_model(half, PLAIN, compute_dtype=torch.float32, device="cpu", cache_dir=tmp_path, seed=0)

    (partial / "model-00002-of-00001.safetensors").write_bytes(b"no file of this merge")
    first = sorted(hashes(partial))[0]
    (partial / first).write_bytes(b"damaged meanwhile")
    monkeypatch.undo()
    written = stopped_after(99, monkeypatch)
    merged(asked)
    assert written() == files - 2, "two files were there, whole"
    assert hashes(asked.out) == hashes(whole.out)
    assert not (asked.out / "merge_journal.json").exists()
    AutoModelForCausalLM.from_pretrained(asked.out)


def test_what_another_merge_left_is_removed(
    asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replace(asked, shard_bytes=SMALL_FILES)
    stopped_after(2, monkeypatch)
    with pytest.raises(OSError, match="No space"):
        merged(replace(asked, dtype="bfloat16"))
    monkeypatch.undo()
    merged(asked)
    assert "removed" in capsys.readouterr().out
    assert {tensor.dtype for tensor in AutoModelForCausalLM.from_pretrained(asked.out).parameters()} == {torch.float32}


def test_an_output_is_never_written_over(asked: Request) -> None:
    asked.out.mkdir()
    with pytest.raises(ModelError, match="is there already; a merge is never written over"):
        merged(asked)


def test_two_merges_of_one_name_do_not_meet(asked: Request, tmp_path: Path) -> None:
    with (
        write.partial_merge(asked.out, {"another": "merge"}),
        pytest.raises(ModelError, match=r"another process is writing .*out"),
    ):
        merged(asked)


@pytest.mark.parametrize("into", ["dequantized", "quantized"])
def test_memory_is_one_file_and_the_work_on_one_tensor(into: str, tmp_path: Path) -> None:
    base: Base = saved_base(tmp_path / "base", hidden_size=128, feed_forward_size=512, num_layers=6, vocab_size=2048)
    trained(base, tmp_path / "adapter")
    asked = request(base, tmp_path / "adapter", tmp_path / "out", into=into)
    tensors = MergedTensors(open_base(base, tmp_path), read_adapter(asked.adapter), asked.adapter, into, torch.float32)
    shard, largest = 1_500_000, 2048 * 128 * 4
    with write.partial_merge(asked.out, {}) as partial, LiveBytes([]) as live:
        write.write_weights(tensors, partial, shard)
    files = sorted(file.stat().st_size for file in partial.folder.glob("*.safetensors"))
    assert max(files) < shard + 10_000
    if into == "dequantized":
        assert sum(files) > 4 * shard, "the model is much larger than what may be in memory"
    assert live.peak < shard + 4 * largest, f"{live.peak:,} bytes for files of {shard:,}"
    assert json.loads((partial.folder / "merge_journal.json").read_text())["files"].keys() == {
        file.name for file in partial.folder.glob("*.safetensors")
    }
