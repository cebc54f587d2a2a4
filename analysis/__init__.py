"""From run folders to an honest answer: tables, statistics, figures and reports; never imports torch.

load           runs, from wherever they are recorded -> one row a run, one row a step
sources        the places: run folders, W&B's offline files, W&B projects, and what is kept of them
study          plan, arms, metrics -> comparisons, and the sentence that the numbers support
statistics     estimates over rows and seeds, and when two arms are separated
report         the answer as HTML, as text and as tables; `python -m analysis.report FOLDER`
opened         a study opened for a notebook; notebooks/ has one for each of the original study's questions
memory_figure  what training takes of memory, drawn; `python -m analysis.memory_figure FILE`
"""
