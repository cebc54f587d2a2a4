#!/usr/bin/env bash
# Install what tests/slurm needs.
exec "$(dirname "$0")/../install_packages.sh" munge slurmctld slurmd slurm-client slurmdbd mariadb-server
