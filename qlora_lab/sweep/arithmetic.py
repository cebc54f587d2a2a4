"""How much arithmetic the training of a run is, from its configuration: a bound for plans without finished runs.

A token costs 2 operations a parameter forward and 2 more for the gradient of its input, as does a product of attention
scores (queries with keys, scores with values) for each number of a head and each token that is seen; those have two
inputs with a gradient each. Gradient checkpointing adds a second forward pass, and training the weights themselves 2
for their gradients (Kaplan et al. 2020, section 2.1). Left out is what is done number by number, such as expanding
weights, and all of evaluation.
"""

from qlora_lab.config.architecture import adapter_parameters, linear_layers, stacks, total_parameters
from qlora_lab.config.families import head_size
from qlora_lab.config.schema import ArchitectureConfig, RunConfig

FORWARD = INPUT_GRADIENT = WEIGHT_GRADIENT = 2  # operations a parameter and token
ATTENTION_PRODUCTS = 2  # a layer has


def training_operations(config: RunConfig) -> float | None:
    """Return the most floating-point operations of a run's training: if its rows are as long as they may be.

    Returns:
        None where the model's numbers are not in its configuration.
    """
    architecture, trainer = config.model.architecture, config.trainer
    parameters = total_parameters(architecture) if architecture is not None else None
    if architecture is None or parameters is None:
        return None
    bounds = [trainer.max_train_tokens]
    if trainer.max_steps is not None:
        bounds.append(trainer.max_steps * trainer.batch_size * config.data.longest_row_tokens)
    tokens = min(bound for bound in bounds if bound is not None)
    again = FORWARD if trainer.gradient_checkpointing else 0
    adapters = adapter_parameters(linear_layers(architecture) or [], config.adapter.rank)  # wherever they are placed
    adapters = 0 if config.adapter.kind == "none" else adapters
    all_trained = config.adapter.kind == "none" or bool(config.adapter.trained_modules)
    a_token = (FORWARD + INPUT_GRADIENT + again) * (parameters + adapters)
    a_token += WEIGHT_GRADIENT * (parameters + adapters if all_trained else adapters)
    a_token += (FORWARD + 2 * INPUT_GRADIENT + again) * _score_products(architecture, config.data.longest_row_tokens)
    return float(a_token * tokens)


def _score_products(architecture: ArchitectureConfig, tokens: int) -> int:
    """Return the products of numbers that the attention of one token takes, which sees all of a row."""
    layers = sum(number for _, number in stacks(architecture))
    return ATTENTION_PRODUCTS * layers * architecture.num_heads * head_size(architecture) * tokens
