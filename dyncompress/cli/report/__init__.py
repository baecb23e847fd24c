"""Tables and plots of results.

Imports compress, runtime and passes.
A new picture is a file here that takes a report.
"""
