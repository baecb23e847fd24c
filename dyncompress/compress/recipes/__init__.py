"""A recipe file, read and checked, and what each of its steps does to a model.

Imports every other room of compress.
A new step is a dataclass in `options/steps.py` and a case in `take_step.py`.
"""
