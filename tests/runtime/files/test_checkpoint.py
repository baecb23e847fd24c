"""A model that went through a file is the model that went in: outputs, tensors, modes, text and further passes."""

import os
import resource
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import dyncompress as dc
from dyncompress.runtime.files.checkpoint import load, read_info, save
from dyncompress.runtime.predict.policy import normalized_entropy


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.block = nn.ModuleDict({"3x3": nn.Conv2d(8, 8, 3, padding="same"), "en-de": nn.Conv2d(8, 8, 1)})
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, 5)
        self.register_buffer("scale", torch.full((3, 1, 1), 2.0))
        self.stem.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x * self.scale)).relu()
        x = x + self.block["en-de"](self.block["3x3"](x))
        return self.fc(self.drop(x.mean((2, 3)))) + torch.arange(5).clamp(max=float("inf"))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        x = x + self.proj(y)
        return {"logits": self.head(x[:, 0]), "tokens": [x, (t, None)]}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 8, 2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        h, _ = self.lstm(self.embed(tokens) * mask.unsqueeze(-1))
        return self.out(h)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRU(6, 4, bidirectional=True), nn.LSTM(8, 7, 2, batch_first=True)
        self.norm, self.fc = nn.LayerNorm(7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.gru(x.transpose(0, 1))[0].transpose(0, 1))
        return self.fc(self.norm(y[:, -1]))


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STEPS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
TOKENS = {"tokens": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]), "mask": torch.ones(2, 4)}
MODELS = {"cnn": (Cnn, IMAGE), "vit": (Vit, IMAGE), "tied": (Tied, TOKENS), "recurrent": (Recurrent, STEPS)}


def captured(name: str) -> fx.GraphModule:
    torch.manual_seed(0)
    kind, inputs = MODELS[name]
    return dc.capture(kind(), inputs)


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def round_trip(model: nn.Module, tmp_path: Path, **options: Any) -> Any:
    save(model, tmp_path / "m.dyn.safetensors", **options)
    return load(tmp_path / "m.dyn.safetensors")


def assert_equal(a: Any, b: Any) -> None:
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if isinstance(x, Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y


def assert_same(a: fx.GraphModule, b: fx.GraphModule) -> None:
    assert str(a.graph) == str(b.graph)
    assert a.code == b.code
    assert repr(a) == repr(b)
    assert {**a.meta, "info": 0} == {**b.meta, "info": 0}
    tensors = [{**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers())} for m in (a, b)]
    assert list(tensors[0]) == list(tensors[1])
    assert list(a.state_dict()) == list(b.state_dict())
    for x, y in zip(*(t.values() for t in tensors), strict=True):
        assert (x.dtype, x.stride(), x.requires_grad, type(x)) == (y.dtype, y.stride(), y.requires_grad, type(y))
        assert torch.equal(x, y)
    for (name, x), (other, y) in zip(a.named_modules(), b.named_modules(), strict=True):
        assert (name, x.training) == (other, y.training)
    for n, m in zip(a.graph.nodes, b.graph.nodes, strict=True):
        assert str({k: v for k, v in n.meta.items() if k != "source"}) == str(m.meta)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    gm, inputs = captured(name), MODELS[name][1]
    loaded = round_trip(gm, tmp_path)
    assert_same(gm, loaded)
    for mode in (True, False):
        outputs = []
        for model in (gm, loaded):
            torch.manual_seed(1)
            outputs.append(call(model.train(mode), inputs))
        assert_equal(*outputs)
    assert_same(gm, loaded)  # batch norm moved both alike


@pytest.mark.parametrize("name", MODELS)
def test_further_passes_work_on_a_loaded_model(name: str, tmp_path: Path) -> None:
    gm = captured(name).eval()
    loaded = round_trip(gm, tmp_path)
    keep = {a.name: list(range(a.size - 1)) for a in dc.infer_axes(gm) if a.prunable and a.size > 1}
    assert keep == {a.name: list(range(a.size - 1)) for a in dc.infer_axes(loaded) if a.prunable and a.size > 1}
    small = dc.shrink(gm, keep, exact=True)
    assert_same(small, dc.shrink(loaded, keep, exact=True))
    again = round_trip(small, tmp_path, overwrite=True)
    assert_same(small, again)
    assert_equal(call(small, MODELS[name][1]), call(again, MODELS[name][1]))


def test_ragged_recurrent_layers_come_back(tmp_path: Path) -> None:
    gm = captured("recurrent").eval()
    hidden = [a for a in dc.infer_axes(gm) if a.prunable and a.size == 7]
    small = dc.shrink(gm, {hidden[0].name: [0, 1, 2]})
    assert "RaggedRecurrent" in str(small)
    loaded = round_trip(small, tmp_path)
    assert_same(small, loaded)
    assert_equal(small(STEPS), loaded(STEPS))


def test_dynamic_model(tmp_path: Path) -> None:
    x = torch.randn(32, 3, 8, 8)
    gm = dc.InsertExits(exits=1)(captured("cnn").eval()).gm
    threshold = normalized_entropy(gm(x)[0] / 1.5).median().item()
    dyn = dc.DynamicModel(gm, dc.ExitPolicy("entropy", (threshold,), (1.5,)))
    loaded = round_trip(dyn, tmp_path, info={"accuracy": 0.5})
    assert isinstance(loaded, dc.DynamicModel)
    assert loaded.policy == dyn.policy and loaded.exits == dyn.exits and loaded.exit_macs == dyn.exit_macs
    assert loaded.trunk.meta["info"] == {"accuracy": 0.5}
    assert_same(dyn.trunk, loaded.trunk)
    a, b = dyn.predict(x), loaded.predict(x)
    assert 0 < int((a.exit_index == 0).sum()) < 32
    assert_equal((a.logits, a.exit_index, a.macs, dyn(x)), (b.logits, b.exit_index, b.macs, loaded(x)))
    again = round_trip(dyn.train(), tmp_path, overwrite=True)
    assert again.training
    assert_same(dyn.trunk, again.trunk)


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, Tensor]
    loss: Tensor | None = None


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Answer:
        y = self.fc(x)
        return Answer(y, Pair(y + 1, y * 2))


def test_dataclass_output_comes_back_as_dict(tmp_path: Path) -> None:
    torch.export.register_dataclass(Answer, serialized_type_name="test_checkpoint.Answer")
    gm, x = dc.capture(Answering(), torch.randn(2, 4)), torch.randn(2, 4)
    expected, loaded = gm(x), round_trip(gm, tmp_path)
    assert isinstance(expected, Answer)
    assert list(loaded(x)) == ["logits", "hidden"]
    assert_equal([expected.logits, expected.hidden[0], expected.hidden[1]], loaded(x))
    assert_same(loaded, round_trip(loaded, tmp_path, overwrite=True))


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    gm = captured("tied")
    loaded = round_trip(gm, tmp_path)
    names = [n for n, p in loaded.named_parameters(remove_duplicate=False) if p is loaded.embed.weight]
    assert names == ["embed.weight", "out.weight"]
    untied = sum(p.nbytes for p in loaded.state_dict().values())
    assert (tmp_path / "m.dyn.safetensors").stat().st_size < untied + 30_000
    longer = {"tokens": torch.randint(0, 20, (3, 9)), "mask": torch.ones(3, 9)}
    assert_equal(gm.eval()(**longer), loaded.eval()(**longer))


def test_modes_flags_layouts_and_dtypes(tmp_path: Path) -> None:
    gm = captured("cnn").train()
    gm.bn.eval()
    gm.stem.to(memory_format=torch.channels_last)
    for name, value in {
        "fp16": torch.randn(3).half(), "bfloat": torch.randn(3).bfloat16(), "flag": torch.tensor([True, False]),
        "count": torch.tensor(7, dtype=torch.int16), "wave": torch.randn(2, 3, dtype=torch.complex128).conj(),
        "empty": torch.zeros(0, 3), "slice": torch.arange(10.0)[2:4],
    }.items():  # fmt: skip
        gm.register_buffer(name, value, persistent=name != "fp16")
    loaded = round_trip(gm, tmp_path)
    assert_same(gm, loaded)
    assert loaded.training and not loaded.bn.training
    assert "fp16" not in loaded.state_dict() and "fp16" in dict(loaded.named_buffers())
    assert_same(gm.bfloat16(), round_trip(gm, tmp_path, overwrite=True))


def test_module_under_two_paths_stays_one(tmp_path: Path) -> None:
    gm = captured("cnn")
    gm.add_module("alias", gm.fc)
    loaded = round_trip(gm, tmp_path)
    assert loaded.alias is loaded.fc


def test_loading_leaves_random_numbers_alone(tmp_path: Path) -> None:
    save(captured("recurrent"), tmp_path / "m")
    state = torch.get_rng_state()
    load(tmp_path / "m")
    assert torch.equal(state, torch.get_rng_state())


def test_loaded_tensors_do_not_hang_on_the_file(tmp_path: Path) -> None:
    gm = captured("cnn").eval()
    loaded = round_trip(gm, tmp_path)
    (tmp_path / "m.dyn.safetensors").write_bytes(b"")
    assert_equal(gm(IMAGE), loaded(IMAGE))


def test_info(tmp_path: Path) -> None:
    info = {"accuracy": 0.93, "recipe": [{"prune": {"ratio": 0.5}}, ("a", None)], "loss": float("inf"), 3: "ü\n"}
    path, gm = tmp_path / "m", captured("cnn")
    save(gm, path, info=info)
    assert read_info(path) == load(path).meta["info"] == info
    save(load(path), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    save(gm, path, overwrite=True)
    assert read_info(path) == {}
    with pytest.raises(dc.RequestError, match=r"info\['best'\] holds a Tensor"):
        save(gm, path, info={"best": torch.ones(1)}, overwrite=True)
    with pytest.raises(dc.RequestError, match="must be a dict"):
        save(gm, path, info=[1], overwrite=True)  # type: ignore[arg-type]


# --- writing -----------------------------------------------------------------------------------------------------


def test_overwriting_must_be_asked_for(tmp_path: Path) -> None:
    gm, path = captured("cnn"), tmp_path / "m"
    save(gm, path)
    old = path.read_bytes()
    with pytest.raises(dc.RequestError, match="overwrite=True"):
        save(gm, path)
    with pytest.raises(dc.RequestError, match="is a directory"):
        save(gm, tmp_path, overwrite=True)
    with pytest.raises(dc.RequestError, match="does not exist"):
        save(gm, tmp_path / "none" / "m")
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m"]


def test_file_mode_follows_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save(captured("cnn"), tmp_path / "m")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o640


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save(captured("cnn"), path)
    old = path.read_bytes()
    big = dc.capture(nn.Sequential(nn.Linear(300, 300)), torch.randn(2, 300))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(dc.DynCompressError, match=rf"^cannot write {path}: .*too large") as caught:
            save(big, path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not isinstance(caught.value, dc.RequestError) and "\n" not in str(caught.value)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m"]


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(dc.RequestError, match=r"not a Cnn: save dyncompress\.capture"):
        save(Cnn(), path)
    gm = captured("cnn")
    gm.fc = Odd()
    with pytest.raises(dc.DynCompressError, match="module fc is a Odd"):
        save(gm, path)
    gm = captured("cnn")
    next(n for n in gm.graph.nodes if n.target is torch.ops.aten.relu.default).target = os.path.join
    with pytest.raises(dc.DynCompressError, match="node relu calls <function join"):
        save(gm, path)
    gm = captured("cnn")
    gm.fc.out_features = 4
    with pytest.raises(dc.DynCompressError, match=r"tensor fc\.weight is \[5, 8\] where its module expects \[4, 8\]"):
        save(gm, path)
    with pytest.raises(dc.DynCompressError, match=r"has no values \(meta device\)"):
        save(captured("cnn").to("meta"), path)
    gm = captured("cnn")
    gm.meta["odd"] = Odd()
    with pytest.raises(dc.DynCompressError, match=r"meta.*holds a Odd"):
        save(gm, path)
    assert os.listdir(tmp_path) == []
