"""Early exits: where they go, what they answer with, reading them off a graph, cutting it into stages.

Imports every room of passes but shrink.
A new head is a module in `modules/multi_layer_heads.py` and a name in `head_choice.py`.
"""
