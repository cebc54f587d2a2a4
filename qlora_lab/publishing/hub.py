"""Exported adapters sent to the Hugging Face hub, a repository each; what would be sent is shown first."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from qlora_lab.errors import DataError
from qlora_lab.publishing.study_index import ADAPTERS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LONGEST = 96  # characters of a repository's name and its owner
TOKENS_PAGE = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Upload:
    """A folder and the repository it goes to."""

    folder: Path
    repository: str

    @property
    def files(self) -> list[Path]:
        return [file for file in sorted(self.folder.rglob("*")) if file.is_file()]

    def __str__(self) -> str:
        size = sum(file.stat().st_size for file in self.files)
        return f"{self.repository}: {len(self.files)} files, {size / 1e6:.1f} MB"


def planned_uploads(out: Path, namespace: str, study: str | None) -> list[Upload]:
    """Return what is sent of an exported folder: every adapter to NAMESPACE/NAME.

    Args:
        study: put before each name, so that those of one study stand together.

    Raises:
        DataError: a name that the hub does not take.
    """
    uploads = []
    for folder in sorted((out / ADAPTERS).iterdir()):
        name = folder.name if study is None else f"{study}-{folder.name}"
        room = LONGEST - len(namespace) - 1
        repository = f"{namespace}/{name[-room:].lstrip('-._')}"  # the run's id, at the end, tells it from others
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise DataError(f"the hub takes no repository of the name '{repository}': {error}") from error
        uploads.append(Upload(folder, repository))
    return uploads


def upload(uploads: list[Upload], *, private: bool, api: "HfApi | None" = None) -> list[str]:
    """Send the folders, and return the addresses of their repositories; what is there already is not sent again.

    Raises:
        DataError: there is no token, or the hub refuses or cannot be reached; names the repository.
    """
    if huggingface_hub.get_token() is None:
        raise DataError(
            f"the hub wants a token: make one that may write at {TOKENS_PAGE}, and set HF_TOKEN to it, or run `hf auth "
            "login`; nothing was sent"
        )
    api = api or huggingface_hub.HfApi(library_name="qlora_lab")
    sent: list[str] = []
    for one in uploads:
        try:
            api.create_repo(one.repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=one.repository, folder_path=one.folder, commit_message="Adapter exported by qlora_lab"
            )
        except Exception as error:  # the hub's own, and whatever its HTTP library has for a network that is not there
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{one.repository} was not sent ({reason}); {len(sent)} of {len(uploads)} repositories are up to date, "
                "and the same command goes on"
            ) from error
        sent.append(f"https://huggingface.co/{one.repository}")
    return sent
