"""Training without data, or with little: inputs synthesised out of a model, few samples a class.

Imports passes, runtime.predict and compress.training.
A new way to make inputs is a file beside `impressions.py`.
"""
