"""What a launch did, for programs and for people."""

from dataclasses import dataclass, field

from qlora_lab.sweep.listing import listed
from qlora_lab.sweep.slurm.nodes import FORGIVEN_AFTER_H


@dataclass
class Outcome:
    """What a launch did.

    Attributes:
        jobs: ids that sbatch gave.
        submitted: ids of the runs in them.
        queued: runs that jobs of an earlier launch wait for or execute.
        given_up: runs that are out of tries.
        left: runs for which the site had no room.
        excluded: nodes that the jobs stay away from.
        elsewhere: plan -> runs in its jobs that are not in this one: the study has changed since.
    """

    jobs: list[str] = field(default_factory=list)
    submitted: list[str] = field(default_factory=list)
    queued: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    elsewhere: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return what to tell a person."""
        said = [f"submitted {len(self.submitted)} runs" + (f" in jobs {', '.join(self.jobs)}" if self.jobs else "")]
        if self.queued:
            said.append(f"{len(self.queued)} runs wait or run in jobs submitted before")
        if self.left:
            said.append(f"{len(self.left)} runs are above the site's limit; the same command submits them later")
        if self.given_up:
            named = ", ".join(listed(self.given_up))
            said.append(f"{len(self.given_up)} runs are out of tries ({named}); sweep.action=retry tries them again")
        if self.excluded:
            nodes, lately = ", ".join(self.excluded), f"in the last {FORGIVEN_AFTER_H} h"
            said.append(f"they stay away from {nodes}, where attempts ended badly, and none well, {lately}")
        said += [surplus(plan, runs) for plan, runs in self.elsewhere.items()]
        return said


def surplus(plan: str, runs: int) -> str:
    """Say that a study has changed while its runs are queued.

    Args:
        plan: NAME/PLAN.
        runs: that are queued and no part of the study any more.
    """
    return (
        f"the study has changed: {runs} runs in the queue are of its earlier plan {plan} alone, and go on; "
        f"python -m qlora_lab.sweep cancel {plan} ends all of that plan"
    )
