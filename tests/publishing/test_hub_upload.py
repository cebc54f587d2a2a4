"""Exported adapters go to the hub only when told so, with a token; a refusal says how far it came.

The hub's own client asks a stand-in for the hub.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from qlora_lab.errors import DataError
from qlora_lab.export import FORMAT, main
from qlora_lab.publishing.hub import planned_uploads
from qlora_lab.publishing.manifest import publish
from tests.publishing.hub_stand_in import TOKEN, HubStandIn, Repository, hub_stand_in

INDEX = "me/sets"
FIRST, SECOND = "me/sets-alpaca-seed-0-000000000000", "me/sets-chip2-seed-0-000000000001"
WEIGHTS, README = "adapter_model.safetensors", "README.md"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A hub that the client takes for the real one, and a token for it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_stand_in() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        yield found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An exported folder with two adapters."""

    def fill(folder: Path) -> dict[str, object]:
        for name in ("alpaca-seed-0-000000000000", "chip2-seed-0-000000000001"):
            (folder / "adapters" / name).mkdir(parents=True)
            for file in (README, WEIGHTS):
                (folder / "adapters" / name / file).write_text(f"{file} of {name}")
        for file in ("index.csv", "index.json"):
            (folder / file).write_text("table")
        (folder / README).write_text("| [chip2](adapters/chip2-seed-0-000000000001/README.md) |")
        return {"study": "sets"}

    publish(tmp_path / "out", fill, layout=FORMAT, command="a test")
    return tmp_path / "out"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main(list(arguments))
    return capsys.readouterr().err


def test_without_being_told_nothing_is_asked(out: Path, hub: HubStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(out), "--namespace", "me"])
    said = capsys.readouterr().out
    assert f"would send {FIRST}: 2 files, 0.0 MB" in said
    assert "nothing was sent; --upload sends it, with a token in HF_TOKEN" in said
    assert hub.asked == []


def test_each_adapter_goes_to_its_repository_and_the_index_to_that_of_the_study(
    out: Path, hub: HubStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    upload = ["--out", str(out), "--namespace", "me", "--upload", "--private"]
    main(upload)
    assert f"{hub.address}/{SECOND} (private)\n" in capsys.readouterr().out
    assert list(hub.repositories) == [FIRST, SECOND, INDEX]
    assert all(repository.private for repository in hub.repositories.values())
    for name in (FIRST, SECOND):
        folder = out / "adapters" / name.removeprefix("me/sets-")
        assert hub.repositories[name].files == {file: (folder / file).read_bytes() for file in (README, WEIGHTS)}
    index = hub.repositories[INDEX].files
    assert index == {
        README: f"| [chip2]({hub.address}/{SECOND}) |".encode(),
        "index.csv": b"table",
        "index.json": b"table",
    }
    hub.asked.clear()
    main(upload)
    assert not [asked for asked in hub.asked if asked.startswith("PUT")], "what is there already is not sent again"


def test_a_repository_that_is_public_already_is_not_called_private(
    out: Path, hub: HubStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories |= {FIRST: Repository(private=True), SECOND: Repository(private=False)}
    upload = ["--out", str(out), "--namespace", "me", "--upload"]
    assert f"and {SECOND} is there already and public; make them private" in refusal(capsys, *upload, "--private")
    assert {asked.partition(" ")[0] for asked in hub.asked} == {"GET"}
    main(upload)
    said = capsys.readouterr().out
    assert f"{FIRST} (private)\n" in said and f"{SECOND}\n" in said
    assert {name: its.private for name, its in hub.repositories.items()} == {FIRST: True, SECOND: False, INDEX: False}


def test_a_token_is_asked_for_before_anything_else(
    out: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload = ["--out", str(out), "--namespace", "me", "--upload"]
    assert "--upload needs --namespace NAME" in refusal(capsys, "--out", str(out), "--upload")
    monkeypatch.delenv("HF_TOKEN")
    assert "set HF_TOKEN to it, or run `hf auth login`; nothing was sent" in refusal(capsys, *upload)
    assert hub.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_a_wrong_one")
    assert f"{FIRST} was not sent (Invalid username or password.); 0 of 3" in refusal(capsys, *upload)


def test_what_the_hub_refuses_is_said_and_the_same_command_goes_on(
    out: Path, hub: HubStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    upload = ["--out", str(out), "--namespace", "me", "--upload"]
    said = refusal(capsys, "--out", str(out), "--namespace", "others", "--upload")
    assert '(You don\'t have the rights to create a model under the namespace "others"); 0 of 3' in said
    hub.hangs_up = "chip2"
    said = refusal(capsys, *upload)
    assert f"{SECOND} was not sent (" in said and "1 of 3 repositories are up to date" in said
    hub.hangs_up = ""
    main(upload)
    assert all(repository.files for repository in hub.repositories.values())
    (out / "adapters/alpaca-seed-0-000000000000/README.md").write_text("changed")
    assert "README.md has changed" in refusal(capsys, *upload)


def test_a_hub_that_is_not_there_is_told(
    out: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port where nothing is sent to
    said = refusal(capsys, "--out", str(out), "--namespace", "me", "--upload")
    assert f"{FIRST} was not sent (" in said and "0 of 3 repositories are up to date" in said


def test_names_that_the_hub_does_not_take(out: Path) -> None:
    with pytest.raises(DataError, match="the hub takes no repository of the name 'my self/sets-alpaca"):
        planned_uploads(out, "my self", "sets")
    long = planned_uploads(out, "me", "a" * 90)
    assert [len(one.repository) <= 96 for one in long] == [True] * 3
    assert len({one.repository for one in long}) == 3
