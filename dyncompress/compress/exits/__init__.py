"""convert: training recipes of early exits, their losses, and which exits pay.

Imports passes, runtime.predict, compress.thresholds, synthesis, evaluation and training.
A new training recipe is a line in `recipes.py`.
"""
