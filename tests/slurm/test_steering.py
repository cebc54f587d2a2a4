"""What is seen and done about a study from the command line, each command as it is typed, on a real SLURM."""

import json
from pathlib import Path
from typing import Any

from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, NEW, RUNNING
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until
from tests.slurm.study import CommandStudy, said


class Steered(CommandStudy):
    def told(self, action: str, *words: str) -> dict[str, Any]:
        """Return what a command tells programs."""
        process = self.steer(action, *words, "--json")
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        return json.loads(out)

    def held(self) -> set[str]:
        """Return the jobs that may not start: SLURM says first what else keeps them from it, such as a canary."""
        lines = self.cluster.output("squeue", "-h", "-r", "-t", "PD", "-o", "%i %Q").splitlines()
        return {job for job, priority in map(str.split, lines) if priority == "0"}


def test_a_study_is_steered_by_commands(cluster: Cluster, tmp_path: Path) -> None:
    study = Steered(cluster, tmp_path / "runs", 4)
    study.tell(0, steps=300, step_s=0.2)
    study.tell(1, 2, steps=2)
    study.tell(3, steps=2, fail="bad luck")
    assert "submitted 4 runs in jobs" in said(study.first())

    study.wait_until_begun()  # the canary, for which the others wait
    status = study.told("status")
    assert status["states"] == {RUNNING: 1, NEW: 3} and status["jobs"] == {"running": 1, "pending": 3}
    assert "4 wait or run in jobs submitted before" in said(study.first("sweep.action=plan"))
    (held,) = study.told("hold", "seed=2")["held_back"]
    wait_until(lambda: study.held() == {held}, 30)
    assert study.told("release", "seed=2")["released"] == [held]
    wait_until(lambda: not study.held(), 30)
    assert "running; " in said(study.steer("logs", "--run", study.runs[0].run_id))

    assert len(study.told("cancel", "seed=1,2,3")["cancelled"]) == 3
    wait_until(lambda: study.told("status")["jobs"] == {"running": 1}, 30)
    assert len(study.told("cancel")["cancelled"]) == 1
    study.wait_until_quiet()
    assert study.states() == [INTERRUPTED, NEW, NEW, NEW]
    assert (study.runs[0].status() or {})["cause"] == "stopped"

    study.tell(0, steps=2)
    assert len(study.told("resume")["runs"]) == 4
    study.wait_until_quiet()
    assert study.states() == [FINISHED, FINISHED, FINISHED, FAILED]
    status = study.told("status")
    assert [(each["cause"], each["message"]) for each in status["failures"]] == [("code", "bad luck")]
    assert status["out_of_tries"] == {"code": 1}
    assert "bad luck" in said(study.steer("logs"))
    again = said(study.first(), status=1)  # it answers, since nothing is left to it
    assert "1 failed run is out of tries (1 code)" in again and "1 of 4 runs did not finish" in again
    assert study.runs[3].attempts() == 1

    study.tell(3, steps=3)
    assert study.told("retry", "--cause", "code")["runs"] == [study.runs[3].run_id]
    study.wait_until_finished()
    study.check_each_was_done_once()
    assert study.runs[3].attempts() == 2 and study.causes(3) == ["code"]

    (study.runs[1].checkpoints / "step_1").mkdir(parents=True)
    (study.runs[1].checkpoints / "step_1" / "weights").write_bytes(b"0" * 5000)
    assert study.told("clean") == {"runs": 1, "freed_bytes": 5000}
    assert said(study.steer("watch")).count("4 finished") == 1
