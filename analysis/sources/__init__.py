"""Where runs are recorded, and how their rows are read.

run_folders    run folders: what their files hold
run_row        what is recorded about a run -> its row
wandb_runs     W&B's offline files -> the same, merged where a run has several
wandb_log      the records of one such file
wandb_project  a W&B project -> the same
parallel       many runs, read by several processes
row_table      rows of many runs as one Arrow table, of which any part gives its own frame
frame_cache    such tables in Parquet files, of which only what has changed is read again
"""
