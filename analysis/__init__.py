"""From run folders to an honest answer: tables, statistics, figures and reports; never imports torch.

load         run folders -> one row a run
metrics      what each metric is called, its unit, and how held-out rows make it
arms         which runs are one arm (a configuration without its seed)
statistics   spread over seeds, arms compared row by row
answer       the table, the comparisons and the sentence that the numbers support
report       one self-contained HTML file; `python -m analysis.report FOLDER` writes it again
study        `summarize_study`: all of the above for a planned study
"""
