"""A disk that is full: the run is recorded as failed for it, and goes on when there is space."""

from pathlib import Path

from qlora_lab.runs.causes import DISK
from qlora_lab.runs.folder import FAILED, FINISHED, NEW
from tests.slurm.cluster import Cluster
from tests.slurm.study import FakeStudy
from tests.small_disk import fill, small_disk

SIZE_KIB = 4096


def test_a_full_disk_while_writing_results(cluster: Cluster, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", SIZE_KIB) as disk:
        study = FakeStudy(cluster, disk, 3)
        study.tell(steps=15, step_s=0.2)
        study.launch()
        study.wait_until_begun()
        ballast = fill(disk)  # its lines of metrics have space yet, in the block that they began
        study.wait_until_quiet()
        status = study.runs[0].status() or {}
        assert study.states() == [FAILED, NEW, NEW] and (status["cause"], status["step"]) == (DISK, 15)
        fill(disk)  # what was kept for the record
        again = study.start(retry_failed=True)
        _, err = again.communicate(timeout=60)
        assert again.returncode != 0 and "No space left on device" in err.splitlines()[-1]
        ballast.unlink()
        assert len(study.launch(retry_failed=True)["submitted"]) == 3
        study.wait_until_finished()
        study.check_each_was_done_once()
        assert study.causes() == [DISK] and study.states() == [FINISHED] * 3
