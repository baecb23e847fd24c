"""Latency of a model that does not exist yet, from a table of what its calls take on this device.

    predicted(model) = scale * sum over calls of table[signature of the call]

The signature of a call is its operator, or its module with all settings, and the shapes and dtypes that go in. An entry
is measured once, the median over several runs of a whole model - so that caches are as warm as they really are - and
kept in a file. `scale` makes the prediction for the full model equal to its own measured latency; it stands for what
lies between the calls.
"""

import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ...errors import DynCompressError, RequestError
from ...passes.axes.axes import Axes
from ...passes.dims.dims import Keep
from ...passes.graph.call_structure import nested_inputs
from ...passes.graph.meta import FixedInput, Input, inputs_of
from ...passes.shrink.shrink import shrink_axes
from ...runtime.predict.timing import device_of, wait_for
from ..training.batches import device_of_model, placed
from .cost_left import Ghost

_RUNS, _LEAST_RUNS, _SECONDS = 15, 3, 1.0  # for the table: so many runs of a model, fewer where they take longer
_ROUNDS = 200  # of a whole model, likewise


def default_cache() -> Path:
    """Where this machine's table is kept: under XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    machine = re.sub(r"[^A-Za-z0-9.-]+", "-", platform.node()) or "machine"
    return Path(root) / "dyncompress" / f"latency-{machine}.json"


class Table:
    """Milliseconds by signature, for one device, number of threads, batch size and version of torch.

    Raises:
        RequestError: the file is there, but is no such table.
    """

    def __init__(self, path: Path, device: torch.device, batch: int) -> None:
        self.path = path
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        self.key = f"torch {torch.__version__}, {_device_name(device)}{threads}, batch {batch}"
        self.entries: dict[str, float] = self._read().get(self.key, {})

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            tables = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RequestError(f"the latency table {self.path} cannot be read ({error}): remove it") from error
        if not _is_tables(tables):
            raise RequestError(f"{self.path} is no latency table: remove it")
        return tables

    def save(self) -> None:
        """Adds the entries to the file, which is replaced at once; what others added meanwhile stays.

        Raises:
            DynCompressError: it cannot be written.
        """
        tables = self._read()
        tables[self.key] = {**tables.get(self.key, {}), **self.entries}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                json.dump(tables, file, indent=1)
            os.replace(file.name, self.path)
        except OSError as error:
            raise DynCompressError(f"the latency table {self.path} cannot be written: {error}") from error


def _is_tables(tables: Any) -> bool:
    groups = list(tables.values()) if isinstance(tables, dict) else [None]
    return all(isinstance(g, dict) and all(isinstance(ms, float) and ms > 0 for ms in g.values()) for g in groups)


class Latency:
    """Predicts, and measures, what is left of a model's latency.

    Args:
        batch: samples per call.
        cache: the file of the table; None = `default_cache()`.
        progress: a progress bar on standard error while entries are measured.
    """

    def __init__(self, axes: Axes, batch: int = 1, cache: Path | None = None, progress: bool = False) -> None:
        if batch < 1:
            raise RequestError(f"latency is measured on batches of at least one sample; got {batch}")
        self.axes, self.gm, self.batch = axes, axes.types.gm, batch
        self.device = device_of_model(self.gm)
        if self.device.type == "meta":
            raise RequestError("latency cannot be measured on the meta device: load the weights first")
        self.table = Table(cache or default_cache(), self.device, batch)
        self.flat = [_input(given, batch, self.device) for given in inputs_of(self.gm)]
        self._ghost, self._progress = Ghost(axes), progress
        self._whole = sum(self.by_node({}).values())
        self.whole_ms = self._time({"whole": self.gm})["whole"]

    @property
    def scale(self) -> float:
        """Measured over summed milliseconds of the full model."""
        return self.whole_ms / self._whole

    def left(self, keep: Keep) -> float:
        """The predicted share of the full model's latency."""
        return sum(self.by_node(keep).values()) / self._whole

    def by_node(self, keep: Keep) -> dict[str, float]:
        """Milliseconds of each call of the shrunk model, by node name; what the table does not know is measured."""
        ghost = self._ghost.shrunk(keep)
        known = {node: signature(ghost, node) for node in ghost.graph.nodes if _is_timed(node)}
        missing = {node.name: text for node, text in known.items() if text not in self.table.entries}
        if missing:
            self._measure(shrink_axes(self.axes, keep), missing)
        return {node.name: self.table.entries[text] for node, text in known.items()}

    def measured_left(self, small: fx.GraphModule) -> float:
        """The share of the full model's latency that a shrunk one takes, the two measured side by side."""
        times = self._time({"whole": self.gm, "small": small})
        return times["small"] / times["whole"]

    def _time(self, models: Mapping[str, fx.GraphModule]) -> dict[str, float]:
        """Milliseconds of the fastest run of each; on a shared device, every slower one measures others' work too."""
        args, kwargs = nested_inputs(self.gm.graph, self.flat)
        fastest = dict.fromkeys(models, math.inf)
        with ExitStack() as stack:
            for gm in models.values():
                stack.enter_context(placed(gm, self.device))
                gm.eval()
            stack.enter_context(torch.inference_mode())
            begin, rounds = perf_counter(), 0
            while rounds < _LEAST_RUNS or (rounds < _ROUNDS and perf_counter() - begin < _SECONDS):
                for name, gm in models.items():  # in turns
                    fastest[name] = min(fastest[name], _timed(gm, args, kwargs)[1])
                rounds += 1
        return fastest

    def _measure(self, gm: fx.GraphModule, missing: Mapping[str, str]) -> None:
        with placed(gm, self.device), torch.inference_mode():
            gm.eval()
            timer = _Timer(gm, missing)
            begin = perf_counter()
            timer.run(*self.flat, enable_io_processing=False)  # warms up
            runs = _runs(perf_counter() - begin)
            timer.times.clear()
            with tqdm(total=runs, desc="measuring latency", unit="run", leave=False, disable=not self._progress) as bar:
                for _ in range(runs):
                    timer.run(*self.flat, enable_io_processing=False)
                    bar.update()
        self.table.entries |= {text: median(timer.times[text]) for text in missing.values()}
        self.table.save()


class _Timer(fx.Interpreter):
    """Runs a model call by call and notes how long some of them take, by signature."""

    def __init__(self, gm: fx.GraphModule, wanted: Mapping[str, str]) -> None:
        super().__init__(gm)
        self.wanted, self.times = wanted, dict[str, list[float]]()

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.wanted:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        function: Any = n.target if n.op == "call_function" else self.fetch_attr(str(n.target))
        result, ms = _timed(function, args, kwargs)
        self.times.setdefault(self.wanted[n.name], []).append(ms)
        return result


def _timed(function: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[Any, float]:
    """What a call returns, and the milliseconds that it takes."""
    device, clock = device_of((args, kwargs)), _clock()
    wait_for(device)
    begin = clock()
    result = function(*args, **kwargs)
    wait_for(device)
    return result, 1000 * (clock() - begin)


def _clock() -> Callable[[], float]:
    """Wall clock in seconds; with a single thread that thread's processor time: the same on an idle machine, and on a
    busy one blind to the others."""
    one_thread = torch.get_num_threads() == 1 and not torch.accelerator.is_available()
    return thread_time if one_thread else perf_counter


def signature(gm: fx.GraphModule, node: fx.Node) -> str:
    """What decides how long a call takes: the operator or module, its settings, shapes and dtypes at capture size."""
    args = [_text(arg) for arg in (*node.args, *node.kwargs.values())]
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        weights = [_shape(tensor) for tensor in module.parameters()]
        name = " ".join(f"{module!r} {weights}".split())
    else:
        name = str(node.target)
    return f"{name}({', '.join(args)})"


def _is_timed(node: fx.Node) -> bool:
    """Calls that work on tensors; reading a size costs next to nothing."""
    computes = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))
    return node.op in ("call_function", "call_module") and computes


def _text(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        val = arg.meta.get("val")
        return ", ".join(_shape(v) if isinstance(v, Tensor) else str(v) for v in pytree.tree_leaves(val))
    if isinstance(arg, list | tuple):
        return f"[{', '.join(map(_text, arg))}]"
    return repr(arg)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _input(given: Input, batch: int, device: torch.device) -> Any:
    """An input as the model was captured with, at this batch size: random floats, ones elsewhere."""
    if isinstance(given, FixedInput):
        return given.value
    shape = given.sized(batch)
    if not given.dtype.is_floating_point:
        return torch.ones(shape, dtype=given.dtype, device=device)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device, given.dtype)


def _runs(seconds: float) -> int:
    return max(_LEAST_RUNS, min(_RUNS, math.ceil(_SECONDS / max(seconds, 1e-9))))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return models[0] if models else platform.processor() or platform.machine()
