"""Which values share memory, and which calls write there: in-place operators and views, read off their schemas."""

import operator

from torch import fx


def storage(node: fx.Node) -> fx.Node:
    """The node whose memory `node` returns: itself, or what it is a view or an in-place result of."""
    while True:
        if node.op != "call_function":
            return node
        sources = [node.args[0]] if node.target is operator.getitem else [arg for arg, _ in aliases(node)]
        source = next(iter(sources), None)
        if not isinstance(source, fx.Node):
            return node
        node = source


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory a call writes to."""
    return [storage(arg) for arg, writes in aliases(node) if writes]


def aliases(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """Arguments that the call returns a view of or writes to, and whether it writes."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    pairs = zip(schema.arguments, node.args, strict=False)
    known = [(arg, a.alias_info) for a, arg in pairs if a.alias_info is not None and isinstance(arg, fx.Node)]
    return [(arg, info.is_write) for arg, info in known]


def overwritten(node: fx.Node) -> bool:
    """Whether an in-place operator writes to `node`, directly or through a view of it."""
    calls = [(user, writes) for user in node.users for arg, writes in aliases(user) if arg is node]
    return any(writes or overwritten(user) for user, writes in calls)
