"""What one training step takes at its peak beyond what lies there between steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from qlora_lab.config.schema import CLASSIFICATION
from qlora_lab.memory.activations import block_bytes, cross_bytes, saved_bytes, shared_bytes
from qlora_lab.memory.layer import FLOAT32_BYTES, Layer
from qlora_lab.memory.planned_run import PlannedRun
from qlora_lab.memory.profiles import PROFILES
from qlora_lab.memory.stacks import Stack
from qlora_lab.memory.workspace import workspace_bytes

BUCKET_BYTES = 8  # of a bias of positions, for each place
# Vectors of each token that embeddings with dropout keep with checkpointing, which gives them a gradient: what is
# dropped, and where.
EMBEDDED = 2


class Kept(NamedTuple):
    """What one layer keeps, and what it takes beyond that at its peak."""

    own: int
    workspace: int


class Moment(NamedTuple):
    """A time of the backward pass at which it may be at its peak: in a layer, or at the embeddings.

    Attributes:
        kept: of what the forward pass left for it.
        besides: what is worked with, and what waits for others.
        leaves: gradients of weights, less their 16-bit copies, which go.
    """

    kept: int
    besides: int
    leaves: int


@dataclass(frozen=True)
class Step:
    """What a step takes.

    Attributes:
        kept: the most that is kept for the backward pass at a time.
        loss: what the output head and the loss take.
        workspace: the most that one layer takes in its backward pass.
        peak: of these and the gradients of all weights, what is there at once.
        at_embeddings: the same when the gradient of the embeddings is made, if what was kept had not gone; 0 without.
    """

    kept: int
    loss: int
    workspace: int
    peak: int
    at_embeddings: int


def plan_step(run: PlannedRun) -> Step:
    """Go through a step, from its loss down to its embeddings.

    Where it is of one micro-batch, gradients come as what is kept goes, and neither is whole beside the other. Where it
    has several, those of the first are there from then on.
    """
    at_loss, moments = _moments_from_below(run)
    loss = loss_bytes(run)
    every = run.trained_bytes if run.accumulates else 0
    done = run.embedding_bytes if run.modules.head and not run.head_waits else 0
    peak = at_loss + loss + every
    for moment in reversed(moments):
        peak = max(peak, moment.kept + moment.besides + (every or done))
        done += moment.leaves
    kept = max(at_loss, *(moment.kept for moment in moments))
    at_embeddings = kept + _waiting_bytes(run, 0) + run.embedding_bytes + every if run.modules.embeddings else 0
    return Step(kept, loss, max(moment.besides for moment in moments), peak, at_embeddings)


def _moments_from_below(run: PlannedRun) -> tuple[int, list[Moment]]:
    """Return what is kept when the loss is worked out, and the moments of all layers that a gradient reaches.

    Nothing is kept below the first adapter, since no gradient goes there.
    """
    checkpointing = run.config.trainer.gradient_checkpointing
    shared = sum(
        shared_bytes(_layer_of(run, stack), layers=len(stack.adapted), checkpointing=checkpointing)
        for stack in run.stacks
    )
    copies = run.adapter_copies_bytes
    adapted = max(1, sum(bool(names) for stack in run.stacks for names in stack.adapted))
    kept, reached_before = shared if checkpointing else shared + copies, run.modules.embeddings
    moments: list[Moment] = []
    for number, stack in enumerate(run.stacks):
        if run.modules.embeddings:
            moments.append(Moment(kept if number else 0, _embeddings_bytes(run, number), 0))
        vector = stack.shape.positions * run.architecture.hidden_size * run.numbers.stream_bytes
        kept += EMBEDDED * vector if checkpointing and stack.profile.dropout else 0
        # the input of the layer at hand is not there twice, unless its norm works on a copy in float32
        keeps_it = stack.profile.hidden or _layer_of(run, stack).norms_natively
        twice = vector if run.numbers.stream_bytes == FLOAT32_BYTES or keeps_it else 0
        between = _between_stacks(run, number)
        for index, layer in enumerate(_layers_of(run, stack, reached_before=reached_before)):
            # with checkpointing, the input of every layer, or of the two that are on their way to the host or back, and
            # one layer at a time as it is worked out again, when all that came after it is gone
            if checkpointing:
                kept += vector if index < 2 or not run.offloads else 0
            if layer is None:
                continue
            if not checkpointing:
                kept += layer.own
            again = layer.own - twice + copies // adapted if checkpointing else 0
            besides = _layer_bytes(run, number, layer)
            moments.append(Moment(kept + between + again, besides, _left_by_layer(run, stack, index)))
            reached_before = True  # what an encoder wrote goes into every layer of the decoder
    return kept + _between_stacks(run, len(run.stacks) - 1), moments


def _left_by_layer(run: PlannedRun, stack: Stack, index: int) -> int:
    """Return the bytes of the gradients that a layer leaves, less 16-bit copies of its weights, which are gone then."""
    numbers = run.numbers
    if not numbers.trained:
        return stack.adapter_parameters[index] * run.adapter_bytes
    copied = numbers.short and not run.config.trainer.gradient_checkpointing
    return stack.weights[index] * (FLOAT32_BYTES - (numbers.compute_bytes if copied else 0))


def _layers_of(run: PlannedRun, stack: Stack, *, reached_before: bool) -> Iterator[Kept | None]:
    """Give what each layer of a stack takes, from below; None of one that no gradient reaches."""
    first = 0 if reached_before else stack.first_adapted
    found: dict[tuple[tuple[str, ...], bool, bool], Kept] = {}
    for number, names in enumerate(stack.adapted):
        if first is None or number < first:
            yield None
            continue
        from_input, in_attention = run.modules.embeddings or number > first, number in stack.attention
        kind = names, from_input, in_attention
        if kind not in found:
            found[kind] = _kept_by(run, stack, names, from_input=from_input, in_attention=in_attention)
        yield found[kind]


def _kept_by(run: PlannedRun, stack: Stack, names: tuple[str, ...], *, from_input: bool, in_attention: bool) -> Kept:
    layer = _layer_of(run, stack, names)
    kept = saved_bytes(layer, from_attention=from_input or in_attention)
    of_block = block_bytes(layer, stack.block)
    if stack.profile.parallel and not from_input and stack.block.isdisjoint(names):  # no gradient goes there
        kept -= of_block
    workspace = workspace_bytes(
        layer,
        block_bytes=of_block,
        cross_bytes=cross_bytes(layer),
        checkpointing=run.config.trainer.gradient_checkpointing,
    )
    return Kept(kept, workspace)


def _layer_of(run: PlannedRun, stack: Stack, adapted: tuple[str, ...] = ()) -> Layer:
    return Layer(run.architecture, run.numbers, stack.profile, stack.shape, adapted, stack.source_tokens)


def _between_stacks(run: PlannedRun, last_stack: int) -> int:
    """Return what an encoder-decoder keeps besides its layers: the encoder's last norm, and biases of positions.

    Args:
        last_stack: that is there at the time; the first one is the encoder.
    """
    if len(run.stacks) == 1:
        return 0
    numbers, heads = run.numbers, run.architecture.num_heads
    source, target = run.stacks[0].shape, run.stacks[1].shape
    last = source.positions * run.architecture.hidden_size * (FLOAT32_BYTES + numbers.compute_bytes)
    # One bias for all rows, which the first layer gives the others: a copy for each row is made anew in each of them.
    # That of the attention to the encoder is zeros in the dtype of the query.
    of_itself, to_source = target.tokens**2, source.tokens * target.tokens
    if not run.config.trainer.gradient_checkpointing:  # the decoder's, until its forward pass ends
        return last + heads * (of_itself * numbers.stream_bytes + to_source * numbers.compute_bytes)
    # With checkpointing the zeros have a gradient, both stay, and the decoder's first layer makes others.
    zeros = 2 if last_stack == 0 else 3
    of_itself = source.tokens**2 + (0 if last_stack == 0 else of_itself)
    if last_stack == 0:
        last = 0
    if numbers.trained:  # so has the bias of a stack to itself, which its first layer works out again from buckets
        of_itself *= 2
        last += source.tokens**2 * BUCKET_BYTES
    return last + heads * (of_itself * numbers.stream_bytes + zeros * to_source * numbers.compute_bytes)


def loss_bytes(run: PlannedRun) -> int:
    """Return what the output head and the loss take: logits of one chunk, and the gradients of what they are of."""
    architecture, numbers, shape = run.architecture, run.numbers, run.stacks[-1].shape
    if run.config.model.task == CLASSIFICATION:
        return 2 * shape.rows * architecture.hidden_size * FLOAT32_BYTES
    chunk = min(run.config.trainer.loss_chunk_tokens, shape.positions)
    # a CPU's kernels give logits in float32; with autocast torch multiplies, which copies them and their gradient
    in_float32 = numbers.emulated if numbers.trained else run.modules.head or not numbers.on_gpu
    bytes_of_one = PROFILES[architecture.model_type].logits_bytes[numbers.short and not in_float32]
    logits = chunk * architecture.vocab_size * bytes_of_one
    states = 2 * shape.positions * architecture.hidden_size * numbers.stream_bytes  # the last, and their gradient
    if run.modules.head:  # its gradient, which is scaled into another one
        return states + run.embedding_bytes + max(logits, run.embedding_bytes)
    return logits + states


def _layer_bytes(run: PlannedRun, number: int, layer: Kept) -> int:
    """Return what is there besides what is kept in the backward pass of a layer of one stack."""
    numbers = run.numbers
    largest = max(rows * columns for _, rows, columns in run.linears)
    # The CPU kernels expand a weight panel by panel in cache; elsewhere it is there whole for its product.
    expanded = largest * numbers.compute_bytes if numbers.on_gpu and numbers.quantized else 0
    gradient = largest * FLOAT32_BYTES if numbers.trained else 0
    return layer.workspace + expanded + gradient + _waiting_bytes(run, number)


def _embeddings_bytes(run: PlannedRun, number: int) -> int:
    """Return what is there while the gradient of what one stack embeds is made.

    That of a head that is the embeddings is added to it, which makes another; below all layers the gradients of what is
    in none of them, such as norms and positions, count too.
    """
    bytes_of_one = run.embedding_bytes
    made = 2 * bytes_of_one if run.head_waits else bytes_of_one
    return made + _waiting_bytes(run, number) + (0 if number else run.outside_layers_bytes)


def _waiting_bytes(run: PlannedRun, number: int) -> int:
    """Return what waits while the gradient passes through one stack: what the loss worked out, and for embeddings.

    The loss keeps to the end what it worked out, the gradients of the last states and of a head that is trained. A head
    that is the embeddings has a scaled one besides, which waits for theirs; so does what a decoder embedded for what
    the encoder did.
    """
    if run.config.model.task == CLASSIFICATION:
        return 0
    states = run.stacks[-1].shape.positions * run.architecture.hidden_size * run.numbers.stream_bytes
    in_decoder_too = run.modules.embeddings and number < len(run.stacks) - 1
    matrices = run.modules.head + (run.head_waits or in_decoder_too)
    return states + matrices * run.embedding_bytes
