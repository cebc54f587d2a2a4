"""A tiny base in a folder, its adapter, and the cache of the test."""

from pathlib import Path
from typing import Any

import pytest

from qlora_lab.evaluation.candidates import Base
from qlora_lab.merging.merge import Request, merge
from tests.merging.bases import request, saved_base, trained


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return saved_base(tmp_path / "base")


@pytest.fixture
def asked(base: Base, tmp_path: Path) -> Request:
    """A merge of an adapter that was just trained."""
    trained(base, tmp_path / "adapter")
    return request(base, tmp_path / "adapter", tmp_path / "out")


def merged(asked: Request) -> dict[str, Any]:
    return merge(asked, cache_dir=asked.out.parent / "cache", cache_bases=False)
