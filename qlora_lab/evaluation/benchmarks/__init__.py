"""Benchmarks: what they ask, how answers are scored, and their metrics. `run_benchmarks` is in `run.py` beside this."""
