"""From what a user names, a file or `zoo:NAME`, to a model that fits its data.

Imports compress.recipes, runtime and model_zoo.
A new kind of model file is a reader in `model_files.py`; a new framework a function in `frameworks.py`.
"""
