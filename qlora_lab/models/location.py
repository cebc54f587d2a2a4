"""Where a model lies, and what is wrong with it as one sentence that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError

from qlora_lab.errors import ModelError

HALF_WRITTEN = "merge_journal.json"  # in a folder that a merge has not finished (merging/write.py)


@dataclass(frozen=True)
class Location:
    """Where transformers finds a model or a tokenizer."""

    name: str  # a folder, or a hub id
    revision: str  # of a hub id
    remedy: str  # what to do when it is damaged
    local: str = "model.source=folder model.path=FOLDER"  # settings that read it from a folder instead

    @property
    def on_hub(self) -> bool:
        return not Path(self.name).is_dir()

    @property
    def snapshot(self) -> Path | None:
        """The folder in the hub's cache that the revision stands for; None elsewhere, or without config.json."""
        config = try_to_load_from_cache(self.name, "config.json", revision=self.revision) if self.on_hub else None
        return Path(config).parent if isinstance(config, str) else None

    def at_its_commit(self) -> "Location":
        """Return the same place at the commit that its config was loaded from: a branch may move meanwhile."""
        snapshot = self.snapshot
        return self if snapshot is None else replace(self, revision=snapshot.name)


@contextmanager
def explained(location: Location, what: str) -> Iterator[None]:
    """Word what goes wrong inside as a sentence that says what to do."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"the {what} in {location.name} cannot be loaded ({error})") from error
    except (OSError, StrictDataclassError, ValueError, SafetensorError) as error:
        causes = list(_causes(error))
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            raise ModelError(
                f"'{location.name}' is gated on the hub: accept its licence on its page and set HF_TOKEN to a token "
                "of that account, or take an open model of its size (Qwen, SmolLM, Pythia, huggyllama), or a local "
                f"copy with {location.local}"
            ) from error
        if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
            raise ModelError(
                f"'{location.name}' has no model.revision '{location.revision}' on the hub; set a branch, tag or "
                f"commit that it has, or take a local copy with {location.local}"
            ) from error
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            raise ModelError(
                f"'{location.name}' is neither a folder nor a model on the hub that you may see; check its spelling, "
                f"set HF_TOKEN if it is private, or take a local copy with {location.local}"
            ) from error
        if location.on_hub and "find them in the cached files" in str(error):
            pinned = location.revision != "main"
            at = f" at revision '{location.revision}' (model.revision=main takes what is there)" if pinned else ""
            raise ModelError(
                f"'{location.name}' is neither a folder nor in the local hub cache{at}, and the hub cannot be reached; "
                "connect once (with HF_HUB_OFFLINE unset), set HF_HOME to a cache that holds it, take a local copy "
                f"with {location.local}, or use model=smollm2_135m, which needs no hub"
            ) from error
        raise damaged(location, what, error) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        # transformers collects what went wrong with single weights in a report of its own
        raise damaged(location, what, error) from error


def damaged(location: Location, what: str, error: BaseException) -> ModelError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(f"the {what} in {location.name} cannot be loaded ({reason}); {location.remedy}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
