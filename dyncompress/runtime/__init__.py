"""What runs in production: predictions, files, ONNX, checkpoints larger than memory.

Imports passes.
Nothing here trains or needs data.
"""
