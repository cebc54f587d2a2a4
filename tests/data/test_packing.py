from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lab.data.packing import collate_packed, pack
from qlora_lab.data.tokenization import Example


def example(ids: list[int], loss_start: int) -> Example:
    return Example(array("i", ids), loss_start, loss_start, key="k", family=None, target_bytes=1)


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40), capacity=st.integers(1, 300))
@settings(max_examples=150, deadline=None)
def test_packs_hold_every_row_once_and_none_runs_over(lengths: list[int], capacity: int) -> None:
    packs = pack(lengths, capacity)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    sizes = [sum(lengths[row] for row in rows) for rows in packs]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size <= capacity or len(rows) == 1 for size, rows in zip(sizes, packs, strict=True))
    # never two packs that would fit into one: they would be even
    assert len(packs) <= max(1, 2 * sum(lengths) // capacity + sum(length > capacity / 2 for length in lengths))


def test_packs_are_even() -> None:
    lengths = [300, 150, 40, 60, 80, 120, 33, 90, 250, 20, 45, 110]
    sizes = [sum(lengths[row] for row in rows) for rows in pack(lengths, 512)]
    assert len(sizes) == 3  # 1,298 tokens
    assert max(sizes) < 1.1 * min(sizes)


def test_positions_start_again_in_every_example_and_labels_stay_with_their_tokens() -> None:
    first, second, third = example([5, 6, 7, 2], 2), example([8, 9, 2], 1), example([4, 2], 1)
    batch = collate_packed([[first, second], [third]], pad_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 2, 8, 9, 2], [4, 2, 0, 0, 0, 0, 0]],
        "labels": [[-100, -100, 7, 2, -100, 9, 2], [-100, 2, -100, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0]],
    }
