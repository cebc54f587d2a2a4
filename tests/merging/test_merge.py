"""A merged model is what was trained, for every way in which architectures keep their weights."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from qlora_lab.adapters.lora import adapted_layers
from qlora_lab.config import hardware
from qlora_lab.config.schema import AdapterConfig, ModelConfig
from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.merging import merge as merge_module
from qlora_lab.merging.checkpoint import FileCheckpoint
from qlora_lab.merging.merge import Request
from qlora_lab.merging.tensors import MergedTensors
from qlora_lab.models.load import load_model
from qlora_lab.models.location import Location
from qlora_lab.models.save import save_quantized
from qlora_lab.quant.linear import QuantizedLinear
from qlora_lab.quant.quantizer import quantize_model
from qlora_lab.quant.settings import QloraLabConfig
from tests.command_line import call
from tests.evaluation.finished_runs import finished
from tests.merging.bases import NF4, PLAIN, logits, request, saved_base, trained
from tests.merging.conftest import merged

BASES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_embeddings": True}),
    "fused QKV under an older name of its head": ("gpt_neox", {}),
    "fused QKV, tied": ("bloom", {"tie_embeddings": True}),
    "encoder-decoder": ("t5", {}),
    "encoder-decoder, tied": ("t5", {"tie_embeddings": True}),
}


def plainly(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Load a folder with transformers alone."""
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", BASES)
def test_a_merged_model_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    model_type, changes = BASES[name]
    base = saved_base(tmp_path / "base", model_type, **changes)
    before = trained(base, tmp_path / "adapter")
    compared = name in ("llama", "encoder-decoder")
    record = merged(request(base, tmp_path / "adapter", tmp_path / "out", check_rows=2 * compared))

    after = plainly(before, tmp_path / "out")
    assert after.dtype == torch.float32
    torch.testing.assert_close(logits(after), logits(before), rtol=1e-4, atol=1e-3)  # order of float32 sums
    bare = load_model(base.model, NF4, compute_dtype=torch.float32, device="cpu", cache_dir=Path(), seed=0)
    assert (logits(after) - logits(bare)).abs().max() > 0.1, "the adapter does something"
    for path, layer in adapted_layers(before).items():
        assert isinstance(layer.base, QuantizedLinear)
        expected = layer.base.dequantize(torch.float32) + layer.scaling * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(after.get_submodule(path).weight, expected, rtol=1e-6, atol=1e-7)
    if compared:
        found = record["comparison"]
        assert found["relative_difference"] < 1e-3 and found["targets"] > 2
        assert found["perplexity_after"] == pytest.approx(found["perplexity_before"], rel=1e-3)
    assert record == json.loads((tmp_path / "out/merge.json").read_text())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing is left behind"


def test_the_original_weights_are_taken_where_asked(asked: Request, tmp_path: Path) -> None:
    (tmp_path / "base/generation_config.json").write_text('{"max_new_tokens": 7}')
    merged(replace(asked, into="original", dtype="bfloat16", tolerance=9.0))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.max_new_tokens == 7
    source, found = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    change = 3 * adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
    assert torch.equal(found[f"{name}.weight"], (source[f"{name}.weight"] + change).bfloat16())
    assert torch.equal(found["lm_head.weight"], source["lm_head.weight"].bfloat16())
    assert found.keys() == source.keys()


def test_a_base_is_quantized_again(asked: Request, base, tmp_path: Path) -> None:
    """Layers with an adapter are quantized anew, from what they were before training; others keep their bytes."""
    config = AdapterConfig(rank=4, alpha=12, placement="attention")
    before = trained(base, tmp_path / "attention", config)
    merged(replace(asked, adapter=tmp_path / "attention", into="quantized", tolerance=9.0))
    again = ModelConfig("q", "folder", path=str(tmp_path / "out"), tokenizer="byte_level", max_length_tokens=512)
    after = load_model(again, NF4, compute_dtype=torch.float32, device="cpu", cache_dir=tmp_path, seed=0)
    source = load_file(tmp_path / "base/model.safetensors")
    for path, layer in after.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        was = before.get_submodule(path)
        if "self_attn" not in path:
            assert torch.equal(layer.packed, was.packed) and torch.equal(layer.absmax, was.absmax)
            continue
        expected = source[f"{path}.weight"] + (was.lora_B @ was.lora_A) * was.scaling  # in this order
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight.data = expected.detach()
        anew = QuantizedLinear.from_linear(linear, **QloraLabConfig("nf4").layer_arguments())
        assert torch.equal(layer.dequantize(), anew.dequantize())
    told = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "bitsandbytes" and told["bnb_4bit_quant_type"] == "nf4"


def test_a_merge_that_is_quantized_loads_in_plain_transformers(tmp_path: Path) -> None:
    """With the bits that this project computes with; in blocks that fill rows, as bitsandbytes on CPUs wants them."""
    base = saved_base(tmp_path / "base", hidden_size=64, feed_forward_size=128)
    before = trained(base, tmp_path / "adapter")
    merged(request(base, tmp_path / "adapter", tmp_path / "out", into="quantized"))
    again = ModelConfig("q", "folder", path=str(tmp_path / "out"), tokenizer="byte_level", max_length_tokens=512)
    ours = load_model(again, NF4, compute_dtype=torch.float32, device="cpu", cache_dir=tmp_path, seed=0)
    plain = plainly(before, tmp_path / "out")
    theirs = {name: layer for name, layer in plain.named_modules() if isinstance(layer, Linear4bit)}
    assert len(theirs) == 14
    for name, layer in theirs.items():
        values = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        assert torch.equal(values, ours.get_submodule(name).dequantize(torch.float32)), name
    difference = (logits(plain) - logits(ours)).abs().max()
    assert difference < 0.05 * logits(ours).std(), "kernels of bitsandbytes may round to bfloat16"


def test_a_small_change_outlives_another_quantization_or_the_loss_is_refused(
    asked: Request, base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far below half a step of the grid: kept where the weights before quantization are at hand."""
    file = asked.adapter / "adapter_model.safetensors"
    smaller = {name: 0.02 * tensor if "lora_B" in name else tensor for name, tensor in load_file(file).items()}
    save_file(smaller, file)
    asked = replace(asked, into="quantized", check_rows=8)
    record = merged(asked)["comparison"]
    assert 0.6 < record["change_kept"] < 1.4
    assert f"{record['perplexity_base']:.4f} of the base, {record['perplexity_before']:.4f} with the adapter" in (
        capsys.readouterr().out
    )
    plain = load_model(base.model, PLAIN, compute_dtype=torch.float32, device="cpu", cache_dir=Path(), seed=0)
    save_quantized(quantize_model(plain, QloraLabConfig("nf4")), tmp_path / "quantized")
    other = replace(base, model=replace(base.model, path=str(tmp_path / "quantized")))
    asked = replace(asked, base=other, out=tmp_path / "lost")
    with pytest.raises(
        ModelError, match=r"only -?\d+\.\d% of the adapter's change is left .*, and 50% must be; .*: give"
    ):
        merged(asked)
    assert merged(replace(asked, tolerance=0.5))["comparison"]["change_kept"] < 0.5, "it was asked for"


def test_one_model_is_in_memory_at_a_time(asked: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[weakref.ref[PreTrainedModel]] = []
    opened, merged_one = merge_module.open_model, merge_module.load_unconfigured

    def opening(*arguments: Any, **how: Any) -> Any:
        found = opened(*arguments, **how)
        first.append(weakref.ref(found.model))
        return found

    def loading(*arguments: Any, **how: Any) -> Any:
        assert [one() for one in first] == [None]
        return merged_one(*arguments, **how)

    monkeypatch.setattr(merge_module, "open_model", opening)
    monkeypatch.setattr(merge_module, "load_unconfigured", loading)
    found = merged(replace(asked, check_rows=2))["comparison"]
    assert found["memory_bytes"] == AutoModelForCausalLM.from_pretrained(asked.out).get_memory_footprint()


def test_float32_of_a_run_that_computed_in_sixteen_bits_is_measured_by_sixteen_bits(asked: Request, base) -> None:
    record = merged(replace(asked, base=replace(base, compute_dtype="bfloat16"), check_rows=4))
    assert record["dtype"] == "float32" and record["tolerance"] == 0.1
    assert record["comparison"]["relative_difference"] > 0.001, "the run's own rounding"


def test_checkpoints_of_other_kinds_give_the_same(asked: Request, base, tmp_path: Path) -> None:
    """torch's own files in shards, and a base that was quantized before it came here."""
    merged(asked)
    expected = load_file(tmp_path / "out/model.safetensors")
    tensors = load_file(tmp_path / "base/model.safetensors")
    in_shards, names = tmp_path / "in_shards", list(tensors)
    in_shards.mkdir()
    shutil.copy(tmp_path / "base/config.json", in_shards)
    files = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, in_shards / file)
    (in_shards / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    plain = load_model(base.model, PLAIN, compute_dtype=torch.float32, device="cpu", cache_dir=Path(), seed=0)
    save_quantized(quantize_model(plain, QloraLabConfig("nf4")), tmp_path / "quantized")
    for folder in (in_shards, tmp_path / "quantized"):
        other = replace(base, model=replace(base.model, path=str(folder)))
        merged(replace(asked, base=other, out=tmp_path / f"out_{folder.name}"))
        found = load_file(tmp_path / f"out_{folder.name}/model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_base_in_the_hub_cache_is_read_from_there(base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub/models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    shutil.copytree(tmp_path / "base", repository / "snapshots" / ("0" * 40))
    read = FileCheckpoint(Location("some/model", "main", "download it again"))
    assert set(read.names) == set(load_file(tmp_path / "base/model.safetensors"))


def test_a_run_is_merged_with_its_new_tokens_and_trained_embeddings(tmp_path: Path) -> None:
    """Tied, and trained as a whole: embeddings and head stay one, with a row for the new token."""
    run = finished(
        tmp_path / "runs",
        "model.new_tokens=['<tool>']",
        "adapter.trained_modules=[embed_tokens]",
        "optim.learning_rate=0.05",
    )
    done = call(
        "qlora_lab.merge",
        *(f"run={run.run_id[:6]}", "out=out", "dtype=float32", "check_rows=4", f"paths.runs_dir={tmp_path}/runs"),
        f"paths.cache_dir={tmp_path}/cache",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "logits differ by" in done.stdout and "perplexity" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == 385
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    assert torch.equal(model.get_input_embeddings().weight, adapter["base_model.model.model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out/merge.json").read_text())["run"] == run.run_id


def test_new_tokens_take_rows_that_a_base_has_to_spare(tmp_path: Path) -> None:
    run = finished(tmp_path / "runs", "model.new_tokens=['<tool>']", "model.architecture.vocab_size=400")
    done = call(
        "qlora_lab.merge",
        *(f"run={run.run_id[:6]}", "out=out", "dtype=float32", "check_rows=4", f"paths.runs_dir={tmp_path}/runs"),
        f"paths.cache_dir={tmp_path}/cache",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    embeddings = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight
    assert len(embeddings) == 400
    torch.testing.assert_close(embeddings[384], embeddings[:384].mean(0))


def test_a_merge_that_loses_the_adapter_fails(asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MergedTensors, "_change", lambda self, name: None)
    with pytest.raises(ModelError, match=r"differs from base and adapter by \d+\.\d+% .* 0\.10% is allowed"):
        merged(replace(asked, check_rows=2))
    assert not asked.out.exists()


def test_an_adapter_that_is_lost_within_the_tolerance_is_missed(
    asked: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small one changes the logits by less than rounding to bfloat16 may."""
    file = asked.adapter / "adapter_model.safetensors"
    smaller = {name: 0.02 * tensor if "lora_B" in name else tensor for name, tensor in load_file(file).items()}
    save_file(smaller, file)
    asked = replace(asked, dtype="bfloat16", check_rows=8)
    assert merged(replace(asked, out=asked.out.with_name("kept")))["comparison"]["change_kept"] > 0.5
    monkeypatch.setattr(MergedTensors, "_change", lambda self, name: None)
    with pytest.raises(ModelError, match="of the adapter's change is left with into=dequantized in bfloat16"):
        merged(asked)
    assert not asked.out.exists()


def test_a_model_that_is_too_large_to_be_compared_is_told_before_anything_is_written(
    asked: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(hardware.detect(), memory_bytes=100_000)
    monkeypatch.setattr(hardware, "detect", lambda: small)
    with pytest.raises(ConfigError, match=r"this machine has 0.0001 GB; give check_rows=0 to merge without comparing"):
        merged(replace(asked, check_rows=2))
    assert not (tmp_path / ".out.partial").exists()
    assert merged(asked)["comparison"] is None


def test_sixteen_bits_are_within_their_tolerance_and_can_be_told_a_tighter_one(asked: Request) -> None:
    dtype, asked = "bfloat16", replace(asked, check_rows=2)
    with pytest.raises(ModelError, match=f"0.00% is allowed for into=dequantized in {dtype}; it stays unfinished in "):
        merged(replace(asked, dtype=dtype, tolerance=1e-7))
    record = merged(replace(asked, dtype=dtype))
    assert 1e-7 < record["comparison"]["relative_difference"] < record["tolerance"]
    assert AutoModelForCausalLM.from_pretrained(asked.out).dtype == getattr(torch, dtype)
