"""prune, prune_checkpoint and compare: ranking, limits, the search for what goes, measured latency.

Imports passes, runtime, compress.importance, evaluation and training.
A new target is a measure in `cost_left.py`.
"""
