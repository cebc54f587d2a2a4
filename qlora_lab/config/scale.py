"""scale=NAME on the command line: which version of a study is meant, such as the published one or that of a laptop.

The study sweeps/experiment/STUDY.yaml chooses a file of the folder sweeps/experiment/STUDY/ in its defaults list, as
`STUDY@_global_: laptop`, which makes the folder a Hydra group like any other. All that scale=NAME stands for is the
group's full name: experiment/STUDY@_global_=NAME.
"""

from qlora_lab.errors import ConfigError

SCALE, EXPERIMENT = "scale=", "+experiment="
SCALES, WHOLE = "experiment/", "@_global_"  # around a study's name: the group of its scales


def with_scale(arguments: list[str]) -> list[str]:
    """Return a command line with scale=NAME as Hydra has it.

    Raises:
        ConfigError: several scales at once, or no study to have them.

    Example:
        >>> with_scale(["+experiment=glue", "scale=paper", "seed=0"])
        ['+experiment=glue', 'experiment/glue@_global_=paper', 'seed=0']
    """
    scales = [argument for argument in arguments if argument.startswith(SCALE)]
    if not scales:
        return arguments
    studies = [each.removeprefix(EXPERIMENT) for each in arguments if each.startswith(EXPERIMENT)]
    if len(studies) != 1:
        raise ConfigError(f"{scales[0]} chooses the version of a study; give one, such as +experiment=dataset_quality")
    if len(scales) > 1 or "," in scales[0]:
        raise ConfigError(f"scale must be one name; got '{' '.join(scales)}'; start one command per scale")
    own = f"{SCALES}{studies[0]}{WHOLE}={scales[0].removeprefix(SCALE)}"
    return [own if argument == scales[0] else argument for argument in arguments]
