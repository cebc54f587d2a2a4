"""What a plan adds on a CPU for what is no tensor."""

import pytest

from qlora_lab.memory.layer import Shape
from qlora_lab.memory.plan import plan_memory
from qlora_lab.memory.process import HEAP_SHARE, LIBRARIES_BYTES, TOKENIZER_BYTES
from tests.helpers import composed

CPU = ["trainer.device=cpu", "trainer.compute_dtype=float32"]


def test_a_process_is_its_libraries_its_tokenizer_and_holes_of_the_heap() -> None:
    config = composed("model=smollm2_135m", *CPU)
    for shape in (Shape(1, 16), Shape(8, 128)):
        plan = plan_memory(config, shape)
        holes = plan.process - LIBRARIES_BYTES - 49_152 * TOKENIZER_BYTES
        assert holes == round(HEAP_SHARE[False] * plan.activations) > 0
    assert plan.total == plan.tensors + plan.process + plan.evaluation


def test_bytes_are_tokens_that_need_no_table() -> None:
    plan = plan_memory(composed("model=tiny_random", *CPU), Shape(1, 16))
    assert plan.process - LIBRARIES_BYTES == pytest.approx(HEAP_SHARE[False] * plan.activations, abs=1)


def test_the_heap_has_fewer_holes_in_16_bits() -> None:
    config = composed("model=smollm2_135m", "trainer.device=cpu", "trainer.compute_dtype=bfloat16")
    plan = plan_memory(config, Shape(8, 128))
    holes = plan.process - LIBRARIES_BYTES - 49_152 * TOKENIZER_BYTES
    assert holes == round(HEAP_SHARE[True] * plan.activations) < HEAP_SHARE[False] * plan.activations


def test_a_heap_keeps_what_larger_matrices_cannot_use() -> None:
    trained = "trainer.batch_size=4", "trainer.micro_batch_size=4", "adapter.trained_modules=[embed_tokens]"
    plain, large = (plan_memory(composed("model=smollm2_135m", *CPU, *each), Shape(4, 128)) for each in ((), trained))
    matrix = 49_152 * 576 * 4
    # three are there when their gradient is made, and two at the peak of tensors, beside a layer's workspace
    assert 0.8 * matrix < large.process - plain.process < matrix
    small = composed("model=tiny_random", *CPU, *trained)
    assert plan_memory(small, Shape(4, 128)).process < LIBRARIES_BYTES + plan_memory(small, Shape(4, 128)).activations


def test_on_a_gpu_a_process_takes_nothing_of_the_card() -> None:
    config = composed("model=smollm2_135m", "trainer.device=cuda", "trainer.compute_dtype=bfloat16")
    assert plan_memory(config, Shape(8, 128)).process == 0
