"""One typing rule per operator family; importing this package registers them all.

A rule gives the outputs of the operators that its decorator names their dims: it unifies what must agree with the
inputs and the weights, and freezes what must keep its size.
"""

from . import (  # noqa: F401 - registers the rules
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
