"""Exported adapters sent to the Hugging Face hub, a repository each; what would be sent is shown first.

The index of a study goes to a repository with the name of the study, where its links lead to those of the adapters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from qlora_lab.errors import DataError
from qlora_lab.publishing.study_index import ADAPTERS, README, TABLES

LONGEST = 96  # characters of a repository's name and its owner


@dataclass(frozen=True)
class Upload:
    """Files and the repository they go to."""

    files: dict[str, bytes | Path]  # by their place in the repository
    repository: str

    def __str__(self) -> str:
        size = sum(its.stat().st_size if isinstance(its, Path) else len(its) for its in self.files.values())
        return f"{self.repository}: {len(self.files)} files, {size / 1e6:.1f} MB"


def planned_uploads(out: Path, namespace: str, study: str | None) -> list[Upload]:
    """Return what is sent of an exported folder: every adapter to NAMESPACE/NAME, and the index of a study last.

    Args:
        study: put before each name, so that those of one study stand together.

    Raises:
        DataError: a name that the hub does not take.
    """
    uploads, index = [], (out / README).read_text(encoding="utf-8")
    for folder in sorted((out / ADAPTERS).iterdir()):
        name = folder.name if study is None else f"{study}-{folder.name}"
        repository = _repository(namespace, name)
        files = {str(its.relative_to(folder)): its for its in sorted(folder.rglob("*")) if its.is_file()}
        uploads.append(Upload({**files}, repository))
        index = index.replace(f"({ADAPTERS}/{folder.name}/{README})", f"({_address(repository)})")
    if study is not None:
        tables = {name: out / name for name in TABLES}
        uploads.append(Upload({README: index.encode(), **tables}, _repository(namespace, study)))
    return uploads


def _address(repository: str) -> str:
    return f"{constants.ENDPOINT}/{repository}"


def _repository(namespace: str, name: str) -> str:
    room = LONGEST - len(namespace) - 1
    repository = f"{namespace}/{name[-room:].lstrip('-._')}"  # the run's id, at the end, tells it from others
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise DataError(f"the hub takes no repository of the name '{repository}': {error}") from error
    return repository


def upload(uploads: list[Upload], *, private: bool) -> list[str]:
    """Send the files, and return the addresses of their repositories; what is there already is not sent again.

    Raises:
        DataError: there is no token, or the hub refuses or cannot be reached; names the repository. Or `private` is
            wanted and some are there and public, which sending would not change: nothing is sent then.
    """
    if get_token() is None:
        raise DataError(
            f"the hub wants a token: make one that may write at {_address('settings/tokens')}, and set HF_TOKEN to it, "
            "or run `hf auth login`; nothing was sent"
        )
    api = HfApi(library_name="qlora_lab")
    sent: list[str] = []
    is_private: dict[str, bool | None] = {}
    for one in uploads:
        with _refusals_in_words(one, sent, len(uploads)):
            is_private[one.repository] = _is_private(api, one.repository)
    public = [repository for repository, found in is_private.items() if found is False]
    if private and public:
        raise DataError(
            f"--private was asked for, and {', '.join(public)} {'is' if len(public) == 1 else 'are'} there already and "
            "public; make them private in their settings on the hub, or leave --private out; nothing was sent"
        )
    for one in uploads:
        with _refusals_in_words(one, sent, len(uploads)):
            api.create_repo(one.repository, private=private, exist_ok=True)
            api.create_commit(
                one.repository,
                [CommitOperationAdd(place, its) for place, its in one.files.items()],
                commit_message="Exported by qlora_lab",
            )
        kept = private or is_private[one.repository]
        sent.append(_address(one.repository) + (" (private)" if kept else ""))
    return sent


def _is_private(api: HfApi, repository: str) -> bool | None:
    """Say whether a repository is private; None: there is none yet."""
    try:
        return bool(api.repo_info(repository).private)
    except RepositoryNotFoundError:
        return None


@contextmanager
def _refusals_in_words(one: Upload, sent: list[str], count: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's own, and whatever its HTTP library has for a network that is not there
        said = (error.server_message if isinstance(error, HfHubHTTPError) else None) or str(error)
        reason = (said.strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{one.repository} was not sent ({reason}); {len(sent)} of {count} repositories are up to date, and the "
            "same command goes on"
        ) from error
