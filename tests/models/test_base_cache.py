"""The cache of quantized bases: the same bits again, shared by runs at once, and never the reason that a run fails."""

import fcntl
import multiprocessing
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from qlora_lab import doctor
from qlora_lab.adapters.lora import add_adapters
from qlora_lab.config.schema import AdapterConfig, ArchitectureConfig, ModelConfig, QuantConfig
from qlora_lab.models import base_cache
from qlora_lab.models.base_cache import MANIFEST, cached_bases
from qlora_lab.models.load import load_model
from qlora_lab.models.loss import target_loss
from qlora_lab.models.save import save_quantized
from qlora_lab.models.tasks import give_own_head
from qlora_lab.quant.held import HELD_FILE
from qlora_lab.quant.linear import QuantizedLinear


def loaded(folder: Path, cache: Path, quant: QuantConfig | None = None, **changes: Any) -> PreTrainedModel:
    arguments: dict[str, Any] = {"compute_dtype": torch.float32, "device": "cpu", "seed": 0, "cache_bases": True}
    config = ModelConfig("m", "folder", path=str(folder), max_length_tokens=64, task=changes.pop("task", "causal"))
    return load_model(config, quant or QuantConfig(), cache_dir=cache, **{**arguments, **changes})


def bases(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "bases").glob("*") if path.is_dir())


def assert_same(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Bit for bit, names and dtypes too, and buffers that no checkpoint holds."""
    for kind in ("named_parameters", "named_buffers"):
        found, right = dict(getattr(actual, kind)()), dict(getattr(expected, kind)())
        assert found.keys() == right.keys()
        for name, tensor in right.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
            assert found[name].requires_grad == tensor.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", [QuantConfig(), QuantConfig("int8", block_size=32, double_quant=False)])
def test_the_second_load_gives_the_same_bits(quant: QuantConfig, dtype: torch.dtype, make_folder, tmp_path) -> None:
    folder = make_folder()
    plain = loaded(folder, tmp_path, quant, compute_dtype=dtype, cache_bases=False)
    assert bases(tmp_path) == []
    first = loaded(folder, tmp_path, quant, compute_dtype=dtype)
    (base,) = bases(tmp_path)
    modified = (base / MANIFEST).stat().st_mtime_ns
    again = loaded(folder, tmp_path, quant, compute_dtype=dtype)
    assert bases(tmp_path) == [base] and (base / MANIFEST).stat().st_mtime_ns == modified
    assert_same(first, plain)
    assert_same(again, plain)
    assert again.name_or_path == plain.name_or_path and not again.training


def test_a_cached_base_trains_and_is_saved_as_a_fresh_one(make_folder, tmp_path: Path) -> None:
    folder = make_folder()
    results = []
    for cached in (False, True, True):
        model = loaded(folder, tmp_path, cache_bases=cached)
        save_quantized(model, tmp_path / "saved")
        add_adapters(model, AdapterConfig(), torch.Generator().manual_seed(1))
        ids = torch.arange(24).view(2, 12)
        target_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, 8)[0].backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        results.append(((tmp_path / "saved" / "model.safetensors").read_bytes(), gradients))
    for saved, gradients in results[1:]:
        assert saved == results[0][0]
        assert all(torch.equal(one, other) for one, other in zip(gradients, results[0][1], strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_an_encoder_decoder_keeps_its_head(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    from qlora_lab.models.architecture import to_transformers

    numbers = ArchitectureConfig("t5", 32, 2, 2, 2, 64, 96, tie_embeddings=tied, max_position=64, head_size=16)
    with torch.random.fork_rng(devices=[]):
        source = AutoModelForSeq2SeqLM.from_config(to_transformers(numbers))
        give_own_head(source)
    source.save_pretrained(tmp_path / "t5")
    plain = loaded(tmp_path / "t5", tmp_path, task="seq2seq", cache_bases=False)
    loaded(tmp_path / "t5", tmp_path, task="seq2seq")
    again = loaded(tmp_path / "t5", tmp_path, task="seq2seq")
    assert len(bases(tmp_path)) == 1
    assert_same(again, plain)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_what_changes_the_bits_is_another_base(make_folder, tmp_path: Path) -> None:
    folder = make_folder()
    loaded(folder, tmp_path)
    loaded(folder, tmp_path, QuantConfig(block_size=32))
    loaded(folder, tmp_path, compute_dtype=torch.bfloat16)
    loaded(make_folder("copy"), tmp_path)  # the same content elsewhere
    assert len(bases(tmp_path)) == 3
    other = make_folder("other", eos_token="<end>")  # other files
    loaded(other, tmp_path)
    assert len(bases(tmp_path)) == 4
    loaded(folder, tmp_path, QuantConfig("none", double_quant=False))  # nothing to keep
    assert len(bases(tmp_path)) == 4


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "flipped codes": lambda base: flip(base / HELD_FILE),
    "flipped dense": lambda base: flip(base / "model.safetensors"),
    "cut": lambda base: (base / HELD_FILE).write_bytes((base / HELD_FILE).read_bytes()[:-1]),
    "gone": lambda base: (base / "model.safetensors").unlink(),
    "manifest": lambda base: (base / MANIFEST).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_base_is_quantized_again(damage: str, make_folder, tmp_path: Path, caplog) -> None:
    folder = make_folder()
    plain = loaded(folder, tmp_path)
    (base,) = bases(tmp_path)
    DAMAGE[damage](base)
    assert_same(loaded(folder, tmp_path), plain)
    (line,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert str(base) in line and "\n" not in line and "quantized again" in line
    caplog.clear()
    assert_same(loaded(folder, tmp_path), plain)
    assert not caplog.records and bases(tmp_path) == [base]


class Usage(NamedTuple):
    free: int


def test_a_full_disk_costs_the_cache_and_not_the_run(make_folder, tmp_path: Path, monkeypatch, caplog) -> None:
    folder = make_folder()
    with monkeypatch.context() as short:
        short.setattr(base_cache.shutil, "disk_usage", lambda path: Usage(1000))
        loaded(folder, tmp_path)
    with monkeypatch.context() as full:

        def no_space(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        full.setattr(base_cache, "write_held", no_space)
        loaded(folder, tmp_path)
    said = [record.getMessage() for record in caplog.records if "is not kept in" in record.getMessage()]
    assert len(said) == 2 and "are free" in said[0] and "No space left" in said[1]
    assert bases(tmp_path) == []  # nothing half written either: the folder of a failed write is hidden, and gone
    (tmp_path / "file").write_text("")
    loaded(folder, tmp_path / "file")  # no folder can be made there
    assert "is not kept in" in caplog.records[-1].getMessage()


def test_while_another_process_writes_a_base_nobody_waits(make_folder, tmp_path: Path) -> None:
    folder = make_folder()
    loaded(folder, tmp_path)
    (base,) = bases(tmp_path)
    shutil.rmtree(base)
    (left,) = [base.with_name(f".{base.name}.0123abcd")]  # by a process that died while it wrote
    left.mkdir()
    with base.with_name(f".{base.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        loaded(folder, tmp_path)
        assert bases(tmp_path) == [left]
    loaded(folder, tmp_path)
    assert bases(tmp_path) == [base]


def _load_in_turn(folder: Path, cache: Path, start: Any, answers: Any) -> None:
    start.wait()
    model = loaded(folder, cache)
    answers.put(sum(float(layer.dequantize().sum()) for layer in model.modules() if isinstance(layer, QuantizedLinear)))


def test_processes_that_fill_the_cache_at_once_agree(make_folder, tmp_path: Path) -> None:
    folder = make_folder()
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(4), context.SimpleQueue()
    processes = [
        context.Process(target=_load_in_turn, args=(folder, tmp_path, start, answers), daemon=True) for _ in range(4)
    ]
    for process in processes:
        process.start()
    sums = {answers.get() for _ in processes}
    for process in processes:
        process.join()
    assert len(sums) == 1 and len(bases(tmp_path)) == 1


def test_the_doctor_shows_their_size(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(make_folder(), tmp_path)
    count, size = cached_bases(tmp_path)
    assert count == 1 and size == sum(file.stat().st_size for file in bases(tmp_path)[0].iterdir())
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path))
    assert f"1 in {tmp_path / 'bases'}" in dict(doctor.report())["quantized bases"]
