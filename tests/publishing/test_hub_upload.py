"""Exported adapters go to the hub only when told so, with a token; a refusal says how far it came."""

from pathlib import Path

import huggingface_hub
import pytest

from qlora_lab.errors import DataError
from qlora_lab.export import FORMAT, main
from qlora_lab.publishing.hub import planned_uploads
from qlora_lab.publishing.manifest import publish


class FakeApi:
    """What the hub was asked for."""

    refuses = ""

    def __init__(self, **_: object) -> None:
        self.sent.clear()

    sent: list[tuple[str, ...]] = []  # noqa: RUF012  # of the class: the command makes the object

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.sent.append(("create", repository, "private" if private else "public"))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.refuses and self.refuses in repo_id:
            raise OSError("the hub hung up")
        self.sent.append(("upload", repo_id, *sorted(file.name for file in folder_path.iterdir())))


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An exported folder with two adapters, and a hub that nobody reaches."""
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(FakeApi, "refuses", "")

    def fill(folder: Path) -> dict[str, object]:
        for name in ("alpaca-seed-0-000000000000", "chip2-seed-0-000000000001"):
            (folder / "adapters" / name).mkdir(parents=True)
            for file in ("README.md", "adapter_model.safetensors"):
                (folder / "adapters" / name / file).write_text("content")
        return {"study": "sets"}

    publish(tmp_path / "out", fill, layout=FORMAT, command="a test")
    return tmp_path / "out"


FIRST, SECOND = "me/sets-alpaca-seed-0-000000000000", "me/sets-chip2-seed-0-000000000001"


def test_without_being_told_nothing_is_sent(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FakeApi.sent.clear()
    main(["--out", str(out), "--namespace", "me"])
    said = capsys.readouterr().out
    assert f"would send {FIRST}: 2 files, 0.0 MB" in said and "nothing was sent; --upload sends it" in said
    assert FakeApi.sent == []


def test_each_adapter_goes_to_its_repository(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(out), "--namespace", "me", "--upload", "--private"])
    files = ("README.md", "adapter_model.safetensors")
    assert FakeApi.sent == [
        *(("create", FIRST, "private"), ("upload", FIRST, *files)),
        *(("create", SECOND, "private"), ("upload", SECOND, *files)),
    ]
    assert f"https://huggingface.co/{SECOND}" in capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main(list(arguments))
    return capsys.readouterr().err


def test_what_is_missing_or_refused_is_said(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload = ["--out", str(out), "--namespace", "me", "--upload"]
    monkeypatch.setattr(FakeApi, "refuses", "chip2")
    said = refusal(capsys, *upload)
    assert f"{SECOND} was not sent (the hub hung up); 1 of 2 repositories are up to date" in said
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    FakeApi.sent.clear()
    assert "set HF_TOKEN to it, or run `hf auth login`; nothing was sent" in refusal(capsys, *upload)
    assert FakeApi.sent == []
    assert "--upload needs --namespace NAME" in refusal(capsys, "--out", str(out), "--upload")
    (out / "adapters/alpaca-seed-0-000000000000/README.md").write_text("changed")
    assert "README.md has changed" in refusal(capsys, *upload)


def test_names_that_the_hub_does_not_take(out: Path) -> None:
    with pytest.raises(DataError, match="the hub takes no repository of the name 'my self/sets-alpaca"):
        planned_uploads(out, "my self", "sets")
    long = planned_uploads(out, "me", "a" * 90)
    assert [len(one.repository) <= 96 for one in long] == [True, True]
    assert len({one.repository for one in long}) == 2
