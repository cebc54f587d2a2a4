"""Where runs are recorded, and how their rows are read.

run_folders    run folders: what their files hold
run_row        what is recorded about a run -> its row
wandb_runs     W&B's offline files -> the same, merged where a run has several
wandb_log      the records of one such file
wandb_project  a W&B project -> the same
frame_cache    frames in Parquet files, of which only what has changed is read again
"""
