"""What one training step takes at its peak beyond what lies there between steps."""

from collections import Counter

from qlora_lab.config.schema import CLASSIFICATION
from qlora_lab.memory.activations import FLOAT32_BYTES, saved_bytes, shared_bytes, works_out_again, workspace_bytes
from qlora_lab.memory.planned_run import PlannedRun
from qlora_lab.memory.profiles import PROFILES

HEAD_ROWS_AT_ONCE = 2048  # of the output head, widened for a product (models/head_products.py)


def activation_bytes(run: PlannedRun) -> int:
    """Return what is kept: nothing below the first adapter, since no gradient goes there."""
    hidden = run.architecture.hidden_size
    kept, inputs, checkpointed, reached_before = 0, 0, 0, run.modules.embeddings
    copies = run.adapter_copies_bytes
    checkpointing = run.config.trainer.gradient_checkpointing
    shared = sum(shared_bytes(s.profile, s.shape, run.numbers, checkpointing=checkpointing) for s in run.stacks)
    adapted = max(1, sum(bool(names) for stack in run.stacks for names in stack.adapted))
    for number_of_stack, stack in enumerate(run.stacks):
        first = 0 if reached_before else stack.first_adapted
        # with checkpointing, the input of every layer, or of the two that are on their way to the host or back
        layers = min(len(stack.adapted), 2) if run.offloads else len(stack.adapted)
        inputs += layers * stack.shape.positions * hidden * run.numbers.compute_bytes
        if first is None:
            continue
        kinds = Counter(
            (names, run.modules.embeddings or number > first or number in stack.attention)
            for number, names in enumerate(stack.adapted)
            if number >= first
        )
        of_a_layer = {
            kind: saved_bytes(
                run.architecture,
                stack.profile,
                stack.shape,
                run.numbers,
                kind[0],
                from_attention=kind[1],
                source_tokens=stack.source_tokens,
            )
            for kind in kinds
        }
        kept += sum(count * of_a_layer[kind] for kind, count in kinds.items())
        # ... and one layer at a time as it is worked out again, when all that came after it is gone
        again = inputs + max(of_a_layer.values()) + copies // adapted + _between_stacks(run, number_of_stack)
        checkpointed = max(checkpointed, again)
        reached_before = True  # what an encoder wrote goes into every layer of the decoder
    if checkpointing:
        return checkpointed + shared
    return kept + shared + copies + _between_stacks(run, len(run.stacks) - 1)


def _between_stacks(run: PlannedRun, last_stack: int) -> int:
    """Return what an encoder-decoder keeps besides its layers: the encoder's last norm, and biases of positions.

    Args:
        last_stack: that is there at the time; the first one is the encoder.
    """
    if len(run.stacks) == 1:
        return 0
    source, target = run.stacks[0].shape, run.stacks[1].shape
    last = source.positions * run.architecture.hidden_size * (FLOAT32_BYTES + run.numbers.compute_bytes)
    if not (run.numbers.on_gpu or run.config.trainer.gradient_checkpointing):
        return last
    places = source.tokens**2
    if last_stack == 0:
        last = 0
    else:
        places += target.tokens**2 + source.tokens * target.tokens
    return last + source.rows * run.architecture.num_heads * places * run.numbers.compute_bytes


def loss_bytes(run: PlannedRun) -> int:
    """Return what the output head and the loss take: logits of one chunk, and the gradients of what they are of."""
    architecture, numbers, shape = run.architecture, run.numbers, run.stacks[-1].shape
    if run.config.model.task == CLASSIFICATION:
        return 2 * shape.rows * architecture.hidden_size * FLOAT32_BYTES
    chunk = min(run.config.trainer.loss_chunk_tokens, shape.positions)
    in_float32 = numbers.emulated or (run.modules.head and not numbers.trained)
    bytes_of_one = PROFILES[architecture.model_type].logits_bytes[numbers.short and not in_float32]
    logits = chunk * architecture.vocab_size * bytes_of_one
    states = 2 * shape.positions * architecture.hidden_size * numbers.compute_bytes  # the last, and their gradient
    if run.modules.head:  # its gradient, which is scaled into another one
        return states + run.embedding_bytes + max(logits, run.embedding_bytes)
    widened = min(HEAD_ROWS_AT_ONCE, architecture.vocab_size) * architecture.hidden_size * FLOAT32_BYTES
    return logits + states + (widened if numbers.emulated else 0)


def backward_bytes(run: PlannedRun, activations: int) -> int:
    """Return what the backward pass of one layer takes at its peak."""
    numbers, architecture = run.numbers, run.architecture
    largest = max(rows * columns for _, rows, columns in run.linears)
    # The CPU kernels expand a weight panel by panel in cache; elsewhere it is there whole for its product.
    expanded = largest * numbers.compute_bytes if numbers.on_gpu and numbers.quantized else 0
    of_layers = [
        workspace_bytes(
            architecture,
            stack.profile,
            stack.shape,
            numbers,
            again=any(works_out_again(stack.profile, numbers, names) for names in stack.adapted),
        )
        for stack in run.stacks
    ]
    backward = max(of_layers) + expanded + (largest * FLOAT32_BYTES if numbers.trained else 0)
    held, size = 0, run.embedding_bytes
    waits = run.modules.head and architecture.tie_embeddings
    if run.modules.head:  # its gradient as the loss left it, and one that waits for that of the embeddings it is
        held = 2 * size if waits else size
    if run.modules.embeddings:  # their gradient, and the sum of both, when all that was kept for the layers is gone
        backward = max(backward, (2 * size if waits else size) - activations)
    return backward + held
