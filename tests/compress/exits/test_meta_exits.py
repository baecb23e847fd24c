"""Meta-learned exits: the first-order gradient against one by hand, episodes by counting, training end to end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import signs
from flat_options import flat
from nets import Tagger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from trained import QUIET, accuracies, inserted, on_signs

from dyncompress.compress.exits.convert import convert
from dyncompress.compress.exits.meta_exits import RATE, STEPS, Adapted, Episodes, Heads, Read
from dyncompress.compress.exits.recipes import check_recipe, train_exits
from dyncompress.compress.synthesis.few_samples import few_shots
from dyncompress.errors import RequestError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def trained() -> nn.Module:
    return on_signs()


def read(shots: int, classes: int = 4) -> Read:
    """Samples whose only feature is their number."""
    labels = torch.arange(classes).repeat(shots)
    return Read([torch.arange(len(labels), dtype=torch.float32)[:, None]], labels)


def slope(w: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the mean cross-entropy of a linear classifier: (p - onehot)^T x / n."""
    z = x @ w.T + b
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return p.T @ x / len(y), p.mean(0)


def test_the_gradient_is_that_of_the_query_set_after_the_steps(trained: nn.Module) -> None:
    heads = Heads(inserted(trained).trunk.double())
    x, y = 3 * torch.randn(2, 12, 24, dtype=torch.float64), torch.randint(0, 4, (2, 12))  # two episodes
    logits = Adapted(heads)(x, x + 1, y)
    torch.stack([F.cross_entropy(z.flatten(0, 1), y[:, 6:].flatten()) for z in logits]).sum().backward()
    for k, head in enumerate(heads.heads):
        parts = []
        for episode in range(2):
            read, labels = (x + k)[episode].numpy(), y[episode].numpy()
            read = np.array(head.norm(torch.tensor(read)).detach()) if hasattr(head, "norm") else read
            w, b = (p.detach().numpy().copy() for p in (head.linear.weight, head.linear.bias))
            for _ in range(STEPS):
                dw, db = slope(w, b, read[:6], labels[:6])
                w, b = w - RATE * dw, b - RATE * db
            parts.append(slope(w, b, read[6:], labels[6:]))
        for got, wanted in zip((head.linear.weight.grad, head.linear.bias.grad), zip(*parts, strict=True), strict=True):
            np.testing.assert_allclose(got, sum(wanted) / 2, rtol=1e-9, atol=1e-12)


def test_episodes() -> None:
    few = read(shots=5)
    episodes, seen = Episodes(few, most=1000), set()
    assert episodes.samples == 16
    for i in range(40):
        (drawn, labels), wanted = episodes[i]
        numbers = drawn.flatten().long()
        assert torch.equal(labels, few.labels[numbers]) and torch.equal(wanted, labels[8:])
        assert len(numbers.unique()) == 16
        for half in (labels[:8], labels[8:]):
            assert torch.bincount(half).tolist() == [2, 2, 2, 2]
        seen |= set(numbers[:8].tolist())
    assert seen == set(range(20))
    (drawn, labels), _ = Episodes(few, most=10)[0]  # as many classes as there is room for
    assert sorted(torch.bincount(labels).tolist())[-2:] == [4, 4] and len(labels) == 8
    (drawn, _), _ = Episodes(read(shots=1), most=1000)[0]
    assert torch.equal(drawn[:4], drawn[4:]) and sorted(drawn[:4].flatten().tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("head", ["auto", "mlp"])
def test_heads_learn_and_the_trunk_does_not(head: str, trained: nn.Module, tmp_path: Path) -> None:
    few = few_shots(signs(), 20, 4, seed=0)
    options: dict[str, Any] = {"recipe": "meta", "lr": 0.01, "trunk_lr": 0.0, "epochs": 2, "batch_size": 64, **QUIET}
    dynamic = inserted(trained, head)
    untaught = accuracies(dynamic)
    history = flat(train_exits)(dynamic, few, run_dir=tmp_path, **options)
    assert [e.epoch for e in history] == [1, 2] and history[1].loss < history[0].loss
    state = dynamic.trunk.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items())
    taught = accuracies(dynamic)
    assert taught[-1] == untaught[-1] and all(t > u + 0.2 for t, u in zip(taught[:-1], untaught, strict=False))
    again = inserted(trained, head)
    flat(train_exits)(again, few, run_dir=tmp_path, resume=True, **options)
    for name, tensor in again.trunk.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_the_last_steps_are_on_all_samples(trained: nn.Module) -> None:
    dynamic = inserted(trained)
    few = few_shots(signs(), 5, 4, seed=0)
    flat(train_exits)(dynamic, few, recipe="meta", lr=1e-12, trunk_lr=0.0, epochs=1, **QUIET)  # w stays where it was
    start = Heads(inserted(trained).trunk).heads[0]
    seen = Read.by(inserted(trained), few, 7, None)
    assert seen.labels.tolist() == [few[i][1] for i in range(20)]
    wanted = nn.Linear(24, 4)
    wanted.load_state_dict(start.linear.state_dict())
    features = start.norm(seen.features[0]).detach() if hasattr(start, "norm") else seen.features[0]
    optimizer = torch.optim.SGD(wanted.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(wanted(features), seen.labels).backward()
        optimizer.step()
    got = Heads(dynamic.trunk).heads[0].linear
    torch.testing.assert_close(got.weight, wanted.weight)
    torch.testing.assert_close(got.bias, wanted.bias)


def test_convert_from_few_shots(trained: nn.Module) -> None:
    options: dict[str, Any] = {"exits": 2, "data": signs(), "shots": 5, "recipe": "meta", "batch_size": 64, **QUIET}
    report = flat(convert)(trained, epochs=1, **options).trunk.meta["info"]["convert"]
    assert report["exits"][1]["accuracy_on_all"] > 0.5
    with pytest.raises(RequestError, match="freeze the trunk"):
        flat(convert)(trained, freeze_trunk=False, **options)


def test_what_cannot_be_meta_learned(trained: nn.Module) -> None:
    with pytest.raises(RequestError, match="take no cascade"):
        check_recipe("meta", True, "cascade")
    one = TensorDataset(torch.randn(6, 8), torch.tensor([2, 2, -1, 2, -1, 2]))
    with pytest.raises(RequestError, match="at least two"):
        flat(train_exits)(inserted(trained), one, recipe="meta", lr=0.01, trunk_lr=0.0, epochs=1, **QUIET)


def test_answers_at_every_position_have_no_classes_to_draw() -> None:
    ids = torch.randint(0, 20, (40, 6))
    with pytest.raises(RequestError, match="answers at every position"):
        flat(convert)(Tagger(), exits=1, data=TensorDataset(ids, ids % 3), recipe="meta", epochs=1, **QUIET)
