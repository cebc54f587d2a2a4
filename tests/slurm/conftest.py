"""A cluster for the tests of this folder, which run only where QLORA_LAB_SLURM_TESTS is set: see `make test-slurm`."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, running
from tests.slurm.configuration import Size
from tests.slurm.daemons import wait_until

if not os.environ.get("QLORA_LAB_SLURM_TESTS"):
    collect_ignore_glob = ["test_*.py"]

PORT = int(os.environ.get("QLORA_LAB_SLURM_PORT", "17400"))  # and a hundred above it
PORT_WITHOUT_ACCOUNTING = PORT + 50


def _cluster(port: int, *, accounting: bool, size: Size) -> Iterator[Cluster]:
    reason = missing(accounting)
    if reason is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="qlora_lab_slurm_"))  # short: the path of a socket has 107 characters at most
    folder.chmod(0o755)  # munged refuses a socket that others cannot reach
    try:
        with running(folder, port, accounting=accounting, size=size) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def whole_session() -> Iterator[Cluster]:
    yield from _cluster(PORT, accounting=True, size=Size())


@pytest.fixture
def cluster(whole_session: Cluster) -> Iterator[Cluster]:
    """The cluster, with every daemon up and no job of an earlier test."""
    whole_session.start()
    yield whole_session
    whole_session.start_controller()
    whole_session.run("scancel", "--user=root")
    # a job that ends while a later test has no controller would be a ghost there
    wait_until(whole_session.empty, 30, required=False)


@pytest.fixture(scope="module")
def cluster_without_accounting() -> Iterator[Cluster]:
    yield from _cluster(PORT_WITHOUT_ACCOUNTING, accounting=False, size=Size(nodes=1, min_job_age_s=5))
