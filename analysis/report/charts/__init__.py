"""Figures that a reader can ask: Vega-Lite charts made with altair, which only the extra `report` brings.

chart      what all charts share: their look, and how their data is written
explore    every run against its cost, above parallel coordinates of what was varied
training   the training curve of each arm
"""
