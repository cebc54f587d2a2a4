"""An answer made visible.

study_report        `summarize_study`: table.csv, report.html and the block of text of one study
page                the look of a page
contents            lines and tables that the page and the W&B report share
sections            the parts of a report
axis_sections       the part about the values of each axis, at equal other settings
settings_sections   the parts about what was varied: by setting, what matters, costs, training
ratings_section     the part about ratings, where a study has a tournament
figures             every figure, a family a module
overview            what figures and charts draw: settings, metric, costs and curves of the counted runs
charts              figures that a reader can ask
interactive         the scripts of a page
wandb_report        a study as a W&B report
samples             what the arms wrote for the same prompts
tables              tables as text, CSV and HTML
terminal            the answer as a block of text
disagreements       where two judges of answers differ, as a page; for `python -m qlora_lab.agreement --report`
"""
