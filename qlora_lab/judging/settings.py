"""The settings of a judge: conf/evaluation/judge/NAME.yaml, with single values changed on the command line."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from qlora_lab.config.load import explain_omegaconf, known_keys, unknown_key
from qlora_lab.errors import ConfigError, unknown_name

ENDPOINT, LOCAL, REPLAY = "endpoint", "local", "replay"
KINDS = (ENDPOINT, LOCAL, REPLAY)


@dataclass
class Price:
    """Price of a million tokens in US dollars, and the day on which it was looked up."""

    prompt: float
    completion: float
    date: str = ""


@dataclass
class JudgeConfig:
    """One judge. Values that change what it says are part of a response's identity in the cache; see `sampling`."""

    kind: str = ENDPOINT
    name: str = ""  # in the ratings; "": the model's
    model: str = ""  # as the endpoint calls it; of a replay: the one judge to take where files are of several
    base_url: str | None = None  # of an OpenAI-compatible server; null: OpenAI's own
    key_variable: str | None = "OPENAI_API_KEY"  # the environment variable with the key; null: the server needs none
    temperature: float | None = 0.0
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int = 1024  # of a reply
    max_tokens_field: str = "max_tokens"  # what the endpoint calls it; newer models want max_completion_tokens
    extra_body: dict[str, Any] = field(default_factory=dict)  # further fields of a request, such as reasoning_effort
    concurrency: int = 8  # requests under way at a time
    requests_per_minute: float | None = None
    timeout_s: float = 180.0  # of one request
    attempts: int = 4  # at a request that times out or that the server fails at
    backoff_s: float = 2.0  # the first pause after a refusal; it doubles, unless the server says how long
    max_wait_s: float = 1800.0  # of refusals and failures without a single reply, after which the command ends
    price_per_million: Price | None = None  # goes before `prices`
    prices: dict[str, Price] = field(default_factory=dict)  # by model
    overrides: list[str] = field(default_factory=list)  # local: model and quant as python -m qlora_lab.train takes them
    run: str = ""  # local: a finished run by id or folder, whose model judges; `overrides` may say where runs lie
    batch: int = 4  # local: comparisons answered together
    ratings: list[str] = field(default_factory=list)  # replay: files or folders of published ratings

    @property
    def judge(self) -> str:
        return self.name or self.model

    @property
    def price(self) -> Price | None:
        """The price of the model's tokens, if it is known; a model on this machine costs none."""
        if self.kind != ENDPOINT:
            return Price(0.0, 0.0)
        return self.price_per_million or self.prices.get(self.model)

    def asked(self) -> dict[str, Any]:
        """Return who is asked: judges that differ in it are different ones, whatever their names."""
        return {"kind": self.kind, "model": self.model} | ({"base_url": self.base_url} if self.base_url else {})

    def asked_sha256(self) -> str:
        """Return the hash of `asked`, which tells nobody the address."""
        return hashlib.sha256(json.dumps(self.asked(), sort_keys=True).encode()).hexdigest()

    def sampling(self) -> dict[str, Any]:
        """Return the fields of a request besides model and messages."""
        chosen = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            self.max_tokens_field: self.max_tokens,
            **self.extra_body,
        }
        return {name: value for name, value in chosen.items() if value is not None}


def load_judge(name: str, changes: Sequence[str], folder: Path) -> JudgeConfig:
    """Read a judge's settings.

    Args:
        name: of a file in `folder`, or the path of any .yaml file.
        changes: KEY=VALUE, over the file's values.
        folder: conf/evaluation/judge.

    Raises:
        ConfigError: no such judge, an unknown setting, or a value that cannot be.
    """
    file = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(unknown_name("--judge", name, sorted(path.stem for path in folder.glob("*.yaml"))))
    for change in changes:
        if "=" not in change:
            raise ConfigError(f"--set takes KEY=VALUE; got '{change}'")
    # which key it was and not what it was set to: people try to give their key here
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(JudgeConfig),
            OmegaConf.load(file),
            OmegaConf.from_dotlist(list(map(_with_id_as_text, changes))),
        )
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(unknown_key(str(error.full_key), known_keys(JudgeConfig))) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"--set or {file.name}: {explain_omegaconf(error)}") from None
    assert isinstance(config, JudgeConfig)
    check(config)
    return config


def _with_id_as_text(change: str) -> str:
    """Keep the id of a run from being read as a number, which many look like."""
    key, _, value = change.partition("=")
    return f"run='{value}'" if key == "run" and value[:1] not in ("'", '"') else change


def check(config: JudgeConfig) -> None:
    """Refuse settings that cannot mean anything.

    Raises:
        ConfigError: with the setting's name.
    """
    if config.kind not in KINDS:
        raise ConfigError(unknown_name("kind", config.kind, KINDS))
    if config.kind == ENDPOINT and not config.model:
        raise ConfigError("model is not set: say which of the endpoint's models judges, as in --set model=gpt-4o")
    if config.kind == LOCAL and (config.temperature, config.top_p, config.seed) != (0.0, None, None):
        raise ConfigError("a local judge always writes the likeliest token; leave temperature 0, top_p and seed null")
    if config.kind != LOCAL and config.run:
        raise ConfigError(f"run is for a local judge, whose model it is; this one is of kind {config.kind}")
    if config.kind == REPLAY and not config.ratings:
        raise ConfigError("ratings is not set: say what to replay, as in --set 'ratings=[ratings-gpt4]'")
    for name in ("max_tokens", "concurrency", "timeout_s", "attempts", "batch"):
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name} must be above 0; got {getattr(config, name)}")
    if config.requests_per_minute is not None and config.requests_per_minute <= 0:
        raise ConfigError(f"requests_per_minute must be above 0, or null; got {config.requests_per_minute}")
    if config.key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", config.key_variable):
        raise ConfigError("key_variable must be the name of an environment variable, not a key itself")
    address = urlsplit(config.base_url or "")
    if address.username or address.password or address.query:  # it is kept with every response, and shown
        raise ConfigError(
            "base_url must be an address without user, password or query; put the key into the variable that "
            "key_variable names"
        )
