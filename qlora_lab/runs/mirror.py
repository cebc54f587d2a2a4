"""Names under which a run is found again in its mirror."""

STEP = "trainer/global_step"  # fragments of a resumed run merge on it: offline, W&B's own step starts at 0 again
RECORDS = "run"  # of a summary: environment, status and result as the run folder has them, but for the metrics
