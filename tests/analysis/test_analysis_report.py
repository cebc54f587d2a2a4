"""From a planned study to its files: one page without requests, a table, a text; and quick to import."""

import csv
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.report.__main__ import main
from analysis.report.samples import MOST_ARMS as MOST_SAMPLED
from analysis.report.samples import without_markup
from analysis.report.settings_sections import benchmarks
from analysis.report.study_report import read_study, summarize_study
from analysis.statistics.verdicts import FALSE_POSITIVES
from analysis.study.plan import plan_of
from qlora_lab.data.prompts import chatml_markup
from qlora_lab.data.rows import USER
from qlora_lab.errors import RunFolderError
from tests.analysis.study_folders import FakeRun, two_arms, write, write_json, write_lines, write_study

REPOSITORY = Path(__file__).parents[2]
PARTS = [f"analysis.{file.parent.name}" for file in (REPOSITORY / "analysis").glob("*/__init__.py")]
PARTS.append("analysis.report.figures")
BEFORE, AFTER = chatml_markup((USER,))


class Links(HTMLParser):
    """Collects what a page links to, and every tag that would make it ask for something."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.requests: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if tag == "a" and name == "href":
                self.links.append(value or "")
            elif name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.requests.append(f"{tag} {name}={value}")


def parsed(html: str) -> Links:
    links = Links()
    links.feed(html)
    return links


def test_a_study_becomes_a_table_a_page_and_a_text(tmp_path: Path) -> None:
    study = write_study(tmp_path, two_arms())
    answer = summarize_study(study, tmp_path)
    assert answer.paths == {"report": study / "report.html", "table": study / "table.csv"}
    with (study / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == answer.arms
    assert float(rows[0]["eval/loss mean"]) == answer.table["eval/loss mean"][0]  # unrounded
    unwrapped = " ".join(answer.text.split())
    assert answer.sentence in unwrapped
    assert str(study / "report.html") in answer.text
    assert max(len(line) for line in answer.text.splitlines() if ": /" not in line) <= 100
    assert not list(study.glob(".*"))  # written, then renamed


def test_the_page_needs_nothing_else_and_links_to_the_runs(tmp_path: Path) -> None:
    study = write_study(tmp_path, two_arms())
    answer = summarize_study(study, tmp_path)
    html = (study / "report.html").read_text()
    page = parsed(html)
    assert page.requests == []
    assert "url(http" not in html
    assert "@import" not in html
    assert len(html) < 200_000
    assert {(study / link).resolve() for link in page.links} == {tmp_path / run for run in answer.runs["run_id"]}
    assert html.count("<svg") == 4
    assert "#1f2428" not in html.partition("<svg")[2]  # ink follows the page, also a dark one
    assert answer.sentence in html
    assert "torch 2.13.0+cpu" in html
    assert "commit 0123456789ab" in html
    assert "python -m qlora_lab.sweep +experiment=dataset_quality" in html


def test_what_a_model_wrote_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    study = write_study(tmp_path, [replace(run, mean_loss=2.0) for run in two_arms()])
    summarize_study(study, tmp_path)
    html = (study / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert not parsed(html).tags & {"script", "b"}


def test_samples_are_the_same_rows_for_every_arm_one_of_each_family(tmp_path: Path) -> None:
    study = write_study(tmp_path, two_arms())
    summarize_study(study, tmp_path)
    html = (study / "report.html").read_text()
    assert re.findall(r'class="prompt">[^<]*, row (\d+)\.', html) == ["0", "1", "2", "3"]
    assert html.count("<dt>procedural_half_wrong_2048</dt>") == 4
    assert "held-out rows that every arm answered" in html


def test_samples_say_of_how_many_arms_they_are(tmp_path: Path) -> None:
    runs = [FakeRun(f"run{n}", f"arm{n}", mean_loss=0.4 + 0.1 * n, rows=4, steps=1) for n in range(MOST_SAMPLED + 2)]
    study = write_study(tmp_path, runs)
    summarize_study(study, tmp_path)
    html = (study / "report.html").read_text()
    assert f"<dt>arm{MOST_SAMPLED - 1}</dt>" in html and f"<dt>arm{MOST_SAMPLED}</dt>" not in html
    assert f"all of these {MOST_SAMPLED} arms (of {MOST_SAMPLED + 2}, the best with answers) answered" in html


def test_runs_that_did_not_finish_are_shown_with_their_error(tmp_path: Path) -> None:
    runs = [
        *two_arms(),
        FakeRun("bad", "procedural_clean_128", 2, "failed"),
        FakeRun("gone", "procedural_clean_128", 3, "missing"),
        FakeRun("busy", "procedural_clean_128", 4, "running"),
        FakeRun("torn", "procedural_clean_128", 5),
    ]
    study = write_study(tmp_path, runs)
    write(tmp_path / "torn" / "config.yaml", "a: [")
    answer = summarize_study(study, tmp_path)
    text = " ".join(answer.text.split())
    assert "bad (procedural_clean_128, seed 2): failed: TrainingError: the loss is not finite at step 12" in text
    assert "gone (procedural_clean_128, seed 3): missing: there is no run folder" in text
    assert "busy (procedural_clean_128, seed 4): still running, or its process died" in text
    assert "torn (procedural_clean_128, seed 5): unreadable:" in text  # the plan knows its seed
    assert "2 of 6" in answer.text
    html = (study / "report.html").read_text()
    assert "4 of 8 runs are counted; not counted: 1 failed, 1 missing, 1 running, 1 unreadable." in html
    assert "Traceback of bad" in html
    assert "lora_B &lt;model.layers.3&gt;" in html
    assert "../../gone" not in html


def test_a_study_in_which_nothing_finished_is_reported(tmp_path: Path) -> None:
    study = write_study(tmp_path, [FakeRun("a", state="failed"), FakeRun("b", "other", state="missing")])
    answer = summarize_study(study, tmp_path)
    assert "nothing to compare" in answer.text
    assert "0 of 1" in answer.text
    assert (study / "report.html").exists()


def test_runs_outside_the_plan_do_not_count(tmp_path: Path) -> None:
    write_study(tmp_path, two_arms(seeds=3))
    study = write_study(tmp_path, two_arms(seeds=2))
    assert len(summarize_study(study, tmp_path).runs) == 4


def test_several_arms_and_sets_are_reported(tmp_path: Path) -> None:
    runs = [
        FakeRun(
            f"{quant}{rank}{seed}",
            seed=seed,
            mean_loss=0.4 + 0.01 * rank,
            sets=("chat", "tasks"),
            exact_match=False,
            axes={"quant": quant, "adapter.rank": str(rank), "seed": str(seed)},
        )
        for quant in ("nf4", "none")
        for rank in (4, 16)
        for seed in range(2)
    ]
    study = write_study(tmp_path, runs)
    answer = summarize_study(study, tmp_path)
    assert len(answer.arms) == 4
    assert "none, rank=16" in answer.arms
    assert "chat loss" in answer.text
    html = (study / "report.html").read_text()
    assert "The other 3 pairs" in html
    assert all(f"<h2>{heading}</h2>" in html for heading in ("By setting", "What matters", "Quality and cost"))
    assert all(escape(finding) in html for finding in answer.findings)


def one_failed(model: str, quant: str, seed: int) -> bool:
    return (model, quant, seed) == ("llama_7b", "int4", 1)


def sized_study(runs_dir: Path, failed: Callable[[str, str, int], bool] = one_failed) -> Path:
    """Write a study of three sizes by three formats by two seeds, some of which failed."""
    sizes = {"llama_7b": 7e9, "llama_13b": 13e9, "llama_65b": 65e9}
    runs = [
        FakeRun(
            f"{model}{quant}{seed}",
            seed=seed,
            state="failed" if failed(model, quant, seed) else "finished",
            mean_loss=0.9 - 0.1 * level + worse + 0.004 * ((level + 2 * seed + len(quant)) % 3),
            rows=16,
            noise=0.001,
            axes={"model": model, "quant": quant, "seed": str(seed)},
        )
        for level, model in enumerate(sizes)
        for quant, worse in {"nf4": 0.0, "fp4": 0.03, "int4": 0.05}.items()
        for seed in range(2)
    ]
    study = write_study(runs_dir, runs, compares=["quant"])
    for run in runs:
        if run.state == "finished":
            result = runs_dir / run.run_id / "result.json"
            size = {"total_parameters": sizes[run.axes["model"]]}
            write_json(result, json.loads(result.read_text()) | size)
    return study


def test_values_of_an_axis_have_a_table_figures_and_a_file(tmp_path: Path) -> None:
    study = sized_study(tmp_path)
    answer = summarize_study(study, tmp_path)
    assert answer.sentence.startswith("At equal model and seed: nf4 has the lowest eval/loss of 3 values of quant")
    text = " ".join(answer.text.split())
    assert "runs of one block have the same model and seed" in text
    assert re.search(r"nf4 − int4 separated −0\.05\d −0\.0\d+ to −0\.0\d+ 5 of 6", text)
    html = (study / "report.html").read_text()
    assert "<h3>quant: at equal model and seed</h3>" in html and "<h3>model: at equal quant and seed</h3>" in html
    for picture in ("eval/loss by quant, within blocks", "Differences between values of model"):
        assert f'aria-label="{picture}"' in html
    assert 'aria-label="eval/loss by the number of parameters"' in html
    with (study / "axes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["axis"] for row in rows] == ["quant"] * 3 + ["model"] * 3
    pair = answer.by_axis[0].pairs[0]
    assert pair.difference is not None and float(rows[0]["difference"]) == pair.difference.value
    assert [row["left_out"] for row in rows[:3]] == ["0", "1", "1"]


def test_values_that_failures_leave_in_no_common_block_are_not_drawn_side_by_side(tmp_path: Path) -> None:
    study = sized_study(tmp_path, lambda model, quant, seed: (model == "llama_65b") != (quant == "int4"))
    compared = summarize_study(study, tmp_path).by_axis[0]
    assert compared.axis.connected and compared.apart == ["int4"]
    html = (study / "report.html").read_text()
    assert "eval/loss by quant, within blocks" not in html and "Differences between values of quant" in html


def test_ratings_of_a_tournament_stand_in_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path, two_arms())
    system = {"rating_low": 950, "rating_high": 1050, "rank_best": 1, "rank_worst": 2, "win_rate": 0.5, "elo": 1000}
    told = {
        "judge": "gpt-4",
        "matches": 160,
        "questions": 80,
        "settings": {"k": 32, "orders": 10, "start": 1000},
        "systems": [{"system": name, "rating": 1000, "elo_question_std": 9, **system} for name in ("<b>a</b>", "b")],
    }
    write_json(tmp_path / "ratings.json", told)
    assert main([str(study), "--ratings", str(tmp_path / "ratings.json")]) == 0
    html = (study / "report.html").read_text()
    assert "<h2>Ratings</h2>" in html and "950 to 1050" in html and "160 matches on 80 questions" in html
    assert "b" not in parsed(html).tags
    assert main([str(study), "--ratings", str(study / "plan.json")]) == 2
    assert "plan.json holds no ratings (KeyError: 'systems'); write them with" in capsys.readouterr().err


def test_benchmarks_are_shown_together(tmp_path: Path) -> None:
    tasks = ("mmlu", "arc", "hellaswag")
    runs = [
        replace(
            run,
            metrics={f"eval/{task}/test/5shot/acc": 0.3 + 0.1 * n + 0.01 * run.seed for n, task in enumerate(tasks)},
        )
        for run in two_arms()
    ]
    study = read_study(write_study(tmp_path, runs), tmp_path)
    assert len(study.answer.iqm) == 2
    shown = benchmarks(study.answer)
    assert "interquartile mean" in shown and f"{study.answer.iqm['iqm'][0]:.3f}" in shown
    assert "eval/mmlu/test/5shot/acc" in shown


def test_the_command_writes_a_study_again_and_answers_for_a_folder_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, two_arms())
    assert main([str(study)]) == 0
    first = (study / "report.html").read_bytes()
    (study / "report.html").unlink()
    assert main(["dataset_quality", "--runs-dir", str(tmp_path)]) == 0
    assert (study / "report.html").read_bytes() == first  # the same runs give the same page
    out = tmp_path / "elsewhere"
    assert main([str(tmp_path), "--out", str(out), "--metric", "eval/exact_match", "--goal", "max"]) == 0
    assert "procedural_clean_128 has a higher eval/exact_match" in " ".join(capsys.readouterr().out.split())
    assert (out / "report.html").exists()


def test_the_command_says_what_is_wrong_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no run; give" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"plan\.json is not there; plan the study"):
        summarize_study(tmp_path, tmp_path)
    study = write_study(tmp_path, two_arms())
    plan = json.loads((study / "plan.json").read_text())
    del plan["study"]["metric"]
    write_json(study / "plan.json", plan)
    with pytest.raises(RunFolderError, match=r"plan\.json is not a plan that can be read \(KeyError: 'metric'\)"):
        summarize_study(study, tmp_path)


def test_the_answer_is_of_the_plan_in_memory_whatever_another_sweep_wrote(tmp_path: Path) -> None:
    study = write_study(tmp_path, two_arms())
    record = json.loads((study / "plan.json").read_text())
    others = [replace(run, run_id=f"other_{run.run_id}", state="not_started") for run in two_arms()]
    assert write_study(tmp_path, others) == study
    answer = summarize_study(study, tmp_path, plan_of(record))
    assert {str(run) for run in answer.runs["run_id"]} == {run.run_id for run in two_arms()}
    assert answer.sentence.startswith("procedural_clean_128 has a lower eval/loss")


@pytest.mark.parametrize("given", ["plan", "study"])
def test_the_command_takes_a_plan_or_all_plans_of_a_study(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_study(tmp_path, two_arms(seeds=3), "aaaaaaaa")
    narrow = write_study(tmp_path, two_arms(seeds=2), "bbbbbbbb")
    monkeypatch.chdir(tmp_path)
    assert main([str((whole if given == "plan" else whole.parent).relative_to(tmp_path))]) == 0
    assert (whole / "report.html").exists()
    assert (narrow / "report.html").exists() == (given == "study")
    assert capsys.readouterr().out.count("procedural_clean_128 has a lower eval/loss") == (2 if given == "study" else 1)


def test_a_study_in_the_folder_of_its_name_is_still_read(tmp_path: Path) -> None:
    study = write_study(tmp_path, two_arms(), plan_id="")
    assert main([str(study)]) == 0
    html = (study / "report.html").read_text()
    assert {(study / link).resolve() for link in parsed(html).links} == {tmp_path / run.run_id for run in two_arms()}


def test_the_method_says_how_often_it_is_wrong(tmp_path: Path) -> None:
    study = write_study(tmp_path, two_arms())
    summarize_study(study, tmp_path)
    assert escape(FALSE_POSITIVES) in (study / "report.html").read_text()


def test_a_chatml_prompt_is_shown_without_its_markup() -> None:
    prompt = f"{BEFORE}What is <|im_end|>?{AFTER}"
    assert without_markup(prompt, "chatml") == "What is <|im_end|>?"
    assert without_markup(prompt, "chat_template") == prompt  # what that puts around is not known here
    assert without_markup("What is 1 + 1?\n", "chatml") == "What is 1 + 1?\n"


def test_samples_are_shown_as_the_run_was_prompted(tmp_path: Path) -> None:
    runs = [replace(run, config={"model": {"prompt_format": "chatml"}}) for run in two_arms()]
    study = write_study(tmp_path, runs)
    for run in runs:
        path = tmp_path / run.run_id / "generations" / "held_out.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [line | {"prompt": f"{BEFORE}{line['prompt']}{AFTER}"} for line in lines])
    summarize_study(study, tmp_path)
    html = (study / "report.html").read_text()
    assert "im_start" not in html
    assert "Sort these words: pear" in html


def test_long_lists_are_cut_in_the_terminal(tmp_path: Path) -> None:
    arms = [FakeRun(f"run{n:03}", f"arm{n:03}", mean_loss=0.4 + 0.01 * n, rows=4) for n in range(60)]
    failed = [FakeRun(f"bad{n:03}", "arm000", n + 1, "failed") for n in range(30)]
    answer = summarize_study(write_study(tmp_path, [*arms, *failed]), tmp_path)
    assert "(and 10 arms more, in the report)" in answer.text
    assert "- and 10 more" in answer.text
    assert answer.text.count("- bad") == 20


def test_analysis_imports_neither_torch_nor_what_is_slow(tmp_path: Path) -> None:
    study = write_study(tmp_path, two_arms())
    files = [file.relative_to(REPOSITORY) for file in (REPOSITORY / "analysis").rglob("*.py")]
    modules = [".".join(file.with_suffix("").parts) for file in files if file.stem != "__init__"]
    code = f"""
import importlib, sys
for name in {sorted(modules)!r}:
    importlib.import_module(name)
slow = {{"torch", "transformers", "hydra", "wandb", "matplotlib", "scipy.stats"}} & set(sys.modules)
assert not slow, slow
from analysis.report.__main__ import main
assert main([{str(study)!r}]) == 0
drawn_with = {{"torch", "matplotlib.pyplot"}} & set(sys.modules)  # pyplot would look for a display
assert not drawn_with, drawn_with
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("package", ["analysis", *PARTS])
def test_a_package_lists_its_modules(package: str) -> None:
    module = importlib.import_module(package)
    listed = {line.split()[0] for line in (module.__doc__ or "").splitlines()[2:] if line}
    folder = REPOSITORY / package.replace(".", "/")
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert listed == there - {"__init__", "__main__"}
