"""When to leave: calibrated scores, candidate thresholds, goals, promised risks.

Imports passes, runtime.predict, compress.evaluation and training.
A new search is a function in `thresholds.py` or `quotas.py` and a name in `goal.py`.
"""
