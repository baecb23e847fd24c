"""The one training loop, its data, losses, saved state, and surgery in the middle of it.

Imports passes.
What a method does between steps or epochs is a hook (`hooks.py`); what outlives an interruption is kept in a `Store`.
"""
