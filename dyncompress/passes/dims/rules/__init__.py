"""One typing rule per operator family; importing this package registers them all."""

from . import (
    attention,
    conv,
    elementwise,
    factory,
    heads,
    indexing,
    joins,
    linear,
    norm,
    recurrent,
    reduce,
    spatial,
    views,
)

__all__ = [
    "attention", "conv", "elementwise", "factory", "heads", "indexing", "joins",
    "linear", "norm", "recurrent", "reduce", "spatial", "views",
]  # fmt: skip
