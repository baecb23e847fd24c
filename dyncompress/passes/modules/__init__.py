"""Layers that passes put into graphs: exit heads, gates, counted norms, ragged recurrent layers.

Imports torch only.
A new layer is a plain `nn.Module` in a file of its kind; `runtime/files/module_json.py` says how it is saved.
"""
