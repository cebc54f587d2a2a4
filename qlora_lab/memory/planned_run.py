"""What every component of a plan is worked out from: a run's model, its adapters, and how it computes."""

from dataclasses import dataclass, replace

from qlora_lab.config import hardware
from qlora_lab.config.architecture import adapter_parameters, linear_layers, total_parameters
from qlora_lab.config.families import FAMILIES, Linear
from qlora_lab.config.hardware import product_dtype
from qlora_lab.config.model_file import architecture_on_disk
from qlora_lab.config.placement import match_linears
from qlora_lab.config.schema import CLASSIFICATION, ArchitectureConfig, RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.memory.layer import FLOAT32_BYTES, Numbers, Shape
from qlora_lab.memory.profiles import PROFILES
from qlora_lab.memory.stacks import Stack, stacks_of
from qlora_lab.memory.trained_modules import TrainedModules, trained_modules

COMPUTE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class PlannedRun:
    """What every component is worked out from."""

    config: RunConfig
    architecture: ArchitectureConfig
    numbers: Numbers
    linears: list[Linear]
    stacks: list[Stack]
    modules: TrainedModules
    trained_parameters: int
    adapter_parameters: int  # of them

    @property
    def trained_bytes(self) -> int:
        """Return the bytes of what is trained, and of its gradients: adapters in their dtype, all else in float32."""
        others = self.trained_parameters - self.adapter_parameters
        return self.adapter_parameters * self.adapter_bytes + others * FLOAT32_BYTES

    @property
    def adapter_bytes(self) -> int:
        """Return the bytes of a number of an adapter."""
        return COMPUTE_BYTES[self.config.adapter.dtype]

    @property
    def outside_layers_bytes(self) -> int:
        """Return the bytes of gradients of weights in no linear of a layer, but for embeddings and head."""
        matrices = self.modules.head + self.modules.embeddings - self.head_waits
        if self.numbers.trained:
            in_layers = sum(sum(stack.weights) for stack in self.stacks) * FLOAT32_BYTES
        else:
            in_layers = sum(sum(stack.adapter_parameters) for stack in self.stacks) * self.adapter_bytes
        return self.trained_bytes - in_layers - matrices * self.embedding_bytes

    @property
    def adapter_copies_bytes(self) -> int:
        """Return the bytes of lora_A and lora_B in the compute dtype, as layers that are not quantized keep them."""
        same = self.config.adapter.dtype == self.config.trainer.compute_dtype
        return 0 if same or self.numbers.quantized else self.adapter_parameters * self.numbers.compute_bytes

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches, of which each finds the gradients of those before it.

        As the configuration says, whatever shape is planned: so a larger shape never needs less.
        """
        trainer = self.config.trainer
        return not isinstance(trainer.micro_batch_size, int) or trainer.micro_batch_size < trainer.batch_size

    @property
    def offloads(self) -> bool:
        """Whether the inputs of layers wait in the host's memory."""
        return self.config.trainer.offload_activations and self.numbers.on_gpu

    @property
    def head_waits(self) -> bool:
        """Whether the gradient of a trained head waits for that of the embeddings that it is."""
        return self.modules.head and self.architecture.tie_embeddings

    @property
    def embedding_parameters(self) -> int:
        """Return the numbers of the embeddings, or of the head of a language model."""
        return self.architecture.vocab_size * (self.architecture.embedding_size or self.architecture.hidden_size)

    @property
    def embedding_bytes(self) -> int:
        """Return the bytes of the same in float32."""
        return self.embedding_parameters * FLOAT32_BYTES


def planned_run(config: RunConfig, shape: Shape) -> PlannedRun:
    """Take a resolved run apart.

    Raises:
        ConfigError: the model's numbers are not known, or its type has no profile.
    """
    architecture = _architecture(config)
    config = replace(config, model=replace(config.model, architecture=architecture))
    linears, total = linear_layers(architecture), total_parameters(architecture)
    assert linears is not None and total is not None  # _architecture refuses others
    trainer, full = config.trainer, config.adapter.kind == "none"
    numbers = Numbers(
        compute_bytes=COMPUTE_BYTES[trainer.compute_dtype],
        rank=config.adapter.rank,
        quantized=config.quant.format != "none",
        trained=full,
        on_gpu=trainer.device == "cuda",
        emulated=product_dtype(hardware.detect(), trainer.device, trainer.compute_dtype) != trainer.compute_dtype,
    )
    chosen = [] if full else _adapted_paths(config, linears)
    adapted = [linear for linear in linears if linear[0] in set(chosen)]
    in_adapters = adapter_parameters(adapted, config.adapter.rank)
    parameters = in_adapters + classifier_parameters(config, len(config.data.labels))
    if full:
        modules = TrainedModules(embeddings=True, head=config.model.task != CLASSIFICATION, parameters=0)
    else:
        modules = trained_modules(config.adapter, architecture)
    return PlannedRun(
        config,
        architecture,
        numbers,
        linears,
        list(stacks_of(config, architecture, linears, frozenset(chosen), shape)),
        modules,
        total if full else parameters + modules.parameters,
        0 if full else in_adapters,
    )


def _architecture(config: RunConfig) -> ArchitectureConfig:
    architecture = config.model.architecture or architecture_on_disk(config.model)
    if architecture is None:
        raise ConfigError(
            "memory can only be planned where model.architecture says the model's numbers, or a config.json in its "
            f"folder or in the local hub cache; {config.model.name} has none of a known type; load it once, set "
            "model.architecture, or take a model that `python -m qlora_lab.models` lists"
        )
    if architecture.model_type not in PROFILES or architecture.model_type not in FAMILIES:
        raise ConfigError(
            f"memory can be planned for models of type {', '.join(PROFILES)}; got '{architecture.model_type}'"
        )
    return architecture


def _adapted_paths(config: RunConfig, linears: list[Linear]) -> list[str]:
    adapter = config.adapter
    paths = [path for path, *_ in linears]
    return match_linears(paths, adapter.placement, adapter.target_regex, adapter.last_k_layers)


def classifier_parameters(config: RunConfig, classes: int) -> int:
    """Return the parameters of a classifier's head, a dense layer and the output; 0 for other models."""
    assert config.model.architecture is not None
    hidden = config.model.architecture.hidden_size
    return (hidden + 1) * (hidden + classes) if config.model.task == CLASSIFICATION else 0
