"""A model's modes and attributes, changed for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

State = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def untouched(model: nn.Module) -> Iterator[list[State]]:
    """Whatever happens inside to attributes of the modules, and to lists, dicts and sets among them, is undone.

    Models that cache tensors between calls would otherwise keep those of a traced call. Yields, for each module, its
    attributes, what they were, and what was in the lists, dicts and sets.
    """
    before = [
        (vars(m), dict(vars(m)), {k: v.copy() for k, v in vars(m).items() if type(v) in (dict, list, set)})
        for m in model.modules()
    ]
    try:
        yield before
    finally:
        for now, attributes, contents in before:
            now.clear()
            now.update(attributes)
            for name, content in contents.items():
                container = now[name]
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
