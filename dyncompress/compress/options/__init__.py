"""The one place for every option: its name, default, allowed values and help. Python, recipes and commands read it.

Imports nothing that needs torch, so that a command's help is quick.
A new option is a field of a step or of a group here; a new name is one more word in `choices.py`.
"""
