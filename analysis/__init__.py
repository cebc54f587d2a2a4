"""From run folders to an honest answer: tables, statistics, figures and reports; never imports torch.

load           runs, from wherever they are recorded -> one row a run, one row a step
frame_cache    frames in Parquet files, of which only what has changed is read again
run_folders    run folders: what their files hold
run_row        what is recorded about a run -> its row
wandb_runs     W&B's offline files -> the same, merged where a run has several
wandb_project  a W&B project -> the same
wandb_log      the records of one such file
plan           plan.json -> what a study set out to do, and which folders hold one
metrics        what each metric is called, its unit, and how held-out rows make it
arms           which runs are one arm (a configuration without its seed)
statistics     estimates over rows and seeds, and when two arms are separated
scores         the held-out rows of several runs, lined up
comparison     pairs of arms, compared on the seeds and rows that both have
data_notes     what an arm was really trained on and judged by
wording        comparisons as sentences
answer         all of the above: the table, the comparisons and the sentence that the numbers support
tables         tables as text, CSV and HTML
terminal       the answer as a block of text
figures        the answer drawn
samples        what the arms wrote for the same prompts
page           the look of a report
sections       its parts
disagreements  where two judges of answers differ, as a page; for `python -m qlora_lab.agreement --report`
memory_figure  what training takes of memory, drawn; `python -m analysis.memory_figure FILE`
report         `summarize_study`, and `python -m analysis.report FOLDER`: one self-contained HTML file
"""
