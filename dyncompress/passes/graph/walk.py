"""Walks over a graph: what nodes are computed from, what is computed from them, what serves nothing else."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from torch import fx


def upstream(ends: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Everything that `ends` are computed from, and they themselves; not what lies at or behind `stop`."""
    found = set(ends)
    queue = list(found)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in found and node not in stop:
                found.add(node)
                queue.append(node)
    return found


def downstream(graph: fx.Graph, starts: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that is computed from `starts`, by value or by size, and they themselves."""
    found = set(starts)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def unread(graph: fx.Graph) -> list[fx.Node]:
    """What the output is not computed from, in graph order: calls that write to what they are given, if anything."""
    read = upstream([graph.output_node()])
    return [node for node in graph.nodes if node not in read]


def uses(node: fx.Node, follow: Callable[[fx.Node], bool] = lambda user: True) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Every use of `node`, and of what is computed from it by calls to `follow`, as (user, what it uses)."""
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        for user in current.users:
            yield user, current
            if user not in seen and follow(user):
                seen.add(user)
                queue.append(user)


def serving(
    end: fx.Node,
    readers: Collection[fx.Node],
    aside: Collection[fx.Node],
    order: Mapping[fx.Node, int],
    stop: Callable[[fx.Node], bool] = lambda node: False,
) -> list[fx.Node]:
    """`end` and whatever serves nothing but `end` and, through it, `readers`, in graph order; inputs stay out.

    Args:
        aside: calls that nobody reads, in graph order; those that write to what was found belong to it.
        order: the place of every node in the graph.
        stop: what stays out with all that it is computed from.
    """
    inside, found, queue = {*readers, *aside}, set[fx.Node](), {end}
    while queue:
        node = max(queue, key=order.__getitem__)
        queue.remove(node)
        if node.op != "placeholder" and not stop(node) and inside.issuperset(node.users):
            inside.add(node)
            found.add(node)
            queue.update(n for n in node.all_input_nodes if n not in found)
    for node in aside:
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return sorted(found, key=order.__getitem__)
