"""Options of verbs by flat name, as tests like to collect them in dicts."""

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import dyncompress as dc

R = TypeVar("R")
GROUPS = {
    "training": dc.Training(),
    "run": dc.Run(),
    "limits": dc.Limits(),
    "cuts": dc.Cuts(),
    "lasso": dc.Lasso(),
    "leaving": dc.Leaving(),
    "samples": dc.Samples(),
}


def flat(verb: Callable[..., R]) -> Callable[..., R]:
    """The verb, to be called with every option as a keyword of its own, whatever group it belongs to."""
    taken = inspect.signature(verb).parameters

    def call(*args: Any, **options: Any) -> R:
        for group, empty in GROUPS.items():
            own = {f.name for f in fields(empty)} - set(taken) if group in taken else set()
            given = {name: options.pop(name) for name in own & set(options)}
            if given:
                options[group] = replace(options.get(group, empty), **given)
        return verb(*args, **options)

    return call
