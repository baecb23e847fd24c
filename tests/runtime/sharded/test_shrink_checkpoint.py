"""Checkpoints larger than memory: the same model as shrinking in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import LanguageModel
from safetensors.torch import load_file, save_file
from shard_files import INDEX, TOKENS, captured, empty, shrink, some, state, trained, write_shards
from torch import Tensor, fx

import dyncompress as dc
from dyncompress.runtime.files import shards


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


def tensors_of(model: Any) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def expected(full: fx.GraphModule, exact: bool = False) -> fx.GraphModule:
    """The reference: the model in memory, shrunk there."""
    return dc.shrink(full, some(full), exact=exact)


@pytest.mark.parametrize(
    ("dtype", "piece_bytes"),
    [(torch.float32, 1), (torch.float32, 700), (torch.bfloat16, shards.PIECE_BYTES), (torch.float16, 1)],
)
def test_the_same_model_as_in_memory(
    dtype: torch.dtype, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", piece_bytes)
    source = write_shards(tmp_path / "source", state(trained(dtype=dtype)))
    small = dc.load(shrink(empty(dtype=dtype), source, tmp_path / "out"))
    want = expected(captured(dtype=dtype))
    equal(tensors_of(small), tensors_of(want))
    assert small.embed.weight.dtype == dtype and small.steps.dtype == torch.int64
    torch.testing.assert_close(small(**TOKENS), want(**TOKENS), rtol=0, atol=0)
    assert not small.training


def test_a_slice_by_hand(gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    out, keep = shrink(gm, source, tmp_path / "out"), some(gm)
    mlp = next(name for name in keep if name.startswith("layers.1.gate.weight:0"))
    residual = next(
        a.name for a in dc.infer_axes(gm).prunable if ("embed.weight", 1) in {(s.tensor, s.dim) for s in a.slices}
    )
    written = {k: v for path in out.glob("model-*.safetensors") for k, v in load_file(path).items()}
    by_hand = trained().layers[1].gate.weight[keep[mlp]][:, keep[residual]]
    torch.testing.assert_close(written["layers.1.gate.weight"], by_hand, rtol=0, atol=0)


def test_the_result_is_a_plain_sharded_checkpoint(gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    out = shrink(gm, source, tmp_path / "out")
    index = json.loads((out / INDEX).read_text())
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert len(files) > 2
    assert {name: file for file, found in files.items() for name in found} == index["weight_map"]
    assert set(index["weight_map"]) == set(trained().state_dict())  # without the computed scale
    sizes = {file: sum(t.nbytes for t in found.values()) for file, found in files.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 9000 or len(files[file]) == 1 for file, size in sizes.items())
    again = LanguageModel()
    shapes = {name: tensor.shape for found in files.values() for name, tensor in found.items()}
    assert shapes["layers.0.gate.weight"][0] == 45 and again.layers[0].gate.weight.shape[0] == 72
    # a shrunk checkpoint can be shrunk again
    small = dc.load(out)
    axis = next(a for a in dc.infer_axes(small).prunable if a.name.startswith("layers.0.gate"))
    twice = dc.shrink_checkpoint(small, {axis.name: [0, 1]}, out, tmp_path / "twice", progress=False)
    assert dc.load(twice).layers.get_submodule("0").gate.out_features == 2


@pytest.mark.parametrize("stored", ["embed", "head", "both"])
def test_tied_tensors_however_they_are_stored(stored: str, tmp_path: Path) -> None:
    without = {"embed": ["head.weight"], "head": ["embed.weight"], "both": []}[stored]
    source = write_shards(tmp_path / "source", state(trained(tied=True), *without))
    small = dc.load(shrink(empty(tied=True), source, tmp_path / "out"))
    assert small.embed.weight is small.head.weight
    equal(tensors_of(small), tensors_of(expected(captured(tied=True))))


@pytest.mark.parametrize("single", ["file", "folder"])
def test_one_file(single: str, gm: fx.GraphModule, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / "model.safetensors"
    save_file(state(trained()), file)
    small = dc.load(shrink(gm, file if single == "file" else file.parent, tmp_path / "out", exact=True))
    want = expected(captured(), exact=True)
    equal(tensors_of(small), tensors_of(want))
    torch.testing.assert_close(small(**TOKENS), want(**TOKENS), rtol=0, atol=0)


def test_exact_mode_refuses_what_it_would_have_to_fold(tmp_path: Path) -> None:
    class Biased(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model, x = Biased(), torch.ones(2, 4)
    with torch.no_grad():
        model.a.weight[2], model.a.bias[2] = 0, 1
    source = write_shards(tmp_path / "source", state(model), count=1)
    gm, keep = dc.capture_empty(Biased, x), {"a.weight:0": [0, 1, 3, 4, 5]}
    folded = dc.shrink(dc.capture(model, x), keep, exact=True)
    with pytest.raises(dc.RequestError, match="constants that removed indices of a leave behind"):
        dc.shrink_checkpoint(gm, keep, source, tmp_path / "out", exact=True, progress=False)
    plain = dc.load(dc.shrink_checkpoint(gm, keep, source, tmp_path / "out", progress=False))
    assert not torch.allclose(folded.b.bias, plain.b.bias)  # so it had to refuse
    others = dc.load(
        dc.shrink_checkpoint(gm, {"a.weight:0": [1, 2]}, source, tmp_path / "kept", exact=True, progress=False)
    )
    torch.testing.assert_close(others.b.weight, model.b.weight[:, [1, 2]])


def test_whole_branches_go(gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    branch = next(axis.name for axis in dc.infer_axes(gm) if axis.kind == "branch")
    small = dc.load(dc.shrink_checkpoint(gm, {branch: []}, source, tmp_path / "out", progress=False))
    full = captured()
    equal(tensors_of(small), tensors_of(dc.shrink(full, {branch: []})))
    assert len(tensors_of(small)) < len(tensors_of(full))


def test_capture_empty_holds_computed_buffers_only() -> None:
    gm = empty(tied=True, dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in gm.parameters())
    torch.testing.assert_close(gm.scale, torch.linspace(0.5, 1.5, 32, dtype=torch.bfloat16))
    assert gm.embed.weight is gm.head.weight and torch.get_default_dtype() == torch.float32
    assert not LanguageModel().embed.weight.is_meta  # nothing is left patched


def test_unused_tensors_can_be_dropped(gm: fx.GraphModule, tmp_path: Path) -> None:
    more = {f"layers.{i}.rotary.inv_freq": torch.ones(3) for i in range(2)}
    source = write_shards(tmp_path / "source", state(trained()) | more)
    out = shrink(gm, source, tmp_path / "out", drop=["*.inv_freq"])
    equal(tensors_of(dc.load(out)), tensors_of(expected(captured())))
    with pytest.raises(dc.RequestError, match=r"1 missing \(norm\.bias\)"):
        shrink(gm, source, tmp_path / "other", drop=["*.inv_freq", "norm.bias"])
