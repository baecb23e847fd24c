"""Small reference architectures with trained checkpoints, and the data sources every command reads."""

from .load_data import Splits, load_data
from .zoo import ZOO, build, example_input, load

__all__ = ["ZOO", "Splits", "build", "example_input", "load", "load_data"]
