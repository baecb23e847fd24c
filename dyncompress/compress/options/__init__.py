"""The one place for every option: its name, default, allowed values and help.

Imports the registries whose names are values.
A new option is a field here; Python, recipes and the command line follow.
"""
