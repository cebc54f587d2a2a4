"""What one layer takes at its peak beyond what its forward pass keeps (activations.py)."""

from qlora_lab.memory.layer import FLOAT32_BYTES, Layer, any_of
from qlora_lab.memory.profiles import (
    FEED_FORWARD,
    FROZEN_GATED_WORKSPACE,
    GATED_WORKSPACE,
    HIDDEN,
    KEY_VALUE,
    NATIVE_GATED_WORKSPACE,
    QUERY,
    UNGATED_WORKSPACE,
)


def workspace_bytes(layer: Layer, *, block_bytes: int, cross_bytes: int, checkpointing: bool) -> int:
    """Return what one layer takes at its peak beyond what its forward pass keeps.

    That is in the backward pass of its feed-forward block, or in that of its attention, when what was kept for the
    block is gone, or while attention computes, when that is not there yet.

    Args:
        block_bytes: kept for the feed-forward block.
        cross_bytes: kept for the attention to an encoder, which comes between the layer's own and the block.
    """
    profile, shape, numbers, width = layer.profile, layer.shape, layer.numbers, layer.widths
    of_block = _block_vectors(layer) * width[FEED_FORWARD] * numbers.compute_bytes
    of_norm = profile.norm_workspace * width[HIDDEN] * FLOAT32_BYTES
    if layer.norms_natively:
        of_norm = width[HIDDEN] * numbers.compute_bytes  # the gradient that it gives
    incoming = width[HIDDEN] * numbers.stream_bytes  # the gradient of the layer's output
    at_once = [shape.positions * max(of_block, of_norm - incoming)]
    own = _attention_workspace(layer, shape.tokens, checkpointing)
    at_once.append(own - block_bytes - cross_bytes)
    if profile.cross_attention:
        other = _attention_workspace(layer, layer.source_tokens, checkpointing, of_itself=False)
        at_once.append(other - block_bytes)
    return round(shape.positions * incoming + max(at_once))


def _block_vectors(layer: Layer) -> float:
    """Return what the backward pass of a feed-forward block takes, in vectors of its width."""
    profile, numbers = layer.profile, layer.numbers
    vectors = profile.workspace[numbers.short]
    if layer.gates_natively:
        return NATIVE_GATED_WORKSPACE
    if layer.works_out_again:
        return vectors + GATED_WORKSPACE[numbers.short]
    if profile.gated:
        return vectors + (FROZEN_GATED_WORKSPACE[numbers.short] if numbers.quantized else 0)
    if numbers.trained:
        return vectors
    last = [names for names, kind in profile.inputs if kind == FEED_FORWARD]
    is_adapted = any(any_of(names, layer.adapted) for names in last) if last else not numbers.quantized
    lacks_input = not is_adapted and last
    return vectors + (UNGATED_WORKSPACE if lacks_input or (is_adapted and not numbers.quantized) else 0)


def _attention_workspace(layer: Layer, seen: int, checkpointing: bool, *, of_itself: bool = True) -> int:
    """Return what attention to `seen` tokens takes at its peak beyond what it keeps, where that may be a layer's peak.

    It may where it holds weights: matrices of tokens x tokens are more than all else in rows that are much longer than
    a vector is wide. Kernels of a GPU with dropout, and of all machines without, hold none, so that the feed-forward
    block needs more; attention that is written out in Python does on a GPU what it does on a CPU.
    """
    profile, shape, numbers = layer.profile, layer.shape, layer.numbers
    heads, query = layer.architecture.num_heads, layer.widths[QUERY]
    if not any(profile.scores):
        return shape.positions * _native_gradients(layer) if layer.attends_natively else 0
    if profile.dropout and numbers.on_gpu:  # but a bias may have a gradient, and with checkpointing zeros have one too
        has_gradient = profile.position_bias and (numbers.trained or (checkpointing and not of_itself))
        return shape.positions * heads * seen * numbers.compute_bytes if has_gradient else 0
    backward = heads * seen * profile.score_backward[numbers.short]
    if profile.dropout:
        computing = _computing_with_dropout(layer, seen, of_itself=of_itself)
        backward += query * numbers.compute_bytes  # gradients of its output and value, where the next layer's input was
    else:
        computing = heads * seen * profile.score_forward[numbers.short]
        if not checkpointing:  # the masks that the model holds; with checkpointing they are counted as shared
            computing += layer.written_mask_bytes
        elif profile.returns_weights:  # those of the layer before, in the first forward pass
            computing += heads * seen * numbers.compute_bytes
        backward -= query * numbers.compute_bytes  # the next layer's input is gone, and value, for its gradient
    return shape.positions * max(computing + profile.forward_query[numbers.short] * query, backward)


def _native_gradients(layer: Layer) -> int:
    """Return the bytes of a token while our attention works out gradients: these, its output's, two of each head."""
    query, key = layer.widths[QUERY], layer.widths[KEY_VALUE]
    return 2 * query * FLOAT32_BYTES + 2 * (query + key) * layer.numbers.compute_bytes


def _computing_with_dropout(layer: Layer, seen: int, *, of_itself: bool) -> int:
    """Return the bytes of a token's row of weights, masks and biases while a CPU works out attention with dropout.

    Args:
        seen: tokens that are attended to.
        of_itself: whether it is not the attention of a decoder to the encoder.
    """
    profile, shape, numbers = layer.profile, layer.shape, layer.numbers
    weights = layer.architecture.num_heads * seen
    rounded = numbers.short and not numbers.emulated
    taken = weights * numbers.compute_bytes if rounded else 0  # for the product with value
    # a decoder sees no padding: what it reads is padded at the end
    padded = shape.rows > 1 and not (of_itself and profile.cross_attention)
    if numbers.emulated and padded:
        taken += FLOAT32_BYTES * seen  # the mask as numbers
    if not profile.position_bias:
        return taken
    # The bias comes for all rows: learnt, in the dtype of its weights, or zeros for the encoder, in that of the query.
    if numbers.emulated and not (numbers.trained and of_itself):
        taken += weights * FLOAT32_BYTES // shape.rows  # is widened
    copied = FLOAT32_BYTES if numbers.emulated else numbers.compute_bytes
    if rounded and numbers.trained and of_itself:
        copied += numbers.stream_bytes  # autocast rounds the copy
    if padded:  # with the mask of each row in it
        taken += weights * copied
    elif of_itself:  # with the causal mask, or into the order of heads
        taken += weights * copied // shape.rows
    return taken
