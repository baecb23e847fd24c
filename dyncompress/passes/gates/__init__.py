"""Skip gates: put into a graph, read off it, settled, removed, and as they run.

Imports every room of passes but exits and shrink.
A new kind of gate is a module in `modules/gate_modules.py` and a name in `insert_gates.py`.
"""
