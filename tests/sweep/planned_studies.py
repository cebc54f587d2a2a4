"""The shipped studies, planned at each of their scales."""

import random
from typing import Any

import pandas as pd
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from analysis.study.published import CERTAINTY, beside_arms, published
from qlora_lab.config.command import shipped
from qlora_lab.config.scale import with_scale
from qlora_lab.config.schema import RunConfig
from qlora_lab.sweep.axes import Axes
from qlora_lab.sweep.command import axes_of_study, check_experiment
from qlora_lab.sweep.compose import Composer
from qlora_lab.sweep.independence import independent_groups
from qlora_lab.sweep.plan import Plan, make_plan

FOLDER = shipped("sweeps") / "experiment"
STUDIES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
SCALES = [(study, file.stem) for study in STUDIES for file in sorted((FOLDER / study).glob("*.yaml"))]
ONE_SCALE = [(study, None) for study in STUDIES if not (FOLDER / study).is_dir()]
# What must be fetched, or lies elsewhere, need not be here for a plan.
UNFETCHED: dict[str, Any] = {
    "qlora_lab.sweep.prepare.check_inputs": lambda config: None,
    "qlora_lab.sweep.prepare.source_fingerprint": lambda source, data_dir: None,
}


def planned(study: str, scale: str | None, *, every_choice: bool) -> Plan:
    """Plan the runs of a study, as its command would; its axes and its printed numbers are checked on the way.

    Args:
        every_choice: plan all of them, rather than all that share their groups' options with the last or with a drawn
            one: Hydra takes a tenth of a second for each choice of options, and thus a minute for all studies.
    """
    overrides = with_scale([f"+experiment={study}", *([f"scale={scale}"] if scale else [])])
    loader = GlobalHydra.instance().config_loader()
    whole = compose("sweep", overrides, return_hydra_config=True)
    check_experiment(loader, study, scale)
    asked: Any = OmegaConf.to_container(whole.study)
    params: Any = OmegaConf.to_container(whole.hydra.sweeper.params)
    axes = axes_of_study(loader, params, overrides, asked)
    assert "seed" in axes.values and asked["question"].endswith("?")
    for key, values in axes.values.items():
        options = loader.get_group_options(key)
        assert not options or set(values) <= set(options)
    if asked["paper"]["file"]:
        check_paper(asked["paper"], axes)
    composer = Composer(
        load=lambda of_run: compose("sweep", of_run),
        is_group=lambda key: "@" in key or bool(loader.get_group_options(key)),
        is_independent=independent_groups(loader, whole),
    )
    points = axes.without(asked["exclude"])
    if not every_choice:
        drawn = random.Random(f"{study} {scale}").choice(points)
        groups = [key for key in points[0] if loader.get_group_options(key)]
        points = [p for p in points if any(all(p[key] == one[key] for key in groups) for one in (points[-1], drawn))]
    return make_plan(study, [(point, composer(axes, point)) for point in points])


def check_paper(paper: dict[str, Any], axes: Axes) -> None:
    """Check that the printed numbers a study names are there, and that every name stands for one of them."""
    table = published(paper["file"], paper["value"])
    arms = [{axis: point[axis] for axis in paper["match"]} for point in axes.points()]
    places = pd.DataFrame(arms).drop_duplicates().assign(arm=lambda arms: arms.apply(" ".join, axis=1))
    joined = beside_arms(paper, places)
    assert len(joined) and (joined["source"].str.len() > 0).all() and set(joined["certainty"]) <= set(CERTAINTY)
    ours = {value for axis in paper["match"] for value in axes.values[axis]}
    theirs = {value for column in paper["match"].values() for value in table[column]}
    assert set(paper["names"]) <= ours and set(paper["names"].values()) <= theirs, "a name that stands for nothing"


def check_settings(config: RunConfig) -> None:
    """Compare a run with what Table 9 prints for its data set, or for most, and its size."""
    table = published("hyperparameters.csv", "learning_rate").set_index(["data", "model"])
    names = {"llama_7b": "LLaMA 7B", "llama_13b": "LLaMA 13B", "llama_33b": "LLaMA 33B", "llama_65b": "LLaMA 65B"}
    data = config.data.name if config.data.name in table.index else "most sets"
    row = table.loc[(data, names[config.model.name])]
    taken = [config.optim.learning_rate, config.trainer.batch_size, config.trainer.max_steps, config.adapter.dropout]
    assert taken == [float(row[key]) for key in ("learning_rate", "batch_size", "max_steps", "dropout")]
    for tokens, ours in (("source", config.data.max_source_tokens), ("target", config.data.max_target_tokens)):
        assert row[f"{tokens}_tokens"] in ("", str(ours)), (data, tokens)
