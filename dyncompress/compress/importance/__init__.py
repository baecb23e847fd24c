"""How much each index of an axis matters: one function per importance.

Imports passes and compress.training.
A new one is a function registered in `scores.py`.
"""
