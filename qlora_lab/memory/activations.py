"""The bytes that autograd keeps of one layer, from the counts of profiles.py; workspace.py has what else it takes."""

from collections.abc import Collection
from dataclasses import replace

from qlora_lab.memory.layer import FLOAT32_BYTES, Layer, any_of
from qlora_lab.memory.profiles import FEED_FORWARD, HIDDEN, KEY_VALUE, PROFILES, QUERY, Profile

CROSS_INPUTS = ("EncDecAttention.k", "EncDecAttention.v")  # these read what the encoder wrote


def saved_bytes(layer: Layer, *, from_attention: bool = True) -> int:
    """Return the bytes that one layer keeps.

    Args:
        from_attention: whether a gradient goes through the layer's attention, or only through its feed-forward block,
            as in the lowest layer with adapters where those are in the block alone.
    """
    numbers, width = layer.numbers, layer.widths
    biases = _bias_bytes(layer) if from_attention else 0
    if numbers.trained and numbers.short:
        return _autocast_bytes(layer) + biases
    profile = _profile_here(layer, from_attention)
    exact = profile.exact_hidden * width[HIDDEN] + profile.exact_query * width[QUERY]
    exact += profile.exact_key_value * width[KEY_VALUE]
    exact *= numbers.compute_bytes if layer.norms_natively else FLOAT32_BYTES
    # what attention of another kind sums for each token
    exact += 0 if profile.dropout else layer.architecture.num_heads * FLOAT32_BYTES
    mask = 0 if layer.attends_natively else layer.mask_places * numbers.compute_bytes
    seen = (layer.shape.tokens if from_attention else 0) + (layer.source_tokens if profile.cross_attention else 0)
    scores = profile.scores[numbers.short] * layer.architecture.num_heads * seen
    of_source = [name for name in layer.adapted if profile.cross_attention and name.endswith(CROSS_INPUTS)]
    low = (len(layer.adapted) - len(of_source)) * numbers.rank * numbers.adapter_bytes
    of_token = _vectors(layer, profile) * numbers.compute_bytes + mask + exact + low + scores
    kept = layer.shape.positions * of_token + biases
    if profile.cross_attention:
        pair = 2 * width[QUERY] * (numbers.compute_bytes if numbers.on_gpu else FLOAT32_BYTES)
        pair += len(of_source) * numbers.rank * numbers.adapter_bytes
        kept += layer.shape.rows * layer.source_tokens * pair
    return kept


def _profile_here(layer: Layer, from_attention: bool) -> Profile:
    """Return the layer's profile as it counts on this device, for what a gradient goes through."""
    profile = layer.profile
    if layer.numbers.trained:
        again = 2 if profile.head_norms else 1
        profile = replace(
            profile,
            exact_hidden=profile.exact_hidden + profile.trained_norms,
            exact_query=again * profile.exact_query,
            exact_key_value=again * profile.exact_key_value,
        )
    elif not from_attention:
        profile = without_attention(profile)
    if profile.dropout and layer.numbers.on_gpu:
        profile = replace(profile, query=profile.query + profile.exact_query, exact_query=0, scores=(0, 0))
    return profile


def _vectors(layer: Layer, profile: Profile) -> int:
    """Return the numbers of a token that are kept in the compute dtype, but for the mask."""
    width, shape = layer.widths, layer.shape
    vectors = profile.hidden * width[HIDDEN] + profile.feed_forward * width[FEED_FORWARD] + profile.query * width[QUERY]
    inputs = [kind for names, kind in profile.inputs if layer.numbers.trained or any_of(names, layer.adapted)]
    vectors += sum(width[kind] for kind in inputs)
    if layer.works_out_again:
        vectors -= 2 * width[FEED_FORWARD]
    # on a GPU heads of keys are not repeated where there is no mask, and a single one is without a copy
    repeats = shape.rows > 1 and layer.architecture.num_kv_heads > 1 and not layer.attends_natively
    return vectors if repeats or not profile.masked else vectors - 2 * (width[QUERY] - width[KEY_VALUE])


def _bias_bytes(layer: Layer) -> int:
    """Return what kernels of a GPU keep instead of attention weights where positions have a bias: a layer's copy of it.

    They give it a gradient where it wants one, and take it as it is read otherwise; a copy is made in each layer, with
    the mask of each row in it (transformers' create_position_bias_mask).
    """
    profile, shape, numbers = layer.profile, layer.shape, layer.numbers
    if not (profile.position_bias and numbers.on_gpu):
        return 0
    padded = shape.rows > 1
    # of a decoder, which sees no padding, one for all rows
    seen = shape.tokens // shape.rows if profile.cross_attention else shape.tokens
    seen += layer.source_tokens if padded else 0  # zeros, which are there without a copy where nothing is masked
    return shape.positions * layer.architecture.num_heads * seen * numbers.compute_bytes


def _autocast_bytes(layer: Layer) -> int:
    """Return what a layer keeps that is trained in 16 bits; autocast's copies of its weights are counted with them."""
    profile, shape, numbers, width = layer.profile, layer.shape, layer.numbers, layer.widths
    of_token = sum(size * number for size, number in zip(profile.autocast, width.values(), strict=True))
    seen = shape.tokens + (layer.source_tokens if profile.cross_attention else 0)
    scores = 0 if profile.dropout and numbers.on_gpu else profile.autocast_scores * seen
    of_token += layer.architecture.num_heads * (FLOAT32_BYTES + scores)
    if numbers.on_gpu and profile.masked:
        of_token += FLOAT32_BYTES * layer.mask_places + profile.autocast_on_gpu * width[QUERY]
        of_token += 2 * numbers.compute_bytes * (width[QUERY] - width[KEY_VALUE])  # heads of keys are repeated
    # key and value of the encoder's tokens, and two copies of those
    pair = 2 * (width[QUERY] * FLOAT32_BYTES + width[HIDDEN] * numbers.compute_bytes) if profile.cross_attention else 0
    return shape.positions * of_token + shape.rows * layer.source_tokens * pair


def shared_bytes(layer: Layer, *, layers: int, checkpointing: bool) -> int:
    """Return what `layers` of a stack like this one keep together: a mask, where each is given it again.

    That is with gradient checkpointing, and with autocast on a CPU that multiplies 16 bits. The mask is one of truth
    values, of batches with padding; attention written out in Python has one of numbers to add, of every batch.
    """
    profile, shape = layer.profile, layer.shape
    kinds = 2 if 1 < profile.sees_all_every <= layers else 1
    if checkpointing and any(profile.written_masks):
        return shape.positions * kinds * layer.written_mask_bytes
    if checkpointing and profile.dropout and shape.rows > 1:
        return shape.positions * (layer.source_tokens if profile.cross_attention else shape.tokens)
    if checkpointing or layer.attends_natively:
        return shape.positions * kinds * layer.mask_places
    return 0


def without_attention(profile: Profile) -> Profile:
    """Return what a layer keeps without its attention, or, in a decoder of two, without the one to itself."""
    if profile.cross_attention:
        return replace(profile, exact_hidden=profile.exact_hidden - 2, exact_query=profile.exact_query - 3)
    return replace(
        profile,
        hidden=profile.hidden // 2,
        exact_hidden=profile.exact_hidden // 2,
        query=0,
        exact_query=0,
        exact_key_value=0,
        masked=False,
        scores=(0, 0),
    )


def block_bytes(layer: Layer, block: Collection[str]) -> int:
    """Return what of `saved_bytes` a layer keeps for its feed-forward block.

    Args:
        block: the linears of the block, by their paths in the layer.
    """
    profile = layer.profile
    blocks = 3 if profile.cross_attention else 2
    only = replace(
        profile,
        hidden=profile.hidden // blocks,
        exact_hidden=profile.exact_hidden // blocks,
        trained_norms=profile.trained_norms // blocks,
        query=0,
        exact_query=0,
        exact_key_value=0,
        inputs=tuple((names, kind) for names, kind in profile.inputs if any_of(names, block)),
        # of the bytes that autocast keeps, those of vectors of hidden width are taken to be shared alike
        autocast=(profile.autocast[0] // blocks, profile.autocast[1], 0, 0),
        autocast_scores=0,
        autocast_on_gpu=0,
        masked=False,
        scores=(0, 0),
        position_bias=False,
        cross_attention=False,
    )
    adapted = tuple(name for name in layer.adapted if name in set(block))
    return saved_bytes(replace(layer, profile=only, adapted=adapted, source_tokens=0))


def cross_bytes(layer: Layer) -> int:
    """Return what of `saved_bytes` a layer of a decoder keeps for its attention to the encoder."""
    if not layer.profile.cross_attention:
        return 0
    without = tuple(name for name in layer.adapted if "EncDecAttention" not in name)
    encoder = PROFILES[layer.architecture.model_type]
    return saved_bytes(layer) - saved_bytes(replace(layer, profile=encoder, adapted=without, source_tokens=0))
