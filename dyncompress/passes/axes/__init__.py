"""The axes of a typed graph: what can shrink, what is frozen and why, which branches can go.

Imports passes.modules, graph and dims.
A new kind of axis is named in `axis_kinds.py` or by the rule that knows it.
"""
