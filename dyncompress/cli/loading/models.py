"""MODEL on the command line: where a model comes from, and example inputs that it can be captured with.

    FILE                        a checkpoint of ours, a torch.export archive, a state dict with --arch, a pickled module
    zoo:NAME                    a reference model of this package, trained where it comes so and no options are given
    timm:NAME torchvision:NAME  an architecture of that library with random weights
    hf:NAME                     a small random model of a transformers class, or a trained one by folder or hub name
    package.module:factory      whatever the function returns; the working directory is importable

All but a file take options in parentheses, as in 'timm:resnet18(num_classes=10, in_chans=1)'.
"""

import ast
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...errors import RequestError
from ...model_zoo import zoo
from ...passes.graph.call_structure import nested_inputs
from ...passes.graph.inputs import Inputs
from ...passes.graph.meta import FixedInput, Input, inputs_of
from ...runtime.files import checkpoint
from ...runtime.files.model_folder import is_model_folder
from ...runtime.predict.dynamic import DynamicModel
from . import frameworks, model_files

_SHOWN = 3  # names listed in an error message
_FRAMEWORKS: Mapping[str, Callable[[str, Mapping[str, Any]], frameworks.Made]] = {
    "timm": frameworks.from_timm,
    "torchvision": frameworks.from_torchvision,
    "hf": frameworks.from_transformers,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and the inputs of one call: a tensor, a tuple of arguments or a dict of keywords.

    name: a short name for tables and folders. trained: False for weights that are random by construction.
    """

    module: nn.Module
    example_inputs: Inputs
    name: str
    trained: bool


def load_model(
    spec: str,
    *,
    arch: str | None = None,
    allow_pickle: bool = False,
    input_shape: tuple[int, ...] | None = None,
    samples: Any = None,
    one_of_many: bool = False,
) -> LoadedModel:
    """The model that SPEC names, on the CPU.

    Args:
        spec: a MODEL, as above.
        arch: the architecture that a state dict fills: a MODEL that is no file.
        allow_pickle: whether a file may be unpickled, which runs code from it.
        input_shape: shape of one float32 sample, without the batch; wins over every other example.
        samples: the first inputs of the data source, as one batch; they win over the usual ones of an architecture,
            not over those that a file was saved with.
        one_of_many: arch may be meant for another model than this one.

    Raises:
        RequestError: SPEC is no model, the file is damaged, needs --arch or has no use for it, the weights do not fit
            or are not finite, or nothing says which inputs the model takes.
    """
    found = _from_file(Path(spec), arch, allow_pickle) if _is_file(spec) else _from_source(spec)
    if arch is not None and not (found.filled or one_of_many):
        raise RequestError(f"--arch goes with a state dict, and {spec} is a whole model: leave --arch out")
    _check_finite(spec, found.module)
    return LoadedModel(
        found.module.eval(), example_for(spec, found, input_shape, samples), short_name(spec), found.trained
    )


@dataclass(frozen=True)
class _Found:
    """A module, and what is known of it.

    saved: the inputs it was saved with, which bind; usual: the inputs its architecture takes by default, which do not.
    filled: whether its weights come from a state dict.
    """

    module: nn.Module
    saved: Any = None
    usual: Any = None
    trained: bool = True
    filled: bool = False


def example_for(spec: str, found: _Found, input_shape: tuple[int, ...] | None, samples: Any = None) -> Any:
    """Inputs for one call of a model. Raises RequestError when nothing says what it takes."""
    if input_shape is not None:
        return torch.rand(2, *input_shape)
    for example in (found.saved, samples, found.usual):
        if example is not None:
            return example
    raise RequestError(f"nothing says which inputs {spec} takes: give --input-shape, such as 3,224,224, or --data")


def _is_file(spec: str) -> bool:
    source, colon, _ = spec.partition(":")
    if not colon or source in ("zoo", *_FRAMEWORKS):
        return not colon
    return Path(spec).exists() or not all(part.isidentifier() for part in source.split("."))


def short_name(spec: str) -> str:
    """A word for tables and folders: the file or model without its folder, ending and options."""
    if _is_file(spec):
        return Path(spec).name.partition(".")[0] or "model"
    return Path(spec.partition(":")[2].partition("(")[0]).name


def _from_file(path: Path, arch: str | None, allow_pickle: bool) -> _Found:
    found = _read(path, allow_pickle)
    if isinstance(found, _Found):
        return found
    if arch is None:
        raise RequestError(f"{path} is a state dict: name its architecture with --arch, such as --arch timm:resnet18")
    if _is_file(arch):
        raise RequestError(f"--arch {arch} is a file: name an architecture, such as zoo:NAME or package.module:factory")
    empty = architecture(arch)
    _fill(path, arch, empty.module, found)
    return replace(empty, trained=True, filled=True)


def _read(path: Path, allow_pickle: bool) -> _Found | dict[str, Tensor]:
    """The whole model in a file, or its state dict."""
    if is_model_folder(path):
        module = checkpoint.load(path)
        return _Found(module, saved=example_of(module))
    kind = model_files.kind_of(path)
    if kind == "export":
        module, example = model_files.read_export(path, allow_pickle)
        return _Found(module, saved=example)
    if kind == "safetensors":
        if "dyncompress" not in model_files.safetensors_metadata(path):
            return model_files.read_safetensors(path)
        module = checkpoint.load(path)
        return _Found(module, saved=example_of(module))
    content = model_files.read_torch(path, allow_pickle)
    return _Found(content) if isinstance(content, nn.Module) else content


def _from_source(spec: str) -> _Found:
    """A model by SOURCE:NAME, with its trained weights where the source has any."""
    source, _, name = spec.partition(":")
    if source == "zoo" and name in zoo.ZOO and zoo.ZOO[name].trained:
        return _Found(zoo.load(name), usual=zoo.example_input(name))
    return architecture(spec)


def architecture(spec: str, *, weights: bool = True) -> _Found:
    """The model of an architecture and its usual inputs; weights=False reads no weights from any file."""
    source, _, rest = spec.partition(":")
    name, options = _split_options(spec, rest)
    if source == "zoo":
        return _Found(zoo.build(name, **options), usual=zoo.example_input(name), trained=False)
    if source not in _FRAMEWORKS:
        return _Found(_call_factory(source, name, options))
    if source == "hf" and not weights:
        module, example = frameworks.from_transformers(name, options, weights=False)
    else:
        module, example = _FRAMEWORKS[source](name, options)
    return _Found(module, usual=example, trained=source == "hf" and Path(name).is_dir())


def _split_options(spec: str, rest: str) -> tuple[str, dict[str, Any]]:
    """'resnet18(num_classes=10)' is ('resnet18', {'num_classes': 10}); values are Python literals."""
    name, bracket, _ = rest.partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"_{rest[len(name) :]}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("not a call with keywords")
        return name, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise RequestError(f"{spec}: write options as NAME(key=value, ...) with plain values") from error


def _call_factory(module_name: str, name: str, options: Mapping[str, Any]) -> nn.Module:
    spec = f"{module_name}:{name}"
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # console scripts, unlike `python -m`, do not search it
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise RequestError(f"{spec} cannot be imported: {error}") from error
    try:
        model = factory(**options)
    except Exception as error:  # the user's own code may raise anything
        raise RequestError(f"{spec} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise RequestError(f"{spec} returned a {type(model).__name__}: a factory returns a torch.nn.Module")
    return model


def example_of(model: nn.Module) -> Any:
    """Inputs for one call of a captured or dynamic model, as its graph describes them: random floats, zero integers."""
    gm = model.trunk if isinstance(model, DynamicModel) else model
    assert isinstance(gm, fx.GraphModule)
    leaves = [_example_leaf(given) for given in inputs_of(gm)]
    args, kwargs = nested_inputs(gm.graph, leaves)
    return args or kwargs


def _example_leaf(given: Input) -> Any:
    if isinstance(given, FixedInput):
        return given.value
    make = torch.rand if given.dtype.is_floating_point else torch.zeros
    return make(given.sized(2), dtype=given.dtype)


def _fill(path: Path, arch: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads the weights, or tells what does not fit in one line."""
    own = module.state_dict()
    both = [key for key in own if key in state and state[key].shape != own[key].shape]
    wrong = [f"{key} is {_shape(state[key])}, not {_shape(own[key])}" for key in both]
    problems = (
        _listed("missing", [key for key in own if key not in state]),
        _listed("unknown", [key for key in state if key not in own]),
        _listed("of another shape", wrong),
    )
    if any(problems):
        raise RequestError(f"{path} does not fit --arch {arch}: {'; '.join(p for p in problems if p)}")
    module.load_state_dict(state)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _listed(what: str, names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})" if names else ""


def _check_finite(spec: str, module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise RequestError(f"{spec}: {name} holds NaN or infinite values: train or save the model again")
