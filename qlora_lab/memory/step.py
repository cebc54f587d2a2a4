"""What one training step takes at its peak beyond what lies there between steps."""

from collections import Counter
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


class Layers(NamedTuple):
    """What a step takes for layers at its peak."""

    kept: int
    workspace: int  # beyond that, of the layer at hand


def bytes_of_layers(run: PlannedRun) -> Layers:
    """Return what is kept: nothing below the first adapter, since no gradient goes there."""
    checkpointing = run.config.trainer.gradient_checkpointing
    shared = sum(
        shared_bytes(_layer_of(run, stack), layers=len(stack.adapted), checkpointing=checkpointing)
        for stack in run.stacks
    )
    copies = run.adapter_copies_bytes
    adapted = max(1, sum(bool(names) for stack in run.stacks for names in stack.adapted))
    kept, inputs, reached_before = 0, 0, run.modules.embeddings
    peaks: list[Layers] = []
    for number, stack in enumerate(run.stacks):
        # with checkpointing, the input of every layer, or of the two that are on their way to the host or back
        layers = min(len(stack.adapted), 2) if run.offloads else len(stack.adapted)
        vector = stack.shape.positions * run.architecture.hidden_size * run.numbers.stream_bytes
        inputs += (layers + (EMBEDDED if stack.profile.dropout else 0)) * vector
        # that of the layer at hand is not there twice, unless its norm works on a copy in float32
        twice = vector if run.numbers.stream_bytes == FLOAT32_BYTES or stack.profile.hidden else 0
        found = _layers_of(run, stack, reached_before=reached_before)
        if not found:
            continue
        reached_before = True  # what an encoder wrote goes into every layer of the decoder
        between = _between_stacks(run, number) + shared
        if checkpointing:  # one layer at a time as it is worked out again, when all that came after it is gone
            peaks += [layer._replace(kept=inputs - twice + layer.kept + copies // adapted + between) for layer in found]
        else:
            kept += sum(layer.kept * count for layer, count in found.items())
            peaks.append(Layers(kept + copies + between, max(layer.workspace for layer in found)))
    return max(peaks, key=sum)


def _layers_of(run: PlannedRun, stack: Stack, *, reached_before: bool) -> Counter[Layers]:
    """Count the layers of a stack that a gradient reaches, by what they take."""
    first = 0 if reached_before else stack.first_adapted
    if first is None:
        return Counter()
    kinds = Counter(
        (names, run.modules.embeddings or number > first, number in stack.attention)
        for number, names in enumerate(stack.adapted)
        if number >= first
    )
    found: Counter[Layers] = Counter()
    for (names, from_input, in_attention), count in kinds.items():
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
        found[Layers(kept, workspace)] += count
    return found


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


def backward_bytes(run: PlannedRun, layers: Layers) -> int:
    """Return what the backward pass of one layer takes at its peak."""
    numbers = run.numbers
    largest = max(rows * columns for _, rows, columns in run.linears)
    # The CPU kernels expand a weight panel by panel in cache; elsewhere it is there whole for its product.
    expanded = largest * numbers.compute_bytes if numbers.on_gpu and numbers.quantized else 0
    backward = layers.workspace + expanded + (largest * FLOAT32_BYTES if numbers.trained else 0)
    if run.config.model.task != CLASSIFICATION:  # the gradient that the loss worked out, which waits in it to the end
        backward += run.stacks[-1].shape.positions * run.architecture.hidden_size * numbers.stream_bytes
    held, size = 0, run.embedding_bytes
    waits = run.modules.head and run.architecture.tie_embeddings
    if run.modules.head:  # its gradient as the loss left it, and one that waits for that of the embeddings it is
        held = 2 * size if waits else size
    if run.modules.embeddings:  # their gradient, and the sum of both, when all that was kept for the layers is gone
        backward = max(backward, (2 * size if waits else size) - layers.kept)
    return backward + held
