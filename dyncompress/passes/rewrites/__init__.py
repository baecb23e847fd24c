"""Passes that keep what a model computes, or nearly: folded norms, low rank, unstacked recurrent layers.

Imports passes.graph.
A new one is a file with a `GraphPass`.
"""
