"""Figures, each made of a data frame and returned as a matplotlib Figure; `to_svg` and `save` write them.

style     what all figures share: colours, dashes, markers; inline SVG, and files for papers
answers   an answer's arms, and their differences row by row
curves    a metric over the steps: one line a group, with a band over its seeds
axes      values of an axis: each minus the best, block by block
settings  a metric by what was varied: dots and intervals, heat map, parallel coordinates, quality against cost
scaling   a metric against the number of parameters
ratings   Bradley-Terry and Elo ratings with their intervals, of `python -m qlora_lab.tournament --json`
"""
