"""Sources that do not fit, files that are damaged, requests that are wrong: one line for each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import LanguageModel
from shard_files import INDEX, TOKENS, empty, shrink, state, trained, write_shards
from torch import Tensor, fx

import dyncompress as dc
from dyncompress.runtime.files import tensor_file


def changed(edit: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = state(trained())
    edit(tensors)
    return tensors


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("layers.0.up.weight"), r"1 missing \(layers\.0\.up\.weight\)"),
        (lambda t: t.pop("steps"), r"1 missing \(steps\)"),
        (lambda t: t.update(more=torch.ones(2)), r"1 unknown to the model, which drop= leaves out \(more\)"),
        (lambda t: t.update({"norm.bias": torch.ones(31)}), r"of another shape \(norm\.bias is 31, not 32\)"),
        (lambda t: t.update({"norm.bias": torch.ones(32).half()}), r"norm\.bias is float16, not float32"),
        (lambda t: t.clear(), r"19 missing \(embed\.weight, .*, \.\.\.\)"),
    ],
)
def test_a_source_that_does_not_fit(edit: Any, said: str, gm: fx.GraphModule, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "source", changed(edit), count=1)
    with pytest.raises(dc.RequestError, match=said) as caught:
        shrink(gm, source, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_ties_that_the_source_does_not_have(tmp_path: Path) -> None:
    tensors = state(trained(tied=True))
    tensors["head.weight"][3, 4] += 1
    source = write_shards(tmp_path / "source", tensors)
    with pytest.raises(dc.RequestError, match=r"tied in the model .* \(embed\.weight and head\.weight\)"):
        shrink(empty(tied=True), source, tmp_path / "out")


def test_computed_buffers_without_values(source: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        gm = dc.capture(LanguageModel().eval(), {"tokens": TOKENS["tokens"].to("meta")})
    with pytest.raises(dc.RequestError, match=r"capture_empty \(scale\)"):
        shrink(gm, source, tmp_path / "out")


def test_wrong_requests(gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nothing").mkdir()
    frozen = next(axis.name for axis in dc.infer_axes(gm) if not axis.prunable)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: shrink(gm, tmp_path / "no", tmp_path / "out"), "there is no file or folder"),
        (lambda: shrink(gm, tmp_path / "nothing", tmp_path / "out"), "holds neither"),
        (lambda: shrink(gm, tmp_path / "file", tmp_path / "out"), "no safetensors file"),
        (lambda: shrink(gm, source, source), "is the folder of the source"),
        (lambda: shrink(gm, source, tmp_path / "file"), "is a file"),
        (lambda: shrink(gm, source, tmp_path / "out", max_shard_bytes=0), "max_shard_bytes"),
        (lambda: dc.shrink_checkpoint(gm, {"nope": [0]}, source, tmp_path / "out"), "no axis named"),
        (lambda: dc.shrink_checkpoint(gm, {frozen: [0]}, source, tmp_path / "out"), "cannot shrink"),
    ]
    for call, said in calls:
        with pytest.raises(dc.RequestError, match=said):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nothing", "source"]


def test_damaged_sources(gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    shard = source / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    cases: list[tuple[Path, bytes, str]] = [
        (shard, data[:-1], "cut short or damaged"),
        (shard, data[:4], "cut short or damaged"),
        (source / INDEX, b"{", "holds no weight_map"),
        (source / INDEX, json.dumps(index).replace("00003", "00004").encode(), "there is no file"),
        (source / INDEX, json.dumps({"weight_map": {"x": "../source.safetensors"}}).encode(), "no plain file name"),
        (source / INDEX, json.dumps({"weight_map": index["weight_map"] | {"x": shard.name}}).encode(), "not there"),
    ]
    for path, broken, said in cases:
        good = path.read_bytes()
        path.write_bytes(broken)
        with pytest.raises(dc.RequestError, match=said) as caught:
            shrink(gm, source, tmp_path / "out")
        assert "\n" not in str(caught.value)
        path.write_bytes(good)
    assert not (tmp_path / "out").exists()


def test_damaged_results_are_not_loaded(gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    out = shrink(gm, source, tmp_path / "out")
    shard = sorted(out.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(dc.RequestError, match="does not match its SHA-256"):
        dc.load(out)
    shard.unlink()
    with pytest.raises(dc.RequestError, match="there is no file"):
        dc.load(out)
    (out / INDEX).unlink()
    with pytest.raises(dc.RequestError, match="is unfinished"):
        dc.load(out)


def test_the_graph_names_no_files_elsewhere(gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    out = shrink(gm, source, tmp_path / "out")
    document, constants = tensor_file.read_file(out / "graph.dyn")
    document["shards"] = {"../source/model-00001-of-00003.safetensors": "0"}
    (out / "graph.dyn").unlink()
    tensor_file.write_file(out / "graph.dyn", document, constants)
    with pytest.raises(dc.RequestError, match="names no shards"):
        dc.load(out)
