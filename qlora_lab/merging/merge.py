"""An adapter merged into its base: weights, configuration and tokenizer written, and compared with what was trained."""

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from qlora_lab.adapters.peft_format import load_adapter
from qlora_lab.adapters.saved_adapter import WEIGHTS, check_base_name, read_adapter
from qlora_lab.config import hardware
from qlora_lab.config.schema import (
    BYTE_LEVEL,
    DEQUANTIZED,
    HELD_OUT,
    ORIGINAL,
    QUANTIZED,
    DataConfig,
    EvaluationConfig,
    RunConfig,
    SourceConfig,
)
from qlora_lab.data.prepare import data_of_run, prepare_data
from qlora_lab.data.tokenization import Example
from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.evaluation.candidates import Base, alone
from qlora_lab.evaluation.run_model import open_model
from qlora_lab.hashing import file_sha256
from qlora_lab.merging.base import OpenedBase, open_base
from qlora_lab.merging.compare import LEAST_KEPT, Comparison, compare, tolerance_of
from qlora_lab.merging.tensors import MergedTensors
from qlora_lab.merging.write import PartialMerge, check_free, partial_merge, write_weights
from qlora_lab.models.load import load_unconfigured
from qlora_lab.models.save import written_quantization
from qlora_lab.ops.blockwise.checks import DTYPES
from qlora_lab.runs.environment import git_commit, package_version
from qlora_lab.runs.files import write_json

FORMAT = 2  # raised whenever other bytes would be written for the same merge
RECORD = "merge.json"
GB = 10**9
ROOM_FOR_WEIGHTS = 0.9  # of a GPU's free memory, or all of the host's; the rest is for what a few rows take
VERSIONS = ("qlora_lab", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Request:
    """What is merged into what.

    Attributes:
        adapter: its folder.
        base: what it was trained on.
        run: the configuration of the run that trained it, whose held-out rows are compared; None: made-up rows.
        into, dtype, tolerance, check_rows: as in MergeConfig; dtype is settled.
        shard_bytes: of a file.
    """

    adapter: Path
    base: Base
    out: Path
    into: str
    dtype: str
    run: RunConfig | None = None
    run_id: str | None = None
    tolerance: float | None = None
    check_rows: int = 16
    shard_bytes: int = 4 * GB


def merge(request: Request, *, cache_dir: Path, cache_bases: bool = True) -> dict[str, Any]:
    """Merge, compare, and put the folder in its place; an interrupted merge of the same goes on where it was.

    Returns:
        The content of merge.json.

    Raises:
        ModelError: the adapter or the base is missing or damaged, they do not fit, or the merged model differs from
            base and adapter by more than it may; the folder is then not there.
        ConfigError: there is no such form of this base, or no memory to compare the merged model in.
        OSError: the disk is full or not writable.
    """
    check_free(request.out)
    saved = read_adapter(request.adapter)
    if request.run is None:
        check_base_name(f"the adapter in {request.adapter}", saved, request.base.known_names)
        if not saved.base_name:
            print(f"note: the adapter in {request.adapter} does not name the base that it is for", flush=True)
    opened = open_base(request.base, cache_dir)
    tensors = MergedTensors(opened, saved, request.adapter, request.into, DTYPES[request.dtype])
    tensors.check()
    device = _device_for(sum(map(tensors.planned_bytes, tensors.names)), request.base.device, request.check_rows)
    made_from = {
        "format": FORMAT,
        "adapter_sha256": file_sha256(request.adapter / WEIGHTS),
        "settings": saved.settings,
        "base": request.base.settings(),
        "into": request.into,
        "dtype": request.dtype,
        "shard_bytes": request.shard_bytes,
    }
    with partial_merge(request.out, made_from) as partial:
        write_weights(tensors, partial, request.shard_bytes)
        _write_companions(opened, request, partial)
        comparison: Comparison | None = None
        if request.check_rows:
            comparison = _compared(request, opened, partial, device, cache_dir=cache_dir, cache_bases=cache_bases)
        print("not compared: check_rows=0" if comparison is None else str(comparison), flush=True)
        _check(request, comparison, partial)
        _write_config(opened, request, partial)
        record = {
            "format": f"qlora_lab.merge {FORMAT}",
            "run": request.run_id,
            "adapter_sha256": made_from["adapter_sha256"],
            "base": request.base.model.hub_id or Path(request.base.model.name).name,
            "base_revision": getattr(opened.config, "_commit_hash", None) or request.base.model.revision,
            "quantization": asdict(request.base.quant),
            "into": request.into,
            "dtype": request.dtype,
            "tolerance": _tolerance(request),
            "comparison": None if comparison is None else comparison.to_dict(),
            "files": partial.files,
            "versions": {name: package_version(name) for name in VERSIONS},
            "git_commit": git_commit(Path(__file__).parent),
        }
        write_json(partial.folder / RECORD, record)
        partial.finish(request.out)
    return record


def _tolerance(request: Request) -> float:
    if request.tolerance is not None:
        return request.tolerance
    return tolerance_of(request.into, (request.base.compute_dtype, request.dtype))


def _check(request: Request, comparison: Comparison | None, partial: PartialMerge) -> None:
    """Refuse a merge that changes the model by more than it may, or that swallows the adapter."""
    if comparison is None:
        return
    difference, kept = comparison.relative_difference, comparison.change_kept
    unfinished = f"it stays unfinished in {partial.folder}"
    ways = [] if request.into == DEQUANTIZED else ["into=dequantized"]
    ways += [] if request.dtype == "float32" else ["a dtype with more bits"]
    otherwise = "".join(f", or {way}" for way in ways)
    if not difference <= _tolerance(request):
        raise ModelError(
            f"the merged model differs from base and adapter by {difference:.2%} of the logits' spread, and "
            f"{_tolerance(request):.2%} is allowed for into={request.into} in {request.dtype}; {unfinished}: give "
            f"tolerance={difference * 1.1:.2g} to take it as it is{otherwise}"
        )
    # the original weights differ from those compared by what quantizing took, beside which an adapter may be small
    if request.into != ORIGINAL and request.tolerance is None and kept < LEAST_KEPT:
        raise ModelError(
            f"only {kept:.1%} of the adapter's change is left with into={request.into} in {request.dtype}, and "
            f"{LEAST_KEPT:.0%} must be; {unfinished}: give tolerance={_tolerance(request)} to take it as it "
            f"is{otherwise}"
        )


def _compared(
    request: Request,
    opened: OpenedBase,
    partial: PartialMerge,
    device: str,
    *,
    cache_dir: Path,
    cache_bases: bool,
) -> Comparison:
    base = replace(request.base, device=request.base.device if torch.cuda.is_available() else "cpu")

    def models() -> Iterator[PreTrainedModel]:
        """Yield the base, base and adapter, and the merged model; only one of them is in memory at a time."""
        run_model = open_model(alone(base, request.out.parent), cache_dir=cache_dir, cache_bases=cache_bases)
        with run_model.computing():
            yield run_model.model
            load_adapter(run_model.model, request.adapter)
            yield run_model.model.eval()
        del run_model
        gc.collect()  # the model before is gone now, and not later
        config = _written_config(opened, request)
        if request.into == QUANTIZED:
            assert opened.quantization is not None  # checked by MergedTensors
            config.quantization_config = opened.quantization.to_dict()
        dtype = opened.compute_dtype if request.into == QUANTIZED else DTYPES[request.dtype]
        yield load_unconfigured(partial.folder, config, task=base.model.task, compute_dtype=dtype, device=device)

    pad_id: Any = opened.tokenizer.pad_token_id
    return compare(models(), _rows(request, opened, cache_dir), pad_id)


def _device_for(model_bytes: int, device: str, check_rows: int) -> str:
    """Return where a merged model is compared: it may be four times as large as the base that was trained on a GPU.

    Raises:
        ConfigError: there is no room for it; said before anything is written.
    """
    if not check_rows or not torch.cuda.is_available():
        device = "cpu"
    if device != "cpu":
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info()
        if model_bytes < ROOM_FOR_WEIGHTS * free_bytes:
            return device
        told = f"the merged model of {model_bytes / GB:.1f} GB is compared on the CPU: the GPU has"
        print(f"{told} {free_bytes / GB:.1f} GB", flush=True)
    memory_bytes = hardware.detect().memory_bytes
    if check_rows and memory_bytes is not None and model_bytes > ROOM_FOR_WEIGHTS * memory_bytes:
        raise ConfigError(
            f"to compare it, the merged model of {model_bytes / GB:.3g} GB must fit into memory, and this machine has "
            f"{memory_bytes / GB:.3g} GB; give check_rows=0 to merge without comparing, or merge where there is more"
        )
    return "cpu"


def _rows(request: Request, opened: OpenedBase, cache_dir: Path) -> Sequence[Example]:
    """Return held-out rows of the run, or made-up ones for an adapter without a run."""
    if request.run is not None:
        data = data_of_run(request.run, opened.tokenizer, cache_dir)
    else:
        source = SourceConfig(kind="procedural", template="procedural")
        data = prepare_data(
            DataConfig(name="procedural", source=source, rows=1),
            EvaluationConfig(rows=request.check_rows),
            prompt_format=request.base.prompt_format,
            tokenizer=opened.tokenizer,
            seed=0,
            cache_dir=cache_dir,
            data_dir=cache_dir,
            task=request.base.model.task,
        )
    held_out = data.held_out.get(HELD_OUT) or [row for rows in data.held_out.values() for row in rows]
    return [replace(row.example, loss_start=row.example.target_start) for row in held_out[: request.check_rows]]


def _written_config(opened: OpenedBase, request: Request) -> Any:
    config = type(opened.config).from_dict(opened.config.to_dict())
    config.dtype = DTYPES[request.dtype]
    config.architectures = [type(opened.model).__name__]
    config.use_cache = True
    return config


def _write_companions(opened: OpenedBase, request: Request, partial: PartialMerge) -> None:
    """Write what stands beside the weights of a model: its generation config and its tokenizer."""
    if opened.generation_config is not None:
        shutil.copyfile(opened.generation_config, partial.folder / "generation_config.json")
    elif opened.model.can_generate():
        GenerationConfig.from_model_config(_written_config(opened, request)).save_pretrained(partial.folder)
    if request.base.model.tokenizer == BYTE_LEVEL:
        print("no tokenizer is written: the byte-level one of this project has no files", flush=True)
    else:
        opened.tokenizer.save_pretrained(partial.folder)


def _write_config(opened: OpenedBase, request: Request, partial: PartialMerge) -> None:
    """Write config.json, which makes a model of the folder."""
    config = _written_config(opened, request)
    if request.into == QUANTIZED:
        assert opened.quantization is not None  # checked by MergedTensors
        kept = [
            name
            for name, module in opened.model.named_modules()
            if isinstance(module, nn.Linear) and name not in opened.quantized
        ]
        config.quantization_config = written_quantization(opened.quantization, kept)
    settings = json.loads(config.to_json_string(use_diff=True))
    settings.pop("_name_or_path", None)
    (partial.folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
