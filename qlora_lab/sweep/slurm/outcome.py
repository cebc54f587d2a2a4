"""What a launch did, for programs and for people."""

from dataclasses import dataclass, field

from qlora_lab.sweep.listing import listed


@dataclass
class Outcome:
    """What a launch did.

    Attributes:
        jobs: ids that sbatch gave.
        submitted: ids of the runs in them.
        queued: runs that jobs of an earlier launch wait for or execute.
        given_up: runs whose cause has used up its attempts.
        left: runs for which the site had no room.
        excluded: nodes that the jobs stay away from.
    """

    jobs: list[str] = field(default_factory=list)
    submitted: list[str] = field(default_factory=list)
    queued: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return what to tell a person."""
        said = [f"submitted {len(self.submitted)} runs" + (f" in jobs {', '.join(self.jobs)}" if self.jobs else "")]
        if self.queued:
            said.append(f"{len(self.queued)} runs wait or run in jobs submitted before")
        if self.left:
            said.append(f"{len(self.left)} runs are above the site's limit; the same command submits them later")
        if self.given_up:
            named = ", ".join(listed(self.given_up))
            said.append(f"{len(self.given_up)} runs ended too often for the same cause ({named})")
        if self.excluded:
            said.append(f"they stay away from {', '.join(self.excluded)}, where earlier attempts ended badly")
        return said
