"""The text of a SOURCE: its forms, and the options at its end, `DIR?size=64` or `NAME?config=plain&size=32`."""

from pathlib import Path

from ...errors import RequestError

SOURCES = "digits, npz:FILE, imagefolder:DIR, text:DIR, cifar10:DIR, hf:NAME_OR_DIR or package.module:factory"


def split_options(text: str, allowed: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """(the text before '?', options by name); a path that exists is never cut.

    Raises RequestError for an option that is not allowed or has no value.
    """
    head, mark, tail = text.rpartition("?")
    if not mark or Path(text).exists():
        return text, {}
    options: dict[str, str] = {}
    for item in tail.split("&"):
        key, _, value = item.partition("=")
        if key not in allowed or not value:
            raise RequestError(f"{text}: {item!r} is no option here: use {' or '.join(f'?{k}=...' for k in allowed)}")
        options[key] = value
    return head, options


def parse_size(options: dict[str, str], where: str) -> tuple[int, int] | None:
    """The (height, width) in pixels asked for by size=S or size=HxW; None when size is not given.

    Raises RequestError for anything else than one or two positive numbers.
    """
    if "size" not in options:
        return None
    sides = options["size"].split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise RequestError(f"{where}: size={options['size']} is no image size: write size=64 or size=48x64")
    return int(sides[0]), int(sides[-1])
