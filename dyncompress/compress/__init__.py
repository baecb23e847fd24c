"""How a graph is trained and decided on; each verb lives in its feature's folder.

Imports passes and runtime; never cli or model_zoo.
A new verb is a folder with a file of its name.
"""
