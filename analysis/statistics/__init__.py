"""What numbers say, and how surely. Every function takes arrays or frames, none reads a file.

seeds        a metric over seeds, and their spread pooled over arms
rows         a metric as held-out rows make it, and a bootstrap over them
estimates    values and differences with intervals over rows and seeds
blocks       values of one axis at equal other settings, and their differences
verdicts     when two arms are separated, and how often that is said wrongly
holm         several comparisons at once
effects      the size of a difference beside its noise, and the seeds that would tell it
iqm          one number over several tasks: the interquartile mean
correlation  whether two metrics put the arms in the same order
variance     how much of the variance goes with each axis and with the seed
"""
