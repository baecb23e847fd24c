"""What the indices of an axis are, in the field's words. Rules say it where they know; the first kind in KINDS wins.

Heads and head dims are what attention broadcasts over and contracts; the residual width is what residual sums carry.
"""

from collections.abc import Iterable

from .branches import Branch
from .dims import Atom, leaves
from .typing import Typing

BRANCH = "branch"
KINDS = (
    "hidden states", "experts", "queries per key", "heads", "head dims", "channel groups", "residual width", "channels",
    "embedding columns", "neurons",
)  # fmt: skip


def kind_of(types: Typing, branches: Iterable[Branch]) -> dict[Atom, str]:
    """The kind of every atom that some rule knows."""
    said = [(dim, kind) for dim, kind in types.kinds]
    for branch in branches:
        width = types.feature_dim(branch.total)
        if width is not None:
            said.append((types.of(branch.total)[width], "residual width"))
    found: dict[Atom, str] = {}
    for dim, kind in sorted(said, key=lambda pair: KINDS.index(pair[1])):
        for atom in leaves(dim):
            found.setdefault(atom, kind)
    return found
