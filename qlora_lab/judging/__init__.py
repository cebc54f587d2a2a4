"""Judges of pairs of answers: models behind an endpoint or on this machine, and published ratings. Never torch.

What a judge writes is kept in a cache by the content of the request, from which a file of ratings can be written again
at any time; asking is the only thing that costs, and nothing is asked twice.
"""
