"""Accuracy, calibration error and wall clock; what reports are, and the entries of one.

Imports passes, runtime.predict and compress.training.
A new measure of models is a file here and a field in `report_entries.py`.
"""
