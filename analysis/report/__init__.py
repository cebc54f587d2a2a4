"""An answer made visible.

study_report        `summarize_study`: table.csv, report.html and the block of text of one study
page                the look of a page
sections            the parts of a report
settings_sections   the parts about what was varied: by setting, what matters, costs, training
figures             every figure, a family a module
overview            what figures and charts draw: settings, metric, costs and curves of the counted runs
interactive         figures that a reader can ask, and the scripts of a page
wandb_report        a study as a W&B report
samples             what the arms wrote for the same prompts
tables              tables as text, CSV and HTML
terminal            the answer as a block of text
disagreements       where two judges of answers differ, as a page; for `python -m qlora_lab.agreement --report`
"""
