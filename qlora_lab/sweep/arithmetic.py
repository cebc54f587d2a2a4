"""How much arithmetic the training of a run is, from its configuration: a bound for plans without finished runs.

A token costs 2 operations a parameter forward and 2 more for the gradient of its input. Gradient checkpointing adds a
second forward pass, and training the weights themselves 2 for their gradients (Kaplan et al. 2020, section 2.1). The
arithmetic of attention scores, adapters and evaluation is left out: a few percent where rows have 1,000 tokens.
"""

from qlora_lab.config.architecture import total_parameters
from qlora_lab.config.schema import RunConfig

FORWARD = INPUT_GRADIENT = WEIGHT_GRADIENT = 2  # operations a parameter and token


def training_operations(config: RunConfig) -> float | None:
    """Return the floating-point operations of a run's training if its rows are as long as they may be.

    Returns:
        None where the model's numbers are not in its configuration.
    """
    architecture, trainer = config.model.architecture, config.trainer
    parameters = total_parameters(architecture) if architecture is not None else None
    if parameters is None:
        return None
    bounds = [trainer.max_train_tokens]
    if trainer.max_steps is not None:
        bounds.append(trainer.max_steps * trainer.batch_size * config.data.longest_row_tokens)
    tokens = min(bound for bound in bounds if bound is not None)
    a_token = FORWARD + INPUT_GRADIENT
    a_token += FORWARD if trainer.gradient_checkpointing else 0
    a_token += WEIGHT_GRADIENT if config.adapter.kind == "none" else 0
    return float(a_token * parameters * tokens)
