"""The dynamic model: stages, policies, blocks that fit the caches, streams, deadlines.

Imports passes.
A new rule for leaving is a function in `policy.py`.
"""
