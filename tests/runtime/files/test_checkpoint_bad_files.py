"""A file that is damaged, of another kind or made by an attacker ends in one line; nothing in it ever runs."""

import copy
import json
import os
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

import dyncompress as dc
from dyncompress.runtime.files.checkpoint import load, read_info, save
from dyncompress.runtime.files.tensor_file import read_file, write_file

Document = dict[str, Any]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(2, 3)
        self.bias = nn.Parameter(torch.ones(3))
        self.lstm = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x: Tensor, *, gain: Tensor) -> dict[str, Tensor]:
        y = self.fc(self.conv(x).relu().mean((2, 3))) + self.bias
        y = y.reshape(y.shape[0], -1) * gain
        return {"logits": torch.nn.functional.gelu(y, approximate="tanh"), "h": self.lstm(y.unsqueeze(1))[0]}


INPUTS = {"x": torch.ones(2, 1, 4, 4), "gain": torch.ones(2, 3)}


@cache
def good_file() -> bytes:
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        save(dc.capture(Small(), INPUTS), path, info={"accuracy": 0.5})
        return path.read_bytes()


@cache
def good_parts() -> tuple[str, dict[str, Tensor]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        path.write_bytes(good_file())
        document, tensors = read_file(path)
    return json.dumps(document), tensors


def forged(tmp_path: Path, change: Callable[[Document, dict[str, Tensor]], object]) -> Path:
    """A file with a valid digest whose contents were changed, as an attacker would."""
    text, tensors = good_parts()
    document, tensors = json.loads(text), dict(tensors)
    change(document, tensors)
    write_file(tmp_path / "forged", document, tensors)
    return tmp_path / "forged"


def refused(path: Path) -> str:
    with pytest.raises(dc.RequestError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1000
    return message


def node(document: Document, name: str) -> Document:
    return next(n for n in document["nodes"] if n["name"] == name)


def module(document: Document, path: str) -> Document:
    return next(m for m in document["modules"] if m["path"] == path)


def test_the_good_file_is_good(tmp_path: Path) -> None:
    model = load(forged(tmp_path, lambda document, tensors: None))
    assert (tmp_path / "forged").read_bytes() == good_file()
    assert model(**INPUTS)["logits"].shape == (2, 3)
    assert "reshape" in str(model.graph) and "approximate" in str(model.graph)


# --- files of another kind ---------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploded",)


OTHER_FILES = {
    "empty": (b"", "not a readable checkpoint"),
    "short": (b"abc", "not a readable checkpoint"),
    "random": (bytes(range(256)) * 20, "not a readable checkpoint"),
    "pickle": (pickle.dumps(Bomb()) + b" " * 100, "not a readable checkpoint"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "not a readable checkpoint"),
    "state dict": (safetensors_bytes({"w": torch.ones(2)}), "holds tensors but no model"),
    "other metadata": (safetensors_bytes({"w": torch.ones(2)}, {"format": "pt"}), "holds tensors but no model"),
    "not JSON": (safetensors_bytes({}, {"dyncompress": "{'a': 1}"}), "not JSON"),
    "nested": (safetensors_bytes({}, {"dyncompress": "[" * 100_000}), "not JSON"),
    "long number": (safetensors_bytes({}, {"dyncompress": "9" * 10_000}), "not JSON"),
    "NaN": (safetensors_bytes({}, {"dyncompress": '{"version": 1, "sha256": "", "model": {"a": NaN}}'}), "not JSON"),
    "list": (safetensors_bytes({}, {"dyncompress": "[]"}), "format None"),
    "newer": (safetensors_bytes({}, {"dyncompress": '{"version": 2}'}), "format 2; this dyncompress reads format 1"),
    "incomplete": (safetensors_bytes({}, {"dyncompress": '{"version": 1}'}), "incomplete"),
    "truncated": (good_file()[:-1], "not a readable checkpoint"),
    "longer": (good_file() + b"\0", "not a readable checkpoint"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_files_of_another_kind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m"
    content, reason = OTHER_FILES[kind]
    path.write_bytes(content)
    assert reason in refused(path)
    with pytest.raises(dc.RequestError, match=reason):
        read_info(path)
    assert os.listdir(tmp_path) == ["m"]


def test_no_file(tmp_path: Path) -> None:
    assert "there is no file" in refused(tmp_path / "none")
    assert "is a directory" in refused(tmp_path)
    assert "there is no file" in refused(Path("/dev/zero"))


# --- damage ------------------------------------------------------------------------------------------------------


def check_damaged(path: Path) -> None:
    """Either the damage is seen, or it touched nothing that matters."""
    try:
        model = load(path)
    except dc.RequestError:
        return
    path.write_bytes(good_file())
    original = load(path)
    assert model.code == original.code
    for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_flipped_bytes(data: st.DataObject) -> None:
    content = bytearray(good_file())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        path.write_bytes(content)
        check_damaged(path)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(good_file()) - 1), st.binary(max_size=3))
def test_cut_files(length: int, tail: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        path.write_bytes(good_file()[:length] + tail)
        check_damaged(path)


def test_every_flipped_bit_of_a_weight_is_seen(tmp_path: Path) -> None:
    for bit in range(8):
        content = bytearray(good_file())
        content[-5] ^= 1 << bit
        (tmp_path / "m").write_bytes(content)
        assert "SHA-256" in refused(tmp_path / "m")


# --- forgeries ---------------------------------------------------------------------------------------------------

EVIL = "__import__('os').system('touch exploded')"


def _append(document: Document, **entry: Any) -> None:
    document["nodes"].insert(-1, {"name": "evil", "op": "call_function", "args": [], "meta": {}, **entry})


def _deep() -> Any:
    value: Any = 1
    for _ in range(300):
        value = {"tuple": [value]}
    return value


FORGERIES: dict[str, tuple[Callable[[Document, dict[str, Tensor]], object], str]] = {
    # functions
    "attrgetter": (lambda d, t: _append(d, target="operator.attrgetter", args=["__class__"]), "outside the operators"),
    "system": (lambda d, t: _append(d, target="os.system", args=["touch exploded"]), "outside the operators"),
    "eval": (lambda d, t: _append(d, target="builtins.eval", args=[EVIL]), "outside the operators"),
    "class": (lambda d, t: _append(d, target="aten.__class__.default"), "outside the operators"),
    "dunder overload": (lambda d, t: _append(d, target="aten.add.__class__"), "outside the operators"),
    "from_file": (lambda d, t: _append(d, target="aten.from_file.default", args=["exploded", True, 9]), "outside the"),
    "save": (lambda d, t: _append(d, target="aten.save.default", args=[1, "exploded"]), "outside the operators"),
    "method": (lambda d, t: _append(d, op="call_method", target="__reduce__"), "unknown kind of node"),
    "target list": (lambda d, t: _append(d, target=["aten.add.Tensor"]), "outside the operators"),
    # text that would become source code
    "node name": (lambda d, t: node(d, "relu").update(name=f"x = {EVIL}"), "not a valid node name"),
    "keyword name": (lambda d, t: node(d, "relu").update(name="lambda"), "not a valid node name"),
    "builtin name": (lambda d, t: _append(d, name="getattr", target="aten.add.Tensor"), "not a valid node name"),
    "same name": (lambda d, t: _append(d, name="relu", target="aten.add.Tensor"), "not a valid node name"),
    "placeholder": (lambda d, t: node(d, "x").update(target=f"x={EVIL}"), "not a valid argument name"),
    "argument": (lambda d, t: d["call"].update(arguments=[f"x={EVIL}", "gain"]), "not a valid argument name"),
    "self": (lambda d, t: d["call"].update(arguments=["self", "gain"]), "not a valid argument name"),
    "key": (
        lambda d, t: d["call"]["inputs"]["tuple"][1]["dict"][1].__setitem__(0, f"g':{EVIL},'"),
        "not a valid argument name",
    ),
    "keyword argument": (lambda d, t: node(d, "gelu").update(kwargs={f"a={EVIL}, b": 1}), "not a valid argument name"),
    "unknown argument": (lambda d, t: node(d, "gelu").update(kwargs={"colour": 1}), "has no argument colour"),
    "module path": (lambda d, t: node(d, "conv").update(target=f'conv") or {EVIL} or ("'), "not a valid module"),
    "tensor path": (lambda d, t: node(d, "bias").update(target=f"bias\n{EVIL}"), "not a valid module or tensor path"),
    "dunder path": (lambda d, t: node(d, "bias").update(target="__class__.__init__"), "not a valid module or tensor"),
    "class name": (lambda d, t: d.update(class_name=f"X:\n {EVIL}"), "not a valid"),
    # references and values
    "unknown node": (lambda d, t: node(d, "relu").update(args=[{"node": "nobody"}]), "unknown node 'nobody'"),
    "later node": (lambda d, t: node(d, "relu").update(args=[{"node": "gelu"}]), "unknown node 'gelu'"),
    "unknown tag": (lambda d, t: node(d, "relu").update(args=[{"object": "os"}]), "malformed value"),
    "two tags": (lambda d, t: node(d, "relu").update(args=[{"tuple": [], "list": []}]), "malformed value"),
    "dtype": (lambda d, t: node(d, "relu").update(args=[{"dtype": "Tensor"}]), "unknown dtype 'Tensor'"),
    "device": (lambda d, t: node(d, "relu").update(args=[{"device": "moon"}]), "malformed description"),
    "float": (lambda d, t: node(d, "relu").update(args=[{"float": "1e3"}]), "malformed number"),
    "deep": (lambda d, t: node(d, "relu").update(args=[_deep()]), "malformed description"),
    "shape": (lambda d, t: node(d, "relu")["meta"].update(val={"tensor": ["float32", [2**62, 2**62]]}), "malformed"),
    "no output": (lambda d, t: d["nodes"].pop(), "does not end in one output"),
    "two outputs": (lambda d, t: d["nodes"].append({**d["nodes"][-1], "name": "o2"}), "does not end in one output"),
    "no nodes": (lambda d, t: d.update(nodes=[]), "does not end in one output"),
    "nodes": (lambda d, t: d.update(nodes=3), "malformed description"),
    "no call": (lambda d, t: d.pop("call"), "malformed description"),
    "more inputs": (lambda d, t: d["call"]["inputs"]["tuple"][0]["tuple"].append("*"), "do not fit its call structure"),
    "fewer outputs": (lambda d, t: d["call"].update(output={"tuple": ["*"]}), "do not fit its output structure"),
    "structure": (lambda d, t: d["call"].update(output={"namedtuple": ["*"]}), "unknown structure"),
    # modules and tensors
    "module class": (lambda d, t: module(d, "fc").update(type="os.system"), "outside the classes"),
    "module argument": (lambda d, t: module(d, "fc")["args"].update(device="cuda"), "with the arguments"),
    "module size": (lambda d, t: module(d, "fc")["args"].update(out_features=4), "where its module expects"),
    "giant module": (lambda d, t: module(d, "fc")["args"].update(out_features=2**62), "cannot be a Linear"),
    "many layers": (lambda d, t: module(d, "lstm")["args"].update(num_layers=10**12), "has 1000000000000 layers"),
    "negative": (lambda d, t: module(d, "conv")["args"].update(kernel_size=-1), "cannot be a Conv2d"),
    "shadow": (lambda d, t: d["modules"].append({"path": "forward", "type": "Module", "args": {}}), "already exists"),
    "call a container": (
        lambda d, t: (
            d["modules"].append({"path": "box", "type": "Module", "args": {}}),
            node(d, "conv").update(target="box"),
        ),
        "not in the file",
    ),
    "call a tensor": (lambda d, t: node(d, "conv").update(target="bias"), "not in the file"),
    "alias": (lambda d, t: d["modules"].append({"path": "b", "same_as": "nobody"}), "nobody"),
    "missing tensor": (lambda d, t: t.pop("fc.weight"), "differ: fc.weight"),
    "missing twice": (lambda d, t: (t.pop("fc.weight"), d["tensors"].pop("fc.weight")), "fc.weight [3, 2] is missing"),
    "extra tensor": (lambda d, t: t.update(extra=torch.ones(1)), "differ: extra"),
    "extra twice": (
        lambda d, t: (t.update({"fc.extra": torch.ones(1)}), d["tensors"].update({"fc.extra": {"kind": "buffer"}})),
        "fc.extra is [1] where its module expects none",
    ),
    "tensor shape": (lambda d, t: t.update({"fc.weight": torch.ones(3, 3)}), "[3, 3] where its module expects [3, 2]"),
    "tensor of the graph": (
        lambda d, t: t.update(bias=torch.ones(4)),
        "tensor bias is [4] where the graph expects [3]",
    ),
    "tensor of nobody": (
        lambda d, t: (t.update({"no.x": torch.ones(1)}), d["tensors"].update({"no.x": {"kind": "buffer"}})),
        "no",
    ),
    "shadowing tensor": (
        lambda d, t: (t.update(forward=torch.ones(1)), d["tensors"].update(forward={"kind": "buffer"})),
        "already exists",
    ),
    "tie": (lambda d, t: d["tensors"]["fc.weight"].update(same_as="nobody"), "differ: fc.weight"),
    "order": (lambda d, t: d["tensors"]["fc.weight"].update(order=[0, 0]), "malformed description"),
    "integers": (lambda d, t: t.update({"fc.bias": torch.ones(3, dtype=torch.int64)}), "malformed description"),
    "mode": (lambda d, t: d.update(opposite_mode=["nobody"]), "nobody"),
    "kind": (lambda d, t: d.update(kind="dynamic"), "malformed description"),
    "no exits": (lambda d, t: d.update(kind="dynamic", policy={"dict": {}}), "the exit policy lacks"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change, reason = FORGERIES[name]
    message = refused(forged(tmp_path, change))
    assert "is not a valid checkpoint" in message and reason in message
    assert os.listdir(tmp_path) == ["forged"]


def test_text_arguments_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"tanh'+{EVIL}+\"\\\n"
    path = forged(tmp_path, lambda d, t: node(d, "gelu").update(kwargs={"approximate": text}))
    model = load(path)
    assert next(n for n in model.graph.nodes if n.name == "gelu").kwargs == {"approximate": text}
    with pytest.raises(RuntimeError, match="approximate"):
        model(**INPUTS)
    assert os.listdir(tmp_path) == ["forged"]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


_LEAVES = st.sampled_from(
    [None, True, -1, 0, 3, 2**40, 2**63, 10**30, 0.5, "", "x", "self", "relu", EVIL, [], {}, [[]], {"node": "relu"},
     {"tuple": []}, {"dict": {}}, {"slice": [1]}, {"tensor": ["bool", [1]]}, {"items": [[[], 1]]}, {"float": "nan"}]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_forged_value_loads_or_is_refused(data: st.DataObject) -> None:
    document = json.loads(good_parts()[0])
    places = list(_places(document))
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        if isinstance(container, list) or key in container:
            container[key] = copy.deepcopy(data.draw(_LEAVES))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        write_file(path, document, good_parts()[1])
        try:
            load(path)
        except dc.RequestError as error:
            assert "\n" not in str(error)
