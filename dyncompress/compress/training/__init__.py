"""The one training loop, its data, losses, saved state, and surgery in the middle of it.

Imports passes.
What runs between steps or epochs is a hook of `trainer.py`.
"""
