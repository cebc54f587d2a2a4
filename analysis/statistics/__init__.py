"""What numbers say, and how surely.

estimates  values with intervals over rows and seeds, and when two arms are separated
"""
