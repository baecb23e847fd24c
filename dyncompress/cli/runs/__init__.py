"""What the commands do: options, the folder of a run, its steps, and the results it leaves.

Imports loading, report, compress, runtime and passes.
A new command that is no step of a recipe is a file here, and a function in `commands.py`.
"""
