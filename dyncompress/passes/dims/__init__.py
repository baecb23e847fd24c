"""Dimension types: what they are, how they unify, and the walk that types a graph.

Imports passes.modules and passes.graph; `rules` holds one typing rule per family of operators.
A new operator's rule goes into `rules`, not here.
"""
