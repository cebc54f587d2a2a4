"""Frames that these tests read are kept where nobody else finds them."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("analysis.sources.frame_cache.default_cache_dir", lambda: folder)


@pytest.fixture(autouse=True)
def no_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vega as one script takes seconds to make: tests that do not run it do without."""
    monkeypatch.setattr("analysis.report.interactive.javascript", lambda: "// Vega")
