"""Pipelines: graph passes one after another, as text and back. The text is the list of passes, all options filled in:

- insert-gates: {gate: pooled, branches: null}
- insert-exits: {exits: 3, head: auto}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from torch import fx

from ..errors import RequestError
from .exits.insert_exits import InsertExits
from .exits.keep_exits import KeepExits
from .field_types import checked_values, field_types
from .gates.insert_gates import InsertGates
from .gates.remove_gates import RemoveGates
from .gates.settle_gates import SettleGates
from .graph.graph_pass import GraphPass, PassResult
from .rewrites.fold_batch_norm import FoldBatchNorm
from .rewrites.low_rank import LowRank
from .rewrites.unstack_recurrent import UnstackRecurrent
from .shrink.shrink import Shrink

_EXACT = (FoldBatchNorm, UnstackRecurrent)
_SMALLER = (LowRank, Shrink)
_DYNAMIC = (InsertGates, SettleGates, RemoveGates, InsertExits, KeepExits)
PASSES: dict[str, type[GraphPass[Any]]] = {kind.name: kind for kind in (*_EXACT, *_SMALLER, *_DYNAMIC)}


@dataclass(frozen=True)
class Pipeline:
    """Passes that run in turn, each on what the one before it made.

    `str(pipeline)` is text that `Pipeline.parse` reads back. Passes of a user's own run and print as well; text names
    those of this package only.
    """

    passes: Sequence[GraphPass[Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))

    def __call__(self, gm: fx.GraphModule) -> PassResult[tuple[object, ...]]:
        """Runs all passes; the report has what each says about its work, in their order.

        Raises:
            RequestError: a pass cannot do its work on what it is given; the message begins with its place and name.
        """
        modified, reports = False, []
        for number, step in enumerate(self.passes, start=1):
            try:
                result = step(gm)
            except RequestError as error:
                raise RequestError(f"pass {number}, {step.name}: {error}") from error
            except Exception as error:
                error.add_note(f"in pass {number} of the pipeline: {step}")
                raise
            gm, modified = result.gm, modified or result.modified
            reports.append(result.report)
        return PassResult(gm, modified, tuple(reports))

    def __str__(self) -> str:
        return "".join(f"- {step}\n" for step in self.passes) or "[]\n"

    @classmethod
    def parse(cls, text: str) -> "Pipeline":
        """The pipeline that a text such as `str(pipeline)` describes; options that it leaves out have their defaults.

        Raises:
            RequestError: no YAML list of passes, an unknown pass or option, a value of another type or out of range.
        """
        if not isinstance(text, str):
            raise RequestError(f"expected the text of a pipeline, got {text!r}")
        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RequestError(f"the pipeline is not YAML: {getattr(error, 'problem', error)}") from error
        if not isinstance(tree, list):
            raise RequestError("a pipeline is a list of passes, such as '- insert-exits: {exits: 3}'")
        return cls(tuple(_parsed(entry, f"pass {number}") for number, entry in enumerate(tree, start=1)))


def _parsed(entry: Any, where: str) -> GraphPass[Any]:
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise RequestError(f"{where}: expected one pass, such as 'insert-exits: {{exits: 3}}', got {entry!r}")
    ((name, options),) = entry.items()
    if name not in PASSES:
        raise RequestError(f"{where}: there is no pass {name!r}: use one of {', '.join(PASSES)}")
    if not isinstance(options, dict | None):
        raise RequestError(f"{where}, {name}: expected options such as {{key: value}}, got {options!r}")
    return PASSES[name](**checked_values(field_types(PASSES[name]), options or {}, f"{where}, {name}"))
