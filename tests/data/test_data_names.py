"""The names that a plan knows without slow imports are those that the data code has."""

from qlora_lab.config.data_names import FILE_KINDS, ITS_TASKS, PROCEDURAL_FAMILIES, SMALLEST_FAMILY, TEMPLATES
from qlora_lab.data import procedural, readers, templates


def test_planned_names_are_the_real_ones() -> None:
    assert set(TEMPLATES) == set(templates.TEMPLATES)
    assert set(PROCEDURAL_FAMILIES) == set(procedural.FAMILIES)
    largest = procedural.procedural_rows(
        ITS_TASKS, seed=0, role="evaluation", families=[SMALLEST_FAMILY], distinct=True
    )
    assert len(largest) == ITS_TASKS
    assert tuple(readers.READERS) == FILE_KINDS
