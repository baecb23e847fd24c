"""Losses of exits against plain loops; what every recipe moves, and that exits learn by it."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from data import signs
from flat_options import flat
from nets import Mlp, Tagger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from trained import QUIET, accuracies, inserted, on_signs

from dyncompress.compress.evaluation.evaluate import collect_logits
from dyncompress.compress.exits.convert import convert
from dyncompress.compress.exits.exit_losses import ExitLoss, FrozenTeacher, Hints, Ramped, Teachers, Weighted
from dyncompress.compress.exits.recipes import RECIPES, check_recipe, train_exits
from dyncompress.compress.exits.taps import Hinted, Taught
from dyncompress.compress.training.schedule import Timetable
from dyncompress.compress.training.trainer import fit
from dyncompress.errors import RequestError
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy

EXITS, BATCH, CLASSES = 4, 6, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def draw() -> tuple[list[Tensor], Tensor]:
    logits = [(2 * torch.randn(BATCH, CLASSES, dtype=torch.float64)).requires_grad_() for _ in range(EXITS)]
    labels = torch.randint(0, CLASSES, (BATCH,))
    labels[1] = -1
    return logits, labels


def softmax(row: Tensor, temperature: float = 1.0) -> list[float]:
    weights = [math.exp(v / temperature) for v in row.tolist()]
    return [w / sum(weights) for w in weights]


def ce(row: Tensor, label: int) -> float:
    return 0.0 if label < 0 else -math.log(softmax(row)[label])


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# --- losses ------------------------------------------------------------------------------------------------------


def test_weighted() -> None:
    logits, labels = draw()
    weights = [1.0, 0.0, 0.5, 0.3]
    rows = zip(weights, logits, strict=True)
    wanted = sum(w * ce(z[i], int(labels[i])) for w, z in rows for i in range(BATCH)) / BATCH
    assert Weighted(weights)(logits, labels).item() == pytest.approx(wanted)


def test_ramped_weights_grow_to_their_tops() -> None:
    logits, labels = draw()
    loss, resumed = Ramped([0.2, 0.4, 0.8]), Ramped([0.2, 0.4, 0.8])
    for each in (loss, resumed):
        each.reschedule(Timetable(samples=10, processes=1, lr=0.1, batch_sizes=(1,)))
    for step in range(10):
        taus = [min(top, 0.01 + top * step / 10) for top in (0.2, 0.4, 0.8)] + [1.0]
        wanted = sum(t * ce(z[i], int(labels[i])) for t, z in zip(taus, logits, strict=True) for i in range(BATCH))
        assert loss(logits, labels).item() == pytest.approx(wanted / BATCH)
        loss.after_step(step)
    resumed.load_state_dict(loss.state_dict())
    assert resumed.weights() == loss.weights() == [0.2, 0.4, 0.8, 1.0]


def test_frozen_teacher_needs_no_labels_and_teaches_nobody_back() -> None:
    logits, labels = draw()
    wanted = sum(kl(softmax(z[i]), softmax(logits[-1][i])) for z in logits[:-1] for i in range(BATCH)) / BATCH
    loss = FrozenTeacher()(logits, torch.full_like(labels, -1))
    assert loss.item() == pytest.approx(wanted)
    loss.backward()
    assert logits[-1].grad is None and logits[0].grad is not None


def test_hints() -> None:
    logits, labels = draw()
    features = [torch.randn(BATCH, 7, dtype=torch.float64, requires_grad=True) for _ in range(EXITS)]
    share, t, weight = 0.3, 2.0, 0.01
    wanted = 0.0
    for i in range(BATCH):
        wanted += ce(logits[-1][i], int(labels[i]))
        for z, f in zip(logits[:-1], features, strict=False):
            wanted += (1 - share) * ce(z[i], int(labels[i]))
            wanted += share * t**2 * kl(softmax(logits[-1][i], t), softmax(z[i], t))
            wanted += weight * sum((a - b) ** 2 for a, b in zip(features[-1][i].tolist(), f[i].tolist(), strict=True))
    loss = Hints(share, t, weight)((logits, features), labels)
    assert loss.item() == pytest.approx(wanted / BATCH)
    loss.backward()
    assert features[-1].grad is None and features[0].grad is not None


def test_teachers() -> None:
    logits, labels = draw()
    teachers = [(2 * torch.randn(BATCH, CLASSES, dtype=torch.float64)).requires_grad_() for _ in range(EXITS - 1)]
    share, t, wanted = 0.3, 2.0, 0.0
    for i in range(BATCH):
        wanted += ce(logits[-1][i], int(labels[i]))
        for z, q in zip(logits, teachers, strict=False):
            wanted += (1 - share) * ce(z[i], int(labels[i])) + ce(q[i], int(labels[i]))
            wanted += share * t**2 * kl(softmax(q[i], t), softmax(z[i], t))
    loss = Teachers(share, t)((logits, teachers), labels)
    assert loss.item() == pytest.approx(wanted / BATCH)
    loss.backward()
    for i, (q, label) in enumerate(zip(teachers[0], labels, strict=True)):  # it learns from labels, not from the exit
        one_hot = F.one_hot(label.clamp(min=0), CLASSES)
        slope = (q.softmax(-1) - one_hot) / BATCH if label >= 0 else torch.zeros(CLASSES, dtype=torch.float64)
        torch.testing.assert_close(teachers[0].grad[i], slope.detach())


LOSSES: list[ExitLoss] = [Weighted([1.0] * EXITS), Ramped([0.5] * 3), FrozenTeacher()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_positions_are_rows_and_those_that_do_not_count_are_left_out(loss: ExitLoss) -> None:
    logits, labels = draw()
    shaped, marks = [z.detach().reshape(2, 3, CLASSES) for z in logits], labels.reshape(2, 3).clone()
    marks[0, 0] = marks[1, 2] = -100
    kept = [1, 2, 3, 4]
    flat = loss([z.detach()[kept] for z in logits], labels[kept])
    assert loss(shaped, marks).item() == pytest.approx(flat.item())
    with pytest.raises(RequestError, match="need labels"):
        loss(shaped, labels)


def test_a_run_on_another_loss_is_not_continued(tmp_path: Path) -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [super().forward(x)] * 2

    def run(loss: ExitLoss, resume: bool) -> None:
        samples = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
        flat(fit)(Twice(4, 2), loss, samples, epochs=1, run_dir=tmp_path, resume=resume, **QUIET)

    run(FrozenTeacher(), False)
    with pytest.raises(RequestError, match="has loss = KL to the last exit, not cross-entropy by"):
        run(Weighted([1.0, 1.0]), True)


# --- recipes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained() -> nn.Module:
    return on_signs()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "balanced"])
def test_exits_learn_under_a_frozen_trunk(recipe: str, trained: nn.Module) -> None:
    dynamic = inserted(trained, "cascade" if recipe == "ztw" else "auto")
    before, untaught = {k: v.clone() for k, v in trained.state_dict().items()}, accuracies(dynamic)
    flat(train_exits)(dynamic, signs(), recipe=recipe, lr=0.02, trunk_lr=0.0, epochs=3, batch_size=64, **QUIET)
    after, taught = dynamic.trunk.state_dict(), accuracies(dynamic)
    assert all(torch.equal(after[k], v) for k, v in before.items()) and taught[-1] == untaught[-1]
    assert all(t > max(u, 0.5) for t, u in zip(taught[:-1], untaught, strict=False))
    assert all(p.requires_grad for p in dynamic.parameters())


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_trunk_learns_where_it_may(recipe: str, trained: nn.Module, tmp_path: Path) -> None:
    options = {"lr": 0.01, "trunk_lr": 0.1, "epochs": 1, "batch_size": 64, "run_dir": tmp_path}
    run = partial(flat(train_exits), recipe=recipe, **options, **QUIET)
    dynamic = inserted(trained, "cascade" if recipe == "ztw" else "auto")
    history = run(dynamic, signs())
    assert [e.epoch for e in history] == list(range(1, len(RECIPES[recipe]) + 1))
    weight = dynamic.trunk.get_submodule("layers.0.0").weight
    assert not torch.equal(weight, trained.layers[0][0].weight)
    again = inserted(trained, "cascade" if recipe == "ztw" else "auto")
    assert [e.loss for e in run(again, signs(), resume=True)] == [e.loss for e in history]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, dynamic.state_dict()[name]), name


def test_two_stages_first_move_the_model_alone(trained: nn.Module) -> None:
    dynamic = inserted(trained)
    alone = Mlp()
    alone.load_state_dict(trained.state_dict())
    flat(train_exits)(dynamic, signs(), recipe="two-stage", lr=0.02, trunk_lr=0.5, epochs=1, batch_size=64, **QUIET)
    flat(fit)(alone, F.cross_entropy, signs(), epochs=1, lr=0.01, batch_size=64, **QUIET)
    state = dynamic.trunk.state_dict()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(state[name], tensor)


def test_ensembles_are_trained_last_and_alone(trained: nn.Module) -> None:
    dynamic = inserted(trained, "cascade")
    first = RECIPES["ztw"][:1]
    try:
        whole, RECIPES["ztw"] = RECIPES["ztw"], first
        flat(train_exits)(dynamic, signs(), recipe="ztw", lr=0.02, trunk_lr=0.0, epochs=1, batch_size=64, **QUIET)
    finally:
        RECIPES["ztw"] = whole
    half = {k: v.clone() for k, v in dynamic.trunk.state_dict().items()}
    assert half["exits.1.ensemble.weight"].flatten().tolist() == [0, 1]
    both = inserted(trained, "cascade")
    flat(train_exits)(both, signs(), recipe="ztw", lr=0.02, trunk_lr=0.0, epochs=1, batch_size=64, **QUIET)
    changed = {k for k, v in both.trunk.state_dict().items() if not torch.equal(v, half[k])}
    assert changed == {k for k in half if ".ensemble." in k}


def test_balanced_gradients_are_the_means_over_the_exits_behind() -> None:
    from dyncompress.compress.exits.recipes import _divided_gradients

    dynamic = inserted(Mlp().double().eval())
    trunk, x, y = dynamic.trunk, torch.randn(16, 8, dtype=torch.float64), torch.randint(0, 4, (16,))
    alone = [
        dict(zip(dict(trunk.named_parameters()), torch.autograd.grad(
            F.cross_entropy(trunk(x)[k], y), list(trunk.parameters()), allow_unused=True), strict=True))
        for k in range(3)
    ]  # fmt: skip
    with _divided_gradients(trunk):
        torch.stack([F.cross_entropy(z, y) for z in trunk(x)]).sum().backward()
    seen = set()
    for name, parameter in trunk.named_parameters():
        behind = [g[name] for g in alone if g[name] is not None]
        seen.add(len(behind))
        torch.testing.assert_close(parameter.grad, torch.stack(behind).mean(0))
    assert seen == {1, 2, 3}


def test_hinted_features() -> None:
    dynamic = inserted(Mlp().eval())
    hinted, x = Hinted(dynamic.trunk), torch.randn(5, 8)
    logits, features = hinted(x)
    for ours, theirs in zip(logits, dynamic.trunk(x), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(dynamic.trunk.fc(features[-1]), logits[-1])
    torch.testing.assert_close(dynamic.trunk.exits.get_submodule("0")(_before(dynamic, x)), logits[0])
    torch.testing.assert_close(features[0], hinted.extra[0](_before(dynamic, x)))
    assert not any("extra" in name for name in dynamic.state_dict())


def test_a_teacher_attends_to_the_exits_behind() -> None:
    dynamic = inserted(Mlp().eval())
    taught, x = Taught(dynamic.trunk), torch.randn(5, 8)
    _, teachers = taught(x)
    _, means = taught.features(x)
    up, query, classify = taught.extra
    for b in range(5):
        for k in range(2):
            q = query[k](means[k][b])
            later = [up[j - 1](means[j][b]) for j in range(k + 1, 3)]
            weights = [math.exp((q @ v).item() / 24**0.5) for v in later]
            mixed = sum(w / sum(weights) * v for w, v in zip(weights, later, strict=True))
            torch.testing.assert_close(teachers[k][b], classify[k](mixed))
    sum(z.sum() for z in teachers).backward()
    assert all(p.grad is None for p in dynamic.parameters())
    assert all(p.grad is not None for p in taught.extra.parameters())


def _before(dynamic: DynamicModel, x: Tensor) -> Tensor:
    """What the first exit reads."""
    seen: list[Tensor] = []
    head = dynamic.trunk.exits.get_submodule("0")
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dynamic.trunk(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("recipe", "frozen", "head", "message"),
    [
        ("mean", True, "auto", "recipe='mean': use one of distill, distill-all, sum"),
        ("balanced", True, "auto", "which is frozen: unfreeze it"),
        ("ztw", True, "auto", 'give head="cascade"'),
    ],
)
def test_recipes_that_cannot_be(recipe: str, frozen: bool, head: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_recipe(recipe, frozen, head)


# --- answers at every position -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the model answers at every position")
def test_a_tagger_is_trained_and_measured_exit_by_exit() -> None:
    ids = torch.randint(0, 20, (160, 6))
    labels = ids % 3
    labels[:, 0] = -100
    net = Tagger()
    tagging = TensorDataset(ids, labels)
    flat(fit)(net, lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()), tagging, epochs=8, lr=0.03, **QUIET)
    dynamic = flat(convert)(net.eval(), exits=1, data=tagging, epochs=4, batch_size=32, lr=0.03, **QUIET)
    [early, last] = dynamic.trunk.meta["info"]["convert"]["exits"]
    logits, marks = collect_logits(dynamic, torch.utils.data.Subset(tagging, range(len(tagging))))
    assert last["at"] == "output" and early["macs"] < last["macs"] and early["accuracy"] > 0.7
    held = torch.randperm(160, generator=torch.Generator().manual_seed(0))[: round(0.15 * 160)]
    for entry, z in zip([early, last], logits, strict=True):
        counted = marks[held] != -100
        rows, wanted = z[held][counted], marks[held][counted]
        assert entry["accuracy"] == pytest.approx(float((rows.argmax(-1) == wanted).double().mean()))
        assert entry["perplexity"] == pytest.approx(math.exp(float(F.cross_entropy(rows, wanted))), rel=1e-5)
    with pytest.raises(RequestError, match="a sample leaves as a whole, so that no exit can be on"):
        dynamic.policy = ExitPolicy("max-softmax", (0.5,))
