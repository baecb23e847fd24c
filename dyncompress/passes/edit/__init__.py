"""What is known about a graph (`analysis.py`), where it can be cut; writing into it and reading its outputs.

Imports passes.modules, graph, capture, dims and axes.
What both exits and gates need to change a graph goes here.
"""
