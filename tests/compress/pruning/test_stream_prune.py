"""Pruning a checkpoint from its file: scores by hand, the choice of pruning in memory, resuming, the command line."""

import json
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import flat
from nets import OneConv
from shard_files import INDEX, captured, empty, state, trained, write_shards
from torch import fx

import dyncompress as dc
from dyncompress.cli.main import run
from dyncompress.compress.pruning import prune_checkpoint as stream_prune
from dyncompress.compress.pruning.prune_checkpoint import stream_l2_scores
from dyncompress.passes.graph.cost import count_macs, count_parameters
from dyncompress.runtime.files import shards
from dyncompress.runtime.files.shards import Source
from dyncompress.runtime.sharded.match_tensors import match


@pytest.fixture
def gm() -> fx.GraphModule:
    return empty()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "source", state(trained()))


def prune(gm: fx.GraphModule, source: Path, out: Path, **options: Any) -> Path:
    return flat(dc.prune_checkpoint)(
        gm, source, out, **{"progress": False, "resume": True, "max_shard_bytes": 9000, **options}
    )


def scores_of(gm: fx.GraphModule, path: Path) -> dict[str, torch.Tensor]:
    source = Source(path)
    return stream_l2_scores(dc.infer_axes(gm), source, match(gm, source))


@pytest.mark.parametrize("piece_bytes", [1, shards.PIECE_BYTES])
def test_scores_by_hand(piece_bytes: int, gm: fx.GraphModule, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", piece_bytes)
    scores, model = scores_of(gm, source), trained()
    layer = model.layers[1]
    mlp = [
        layer.gate.weight[i].square().sum() + layer.up.weight[i].square().sum() + layer.down.weight[:, i].square().sum()
        for i in range(72)
    ]
    torch.testing.assert_close(scores["layers.1.gate.weight:0"].float(), torch.stack(mlp).sqrt())
    branch = sum(
        p.square().sum() for p in [layer.norm2.weight, *(m.weight for m in (layer.gate, layer.up, layer.down))]
    )
    assert scores["layers.1:branch.1"].shape == (1,)
    torch.testing.assert_close(scores["layers.1:branch.1"].float(), branch.sqrt()[None])


def test_sums_of_half_precision_are_not_half_precise(tmp_path: Path) -> None:
    model = trained(dtype=torch.bfloat16)
    scores = scores_of(empty(dtype=torch.bfloat16), write_shards(tmp_path / "source", state(model)))
    gate, up, down = (getattr(model.layers[0], name).weight.double() for name in ("gate", "up", "down"))
    by_hand = (gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)).sqrt()
    torch.testing.assert_close(scores["layers.0.gate.weight:0"], by_hand, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {"params": 0.5}),
        (True, {"macs": 0.6, "round_to": 4}),
        (False, {"ratio": 0.7, "ignore": ["embed"], "floor": 0.3, "exact": True}),
    ],
)
def test_the_choice_of_pruning_in_memory(tied: bool, options: dict[str, Any], tmp_path: Path) -> None:
    source = write_shards(tmp_path / "source", state(trained(tied)))
    small = dc.load(flat(prune)(empty(tied), source, tmp_path / "out", **options))
    want = flat(dc.prune)(captured(tied), **options)
    for (name, got), (same, reference) in zip(small.named_parameters(), want.named_parameters(), strict=True):
        assert name == same
        torch.testing.assert_close(got, reference, rtol=0, atol=0)
    count = {"params": count_parameters, "macs": count_macs}.get(next(iter(options)))
    if count is not None:
        (target,) = (value for name, value in options.items() if name in ("params", "macs"))
        assert target - 0.05 <= count(small) / count(captured(tied)) <= target


def test_an_interrupted_run_does_not_rank_again(
    gm: fx.GraphModule, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    out, again = tmp_path / "out", tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(stream_prune, "shrink_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(gm, source, out, params=0.5)
    assert [path.name for path in out.iterdir()] == ["kept.json"]
    with pytest.raises(dc.RequestError, match=r"holds another run \(macs, params differ\)"):
        prune(gm, source, out, macs=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(stream_prune, "stream_l2_scores", stop)
        prune(gm, source, out, params=0.5)
        before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        prune(gm, source, out, params=0.5)  # finished already
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    prune(gm, source, again, params=0.5)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    with pytest.raises(dc.RequestError, match="holds another run"):
        prune(gm, source, out, macs=0.5)
    with pytest.raises(dc.RequestError, match="holds a model already"):
        prune(gm, source, out, macs=0.5, resume=False)
    prune(gm, source, out, macs=0.5, overwrite=True)
    assert "macs" in json.loads((out / "kept.json").read_text())["request"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one of ratio, macs, params, bytes"),
        ({"params": 0.5, "macs": 0.5}, "exactly one"),
        ({"params": 1.5}, "at most 1"),
        ({"params": 0.01}, "out of reach"),
        ({"params": 0.5, "ignore": ["nope"]}, "nope"),
        ({"params": 0.5, "scope": "nope"}, "unknown scope"),
    ],
)
def test_wrong_requests(options: dict[str, Any], said: str, gm: fx.GraphModule, source: Path, tmp_path: Path) -> None:
    with pytest.raises(dc.RequestError, match=said):
        flat(prune)(gm, source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float, gm: fx.GraphModule, tmp_path: Path) -> None:
    tensors = state(trained())
    tensors["layers.1.up.weight"][3, 7] = bad
    with pytest.raises(dc.RequestError, match=r"layers\.1\.up\.weight holds NaN or infinite"):
        prune(gm, write_shards(tmp_path / "source", tensors), tmp_path / "out", params=0.5)


# --- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of OneConv in half precisionin the working directory."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in OneConv(24).state_dict().items()}
    return write_shards(tmp_path / "ckpt", halves, count=2)


ARCH = "--arch nets:OneConv(width=24) --input-shape 1,8,8 --stream"


def test_prune_stream(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(f"prune ckpt {ARCH} --params 0.5 --out out --json")) == 0
    captured = capfd.readouterr()
    report = json.loads(captured.out)
    small = dc.load("out")
    assert report["model"] == report["run_dir"] == "out" and report["onnx"] is None
    assert report["pruned"]["parameters"] == sum(p.numel() for p in small.parameters())
    assert report["static"]["parameters"] == sum(p.numel() for p in OneConv(24).parameters())
    assert report["axes"] == [
        {"name": "stem.weight:0", "kind": "channels", "before": 24, "after": small.fc.in_features}
    ]
    assert small.stem.weight.dtype == torch.float16 and small.norm.num_batches_tracked.dtype == torch.int64
    assert "stem.weight:0" in captured.err and "stem.weight:0" in Path("out/table.txt").read_text()
    assert run(shlex.split(f"prune ckpt {ARCH} --params 0.5 --out out --json --resume")) == 0
    assert json.loads(capfd.readouterr().out) == report
    assert run(["inspect", "out", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["parameters"] == report["pruned"]["parameters"]


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        (f"prune ckpt {ARCH}", 2, "exactly one"),
        (f"prune nope {ARCH} --params 0.5", 2, "there is no file or folder nope"),
        ("prune ckpt --stream --params 0.5", 2, "needs --arch"),
        (f"prune ckpt {ARCH} --params 0.5 --data digits", 2, "leave --data out"),
        (f"prune ckpt {ARCH} --params 0.5 --finetune 1", 2, "does not go with --finetune"),
        (f"prune ckpt {ARCH} --params 0.5 --importance taylor", 2, "does not go with --importance"),
        (f"prune ckpt {ARCH} --params 0.5 --out ckpt", 2, "ckpt is not empty"),
        (f"prune ckpt {ARCH} --params 0.5 --out ckpt --overwrite", 2, "is the folder of the source"),
        ("prune zoo:vgg-digits --params 0.5 --drop x", 2, "--drop goes with --stream"),
        ("prune ckpt --arch zoo:vgg-digits --params 0.5 --stream", 2, "does not fit the model"),
    ],
)
def test_mistakes_end_in_one_line(
    command: str, status: int, says: str, images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in images.iterdir())
    assert run(shlex.split(command)) == status
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and says in said[0]
    assert sorted(path.name for path in images.iterdir()) == before and not Path("runs").exists()


def test_ctrl_c_says_how_to_go_on(
    images: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stream_prune, "shrink_checkpoint", stop)
        assert run(shlex.split(f"prune ckpt {ARCH} --params 0.5")) == 130
    line = capfd.readouterr().err.strip()
    assert line.startswith("dyncompress: interrupted: continue with dyncompress prune ckpt")
    assert not Path("runs/prune-ckpt-1", INDEX).exists()
    assert run(shlex.split(line.partition("continue with dyncompress ")[2])) == 0
    assert dc.load("runs/prune-ckpt-1").fc.out_features == 3


def test_transformers_configurations(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # A CPU-only torch cannot load torchvision's compiled operators, which transformers imports where it is installed.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    source = write_shards(tmp_path / "source", state(model, "lm_head.weight"), count=2)
    config.save_pretrained(source)
    for arch in (source, source / "config.json"):
        out = tmp_path / f"out-{arch.name}"
        assert (
            run(["prune", str(source), "--arch", f"hf:{arch}", "--params", "0.6", "--stream", "--out", str(out)]) == 0
        )
        small = dc.load(out)
        logits = small(input_ids=torch.ones(2, 7, dtype=torch.int64))["logits"]
        assert logits.shape == (2, 7, 64) and logits.dtype == torch.bfloat16 and logits.isfinite().all()
        assert small.lm_head.weight is small.model.embed_tokens.weight
