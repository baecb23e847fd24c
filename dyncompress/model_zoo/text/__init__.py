"""Texts as data: words, sentences, corpora, questions.

Imports model_zoo.data.
A new form of text is a file here and a case in `text.py`.
"""
