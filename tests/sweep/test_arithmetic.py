"""The bound on a run's arithmetic beside a count of what torch does."""

import pytest

from qlora_lab.sweep.arithmetic import training_operations
from tests.helpers import composed

RUN = ["model=llama_7b", "trainer.max_steps=10", "trainer.batch_size=2", "adapter.rank=16"]
ROWS = ["data.max_source_tokens=448", "data.max_target_tokens=64"]
PARAMETERS, ADAPTERS = 6_738_415_616, 39_976_960
TOKENS = 10 * 2 * 512
SCORES = 2 * 32 * 4096 * 512  # two products in each of 32 layers, of 32 heads of 128 numbers, with each of 512 tokens


@pytest.mark.parametrize(
    ("overrides", "a_token"),
    [
        ([], 4 * PARAMETERS + 6 * ADAPTERS + 6 * SCORES),
        (["trainer.gradient_checkpointing=true"], 6 * PARAMETERS + 8 * ADAPTERS + 8 * SCORES),
        (["adapter=none", "quant=none"], 6 * PARAMETERS + 6 * SCORES),
    ],
)
def test_weights_and_attention_scores_are_counted(overrides: list[str], a_token: int) -> None:
    overrides = [each for each in RUN if not (each.startswith("adapter.") and "adapter=none" in overrides)] + overrides
    assert training_operations(composed(*overrides, *ROWS)) == a_token * TOKENS
