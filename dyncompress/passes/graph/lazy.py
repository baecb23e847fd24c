"""The module of a graph, whose Python code is written and compiled when it is first called or printed."""

from threading import RLock
from typing import ClassVar

from torch.fx._lazy_graph_module import _LazyGraphModule


class LazyGraphModule(_LazyGraphModule):
    """Torch's own, for threads that share a model: writing marks the graph's nodes, so only one may write at a time."""

    _writing: ClassVar = RLock()

    def real_recompile(self) -> None:
        with self._writing:
            super().real_recompile()
