"""A model on this machine as a judge: of a finished run, or one that runs start from. Torch comes in only to ask it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lab.config import hardware
from qlora_lab.config.command import shipped
from qlora_lab.config.load import from_hydra
from qlora_lab.config.refusals import explain
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import CLASSIFICATION, RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.judging.cache import Response
from qlora_lab.judging.prompts import Message
from qlora_lab.judging.settings import JudgeConfig
from qlora_lab.judging.work import Unanswered
from qlora_lab.runs.find import find_run
from qlora_lab.runs.fingerprint import source_fingerprint
from qlora_lab.wheels import default_cache_dir

if TYPE_CHECKING:  # the heavy chain
    from qlora_lab.evaluation.candidates import Candidate


@dataclass(frozen=True)
class LocalModel:
    """A model that judges, and where and how it is loaded.

    Attributes:
        candidate: a finished run's model, or a base alone.
        threads: None: as many as torch takes.
    """

    candidate: "Candidate"
    cache_dir: Path
    cache_bases: bool
    threads: int | None

    def named(self, config: JudgeConfig) -> JudgeConfig:
        """Name the model in the judge's settings, so that no other has its responses."""
        base, run = self.candidate.base, self.candidate.run
        if run is None:
            name = base.model.name if base.quant.format == "none" else f"{base.model.name} in {base.quant.format}"
            chosen: Any = {"model": asdict(base.model), "quant": asdict(base.quant), "dtype": base.compute_dtype}
        else:
            name, chosen = run.run_id, [run.run_id, run.result()["adapter_sha256"]]
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
        return replace(config, name=config.judge or name, model=f"{name} {digest}")


def local_model(config: JudgeConfig) -> LocalModel:
    """Find the model that judges: `run`, or the one that `overrides` compose.

    Raises:
        ConfigError: `overrides` are none of python -m qlora_lab.train, or the model writes no words.
        ModelError, RunFolderError: the model or the run is not there, or the run is not finished.
    """
    from qlora_lab.evaluation.candidates import alone, base_of, trained

    composed = _composed(config.overrides)
    paths = composed.paths
    cache_dir = Path(paths.cache_dir) if paths.cache_dir else default_cache_dir()
    if config.run:
        candidate, threads = trained(find_run(Path(paths.runs_dir), config.run)), composed.trainer.threads
    else:
        machine = hardware.detect()
        resolved = resolve(composed, machine, lambda source: source_fingerprint(source, Path(paths.data_dir)))
        base = base_of(resolved)
        candidate = alone(replace(base, prompt_format=resolved.model.prompt_format), Path(paths.runs_dir))
        threads = resolved.trainer.threads or machine.cores
    if candidate.base.model.task == CLASSIFICATION:
        raise ConfigError(f"{candidate.name} is a classifier, which writes no reviews; let another model judge")
    return LocalModel(candidate, cache_dir, paths.cache_bases, threads)


class LocalJudge:
    """Replies by greedy generation, a batch at a time."""

    workers = 1
    paid = False

    def __init__(self, config: JudgeConfig, local: LocalModel) -> None:
        import torch

        from qlora_lab.data.prompts import find_prompt_format
        from qlora_lab.evaluation.prompt_sets import turn_ends
        from qlora_lab.evaluation.run_model import open_model

        if local.threads is not None:
            torch.set_num_threads(local.threads)
        self._config = config
        self._subject = open_model(local.candidate, cache_dir=local.cache_dir, cache_bases=local.cache_bases)
        base, tokenizer = self._subject.base, self._subject.tokenizer
        self._format = find_prompt_format(base.prompt_format, tokenizer)
        self._stops = turn_ends(base.prompt_format, tokenizer)
        self.batch = config.batch

    def ask(self, conversations: Sequence[list[Message]]) -> list[Response | Unanswered]:
        """Return the reply to each conversation; those that the model has no room for have none."""
        from qlora_lab.evaluation.generate import generate, prompt_room

        base, model, max_tokens = self._subject.base, self._subject.model, self._config.max_tokens
        prompts = [self._token_ids(messages) for messages in conversations]
        room = prompt_room(base.model.task, base.model.max_length_tokens, max_tokens)
        fitting = [number for number, prompt in enumerate(prompts) if len(prompt) <= room]
        replies: list[Response | Unanswered] = [
            Unanswered(
                f"the conversation has {len(prompt)} tokens, and {base.model.name} has room for {room} before a reply "
                f"of {max_tokens}"
            )
            for prompt in prompts
        ]
        with self._subject.computing():
            written = generate(
                model,
                self._subject.tokenizer,
                [prompts[number] for number in fitting],
                max_new_tokens=max_tokens,
                batch_tokens=self._config.batch * base.model.max_length_tokens,
                device=model.device,
                stops=self._stops,
            )
        for number, generation in zip(fitting, written, strict=True):
            replies[number] = Response(
                text=generation.text,
                model=self._config.model,
                finish_reason=generation.stop_reason,
                prompt_tokens=len(prompts[number]),
                completion_tokens=len(generation.token_ids),
                cost=0.0,
                date=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        return replies

    def _token_ids(self, messages: list[Message]) -> list[int]:
        from qlora_lab.data.prompts import data_ids
        from qlora_lab.data.rows import Turn

        *history, last = [Turn(message["role"], message["content"]) for message in messages]
        (last_ids,) = data_ids([last.text], self._subject.tokenizer)
        return self._format.following(history).ids(last.text, last_ids)


def _composed(overrides: Sequence[str]) -> RunConfig:
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    try:
        with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
            return from_hydra(compose("train", list(overrides)))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"overrides of the judge: {explain(error)}") from error
