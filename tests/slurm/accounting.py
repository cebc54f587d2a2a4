"""SLURM's accounting: slurmdbd, on a MariaDB of its own."""

import subprocess

from tests.slurm.daemons import Daemons, wait_until

SUBMIT_LIMIT, RUN_LIMIT = 100, 8  # of the QOS `capped`


def start_accounting(daemons: Daemons, port: int) -> None:
    """Start what does not run, MariaDB on `port`, with an account, and a QOS that takes few jobs."""
    _start_mariadb(daemons, port)
    _start_slurmdbd(daemons)


def _start_mariadb(daemons: Daemons, port: int) -> None:
    data, run = daemons.folder / "mysql", daemons.folder / "run"
    options = ["--no-defaults", "--user=root", f"--datadir={data}"]
    if not daemons.alive("mariadb"):
        (run / "mariadb.pid").unlink(missing_ok=True)
        if not (data / "mysql").is_dir():
            data.mkdir(exist_ok=True)
            of_root = ["--skip-test-db", "--auth-root-authentication-method=normal"]
            daemons.output("mariadb-install-db", *options, *of_root)
        with (daemons.folder / "log" / "mariadb.log").open("w") as log:
            subprocess.Popen(
                [
                    "mariadbd",
                    *options,
                    f"--socket={run}/mysql.sock",
                    "--bind-address=127.0.0.1",
                    f"--port={port}",
                    f"--pid-file={run}/mariadb.pid",
                    "--innodb-buffer-pool-size=64M",
                    "--innodb-lock-wait-timeout=900",
                    "--innodb-flush-log-at-trx-commit=0",
                    "--performance-schema=OFF",
                    "--skip-log-bin",
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
    wait_until(lambda: _sql(daemons, "select 1").returncode == 0, 60)
    for statement in (
        "create database if not exists slurm_acct",
        "create user if not exists 'slurm'@'127.0.0.1' identified by 'slurm'",
        "create user if not exists 'slurm'@'localhost' identified by 'slurm'",
        "grant all on slurm_acct.* to 'slurm'@'127.0.0.1'",
        "grant all on slurm_acct.* to 'slurm'@'localhost'",
    ):
        done = _sql(daemons, statement)
        assert done.returncode == 0, done.stderr


def _sql(daemons: Daemons, statement: str) -> subprocess.CompletedProcess[str]:
    return daemons.run(
        "mariadb", "--no-defaults", "-S", f"{daemons.folder}/run/mysql.sock", "-u", "root", "-e", statement
    )


def _start_slurmdbd(daemons: Daemons) -> None:
    if not daemons.alive("slurmdbd"):
        daemons.pid_file("slurmdbd").unlink(missing_ok=True)
        daemons.start("slurmdbd")
    wait_until(lambda: daemons.run("sacctmgr", "-n", "show", "cluster").returncode == 0, 60)
    if "capped" in daemons.output("sacctmgr", "-n", "-P", "show", "qos", "format=name").split():
        return
    for words in (
        "add cluster tests",
        "add account tests Cluster=tests Description=tests Organization=tests",
        "add user root Cluster=tests Account=tests DefaultAccount=tests",
        f"add qos capped MaxSubmitJobsPerUser={SUBMIT_LIMIT} MaxJobsPerUser={RUN_LIMIT}",
        "modify user root where Cluster=tests set QOS=normal,capped DefaultQOS=normal",
    ):
        daemons.run("sacctmgr", "-i", *words.split())
