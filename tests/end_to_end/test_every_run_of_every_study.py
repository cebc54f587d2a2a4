"""Every run of every shipped study is planned, and those that Table 9 of the paper describes have its settings."""

from collections.abc import Iterator

import pytest

from tests.helpers import hydra_on_conf
from tests.sweep.planned_studies import ONE_SCALE, SCALES, UNFETCHED, check_settings, planned

OF_TABLE_9 = (("dataset_quality", "paper"), ("data_types", "paper_fine_tuned"), ("guanaco", "paper"))


@pytest.fixture(scope="module")
def conf() -> Iterator[None]:
    with hydra_on_conf():
        yield


@pytest.mark.parametrize(("study", "scale"), [*SCALES, *ONE_SCALE])
def test_every_run_is_planned(conf: None, study: str, scale: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stand_in in UNFETCHED.items():
        monkeypatch.setattr(name, stand_in)
    plan = planned(study, scale, every_choice=True)
    assert not plan.refused and all(run.need is not None for run in plan.runs)
    if (study, scale) in OF_TABLE_9:
        for run in plan.runs:
            check_settings(run.config)
