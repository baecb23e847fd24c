"""Reference networks, plain `nn.Module`s.

Imports torch only.
A new one is a file here and a line in `zoo.py`.
"""
