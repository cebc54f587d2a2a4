"""The lists of layers of a model, with their adapters and what they read."""

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_lab.config.architecture import stacks
from qlora_lab.config.families import Linear
from qlora_lab.config.placement import match_linears
from qlora_lab.config.schema import SEQ2SEQ, ArchitectureConfig, RunConfig
from qlora_lab.memory.layer import Shape
from qlora_lab.memory.profiles import PROFILES, Profile


@dataclass(frozen=True)
class Stack:
    """A list of like layers: a model has one, or an encoder's and a decoder's."""

    profile: Profile
    adapted: tuple[tuple[str, ...], ...]  # of each layer, the linears with an adapter, by their paths in it
    attention: frozenset[int]  # layers with one in their attention
    block: frozenset[str]  # the linears of a layer's feed-forward block, by their paths in it
    weights: tuple[int, ...]  # of each layer, the numbers in its linears
    adapter_parameters: tuple[int, ...]  # of each layer
    shape: Shape  # of what it reads
    source_tokens: int = 0  # of what the encoder before it reads

    @property
    def first_adapted(self) -> int | None:
        return next((number for number, names in enumerate(self.adapted) if names), None)


def stacks_of(
    config: RunConfig, architecture: ArchitectureConfig, linears: list[Linear], adapted: frozenset[str], shape: Shape
) -> Iterator[Stack]:
    """Give each list of layers of a model.

    Args:
        linears: of the model.
        adapted: the paths of those with an adapter.
        shape: the tokens of an encoder-decoder are its source and target together.
    """
    attention = set(match_linears([path for path, *_ in linears], "attention", None, None))
    encoder = PROFILES[architecture.model_type]
    source, target = shape, shape
    if config.model.task == SEQ2SEQ:
        limits = config.data.max_source_tokens, config.data.max_target_tokens
        target = Shape(shape.rows, max(1, shape.tokens * limits[1] // sum(limits)))
        source = Shape(shape.rows, max(1, shape.tokens - target.tokens))
    for number, (family, num_layers) in enumerate(stacks(architecture)):
        of_layers: list[list[str]] = [[] for _ in range(num_layers)]
        weights, adapter_weights = [0] * num_layers, [0] * num_layers
        in_attention, block = set(), set()
        for path, rows, columns in linears:
            if not path.startswith(f"{family.layers}."):
                continue
            index, _, name = path.removeprefix(f"{family.layers}.").partition(".")
            weights[int(index)] += rows * columns
            if path not in attention:
                block.add(name)
            if path in adapted:
                of_layers[int(index)].append(name)
                adapter_weights[int(index)] += config.adapter.rank * (rows + columns)
                if path in attention:
                    in_attention.add(int(index))
        profile = encoder if number == 0 else encoder.decoder
        assert profile is not None  # of every family with a decoder
        yield Stack(
            profile,
            tuple(tuple(sorted(names)) for names in of_layers),
            frozenset(in_attention),
            frozenset(block),
            tuple(weights),
            tuple(adapter_weights),
            source if number == 0 else target,
            0 if number == 0 else source.tokens,
        )
