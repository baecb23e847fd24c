"""Labelled data: embedded digits, arrays, image folders, hubs, factories; splits and augmentation.

Imports torch and numpy.
A new source is a file here and a line in `load_data.py`.
"""
