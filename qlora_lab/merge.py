"""python -m qlora_lab.merge run=ID out=FOLDER: an adapter merged into its base, a model of its own."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from qlora_lab.config import hardware
from qlora_lab.config.command import command
from qlora_lab.config.load import typed_from_hydra
from qlora_lab.config.schema import AUTO, BASE, EvaluateConfig, EvaluationConfig, MergeConfig, RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.evaluate import run_name
from qlora_lab.evaluation.candidates import asked_base, trained
from qlora_lab.runs.find import find_run
from qlora_lab.runs.heap import restart_with_heap_settings
from qlora_lab.wheels import default_cache_dir

if TYPE_CHECKING:  # torch: only once there is something to merge
    from qlora_lab.merging.merge import Request

GB = 10**9


def merge(node: DictConfig) -> None:
    """Merge what the configuration names, and say where it lies and how much it differs."""
    config = typed_from_hydra(node, MergeConfig)
    request = request_of(config)
    import torch

    from qlora_lab.merging.merge import merge as merge_adapter

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    cache_dir = Path(config.paths.cache_dir) if config.paths.cache_dir else default_cache_dir()
    record = merge_adapter(request, cache_dir=cache_dir, cache_bases=config.paths.cache_bases)
    print(f"{request.out}: {record['base']} with the adapter merged in ({request.into}, {request.dtype})")


def request_of(config: MergeConfig) -> "Request":
    """Return what is asked for, with nothing left to choose.

    Raises:
        RunFolderError: there is no such run, or it is not finished.
        ConfigError: the run has no adapter.
        ModelError: its weights are missing or changed.
    """
    from qlora_lab.evaluation.run_model import check_weights
    from qlora_lab.merging.merge import Request

    run: RunConfig | None = None
    run_id: str | None = None
    if config.adapter_folder is not None:
        asked = EvaluateConfig(
            run=BASE, model=config.model, quant=config.quant, compute_dtype=config.dtype, evaluation=EvaluationConfig()
        )
        base, adapter = asked_base(asked, hardware.detect()), Path(config.adapter_folder)
    else:
        folder = find_run(Path(config.paths.runs_dir), run_name(config.run))
        base, adapter, run, run_id = trained(folder).base, folder.adapter, folder.config(), folder.run_id
        if run.adapter.kind == "none":
            raise ConfigError(
                f"run {run_id} trained every weight and has no adapter: {adapter} is its whole model already"
            )
        check_weights(folder)
        run = replace(run, paths=replace(run.paths, data_dir=config.paths.data_dir))
    return Request(
        adapter=adapter,
        base=base,
        out=Path(config.out),
        into=config.into,
        dtype=base.compute_dtype if config.dtype == AUTO else config.dtype,
        run=run,
        run_id=run_id,
        tolerance=config.tolerance,
        check_rows=config.check_rows,
        shard_bytes=int(config.shard_gb * GB),
    )


def main() -> None:
    command("merge", merge, schema=MergeConfig, schema_name="merge_schema")


if __name__ == "__main__":
    restart_with_heap_settings()
    main()
