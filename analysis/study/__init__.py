"""From the runs of a study to its answer.

plan         plan.json -> what a study set out to do, and which folders hold one
metrics      what each metric is called, its unit, and how held-out rows make it
arms         which runs are one arm (a configuration without its seed)
row_ratios   what each held-out row of a run adds to a metric
scores       the held-out rows of several runs, lined up
comparison   pairs of arms, compared on the seeds and rows that both have
axes         each axis, its values compared at equal other settings
pair_notes   what pairs of arms share and what they lack
data_notes   what an arm was really trained on and judged by
wording      comparisons as sentences
audit        what is odd about the runs, and by which rule it is treated
tasks        several benchmarks: all together, and whether they agree
findings     sizes, seeds, axes and benchmarks as sentences
systems      a study's benchmarks beside the ratings of its systems
published    what the original study printed, beside our arms
answer       all of the above: the table, the comparisons and the sentence that the numbers support
"""
