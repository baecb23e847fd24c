"""Which exits a search keeps: against every subset, and end to end through `convert`."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import digits
from flat_options import flat
from torch import Tensor, nn
from trained import QUIET, accuracy_and_macs, info, on_digits

import dyncompress as dc
from dyncompress.compress.exits.convert import convert
from dyncompress.compress.exits.which_exits import choose_subset
from dyncompress.compress.recipes.recipe import read_recipe
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.exits.keep_exits import KeepExits
from dyncompress.passes.graph.meta import exits_of
from dyncompress.runtime.predict.dynamic import DynamicModel


def mean_cost(kept: tuple[int, ...], leaves_at: np.ndarray, stage: float, heads: np.ndarray) -> float:
    """Samples leave at the first kept exit at or after their own; plain loop."""
    total = 0.0
    for own in leaves_at:
        at = next((k for k in kept if k >= own), None)
        reached = [k for k in kept if at is None or k <= at]
        depth = len(heads) + 1 if at is None else at + 1
        total += stage * depth + sum(heads[k] for k in reached)
    return total / len(leaves_at) / (stage * (len(heads) + 1))


@pytest.mark.parametrize("seed", range(6))
def test_the_subset_is_nearly_the_best_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    leaves_at, heads = random.integers(0, 7, 60), random.uniform(0, 6, 6)

    def value(kept: Any) -> tuple[float, float]:
        cost = mean_cost(tuple(kept), leaves_at, 10, heads)
        return cost, cost

    kept = choose_subset(6, value, 0.001)
    best = min(value(subset)[0] for n in range(7) for subset in combinations(range(6), n))
    assert value(kept)[0] <= best + 0.03 and value(kept)[0] < value(())[0]
    for k in kept:  # each one pays
        assert value([other for other in kept if other != k])[0] >= value(kept)[0] + 0.001


def test_an_exit_that_does_not_pay_is_not_kept() -> None:
    leaves_at, heads = np.array([0] * 30 + [2] * 30), np.array([1.0, 1.0, 40.0])

    def value(kept: Any) -> tuple[float, float]:
        cost = mean_cost(tuple(kept), leaves_at, 10, heads)
        return cost, cost

    assert choose_subset(3, value, 0.01) == [0]  # 1 answers nobody, 2 costs more than the rest of the model
    assert choose_subset(3, value, 0.5) == []


def test_kept_exits_answer_as_before() -> None:
    gm = InsertExits("every")(dc.capture(on_digits(), torch.randn(2, 1, 8, 8))).gm.eval()
    assert len(exits_of(gm)) > 2
    small, x = KeepExits((1,))(gm).gm, torch.randn(3, 1, 8, 8)
    assert exits_of(small) == exits_of(gm)[1:2] and len(gm(x)) > len(small(x)) == 2
    assert torch.equal(small(x)[0], gm(x)[1]) and torch.equal(small(x)[1], gm(x)[-1])
    assert [name for name, _ in small.exits.named_children()] == ["1"]


def test_convert_searches() -> None:
    model = flat(convert)(on_digits(), exits="search", data=digits(), epochs=3, batch_size=64, max_loss=0.01, **QUIET)
    found = info(model)["exit_search"]
    assert model.exits == found["kept"] and set(found["kept"]) <= set(found["candidates"])
    accuracy, macs = accuracy_and_macs(model, digits().calibration)
    assert accuracy >= info(model)["static"]["accuracy"] - 0.01 - 1e-9 and macs < 0.7 * model.static_macs


class TwoAnswers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList([nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 32)])
        self.answers = nn.ModuleList(nn.Linear(32, 10) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, found = x.flatten(1), []
        for layer, answer in zip(self.trunk, self.answers, strict=True):
            x = torch.relu(layer(x))
            found.append(answer(x))
        return tuple(found)


def test_a_models_own_exits_are_trained_from_scratch() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"recipe": "sum", "freeze_trunk": False, "trunk_lr": 1.0, "lr": 0.01, "epochs": 8}
    model = flat(convert)(TwoAnswers(), exits="own", data=digits(), batch_size=64, **settings, **QUIET)
    assert isinstance(model, DynamicModel) and len(model.exits) == 2
    report = info(model)
    assert report["final"]["accuracy"] > 0.6
    # the static model was a guess: what may be lost counts from the trained one
    assert report["dynamic"]["accuracy"] >= report["final"]["accuracy"] - 0.005 - 1e-9


def test_the_example_recipes_can_be_read() -> None:
    examples = Path(__file__).parents[3] / "examples"
    for name in ("branchynet-lenet", "branchynet-alexnet", "vgg-four-exits", "msdnet"):
        [step, *_] = read_recipe(examples / f"{name}.yaml").steps
        assert step.name == "convert"
    step = read_recipe(examples / "msdnet.yaml", ["convert.exits=search", "convert.recipe=ztw"]).steps[0]
    assert step.exits == "search" and step.recipe == "ztw"  # type: ignore[union-attr]
    with pytest.raises(dc.RequestError, match="recipe: expected distill or"):
        read_recipe(examples / "msdnet.yaml", ["convert.recipe=none"])


@pytest.mark.parametrize(
    ("zoo", "options", "exits"),
    [("lenet", {"size": 32}, ("max_pool2d",)), ("alexnet-cifar", {}, ("max_pool2d", "max_pool2d_1")),
     ("vgg-cifar", {}, ("relu_1", "relu_3", "relu_6"))],
)  # fmt: skip
def test_the_published_branches_have_a_place(zoo: str, options: dict[str, int], exits: tuple[str, ...]) -> None:
    from dyncompress.model_zoo import zoo as models

    x = torch.rand(2, 1 if zoo == "lenet" else 3, 32, 32)
    model = DynamicModel(InsertExits(exits)(dc.capture(models.build(zoo, **options).eval(), x)).gm.eval())
    assert tuple(model.exits) == exits and len(model.all_logits(x)) == len(exits) + 1
