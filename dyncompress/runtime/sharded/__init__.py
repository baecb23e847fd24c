"""Shrinking a checkpoint that is larger than memory, piece by piece, so that a killed run goes on.

Imports passes and runtime.files.
A step that touches all shards goes through `journal.py`.
"""
