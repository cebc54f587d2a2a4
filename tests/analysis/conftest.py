"""Frames that these tests read are kept where nobody else finds them."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("analysis.sources.frame_cache.default_cache_dir", lambda: folder)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take seconds to make: tests that are not about them do without, as where altair is not installed."""
    for module in ("interactive", "__main__"):
        monkeypatch.setattr(f"analysis.report.{module}.missing_packages", lambda: ["altair"])
