"""One safetensors file that rebuilds a model and runs nothing; folders of shards.

Imports passes and runtime.predict.
A new module that checkpoints may hold is a line in `module_json.py`.
"""
