"""Accuracy, calibration error and wall clock; the entries of a report.

Imports passes, runtime.predict and compress.training.
A new measure of models is a file here and a key in `report_entries.py`.
"""
