"""Checkpoints larger than memory: the same model as shrinking in memory, and never a half-written file."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stream_models import INDEX, TOKENS, Tiny, captured, contents, empty, some, state, trained, write_shards
from torch import Tensor, fx

import dyncompress as dc
from dyncompress.runtime.files import shards, tensor_file
from dyncompress.runtime.sharded import shard_writer

GB = 10**9
STEP = 7  # of the events at which a run is killed; shards have other numbers of events, so that all kinds occur


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    return empty()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "source", state(trained()))


def shrink(gm: fx.GraphModule, source: Path, out: Path, **options: Any) -> Path:
    return dc.shrink_checkpoint(gm, some(gm), source, out, **({"progress": False, "max_shard_bytes": 9000} | options))


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
    again = Tiny()
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
    assert not Tiny().embed.weight.is_meta  # nothing is left patched


# --- interruptions -----------------------------------------------------------------------------------------------


def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(
    gm: fx.GraphModule, source: Path, tmp_path: Path
) -> None:
    whole = contents(shrink(gm, source, tmp_path / "whole"))
    worker = subprocess.run(
        [sys.executable, __file__, str(source), str(tmp_path)], capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    killed, events = json.loads(worker.stdout)
    assert len(killed) >= 8 and killed[-1] < events <= killed[-1] + STEP  # all that were to be killed were
    finished = set()
    for at in killed:
        left = tmp_path / f"killed-{at}"
        found = contents(left)
        assert INDEX not in found or set(whole) <= set(found)
        shown = {name: data for name, data in found.items() if not name.startswith(".")}
        shown.pop("unfinished.json", None)
        assert all(whole[name] == data for name, data in shown.items())  # no name without all of its bytes
        done = json.loads((left / "unfinished.json").read_text())["done"] if "unfinished.json" in found else {}
        finished.add(len(done))
        before = {name: (left / name).stat().st_ino for name in done}
        if INDEX not in found:  # not yet a model
            with pytest.raises(dc.RequestError, match=r"is unfinished|is a directory|there is no file"):
                dc.load(left)
        if INDEX not in found or "unfinished.json" in found:
            assert contents(shrink(gm, source, left)) == whole
        else:
            assert found == whole
        assert {name: (left / name).stat().st_ino for name in done} == before  # what was done is not done again
    assert len(finished) > 3


def die_at(event: int, source: Path, out: Path, gm: fx.GraphModule) -> tuple[bool, int]:
    """Shrinks in a process that kills itself at the given read, sync or rename; whether it died, and events seen."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        seen = 0

        def count(function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any) -> Any:
                nonlocal seen
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
                return function(*args)

            return counted

        shards._fill = count(shards._fill)
        shard_writer.os = namedtuple("Os", "fsync replace open close O_RDONLY")(  # type: ignore[assignment]
            count(os.fsync), count(os.replace), os.open, os.close, os.O_RDONLY
        )
        shrink(gm, source, out)
        os.write(writing, struct.pack("i", seen))
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    died = os.WIFSIGNALED(status)
    events = 0 if died else struct.unpack("i", os.read(reading, 4))[0]
    os.close(reading)
    return died, events


def kill_everywhere() -> None:
    """Run as a program: one run killed at each STEP-th event; prints which, and how many events a whole run has."""
    torch.set_num_threads(1)
    source, folder, gm = Path(sys.argv[1]), Path(sys.argv[2]), empty()
    killed, at = [], 0
    while (outcome := die_at(at, source, folder / f"killed-{at}", gm))[0]:
        killed.append(at)
        at += STEP
    shutil.rmtree(folder / f"killed-{at}")
    print(json.dumps([killed, outcome[1]]))


def test_another_request_does_not_go_on(gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(gm, source, out)
    left = contents(out)
    keep = {next(iter(some(gm))): [0]}
    for changed in (
        lambda **o: dc.shrink_checkpoint(gm, keep, source, out, progress=False, **o),
        lambda **o: shrink(gm, source, out, max_shard_bytes=5000, **o),
    ):
        with pytest.raises(dc.RequestError, match="unfinished run of another"):
            changed()
    with pytest.raises(dc.RequestError, match="unfinished run: resume"):
        shrink(gm, source, out, resume=False)
    assert contents(out) == left
    fresh = contents(shrink(gm, source, tmp_path / "fresh", max_shard_bytes=5000))
    assert contents(shrink(gm, source, out, max_shard_bytes=5000, overwrite=True)) == fresh


def interrupt(gm: fx.GraphModule, source: Path, out: Path) -> None:
    """Stops a run after its second shard."""
    with pytest.MonkeyPatch.context() as patch:
        real, count = os.replace, 0

        def replace(*args: Any) -> None:
            nonlocal count
            count += str(args[1]).endswith(".safetensors")
            if count == 3:
                raise KeyboardInterrupt
            real(*args)

        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            shrink(gm, source, out)
    assert len(list(out.glob("*.safetensors"))) == 2 and not list(out.glob(".*"))


def test_a_finished_model_is_not_replaced_unless_asked(gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    out = shrink(gm, source, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(dc.RequestError, match="holds a model already"):
        shrink(gm, source, out)
    assert contents(out) == before
    after = contents(shrink(gm, source, out, max_shard_bytes=GB, overwrite=True))
    assert {"notes.txt", "model-00001-of-00001.safetensors", INDEX, "graph.dyn"} == set(after)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(
    step: str, gm: fx.GraphModule, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = contents(shrink(gm, source, tmp_path / "whole")), tmp_path / "out"
    real, calls = getattr(os, step), 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, step, full)
    with pytest.raises(dc.DynCompressError, match=r"cannot write .*No space left on device; free some space") as caught:
        shrink(gm, source, out)
    assert "\n" not in str(caught.value)
    left = contents(out)
    assert left.pop("unfinished.json") and all(whole[name] == data for name, data in left.items())
    assert contents(shrink(gm, source, out)) == whole


def test_too_small_a_disk_is_refused_before_anything_is_written(
    gm: fx.GraphModule, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(GB, GB, 100))
    with pytest.raises(dc.DynCompressError, match=r"needs 0\.00 GB, but its disk has 0\.00 GB"):
        shrink(gm, source, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


# --- what is wrong is said in one line ---------------------------------------------------------------------------


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


def test_unused_tensors_can_be_dropped(gm: fx.GraphModule, tmp_path: Path) -> None:
    more = {f"layers.{i}.rotary.inv_freq": torch.ones(3) for i in range(2)}
    source = write_shards(tmp_path / "source", state(trained()) | more)
    out = shrink(gm, source, tmp_path / "out", drop=["*.inv_freq"])
    equal(tensors_of(dc.load(out)), tensors_of(expected(captured())))
    with pytest.raises(dc.RequestError, match=r"1 missing \(norm\.bias\)"):
        shrink(gm, source, tmp_path / "other", drop=["*.inv_freq", "norm.bias"])


def test_ties_that_the_source_does_not_have(tmp_path: Path) -> None:
    tensors = state(trained(tied=True))
    tensors["head.weight"][3, 4] += 1
    source = write_shards(tmp_path / "source", tensors)
    with pytest.raises(dc.RequestError, match=r"tied in the model .* \(embed\.weight and head\.weight\)"):
        shrink(empty(tied=True), source, tmp_path / "out")


def test_computed_buffers_without_values(source: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        gm = dc.capture(Tiny().eval(), {"tokens": TOKENS["tokens"].to("meta")})
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


if __name__ == "__main__":
    kill_everywhere()
