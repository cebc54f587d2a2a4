"""A model on this machine as a judge, loaded as runs load theirs. Torch comes in only where it is asked."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_lab.config import hardware
from qlora_lab.config.command import shipped
from qlora_lab.config.load import from_hydra
from qlora_lab.config.refusals import explain
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.judging.cache import Response
from qlora_lab.judging.prompts import Message
from qlora_lab.judging.settings import JudgeConfig
from qlora_lab.judging.work import Unanswered
from qlora_lab.runs.fingerprint import source_fingerprint
from qlora_lab.wheels import default_cache_dir


def with_local_model(config: JudgeConfig) -> tuple[JudgeConfig, RunConfig]:
    """Compose the run whose model judges, and name it in the judge's settings so that no other has its responses.

    Raises:
        ConfigError, ModelError: `overrides` are none of python -m qlora_lab.train, or the model is not there.
    """
    run = _composed(config.overrides)
    chosen = {"model": asdict(run.model), "quant": asdict(run.quant), "dtype": run.trainer.compute_dtype}
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
    name = run.model.name if run.quant.format == "none" else f"{run.model.name} in {run.quant.format}"
    return replace(config, name=config.judge or name, model=f"{name} {digest}"), run


class LocalJudge:
    """Replies by greedy generation, a batch at a time."""

    workers = 1
    paid = False

    def __init__(self, config: JudgeConfig, run: RunConfig) -> None:
        import torch

        from qlora_lab.data.prompts import find_prompt_format
        from qlora_lab.models.load import load_model, load_tokenizer
        from qlora_lab.ops.blockwise.checks import DTYPES

        cache_dir = Path(run.paths.cache_dir) if run.paths.cache_dir else default_cache_dir()
        if run.trainer.threads is not None:
            torch.set_num_threads(run.trainer.threads)
        self._config, self._run = config, run
        self._tokenizer = load_tokenizer(run.model, cache_dir)
        self._format = find_prompt_format(run.model.prompt_format, self._tokenizer)
        self._model = load_model(
            run.model,
            run.quant,
            compute_dtype=DTYPES[run.trainer.compute_dtype],
            device=run.trainer.device,
            cache_dir=cache_dir,
            seed=run.seed,
            cache_bases=run.paths.cache_bases,
        )
        self.batch = config.batch

    def ask(self, conversations: Sequence[list[Message]]) -> list[Response | Unanswered]:
        """Return the reply to each conversation; those that the model has no room for have none."""
        from qlora_lab.evaluation.generate import generate
        from qlora_lab.evaluation.weights import cached_if_small

        prompts = [self._token_ids(messages) for messages in conversations]
        room = self._run.model.max_length_tokens - self._config.max_tokens
        fitting = [number for number, prompt in enumerate(prompts) if len(prompt) <= room]
        replies: list[Response | Unanswered] = [
            Unanswered(
                f"the conversation has {len(prompt)} tokens, and {self._run.model.name} has room for {room} before a "
                f"reply of {self._config.max_tokens}"
            )
            for prompt in prompts
        ]
        with cached_if_small(self._model):
            written = generate(
                self._model,
                self._tokenizer,
                [prompts[number] for number in fitting],
                max_new_tokens=self._config.max_tokens,
                batch_tokens=self._config.batch * self._run.model.max_length_tokens,
                device=self._model.device,
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
        (last_ids,) = data_ids([last.text], self._tokenizer)
        return self._format.following(history).ids(last.text, last_ids)


def _composed(overrides: Sequence[str]) -> RunConfig:
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    machine = hardware.detect()
    try:
        with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
            composed = from_hydra(compose("train", list(overrides)))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"overrides of the judge: {explain(error)}") from error
    data_dir = Path(composed.paths.data_dir)

    def fingerprint(source: Any) -> str | None:
        return source_fingerprint(source, data_dir)

    resolved = resolve(composed, machine, fingerprint)
    threads = resolved.trainer.threads or machine.cores
    return replace(resolved, trainer=replace(resolved.trainer, threads=threads))
