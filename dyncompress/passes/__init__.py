"""Graph in, graph out: no training, no data, no files.

Imports torch and its own rooms only; rooms import those named before them: modules, graph, capture, dims, axes,
edit, rewrites, gates, exits, shrink.
A new rewriting of graphs is a `GraphPass` in the room of what it changes, or a room of its own, and a name in
`pipeline.py`.
"""
