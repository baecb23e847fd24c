"""From a user's model to a graph of standard modules: record or export, then lift.

Imports passes.graph.
A layer that should come back as a module is a builder in `module_builders.py`.
"""
