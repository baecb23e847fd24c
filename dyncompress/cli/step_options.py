"""The options of a step as the parser of the command line reads them: one flat class, help in panels by group."""

from collections.abc import Callable
from dataclasses import field, make_dataclass
from inspect import Signature, signature
from typing import Annotated, Any

from cyclopts import Group, Parameter

from ..compress.options.flat import Option, build, options_of
from ..compress.options.steps import Options
from .app import app

_EVERYDAY = Group("Everyday options", sort_key=0)


def command(kind: type[Options], example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as the command of a kind of step; it gets the step that the options make as `step`.

    The function stays what it was, so that it can be the command of several kinds.
    """
    flat = make_dataclass(
        kind.__name__, [_field(option) for option in options_of(kind).values()],
        frozen=True, kw_only=True, namespace={"__module__": __name__},
    )  # fmt: skip

    parsed: Any = Annotated[flat, Parameter(name="*")]

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def called(*args: object, step: object = flat(), **others: object) -> None:
            function(*args, step=build(kind, vars(step)), **others)

        parameters = dict(signature(function).parameters)
        parameters["step"] = parameters["step"].replace(annotation=parsed, default=flat())
        vars(called)["__signature__"] = Signature([*parameters.values()])
        called.__annotations__ = {**function.__annotations__, "step": parsed}
        epilogue = f"Example: dyncompress {kind.name} {example}"
        app.command(called, name=kind.name, help=kind.__doc__, help_epilogue=epilogue)
        return function

    return register


def _field(option: Option) -> tuple[str, object, object]:
    panel = _EVERYDAY if option.group is None else Group(option.group[1].__name__, sort_key=2)
    several = option.hint == tuple[float, ...]  # --shares 0.5 0.25
    parameter = Parameter(help=option.help, group=panel, consume_multiple=several)
    return option.name, Annotated[option.hint, parameter], field(default=option.default)
