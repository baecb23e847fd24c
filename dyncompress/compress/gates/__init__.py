"""gate: how skip gates learn, are held to a budget, and are reported on.

Imports passes, runtime.predict, compress.exits, evaluation and training.
A new kind of training is a phase in `gate_training.py`.
"""
