"""Python and the command line: the same verb with the same options gives the same tensors, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from data import make_stripes
from nets import small_resnet
from torch import nn
from trained import same

import dyncompress as dc
from dyncompress.cli.main import run

NET, DATA = "nets:small_resnet", ("--data", "data:make_stripes", "--device", "cpu")
RUN = dc.Run(device="cpu", progress=False)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def commanded(*words: str) -> nn.Module:
    """What a command leaves in its folder."""
    assert run([*words, *DATA, "--out", "out"]) == 0
    [path] = Path("out").glob("model*.safetensors")
    return dc.load(path)


def test_prune() -> None:
    """With data, the statistics of what is left are measured anew after one cut, too."""
    asked = commanded("prune", NET, "--macs", "0.5", "--round-to", "2", "--seed", "1")
    limits, seeded = dc.Limits(round_to=2), dc.Run(device="cpu", seed=1)
    small = dc.prune(small_resnet(), data=make_stripes(), macs=0.5, limits=limits, run=seeded)
    assert same(small, asked)
    assert same(small, dc.prune(small_resnet(), data=make_stripes().train, macs=0.5, limits=limits, run=seeded))
    without = dc.prune(small_resnet(), make_stripes().train[0][0][None], macs=0.5, limits=limits)
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, without.state_dict()[name]) != ("running" in name or "num_batches" in name), name


def test_prune_and_train() -> None:
    words = "--params 0.6 --steps 2 --finetune 1 --distill 0.5 --importance taylor --lr 1e-2 --batch-size 32"
    training, cuts = dc.Training(lr=1e-2, batch_size=32), dc.Cuts(steps=2, distill=0.5)
    options: dict[str, Any] = {"params": 0.6, "finetune": 1, "importance": "taylor", "cuts": cuts}
    small = dc.prune(small_resnet(), data=make_stripes(), **options, training=training, run=RUN)
    assert same(small, commanded("prune", NET, *words.split()))


def test_sparsify() -> None:
    words = "--macs 0.5 --epochs 2 --finetune 1 --batch-size 32 --shrink-every 1 --optimizer sgd"
    training, lasso = dc.Training(epochs=2, batch_size=32, optimizer="sgd"), dc.Lasso(shrink_every=1)
    small = dc.sparsify(small_resnet(), make_stripes(), macs=0.5, finetune=1, lasso=lasso, training=training, run=RUN)
    assert same(small, commanded("sparsify", NET, *words.split()))


def test_retrain() -> None:
    small = dc.prune(small_resnet(), data=make_stripes(), macs=0.5)
    dc.save(small, "small.safetensors")
    early = dc.capture(small_resnet(), make_stripes().train[0][0][None])
    ticket = dc.retrain(small, make_stripes(), early=early, training=dc.Training(epochs=1, batch_size=32), run=RUN)
    words = f"small.safetensors --early {NET} --epochs 1 --batch-size 32"
    assert same(ticket, commanded("retrain", *words.split()))


def test_convert() -> None:
    words = "--exits 1 --epochs 1 --batch-size 32 --no-freeze-trunk --trunk-lr 0.1 --rule entropy --max-loss 0.1"
    made = dc.convert(
        small_resnet(), data=make_stripes(), exits=1, freeze_trunk=False, max_loss=0.1,
        leaving=dc.Leaving(rule="entropy"), training=dc.Training(epochs=1, batch_size=32, trunk_lr=0.1), run=RUN,
    )  # fmt: skip
    asked = commanded("convert", NET, *words.split())
    assert isinstance(asked, dc.DynamicModel)
    assert same(made, asked) and made.policy == asked.policy


def test_gate() -> None:
    words = "--macs 0.9 --epochs 1 --batch-size 32 --settle 0"
    made = dc.gate(
        small_resnet(), data=make_stripes(), macs=0.9, settle=0.0,
        training=dc.Training(epochs=1, batch_size=32), run=RUN,
    )  # fmt: skip
    assert same(made, commanded("gate", NET, *words.split()))


def test_baselines() -> None:
    """Low rank, and then zeros, each trained: as steps of a recipe in a file, and in Python."""
    options = "finetune: 1, lr: 1e-2, batch_size: 32"
    steps = f"[low-rank: {{params: 0.6, {options}}}, unstructured: {{sparsity: 0.4, {options}}}]"
    Path("r.yaml").write_text(f"model: {NET}\ndata: {DATA[1]}\ndevice: cpu\nsteps: {steps}\n")
    training = dc.Training(lr=1e-2, batch_size=32)
    thin = dc.low_rank(small_resnet(), data=make_stripes(), params=0.6, finetune=1, training=training, run=RUN)
    both = dc.prune_weights(thin, data=make_stripes(), sparsity=0.4, finetune=1, training=training, run=RUN)
    report = dc.run_recipe("r.yaml", "python")
    assert same(both, dc.load(report.model))
    assert run(["run", "r.yaml", "--out", "command"]) == 0
    assert same(both, dc.load("command/model.safetensors"))
    with pytest.raises(dc.RequestError, match="python is not empty"):
        dc.run_recipe("r.yaml", "python")
    assert dc.run_recipe(dc.read_recipe(Path("r.yaml")), "python", resume=True) == report


def test_compare() -> None:
    found = dc.compare(
        small_resnet(), make_stripes().train, make_stripes().test,
        shares=[0.5], training=dc.Training(batch_size=32), run=RUN,
    )  # fmt: skip
    assert run(["compare", NET, *DATA, "--shares", "0.5", "--batch-size", "32", "--out", "out"]) == 0
    for name in ("structured-0.5", "low-rank-0.5", "unstructured-0.5"):
        assert same(found.models[name], dc.load(f"out/{name}.safetensors")), name
