"""What Hydra, OmegaConf and PyYAML refuse on a command line is said in one sentence that helps."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import call

STUDIES = {
    "no_yaml": "# @package _global_\nstudy:\n  question: [why\nhydra: 1\n",
    "tab": "# @package _global_\nstudy:\n\tquestion: why\n",
    "no_package": "study:\n  question: why\n",
    "misspelt": "# @package _global_\nstudy:\n  queston: why\n",
    "params": "# @package _global_\nhydra:\n  sweeper:\n    parms: {seed: [0, 1]}\n",
    "nested": "# @package _global_\nhydra:\n  sweeper:\n    params: {adapter: {rank: [4, 8]}}\n",
    "launcher": "# @package _global_\nlauncher: {max_parallel: 3}\n",
    "chosen": "# @package _global_\ndefaults: [{override /launcher: slurm}]\n",
    "hydra_launcher": "# @package _global_\nhydra: {launcher: {max_array: 500}}\n",
    "twice": "# @package _global_\nhydra:\n  sweeper:\n    params: {seed: [0, 1, 0]}\n",
    "paired": "# @package _global_\nstudy: {zip: [[seed, quant]]}\n"
    "hydra:\n  sweeper:\n    params: {seed: [0, 1, 2], quant: [none, nf4]}\n",
    "excluded": "# @package _global_\nstudy:\n  exclude: [{quant: nf5}]\n"
    "hydra:\n  sweeper:\n    params: {quant: [none, nf4]}\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with studies of the user's own, each with one fault."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "sweeps" / "experiment").mkdir(parents=True)
    for name, text in STUDIES.items():
        (folder / "sweeps" / "experiment" / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("+experiment=no_yaml", "no_yaml.yaml, line 4: this is no YAML"),
        ("+experiment=tab", "tab.yaml, line 3: this is no YAML"),
        ("+experiment=no_package", "experiment/no_package.yaml must begin with the line '# @package _global_'"),
        ("+experiment=misspelt", "did you mean 'study.question'? (in experiment/misspelt)"),
        ("+experiment=params", "did you mean 'hydra.sweeper.params'? (in experiment/params)"),
        ("+experiment=nested", "hydra.sweeper.params.adapter must be a list of values"),
        ("+experiment=excluded", "study.exclude: quant must be one of none, nf4; got 'nf5'; did you mean 'nf4'?"),
        ("+experiment=launcher", "launcher does not belong in a study's file (experiment/launcher)"),
        ("+experiment=chosen", "launcher does not belong in a study's file (experiment/chosen)"),
        ("+experiment=hydra_launcher", "hydra.launcher.max_array does not belong in a study's file"),
        ("+experiment=twice", "seed lists 0 twice"),
        ("+experiment=paired", "needs as many values of each; seed has 3, quant has 2"),
        ("+experiment=dataset_quality seed=1,2,1", "seed lists 1 twice; got 'seed=1,2,1'"),
        ("+experiment=dataset_quality adapter.rank=4,0", "no run can use adapter.rank=0: adapter.rank must be 1 or"),
        (
            "+experiment=dataset_quality quant=none,nf4 adapter=none,all_linear",
            "4 of 16 combinations cannot work, such as data=procedural_clean_128 seed=0 quant=nf4 adapter=none: quant",
        ),
        ("sweep.action=stop", "sweep.action must be one of run, plan, status"),
        (
            "hydra/launcher=submitit_local",
            "hydra/launcher=submitit_local goes with one of Hydra's sweepers: add hydra/sw",
        ),
        ("+experiment=dataset_quality sweep.action=status", "no study 'dataset_quality' was started"),
        ("experiment=dataset_quality", "write it with +: +experiment=dataset_quality"),
        ("+experiment=dataset_quality,data_types", "+experiment names one study"),
        ("+seed=5", "seed has a value already; write it without +: seed=5"),
        ("++data=procedural_clean_128", "data is a group; write it without +: data=procedural_clean_128"),
        ("+experiment=dataset_quality ~data", "~data would delete an axis of the study"),
        ("~quant", "quant is not set, and it has no default; give quant=..."),
        ("~quants", "quants is no configuration key"),
        ("hydra.sweeper.param.seed=1", "did you mean 'hydra.sweeper.params'?"),
        ("hydra.swep=1", "did you mean 'hydra.sweep'?"),
        ("data.source.families=foo", "data.source.families must be a list such as [a,b]; got text"),
        ("quant.double_quant=maybe", "quant.double_quant must be true or false; got 'maybe'"),
        ("paths.runs_dir=null", "paths.runs_dir must be text; got null"),
        ("=3", "write key=value"),
        ("--multirun --cfg job", "Only one of --run, --multirun, --cfg"),
        ("sweep.action=run paths.runs_dir=/proc/nope", "paths.runs_dir must be a folder that can be written; got"),
        ("+evaluation.sets.x.kind=file", "write '+evaluation.sets={x:{kind:...}}'"),
        ("+evaluation.sets={x:{kindd:file}}", "evaluation.sets.x has the keys kind, path, hub_id"),
        ("+evaluation.sets={x:{kindd:file}}", "did you mean 'evaluation.sets.x.kind'?"),
        (
            "+evaluation.sets={x:{kind:procedural,template:procedural,exact_match:maybe}}",
            "evaluation.sets.x.exact_match must be true or false; got 'maybe'",
        ),
        ("model.name.x.y=3", "model.name"),
    ],
)
def test_a_sweep_is_refused_in_one_sentence(folder: Path, overrides: str, sentence: str) -> None:
    done = call("qlora_lab.sweep.__main__", "sweep.action=plan", "model=tiny_random", *overrides.split(), cwd=folder)
    assert sentence in done.stderr
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    code = (
        "from qlora_lab.config.command import command\n"
        "def task(node): raise ValueError('a fault of ours')\n"
        "command('train', task)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: a fault of ours" in done.stderr


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_says_what_is_left(tmp_path: Path, signum: signal.Signals, status: int) -> None:
    code = (
        "import time; from pathlib import Path; from qlora_lab.config.command import command\n"
        "def task(node):\n    Path('started').touch()\n    time.sleep(600)\n"
        "command('train', task)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 240
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signum)
    _, said = process.communicate(timeout=240)
    assert process.returncode == status
    assert said.count("\n") == 1 and "the same command goes on" in said
