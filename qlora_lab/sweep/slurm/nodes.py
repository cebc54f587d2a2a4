"""Nodes to stay away from, from what became of earlier attempts."""

from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from qlora_lab.runs.causes import CODE, GPU_MEMORY, INFRASTRUCTURE, NAN, NODE, STORE
from qlora_lab.runs.folder import FINISHED

FORGIVEN_AFTER_H = 24  # somebody may have mended the node since
SUSPICIOUS = 3  # attempts that ended badly on a node where none ended well
NODES_OWN = (NODE, INFRASTRUCTURE, STORE)  # which other nodes need not disprove
PERHAPS = (CODE, NAN, GPU_MEMORY)  # the node's fault only where others finish


def bad_nodes(statuses: Iterable[dict[str, Any] | None], now: datetime) -> list[str]:
    """Return the nodes on which several attempts ended badly of late and none well, while other nodes do better."""
    finished: Counter[str] = Counter()
    own: Counter[str] = Counter()
    perhaps: Counter[str] = Counter()
    since = now - timedelta(hours=FORGIVEN_AFTER_H)
    for status in statuses:
        for attempt in [*(status or {}).get("history", []), status or {}]:
            node, at = attempt.get("node"), attempt.get("ended_at") or attempt.get("started_at")
            if node is None or at is None or datetime.fromisoformat(at) < since:
                continue
            if attempt["state"] == FINISHED:
                finished[node] += 1
            elif attempt.get("cause") in NODES_OWN:
                own[node] += 1
            elif attempt.get("cause") in PERHAPS:
                perhaps[node] += 1
    bad = {node for node, count in own.items() if count >= SUSPICIOUS and not finished[node]}
    if finished:
        bad |= {node for node, count in perhaps.items() if count >= SUSPICIOUS and not finished[node]}
    everywhere = {*finished, *own, *perhaps} == bad  # then it is not the nodes
    return [] if everywhere else sorted(bad)
