"""sparsify and retrain: group lasso, its strength over time, surgery, controls.

Imports passes and compress.pruning, importance and training.
A new kind of group is a function in `groups.py`.
"""
