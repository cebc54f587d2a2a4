"""python -m qlora_lab.serve run=ID: an OpenAI-compatible server of one base and its adapters, with a page to chat."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from qlora_lab.config import hardware
from qlora_lab.config.command import command
from qlora_lab.config.load import typed_from_hydra
from qlora_lab.config.schema import OpenConfig, ServeConfig
from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.evaluate import finished_of_study, readable_name, run_name
from qlora_lab.evaluation.candidates import alone, asked_base, trained
from qlora_lab.listening import is_loopback, listen
from qlora_lab.runs.find import find_run
from qlora_lab.wheels import default_cache_dir

if TYPE_CHECKING:  # torch: only once there is something to serve
    from qlora_lab.serving.shared_base import SharedBase
    from qlora_lab.serving.sources import Source

PACKAGES = ("fastapi", "uvicorn")  # of the extra `serve`
SHORTEST_TOKEN = 16
FEWEST_CACHE_TOKENS = 16
SHARE_OF_A_GPU, SHARE_OF_THE_HOST = 0.5, 0.25  # of its free memory, or of all; for keys and values of answers
LAST_ANSWERS_S = 5  # that a stopping server waits for its connections


def serve(node: DictConfig) -> None:
    """Serve what the configuration names until Ctrl-C, or SIGTERM."""
    config = typed_from_hydra(node, ServeConfig)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the server needs {', '.join(missing)}; install them with `pip install 'qlora_lab[serve]'`")
    token = token_of(config)
    with listen(config.host, config.port) as listening:  # before the model is loaded, which takes long
        import uvicorn

        from qlora_lab.serving.app import Limits, create_app
        from qlora_lab.serving.engine import Engine
        from qlora_lab.serving.scheduler import Scheduler

        shared = open_shared(config)

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: Any) -> None:
                engine.stop()  # answers under way end, so that their connections close
                super().handle_exit(sig, frame)

        def failed() -> None:
            server.should_exit = True

        cache_tokens = cache_tokens_of(config, shared)
        engine = Engine(shared, Scheduler(shared, max_rows=config.max_rows, max_cache_tokens=cache_tokens), failed)
        limits = Limits(config.max_waiting, config.max_body_kb * 1024, config.max_new_tokens, cache_tokens)
        # No log_config: it would close the handlers of everybody else's logs.
        server = Server(
            uvicorn.Config(
                create_app(shared, engine, limits, token=token),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=LAST_ANSWERS_S,
            )
        )
        host = f"[{config.host}]" if ":" in config.host else config.host
        _announce(shared, f"http://{host}:{listening.getsockname()[1]}")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        engine.start()
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has ended
            server.run(sockets=[listening])
        engine.stop()
        engine.join()
        if engine.error is not None:
            raise engine.error
        print("stopped", flush=True)


def token_of(config: ServeConfig) -> str | None:
    """Return what requests must bring; None: nothing, on this machine alone.

    Raises:
        ConfigError: others reach the server and there is no token, or it is one that can be guessed.
    """
    token = os.environ.get(config.token_variable, "").strip()
    if not token and not is_loopback(config.host):
        raise ConfigError(
            f"host '{config.host}' can be reached from other machines: set the environment variable "
            f"{config.token_variable} to a secret that requests must bring, such as what `openssl rand -hex 24` prints"
        )
    if token and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise ConfigError(f"the token in {config.token_variable} must be at least {SHORTEST_TOKEN} ASCII characters")
    return token or None


def cache_tokens_of(config: ServeConfig, shared: "SharedBase") -> int | None:
    """Return how many tokens of prompts and answers are remembered at a time; None: the host's memory is not known.

    Raises:
        ConfigError: the budget is none for any answer.
    """
    import torch

    from qlora_lab.serving.batch import cache_bytes_per_token

    budget_bytes: float | None
    if config.cache_budget_mb is not None:
        budget_bytes = config.cache_budget_mb * 1e6
    elif shared.model.device.type == "cuda":
        budget_bytes = torch.cuda.mem_get_info()[0] * SHARE_OF_A_GPU
    else:
        total = hardware.detect().memory_bytes
        budget_bytes = None if total is None else total * SHARE_OF_THE_HOST
    if budget_bytes is None:
        return None
    of_a_token = cache_bytes_per_token(shared)
    tokens = int(budget_bytes // of_a_token)
    if tokens < FEWEST_CACHE_TOKENS:
        raise ConfigError(
            f"cache_budget_mb must hold at least {FEWEST_CACHE_TOKENS} tokens of {shared.base.name}, "
            f"{FEWEST_CACHE_TOKENS * of_a_token / 1e6:g} MB; {budget_bytes / 1e6:g} MB hold {tokens}"
        )
    print(f"prompts and answers under way have at most {tokens:,} tokens together, {budget_bytes / 1e6:,.0f} MB")
    return tokens


def open_shared(config: OpenConfig) -> "SharedBase":
    """Open a base, and put on it the adapters that are asked for.

    Raises:
        ConfigError: nothing tells the base, or it needs a GPU and there is none.
        ModelError: the base or an adapter is missing or damaged, or they do not belong together.
        RunFolderError: there is no such run or study, or a run is not finished.
    """
    import torch

    from qlora_lab.evaluation.run_model import open_model
    from qlora_lab.serving.shared_base import SharedBase

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    runs_dir = Path(config.paths.runs_dir)
    sources = dict(_named_sources(config, runs_dir))
    of_study = dict(_study_sources(config, runs_dir))
    bases = [source.base for source in [*sources.values(), *of_study.values()] if source.base is not None]
    if config.model is None and not bases:
        raise ConfigError(
            "folders and hub ids do not say how their base is loaded; name it, as in model=smollm2_135m quant=nf4"
        )
    base = bases[0] if config.model is None else asked_base(config, hardware.detect())
    if base.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"{base.name} is to compute on a GPU, as a run of it did or as it was asked for, and torch sees none here; "
            f"for the CPU name the base, as in model={base.model.name} quant={base.quant.format} device=cpu "
            "+adapters.tuned=RUN"
        )
    _say_slow_kernels(base.device)
    cache_dir = Path(config.paths.cache_dir) if config.paths.cache_dir else default_cache_dir()
    opened = open_model(alone(base, runs_dir), cache_dir=cache_dir, cache_bases=config.paths.cache_bases)
    budget_bytes = None if config.adapter_budget_mb is None else int(config.adapter_budget_mb * 1e6)
    shared = SharedBase(opened, runs_dir, budget_bytes=budget_bytes)
    for name, source in sources.items():
        _register(shared, name, source)
    for name, source in of_study.items():
        try:
            _register(shared, name, source)
        except ModelError as error:
            print(f"left out: {error}", flush=True)
    if of_study and not shared.names:
        raise ModelError(f"no run of study '{config.study}' can be served on {base.name}")
    return shared


def _say_slow_kernels(device: str) -> None:
    """Tell that references in torch run in place of native kernels, and why."""
    from qlora_lab.ops.registry import CUDA_KERNELS, KERNELS

    kernels = CUDA_KERNELS if device == "cuda" else KERNELS
    if kernels.library is None:
        print(f"note: kernels: {kernels}", flush=True)


def _register(shared: "SharedBase", name: str, source: "Source") -> None:
    for note in shared.register(name, source).notes:
        print(f"note: {note}", flush=True)


def _named_sources(config: OpenConfig, runs_dir: Path) -> "Iterator[tuple[str, Source]]":
    from qlora_lab.serving.sources import find_source, source_of

    names = config.run if isinstance(config.run, list) else [] if config.run is None else [config.run]
    for name in names:
        run = find_run(runs_dir, run_name(name))
        yield run.run_id, source_of(trained(run, readable_name(run)))
    for name, where in config.adapters.items():
        yield name, find_source(where, runs_dir)


def _study_sources(config: OpenConfig, runs_dir: Path) -> "Iterator[tuple[str, Source]]":
    from qlora_lab.serving.sources import source_of

    if config.study is not None:
        for run in finished_of_study(runs_dir, config.study):
            try:
                yield run.run_id, source_of(trained(run, readable_name(run)))
            except ModelError as error:
                print(f"left out: {error}", flush=True)


def _announce(shared: "SharedBase", address: str) -> None:
    print(f"{shared.name}: the base, {shared.base.name}")
    for name, adapter in shared.pool.registered.items():
        print(name if name == adapter.description else f"{name}: {adapter.description}")
    print(f"serving at {address}/v1, and a page to chat at {address}/. Stop with Ctrl-C.", flush=True)


def main() -> None:
    command("serve", serve, schema=ServeConfig, schema_name="serve_schema")


if __name__ == "__main__":
    main()
