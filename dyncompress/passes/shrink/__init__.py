"""From kept indices to physically smaller tensors: plan, shrink, mask, exact counts, verify.

Imports passes.modules, graph, dims and axes.
A call that spells out a size is a line in `resize_ops.py`, a module that does in `resize_modules.py`.
"""
