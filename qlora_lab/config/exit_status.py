"""Exit statuses of command lines and jobs: bad input, failed runs, Ctrl-C, SIGTERM; the last two as shells say them."""

REFUSED, FAILED, STOPPED, TERMINATED = 2, 1, 130, 143
