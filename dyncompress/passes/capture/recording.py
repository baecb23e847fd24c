"""A recording: one call of a model on tensors that have a shape but no values, operator by operator.

Operators are seen before autograd decomposes them, as torch.export sees them, but sizes are plain numbers: no symbolic
arithmetic, which is most of what an export costs. `varying` finds out, from a second recording at another batch, which
of the numbers follow the batch. What a recording cannot vouch for raises `Unrecorded`, and export takes the model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import _set_mode_pre_dispatch, unset_mode_pre_dispatch
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph.restoring import State, untouched
from .output_shapes import OUTPUT_SHAPES


class Unrecorded(Exception):
    """Why a model cannot be recorded."""


@dataclass(slots=True)
class Source:
    """Where an argument comes from: tensor number `output` of call number `call`, or an input or tensor by name."""

    call: int
    output: int = 0
    name: str = ""


@dataclass(slots=True)
class Call:
    """One operator: its arguments with a `Source` for each tensor, its outputs, the module that made it."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any
    path: str


@dataclass
class Recording:
    """The calls in order; the inputs by name; the tensors of the model that are used; the output's leaves."""

    inputs: dict[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    structure: Any = None


@dataclass(frozen=True)
class Subject:
    """A model without values: its tensors by name, its modules' paths by id, and the device that it is really on."""

    model: nn.Module
    tensors: dict[str, Tensor]
    paths: dict[int, str]
    device: torch.device


def record(subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> Recording:
    """Calls the model on meta tensors; `names` are those of the leaves of (args, kwargs). The model is left as it was.

    Raises:
        Unrecorded: the call needs a value, or keeps state in the model, or uses a tensor that is not the model's own.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise Unrecorded("an input is not a tensor")
    recording = Recording(dict(zip(names, leaves, strict=True)))
    recorder = _Recorder(recording, subject)
    try:
        with untouched(subject.model) as before:
            with (
                recorder.following_modules(),
                _as_in_export(),
                enable_python_dispatcher(),
                recorder,
                _OnDevice(subject.device),
            ):
                result = subject.model(*args, **kwargs)
            _check_kept(before)
    except Unrecorded:
        raise
    except Exception as error:  # whatever it is, export meets it too and explains it in the user's words
        raise Unrecorded(f"{type(error).__name__}: {error}") from error
    flat, recording.structure = pytree.tree_flatten(result)
    recording.outputs = [recorder.source(leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat]
    return recording


_ASKED: dict[Any, Callable[[torch.device], Any]] = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: lambda device: device.type == "meta",  # type: ignore[attr-defined]
}
_META = torch.device("meta")
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


class _OnDevice(TorchFunctionMode):
    """Tensors say that they are on the model's device, and what is made there has no values either.

    Models choose kernels and dtypes by the device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKED:
            return _ASKED[func](self._device)
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        return func(*[_META if isinstance(arg, torch.device) else arg for arg in args], **kwargs)


class _Recorder(ProxyTorchDispatchMode):
    """Takes the place of the tracer that torch calls before autograd; the base class is what torch lets in there."""

    def __init__(self, recording: Recording, subject: Subject) -> None:
        TorchDispatchMode.__init__(self, _PRE_DISPATCH)
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY
        self.recording, self._known = recording, {id(t): name for name, t in reversed(subject.tensors.items())}
        self._paths, self._path = subject.paths, [""]
        self._sources = {id(t): Source(-1, name=name) for name, t in recording.inputs.items()}
        self._made: dict[Any, Source] = {}  # by place: torch hands out a second tensor on what a factory has made
        self._alive: list[Any] = []  # an id stays a tensor's own as long as the tensor lives
        self._caught: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and torch's guard against it takes as long as the rest of a call

    def __enter__(self) -> "_Recorder":
        _set_mode_pre_dispatch(self)
        return self

    def __exit__(self, *_: Any) -> None:
        for operator in self._caught:
            operator._uncache_dispatch(_PRE_DISPATCH)
        unset_mode_pre_dispatch(self._mode_key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operator's first call, on torch's own way to a mode; the later ones take a third less time without it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            torch._C._dispatch_tls_set_dispatch_key_included(_PRE_DISPATCH, False)
            try:
                return self._call(func, args, kwargs)
            finally:
                torch._C._dispatch_tls_set_dispatch_key_included(_PRE_DISPATCH, True)

        func._dispatch_cache[_PRE_DISPATCH] = call
        self._caught.append(func)
        return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise Unrecorded("an autocast region")
        sources, named = self._sourced(args), {k: self._sourced(v) for k, v in kwargs.items()}
        with torch._C._DisablePythonDispatcher():
            shape = OUTPUT_SHAPES.get(func)
            value = shape(*args, **kwargs) if shape is not None else None
            if value is None:
                value = func(*args, **kwargs)
        self._note(Call(func, sources, named, value, self._path[-1]))
        return value

    def _note(self, call: Call) -> None:
        number = len(self.recording.calls)
        outputs = call.value if isinstance(call.value, tuple | list) else [call.value]
        for i, output in enumerate(outputs):
            if isinstance(output, Tensor):
                source = self._sources[id(output)] = Source(number, i)
                self._made.setdefault(_placed(output), source)
            elif output is not None:
                raise Unrecorded(f"{call.target} returns a {type(output).__name__}")
        self.recording.calls.append(call)
        self._alive.append(call.value)

    def _sourced(self, value: Any) -> Any:
        """The arguments of a call with a source for each tensor (lists and tuples nest, nothing else does)."""
        if isinstance(value, Tensor):
            return self.source(value)
        if isinstance(value, tuple | list):
            return type(value)([self._sourced(v) for v in value])
        return value

    def source(self, leaf: Tensor) -> Source:
        """Where a tensor comes from."""
        found = self._sources.get(id(leaf)) or self._made.get(_placed(leaf))
        if found is None:
            name = self._known.get(id(leaf))
            if name is None:
                raise Unrecorded("a tensor that is neither an input nor a parameter or buffer of the model")
            self.recording.tensors[name] = leaf
            found = self._sources[id(leaf)] = Source(-2, name=name)
        return found

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """Knows at every moment whose forward runs."""

        def enter(module: nn.Module, _: Any) -> None:
            self._path.append(self._paths.get(id(module), self._path[-1]))

        def leave(*_: Any) -> None:
            self._path.pop()

        hooks = [
            module_hooks.register_module_forward_pre_hook(enter),
            module_hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _placed(tensor: Tensor) -> tuple[Any, ...]:
    """Which elements of which memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


@contextmanager
def without_values(model: nn.Module) -> Iterator[Subject]:
    """While active every parameter and buffer is a meta tensor, ties kept."""
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = [kind for module in modules.values() for kind in (module._parameters, module._buffers)]
    full = {id(kind): (kind, dict(kind)) for kind in kinds}
    empty = {id(t): t for _, tensors in full.values() for t in tensors.values() if t is not None}
    device = next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    empty = {number: _empty(t) for number, t in empty.items()}
    try:
        for kind, tensors in full.values():
            kind.update((name, t if t is None else empty[id(t)]) for name, t in tensors.items())
        known = {
            f"{path}.{name}".lstrip("."): tensor
            for path, module in modules.items()
            for name, tensor in {**module._parameters, **module._buffers}.items()
            if tensor is not None
        }
        yield Subject(model, known, {id(m): path for path, m in reversed(modules.items())}, device)
    finally:
        for kind, tensors in full.values():
            kind.update(tensors)


def _check_kept(before: list[State]) -> None:
    """Raises Unrecorded where the call has put tensors into the model."""
    for now, attributes, contents in before:
        added = [k for k, v in now.items() if attributes.get(k) is not v and isinstance(v, Tensor)]
        if added or now["_buffers"].keys() != contents["_buffers"].keys():
            raise Unrecorded(f"the model keeps a tensor between calls: {added}")


def _empty(tensor: Tensor) -> Tensor:
    shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(shape, requires_grad=False) if isinstance(tensor, nn.Parameter) else shape


@contextmanager
def _as_in_export() -> Iterator[None]:
    """Models that ask whether they are being exported get the answer that torch.export gives."""
    compiler = torch.compiler
    before = compiler._is_compiling_flag, compiler._is_exporting_flag
    try:
        compiler._is_compiling_flag = compiler._is_exporting_flag = True
        yield
    finally:
        compiler._is_compiling_flag, compiler._is_exporting_flag = before
