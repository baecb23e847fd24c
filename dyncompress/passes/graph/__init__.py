"""What every pass works with: nodes, walks, costs, copies, calls, inputs, what a graph knows of itself, aliasing, the
form of a pass.

Imports passes.modules.
A helper belongs here once two rooms use it; the MACs of a new operator are a line in `cost.py`.
"""
