"""MMLU of the embedded model: ours, the plain way, and lm-evaluation-harness, on the same questions.

    QLORA_LAB_DATA=... python tests/benchmarks/mmlu.py [--questions 500] [--shots 5] [--ways ours,plain,harness]

The questions are validation questions of qlora_eval/zero_shot_mmlu_val.json; the first five of each subject serve as
worked examples and are not asked. `plain` runs every prompt whole, a few in a batch, and takes the logits of the last
token from the model's whole output; the harness (pip install 'qlora_lab[harness]') has the same prompts from its own
task definitions, and its own batches. A prompt that is longer than the context is another one for each: ours leaves
worked examples out, the last first, and the harness cuts off the beginning. The model is SmolLM2-135M-Instruct in
float32, unquantized. Seconds are of the model's passes: loading, reading and tokenizing are left out everywhere.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qlora_lab.config.schema import BenchmarkConfig, RowsConfig
from qlora_lab.data.batching import pad_right
from qlora_lab.evaluation.benchmarks import mmlu
from qlora_lab.evaluation.benchmarks.examinee import Examinee, Texts
from qlora_lab.evaluation.benchmarks.items import ItemReader
from qlora_lab.evaluation.benchmarks.mmlu_rows import LETTERS, question_of
from qlora_lab.evaluation.harness import harness_scores, task_manager
from qlora_lab.models.load import load_model, load_tokenizer
from qlora_lab.runs.environment import measured_commit
from qlora_lab.wheels import default_cache_dir
from tests.evaluation.benchmarks.harness_definitions import write_definition
from tests.helpers import composed

EXAMPLES = 5
CHOICES = re.compile(r"(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:", re.DOTALL)
HARNESS_DEFINITION = "mmlu/default/_default_template_yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500, help="spread over the subjects")
    parser.add_argument("--part", default="1/1", help="such as 2/5: the second fifth of the questions")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--ways", default="ours,plain,harness")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, help="tokens the model may read at once; default: as many as it can")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in a batch of the others")
    parser.add_argument("--out", type=Path, help="a JSON file for the logits of each question")
    options = parser.parse_args()
    examinee = embedded(options.batch_tokens, options.context)
    with tempfile.TemporaryDirectory() as folder:
        asked, solved = rows_of_the_study(options.questions, options.part)
        write(Path(folder) / "test.jsonl", asked)
        write(Path(folder) / "dev.jsonl", solved)
        found: dict[str, Any] = {}
        for way in options.ways.split(","):
            found[way] = WAYS[way](examinee, Path(folder), asked, options)
            print(way, {name: value for name, value in found[way].items() if name != "logits"}, flush=True)
    report(found)
    if options.out:
        options.out.write_text(json.dumps({"commit": measured_commit(), "questions": asked, "found": found}))


def embedded(batch_tokens: int, context: int | None) -> Examinee:
    config = composed("model=smollm2_135m", "quant=none", "adapter=none")
    cache_dir = default_cache_dir()
    tokenizer = load_tokenizer(config.model, cache_dir)
    model = load_model(
        config.model, config.quant, compute_dtype=torch.float32, device="cpu", cache_dir=cache_dir, seed=0
    )
    return Examinee(
        model,
        tokenizer,
        prompt_format="plain",
        max_length_tokens=context or config.model.max_length_tokens,
        batch_tokens=batch_tokens,
        loss_chunk_tokens=256,
        cache_dir=cache_dir,
        data_dir=Path.cwd(),
    )


def rows_of_the_study(questions: int, part: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return questions and worked examples in the schema of cais/mmlu."""
    subjects: dict[str, list[dict[str, Any]]] = defaultdict(list)
    lines = (Path(os.environ["QLORA_LAB_DATA"]) / "qlora_eval/zero_shot_mmlu_val.json").read_text().splitlines()
    for line in lines:
        question = question_of(json.loads(line), "")
        split = CHOICES.fullmatch(question.text)
        assert split is not None, question.text
        text, *choices = split.groups()
        answer = LETTERS.index(question.answer)
        row = {"question": text, "subject": question.subject, "choices": choices, "answer": answer}
        subjects[question.subject].append(row)
    solved = [row for rows in subjects.values() for row in rows[:EXAMPLES]]
    rest = [row for rows in subjects.values() for row in rows[EXAMPLES:]]
    number, parts = map(int, part.split("/"))
    chosen = [rest[place * len(rest) // questions] for place in range(questions)]
    return chosen[(number - 1) * questions // parts : number * questions // parts], solved


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def configuration(folder: Path, shots: int) -> BenchmarkConfig:
    examples = RowsConfig(kind="file", path=str(folder / "dev.jsonl"))
    return BenchmarkConfig(
        task="mmlu", kind="file", path=str(folder / "test.jsonl"), shots=shots, examples=examples if shots else None
    )


@contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Add up the seconds that are spent in one function."""
    seconds: list[float] = []
    work = getattr(owner, name)

    def with_clock(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    with mock.patch.object(owner, name, with_clock):
        yield seconds


def ours(examinee: Examinee, folder: Path, asked: list[dict[str, Any]], options: Any) -> dict[str, Any]:
    with timed(mmlu, "_logits") as seconds:
        ready = mmlu.mmlu(examinee, configuration(folder, options.shots), reader(examinee))
        scores = ready.score(lambda done: None)
    return {
        "seconds": sum(seconds),
        "tokens": scores.metrics["tokens"],
        "tokens_of_whole_prompts": sum(item["prompt_tokens"] for item in scores.items),
        "micro": scores.metrics["hendrycks_micro"],
        "macro": scores.metrics["qlora_macro"],
        "logits": [item["logits"] for item in scores.items],
    }


@torch.inference_mode()
def plain(examinee: Examinee, folder: Path, asked: list[dict[str, Any]], options: Any) -> dict[str, Any]:
    prompts, letters = prepared(examinee, folder, options.shots)
    logits = torch.empty((len(prompts), len(LETTERS)))
    started = time.perf_counter()
    ids = [prompt.ids for prompt in prompts]
    by_length = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    for start in range(0, len(ids), options.batch_size):
        batch = by_length[start : start + options.batch_size]
        inputs = pad_right([ids[row] for row in batch], examinee.pad_id)
        last = torch.tensor([len(ids[row]) - 1 for row in batch])
        output = examinee.model(**inputs, use_cache=False).logits[torch.arange(len(batch)), last]
        logits[batch] = output[:, list(letters.ids)]
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "logits": logits.tolist()}


def prepared(examinee: Examinee, folder: Path, shots: int) -> tuple[Any, Any]:
    """Return the prompts that our benchmark would ask, and its letters."""
    config = configuration(folder, shots)
    questions = dict(enumerate(mmlu._read(reader(examinee), config, config)))
    texts = Texts.of(examinee)
    letters = mmlu._letters(texts)
    examples = mmlu._worked_examples(reader(examinee), config, questions)
    return mmlu._prompts(texts, letters, examinee, config, questions, examples), letters


def reader(examinee: Examinee) -> ItemReader:
    return ItemReader("mmlu", examinee.cache_dir, examinee.data_dir)


def harness(examinee: Examinee, folder: Path, asked: list[dict[str, Any]], options: Any) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    solved = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]
    subjects = list(dict.fromkeys(row["subject"] for row in asked))
    for subject in subjects:
        files = {}
        for split, rows in (("test", asked), ("dev", solved)):
            files[split] = folder / f"{subject}_{split}.jsonl"
            write(files[split], [row for row in rows if row["subject"] == subject])
        header = BenchmarkConfig.header.replace("{subject}", subject.replace("_", " "))
        write_definition(folder / "tasks", subject, HARNESS_DEFINITION, files, description=header)
    with timed(HFLM, "_loglikelihood_tokens") as seconds:
        scores = harness_scores(
            examinee.model,
            examinee.tokenizer,
            subjects,
            task_manager(folder / "tasks"),
            max_length_tokens=examinee.max_length_tokens,
            shots=options.shots,
            batch_size=options.batch_size,
        )
    items = sorted(scores.items, key=lambda item: item["item"])
    by_subject = {name: iter([item["responses"] for item in items if item["task"] == name]) for name in subjects}
    logits = [[response[0] for response in next(by_subject[row["subject"]])] for row in asked]
    right = {name: scores.metrics[f"{name}/acc"] for name in subjects}
    return {
        "seconds": sum(seconds),
        "micro": sum(right[row["subject"]] for row in asked) / len(asked),
        "macro": sum(right.values()) / len(right),
        "logits": logits,
    }


WAYS = {"ours": ours, "plain": plain, "harness": harness}


def report(found: dict[str, Any]) -> None:
    if "ours" not in found:
        return
    mine = torch.tensor(found["ours"]["logits"])
    for way in found.keys() - {"ours"}:
        theirs = torch.tensor(found[way]["logits"])
        same = (mine.argmax(1) == theirs.argmax(1)).sum().item()
        # log-likelihoods differ from logits by the same amount for all four letters
        differences = (mine - mine[:, :1]) - (theirs - theirs[:, :1])
        print(
            f"{way}: same choice in {same} of {len(mine)} questions, largest difference between logits "
            f"{differences.abs().max().item():.1e}, {found[way]['seconds'] / found['ours']['seconds']:.2f} times the "
            "seconds"
        )
    tokens, whole = (found["ours"][name] for name in ("tokens", "tokens_of_whole_prompts"))
    print(f"the plain way processes {whole / tokens:.2f} times the tokens")


if __name__ == "__main__":
    main()
