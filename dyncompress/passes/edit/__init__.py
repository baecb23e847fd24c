"""Where a graph can be cut and what crosses there; writing into a graph and reading its outputs.

Imports passes.modules, graph, capture and dims.
What both exits and gates need to change a graph goes here.
"""
