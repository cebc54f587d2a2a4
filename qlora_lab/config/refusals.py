"""What Hydra and OmegaConf refuse, in one sentence: the key, what was given, what is allowed, the nearest name."""

import re
from collections.abc import Iterator

import yaml
from hydra.conf import HydraConf
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from qlora_lab.config.load import explain_omegaconf, known_keys, unknown_key
from qlora_lab.config.scale import SCALES, WHOLE
from qlora_lab.config.schema import BenchmarkConfig, EvaluationSetConfig, MixPartConfig, PromptSetConfig, RunConfig
from qlora_lab.errors import ConfigError, QloraLabError, nearest

# OmegaConf cannot add to a mapping of typed values
NO_MEMBER = {
    f"is not a subclass of {EvaluationSetConfig.__name__}": ("evaluation.sets", "a set"),
    f"is not a subclass of {BenchmarkConfig.__name__}": ("evaluation.benchmarks", "a benchmark"),
    f"is not a subclass of {PromptSetConfig.__name__}": ("evaluation.prompts", "a set"),
    f"is not a subclass of {MixPartConfig.__name__}": ("data.mix", "a part"),
}
LAUNCHERS = "hydra.launcher."
OVERRIDE_HELP = "write key=value, and quote values with special characters"


def explain(error: BaseException, schema: type = RunConfig) -> str:
    """Say in one sentence what was refused and what is allowed.

    Args:
        schema: of the command's configuration.
    """
    if isinstance(error, QloraLabError):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}'; {OVERRIDE_HELP}"
    if isinstance(error, yaml.MarkedYAMLError):
        return _broken_yaml(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    for cause in _causes(error):
        if isinstance(cause, ConfigError):
            return str(cause)
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
            return _unknown(str(cause.full_key), error, schema)
        if isinstance(cause, OmegaConfBaseException):
            for words, (mapping, member) in NO_MEMBER.items():
                if words in str(cause.msg):
                    return f"{mapping} takes {member} as a whole; write '+{mapping}={{{cause.key}:{{kind:...}}}}'"
        if isinstance(cause, OmegaConfBaseException):
            return explain_omegaconf(cause, schema)
    return _hydra_sentence(str(error), schema)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or [])
    if not group or not options:
        return _hydra_sentence(str(error))
    key = "scale" if group.startswith(SCALES) else group
    return f"{key} must be one of {', '.join(options)}; got '{option}'{nearest(option, options)}"


def _broken_yaml(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{mark.name}, line {mark.line + 1}" if mark is not None else "a configuration file"
    return f"{place}: this is no YAML ({error.problem or error.context}); compare it with a file that works"


def _unknown(key: str, error: BaseException, schema: type) -> str:
    """Word the refusal of a key, with the file it stands in where Hydra says that."""
    found = re.match(r"In '([^']+)'", str(error))
    if key == "experiment":
        return _experiment(found[1] if found else None, str(error))
    if key.startswith(LAUNCHERS) and found:
        return (
            f"{key} does not belong in a study's file ({found[1]}), which any launcher executes; give it on the "
            "command line, with the launcher that has it"
        )
    known = _hydra_keys() if key.partition(".")[0] == "hydra" else known_keys(schema)
    return unknown_key(key, known) + (f" (in {found[1]})" if found else "")


def _hydra_keys() -> list[str]:
    # "hydra.sweeper" has no schema of its own until a sweeper is chosen
    return ["hydra", *known_keys(HydraConf, "hydra."), "hydra.sweeper.params"]


def _experiment(file: str | None, message: str) -> str:
    if file is not None:
        return f"{file}.yaml must begin with the line '# @package _global_', so that its keys are those of a run"
    given = re.search(r"\+experiment=(\S*)", message)
    return f"experiment adds a study to the defaults; write it with +: +experiment={given[1] if given else 'NAME'}"


def _hydra_sentence(message: str, schema: type = RunConfig) -> str:
    """Shorten Hydra's message; a mistyped key or group gets its nearest name."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    first = lines[0] if lines else "the configuration could not be composed"
    quoted = re.findall(r"'([^']*)'", " ".join(lines))
    if first.startswith("Could not append to config. An item is already at '"):
        return f"{quoted[0]} has a value already; write it without +: {quoted[1]}"
    if first.startswith("force-add of config groups is not supported"):
        return f"{quoted[0].lstrip('+').partition('=')[0]} is a group; write it without +: {quoted[0].lstrip('+')}"
    if first.startswith(("Could not override '", "Could not delete from config. '")):
        key = quoted[0].lstrip("+~")
        if key == "experiment":
            return _experiment(None, message)
        if key not in known_keys(schema):
            return unknown_key(key, known_keys(schema))
    if first.startswith(f"Override {SCALES}") and f"{WHOLE}=" in first:
        study = first.removeprefix(f"Override {SCALES}").partition(WHOLE)[0]
        return f"study {study} has no scales to choose from; leave out scale"
    if first.startswith("You must specify '"):
        return f"{quoted[0]} is not set, and it has no default; choose one of {', '.join(lines[2:])}"
    if first.startswith("Ambiguous value for argument"):
        return (
            f"{quoted[0]} holds several values, and this command executes one run; "
            "to sweep over them use python -m qlora_lab.sweep, or write key=[a,b] for a list"
        )
    if first.startswith("Config group override must be a string or a list"):
        return f"an override has no key, or a number where a group's option is named; {OVERRIDE_HELP}"
    return " ".join(lines)
