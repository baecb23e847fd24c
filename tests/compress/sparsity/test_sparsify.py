"""Learned sparsity: targets, surgery held to the mask, controls, wrong requests."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from data import counting, stripes
from flat_options import flat
from nets import SmallResNet, Words, seeded
from torch.nn import functional as F
from trained import SPARSIFY, accuracy, same

import dyncompress as dc
from dyncompress.compress.sparsity.retrain import reinit, rewind
from dyncompress.compress.training.surgery import carry_over, operate
from dyncompress.passes.graph.cost import count_macs, count_parameters
from dyncompress.passes.graph.restoring import evaluating

TWO = partial(SmallResNet, branches=2)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({"macs": 0.5}, count_macs),
        ({"params": 0.4, "kinds": ("channels",)}, count_parameters),
        ({"macs": 0.6, "kinds": ("axes", "layers", "filters"), "ema": 0.9}, count_macs),
        ({"macs": 0.5, "optimizer": partial(torch.optim.SGD, momentum=0.9), "lr": 0.05}, count_macs),
        ({"macs": 0.5, "round_to": 4}, count_macs),
        ({"macs": 0.7, "epochs": 1, "finetune": 0, "lr": 1e-4}, count_macs),  # too short to learn anything: all is cut
    ],
)
def test_targets_are_met(change: dict[str, Any], count: Any) -> None:
    data, model = stripes(), seeded(TWO if "kinds" in change else SmallResNet)
    gm = dc.capture(model, data.tensors[0][:2])
    before = copy.deepcopy(gm.state_dict())
    small = flat(dc.sparsify)(gm, data, **SPARSIFY | change)
    report = small.meta["info"]["sparsify"]
    target = change.get("macs") or change["params"]
    assert report["left"] == pytest.approx(count(small) / count(gm))
    assert report["left"] <= target and report["learned"] >= report["left"]
    assert all(s["difference"] <= 1e-5 for s in report["surgeries"])
    if change.get("epochs") == 1:
        assert report["learned"] == 1.0 and report["left"] > target - 0.1
    else:
        assert report["learned"] < 1 and accuracy(small, data) > 0.9
    assert all(torch.equal(before[name], tensor) for name, tensor in gm.state_dict().items())


@pytest.mark.parametrize("goal", [{"macs": 0.4}, {"strength": 1.0}])
def test_counts_are_multiples_at_every_surgery(goal: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    from dyncompress.compress.sparsity import sparsifier

    counts: list[set[int]] = []

    def seen(gm: torch.fx.GraphModule, keep: Any, **options: Any) -> Any:
        counts.append({len(kept) for kept in keep.values()})
        return operate(gm, keep, **options)

    monkeypatch.setattr(sparsifier, "operate", seen)
    flat(dc.sparsify)(seeded(), stripes(), **SPARSIFY | {**goal, "round_to": 4, "shrink_every": 1})
    assert len(counts) > 1 and all(count % 4 == 0 for some in counts for count in some)


def test_every_surgery_equals_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from dyncompress.compress.sparsity import sparsifier

    seen = []

    def compared(gm: torch.fx.GraphModule, keep: Any, **options: Any) -> Any:
        surgery = operate(gm, keep, **options)
        x = data.tensors[0][:8]
        with torch.no_grad(), evaluating(surgery.model):
            expected, ours = dc.mask(gm, keep).eval()(x), surgery.model(x)
        seen.append(float((expected - ours).abs().max() / expected.abs().max()))
        zeroed = dict(dc.mask(gm, keep).named_parameters())
        learned.append(all(torch.equal(p, zeroed[name]) for name, p in gm.named_parameters()))
        return surgery

    monkeypatch.setattr(sparsifier, "operate", compared)
    for kind, data, kinds in ((TWO, stripes(), ("axes", "layers")), (Words, counting(), ("axes",))):
        learned: list[bool] = []
        flat(dc.sparsify)(seeded(kind), data, params=0.5, shrink_every=1, kinds=kinds, **SPARSIFY)
        assert learned and learned[0]  # what lasso zeroed, not what the surgery zeroes
    assert max(seen) < 1e-5


def test_language_models_and_strength_by_hand() -> None:
    data = counting()
    model = seeded(Words)
    weak = flat(dc.sparsify)(model, data, strength=0.2, **SPARSIFY)
    strong = flat(dc.sparsify)(model, data, strength=4.0, kinds=("hidden states",), floor=0.25, **SPARSIFY)
    assert count_parameters(strong) < count_parameters(weak) <= count_parameters(model)
    assert strong.embed.embedding_dim == 8 and strong.lstm.hidden_size == 3  # as its floor says
    assert {s["strength"] for s in strong.meta["info"]["sparsify"]["surgeries"]} == {4.0}
    assert accuracy(weak, data) > 0.9


@pytest.mark.parametrize("kind", ["filters", "shapes"])
def test_zeros_that_stay_in_a_weight_outlive_the_training_after_them(kind: str) -> None:
    small = flat(dc.sparsify)(seeded(), stripes(), macs=0.6, kinds=("axes", kind), ema=0.9, **SPARSIFY)
    zeros = [weight.flatten(1) == 0 for name, weight in small.named_parameters() if weight.dim() > 1]
    shares = [float(zero.all(1 if kind == "filters" else 0).double().mean()) for zero in zeros]
    assert 0 < max(shares) < 0.6
    assert accuracy(small, stripes()) > 0.9


def test_strength_from_the_first_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from dyncompress.compress.sparsity.group_lasso import GroupLasso
    from dyncompress.compress.sparsity.sparsifier import Sparsifier

    steps: list[float] = []
    monkeypatch.setattr(GroupLasso, "proximal_", lambda self, step: steps.append(step) or ~self.live)
    found: list[float] = []

    class Watched(Sparsifier):
        def after_step(self, step: int) -> None:
            penalty = float(self.lasso.penalty().detach())
            super().after_step(step)
            if step == 0:
                found.append(self.strength * penalty / float(self._first_loss))  # type: ignore[arg-type]

    monkeypatch.setattr("dyncompress.compress.sparsity.sparsify.Sparsifier", Watched)
    flat(dc.sparsify)(seeded(), stripes(), penalty_ratio=0.2, **SPARSIFY)
    assert found == [pytest.approx(0.2)] and len(steps) == 4 * 6
    assert min(steps[: 3 * 6]) > 0 and steps[3 * 6 :] == [0.0] * 6  # then zeros are held only


@pytest.mark.parametrize("make", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9), torch.optim.RMSprop])
def test_training_goes_on_after_surgery_as_if_the_zeros_were_still_there(make: Any) -> None:
    """Groups of zeros get no gradient: the steps of the small model are those of the large one, moments and all."""
    x, y = stripes(32).tensors[0].double(), stripes(32).tensors[1]
    whole = dc.capture(seeded(TWO).double(), x[:2])
    keep = {"stem.weight:0": [0, 2, 3, 7, 8, 9, 11], "blocks.0.0.weight:0": [1, 2, 5], "blocks.1.0.weight:0": [0, 9]}

    def trained(cut: bool) -> Any:
        model: Any = dc.mask(whole, keep).train()
        rest = [p for name, p in model.named_parameters() if name != "head.bias"]
        optimizer = make([{"params": rest}, {"params": [model.head.bias], "lr": 3e-3}], lr=1e-2)
        for step in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step == 2 and cut:
                surgery = operate(model, keep)
                carry_over(optimizer, model, surgery)
                model = surgery.model
        return model

    large, small = trained(cut=False), trained(cut=True)
    scheme = dc.plan(whole, keep)
    assert small.stem.out_channels == 7 and not torch.equal(small.head.bias, whole.head.bias)
    for name, expected in scheme(large.state_dict()).items():
        torch.testing.assert_close(small.state_dict()[name], expected, rtol=1e-8, atol=1e-11)


def test_an_optimiser_whose_state_has_no_slices_is_refused() -> None:
    gm = dc.capture(seeded(), stripes().tensors[0][:2]).train()
    optimizer = torch.optim.Adafactor(gm.parameters())
    gm(stripes().tensors[0][:4]).sum().backward()
    optimizer.step()
    with pytest.raises(dc.RequestError, match="cannot be sliced"):
        carry_over(optimizer, gm, operate(gm, {"stem.weight:0": [0, 1]}))


def test_controls() -> None:
    data = stripes()
    early = dc.capture(seeded(), data.tensors[0][:2])
    small = flat(dc.sparsify)(early, data, macs=0.5, kinds=("axes", "layers"), **SPARSIFY)
    kept = {name: a["kept"] for name, a in small.meta["info"]["sparsify"]["kept"].items() if a["kept"]}
    ticket = rewind(small, early)
    rows, columns = kept["blocks.0.0.weight:0"], kept["stem.weight:0"]
    assert torch.equal(
        ticket.get_parameter("blocks.0.0.weight"), early.get_parameter("blocks.0.0.weight")[rows][:, columns]
    )
    assert torch.equal(ticket.head.bias, early.head.bias) and not torch.equal(ticket.head.bias, small.head.bias)
    one, two, three = reinit(small), reinit(small), reinit(small, seed=1)
    assert same(one, two) and not same(one, three) and not same(one, ticket)
    assert all(a.shape == b.shape for a, b in zip(one.parameters(), small.parameters(), strict=True))
    bound = one.stem.weight[0].numel() ** -0.5
    assert one.stem.weight.abs().max() <= bound < 1.2 * one.stem.weight.abs().max()
    with pytest.raises(dc.RequestError, match="no report"):
        rewind(early, early)


def test_bf16() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        small = flat(dc.sparsify)(seeded(), stripes(), macs=0.5, mixed_precision="bf16", **SPARSIFY)
        report = small.meta["info"]["sparsify"]
        assert report["left"] <= 0.5 and report["learned"] < 1 and accuracy(small, stripes()) > 0.9
        assert {p.dtype for p in small.parameters()} == {torch.float32}
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "exactly one of macs, params, strength, penalty_ratio"),
        ({"macs": 0.5, "strength": 0.1}, "exactly one"),
        ({"macs": 1.5}, "at most 1"),
        ({"macs": 0.01, "floor": 0.5}, "out of reach"),
        ({"macs": 0.5, "kinds": ("filters",)}, "taken out"),
        ({"macs": 0.5, "kinds": ("rows",)}, "unknown kind"),
        ({"macs": 0.5, "ignore": ("nope",)}, "nope"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"penalty_ratio": -1.0}, "penalty_ratio"),
        ({"macs": 0.5, "epochs": 0}, "epochs"),
        ({"macs": 0.5, "finetune": -1}, "finetune"),
        ({"macs": 0.5, "shrink_every": 0}, "shrink_every"),
        ({"macs": 0.5, "ema": 1.0}, "ema"),
        ({"macs": 0.5, "round_to": 0}, "round_to"),
        ({"macs": 0.5, "resume": True}, "run_dir"),
    ],
)
def test_wrong_requests(change: dict[str, Any], said: str) -> None:
    with pytest.raises(dc.RequestError, match=said):
        flat(dc.sparsify)(seeded(), stripes(8), **change)
