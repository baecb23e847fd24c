"""The dynamic model against a plain loop over every exit's logits, and proof that skipped work is skipped."""

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, call, graph, graph_with_exits, logits_of, model, rows
from dynamic_models import policy_for, rows_seen, spread
from played import exits_by_hand
from torch import nn

from dyncompress.errors import RequestError
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.exits.stages import split_stages
from dyncompress.passes.graph.copying import deep_copy
from dyncompress.passes.graph.cost import count_macs
from dyncompress.runtime.predict.dynamic import DynamicModel
from dyncompress.runtime.predict.policy import ExitPolicy


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rule", ["max-softmax", "entropy"])
def test_predict_is_a_plain_loop_over_the_exits(name: str, rule: str) -> None:
    made, batch, n = spread(name), CASES[name].batch(23), 23
    made.policy = policy_for(made, batch, rule, CASES[name].exits)
    logits = call(made.all_logits, batch)
    wanted = exits_by_hand(made.policy, logits)
    found = call(made.predict, batch)
    assert found.exit_index.tolist() == wanted and len(set(wanted)) == CASES[name].exits + 1
    assert found.logits.dtype == torch.float32 and not found.logits.requires_grad
    answers = np.stack([logits[k][i].numpy() for i, k in enumerate(wanted)])
    np.testing.assert_allclose(found.logits.numpy(), answers, rtol=1e-4, atol=1e-5)
    assert found.macs.tolist() == [made.exit_macs[k] for k in wanted] and found.macs.shape == (n,)


@pytest.mark.parametrize("name", CASES)
def test_with_every_exit_off_it_is_the_static_model(name: str) -> None:
    made, batch = spread(name), CASES[name].batch(6)
    with torch.no_grad():
        wanted = logits_of(call(graph(name), batch))
    found = call(made.predict, batch)
    with torch.no_grad():
        eval_forward = call(made, batch)
    for logits in (eval_forward, found.logits, call(made.all_logits, batch)[-1]):
        torch.testing.assert_close(logits, wanted, rtol=0, atol=0)
    assert set(found.exit_index.tolist()) == {CASES[name].exits}
    assert set(found.macs.tolist()) == {made.static_macs} == {count_macs(graph(name))}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [1, 2, 60])
def test_any_batch_size(name: str, n: int) -> None:
    made, batch = spread(name), CASES[name].batch(n)
    made.policy = ExitPolicy("max-softmax", (0.6,) * CASES[name].exits)
    whole = call(made.predict, batch)
    for i in range(0, n, 7):
        alone = call(made.predict, rows(batch, slice(i, i + 1)))
        assert alone.exit_index[0] == whole.exit_index[i]
        torch.testing.assert_close(alone.logits[0], whole.logits[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_no_samples(name: str) -> None:
    made = spread(name)
    classes = made.num_classes
    found = call(made.predict, rows(CASES[name].batch(2), slice(0, 0)))
    assert found.logits.shape == (0, classes) and found.exit_index.shape == found.macs.shape == (0,)
    assert found.exit_index.dtype == found.macs.dtype == torch.int64
    assert [z.shape for z in call(made.all_logits, rows(CASES[name].batch(2), slice(0, 0)))] == [(0, classes)] * (
        CASES[name].exits + 1
    )


def test_other_sequence_lengths() -> None:
    made = spread("text")
    lengths = torch.randint(1, 12, (9, 1))
    batch = {"input_ids": torch.randint(0, 50, (9, 11)), "attention_mask": (torch.arange(11) < lengths).long()}
    made.policy = policy_for(made, batch, "max-softmax", 2)
    logits = made.all_logits(**batch)
    found = made.predict(**batch)
    assert found.exit_index.tolist() == exits_by_hand(made.policy, logits)
    np.testing.assert_allclose(logits[-1], model("text")(**batch)["logits"].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "in_each_stage"),
    [
        ("resnet", ["stem.0", "blocks.1.c1", "blocks.2.c2", "blocks.3.down"]),
        ("vit", ["layers.0.mlp.0", "layers.1.attention.qkv", "layers.2.n1", "layers.3.mlp.2"]),
        ("text", ["layers.0.attention.out", "layers.1.mlp.0", "layers.2.attention.qkv"]),
        ("lstm", ["embed", "l2", "l3"]),
    ],
)
def test_only_undecided_samples_run_on(name: str, in_each_stage: list[str]) -> None:
    made, batch, n, k = spread(name), CASES[name].batch(40), 40, CASES[name].exits
    made.policy = policy_for(made, batch, "max-softmax", k)
    heads = [f"exits.{i}" for i in range(k)]
    with rows_seen(made, in_each_stage + heads) as seen:
        at = call(made.predict, batch).exit_index
    reached = [[int((at >= i).sum())] for i in range(k + 1)]
    assert reached[0] == [n] and reached[-1][0] < n
    assert [seen[path] for path in in_each_stage] == reached
    assert [seen[path] for path in heads] == reached[:-1]


def test_nothing_runs_once_everybody_has_left() -> None:
    made = spread("resnet").with_policy(ExitPolicy("max-softmax", (None, 0.0, 0.5)))
    with rows_seen(made, ["blocks.1.c1", "blocks.2.c1", "blocks.3.c1", "exits.0", "exits.1", "exits.2", "fc"]) as seen:
        found = made.predict(CASES["resnet"].batch(5))
    assert seen["blocks.1.c1"] == seen["exits.1"] == [5]
    assert [p for p, calls in seen.items() if not calls] == ["blocks.2.c1", "blocks.3.c1", "exits.0", "exits.2", "fc"]
    assert found.exit_index.tolist() == [1] * 5


def test_evaluation_computes_no_head_and_training_every_one() -> None:
    made, batch = spread("vit"), CASES["vit"].batch(3)
    heads = ["exits.0", "exits.1", "exits.2"]
    with rows_seen(made, heads) as seen:
        made(batch)
        assert list(seen.values()) == [[], [], []]
        outputs = made.train()(batch)
    assert list(seen.values()) == [[3], [3], [3]] and len(outputs) == 4


def test_predict_leaves_every_mode_as_it_was() -> None:
    made, batch = spread("resnet"), CASES["resnet"].batch(4)
    wanted = made.predict(batch).logits
    made.train()
    made.trunk.get_submodule("stem.1").eval()
    modes = {path: m.training for path, m in made.named_modules()}
    statistics = made.trunk.get_submodule("blocks.0.b1").running_mean.clone()
    torch.testing.assert_close(made.predict(batch).logits, wanted, rtol=0, atol=0)
    torch.testing.assert_close(made.all_logits(batch)[-1], wanted, rtol=0, atol=0)
    assert {path: m.training for path, m in made.named_modules()} == modes
    assert torch.equal(made.trunk.get_submodule("blocks.0.b1").running_mean, statistics)


def test_what_happens_to_the_trunk_shows_at_once() -> None:
    made, batch = spread("vit"), CASES["vit"].batch(5)
    policy = policy_for(made, batch, "max-softmax", 3)
    made.policy = policy
    single = made.predict(batch)
    double = made.double().predict(batch.double())
    assert double.logits.dtype == torch.float64 and double.exit_index.tolist() == single.exit_index.tolist()
    torch.testing.assert_close(double.logits.float(), single.logits, rtol=1e-4, atol=1e-5)
    state = {k: torch.zeros_like(v) for k, v in made.state_dict().items()}
    made.load_state_dict(state, assign=True)
    assert made.predict(batch.double()).logits.abs().sum() == 0
    made.trunk.head = nn.Linear(32, 10).double()
    made.policy = ExitPolicy.never(3)
    assert made.predict(batch.double()).logits.abs().sum() > 0


def test_parameters_are_held_once() -> None:
    made = spread("resnet")
    heads = sum(p.numel() for p in made.trunk.exits.parameters())
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in model("resnet").parameters()) + heads
    assert list(made.state_dict()) == [f"trunk.{k}" for k in made.trunk.state_dict()]
    pieces = [made._pieces().static, *(s.body for s in made._pieces().stages)]
    owned = {id(p) for p in made.parameters()}
    assert all({id(p) for p in piece.parameters()} == owned for piece in pieces)


def test_copies_are_independent() -> None:
    made, batch = spread("lstm"), CASES["lstm"].batch(6)
    made.policy = policy_for(made, batch, "entropy", 2)
    copied = deep_copy(made)
    wanted, found = made.predict(batch), copied.predict(batch)
    assert torch.equal(wanted.logits, found.logits) and torch.equal(wanted.exit_index, found.exit_index)
    nn.init.zeros_(copied.trunk.fc.weight)
    assert torch.equal(made.predict(batch).logits, wanted.logits)
    assert pickle.loads(pickle.dumps(made.policy)) == made.policy
    assert made.__getstate__()["_cached"] is None and made._cached is not None


def test_policies_share_the_model() -> None:
    made = spread("resnet")
    all_leave = made.with_policy(ExitPolicy("max-softmax", (0.0, None, None)))
    batch = CASES["resnet"].batch(3)
    assert all_leave.predict(batch).exit_index.tolist() == [0, 0, 0]
    assert made.predict(batch).exit_index.tolist() == [3, 3, 3]
    assert all_leave.trunk is made.trunk and not all_leave.training


def test_macs() -> None:
    made = spread("resnet")
    stages = split_stages(made.trunk)
    heads = [h.linear.weight.numel() for h in made.trunk.exits.children()]
    assert [s.head_macs for s in stages] == [*heads, 0]
    assert sum(s.macs for s in stages) == made.static_macs == count_macs(graph("resnet"))
    assert made.exit_macs[-1] == made.static_macs + sum(heads)
    assert made.exit_macs[1] == stages[0].macs + stages[1].macs + heads[0] + heads[1]
    off = made.with_policy(ExitPolicy("max-softmax", (None, 0.0, None))).predict(CASES["resnet"].batch(2))
    assert off.macs.tolist() == [made.exit_macs[1] - heads[0]] * 2


def test_stage_inputs_are_the_outputs_before() -> None:
    stages = split_stages(graph_with_exits("text"))
    for before, after in pairwise(stages):
        assert before.outputs == after.inputs and before.at in before.outputs
    assert stages[0].inputs == ["input_ids", "attention_mask"] and stages[-1].head is None
    assert stages[0].per_sample == [True, False, True, True]  # mask, length, mask as bool, features


class Nested(nn.Module):
    """Its own modules and tensors are called like those of a dynamic model."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleDict({"trunk": nn.Linear(5, 5), "head": nn.Linear(5, 3)})
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk["head"](torch.relu(self.trunk["trunk"](x)) * self.scale)


def test_names_of_the_users_own_do_not_clash() -> None:
    source, x = Nested().eval(), torch.randn(4, 5)
    made = DynamicModel(InsertExits(1)(capture(source, x)).gm).eval()
    torch.testing.assert_close(made.predict(x).logits, source(x).detach())
    assert made.with_policy(ExitPolicy("entropy", (1.0,))).predict(x).exit_index.tolist() == [0] * 4


def test_inputs_by_position_or_by_name() -> None:
    made, batch = spread("text"), CASES["text"].batch(4)
    wanted = made.predict(**batch).logits
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for found in (made.predict(ids, mask), made.predict(attention_mask=mask, input_ids=ids)):
        assert torch.equal(found.logits, wanted)


X = torch.randn(4, 3, 16, 16)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X[0],), {}, r"input 'x' has shape \(3, 16, 16\); the model takes \(batch, 3, 16, 16\)"),
        ((X[:, :1],), {}, r"input 'x' has shape \(4, 1, 16, 16\)"),
        ((X.double(),), {}, r"input 'x' is torch.float64; the model takes torch.float32: use x.to\(torch.float32\)"),
        ((X.long(),), {}, r"input 'x' is torch.int64"),
        ((X, X), {}, "2 positional inputs were given; the model takes x"),
        ((), {}, "input x missing; the model takes x"),
        ((X,), {"mask": X}, "input mask unknown; the model takes x"),
        ((X,), {"x": X}, "input x given twice"),
        ((X.numpy(),), {}, r"input 'x' is a ndarray; give a torch.Tensor"),
        (([X],), {}, "nested differently"),
        ((X.to("meta"),), {}, "input 'x' is on meta, the model on cpu"),
    ],
)
def test_wrong_inputs_are_named(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    made = DynamicModel(graph_with_exits("resnet")).eval()
    with pytest.raises(RequestError, match=message):
        made.predict(*args, **kwargs)


def test_inputs_of_different_batches() -> None:
    made = DynamicModel(graph_with_exits("two-inputs")).eval()
    with pytest.raises(RequestError, match=r"different numbers of samples: \{'x': 3, 'late': 2\}"):
        made.predict(torch.randn(3, 12), torch.randn(2))


def test_graphs_without_exits_are_refused() -> None:
    with pytest.raises(RequestError, match="run InsertExits on it first"):
        DynamicModel(graph("resnet"))


def test_an_exit_that_can_no_longer_be_cut() -> None:
    gm = InsertExits(("relu_",))(graph("vgg")).gm
    [head] = gm.graph.find_nodes(op="call_module", target="exits.0")
    head.args = (next(n for n in gm.graph.nodes if n.name == "features_0"),)
    with pytest.raises(RequestError, match="cannot be cut after features_0: features_0 cannot pass on"):
        split_stages(gm)


def test_a_prediction_is_not_overwritten_by_the_next() -> None:
    made, batch = spread("resnet"), CASES["resnet"].batch(8)
    made.policy = policy_for(made, batch, "max-softmax", 3)
    first = made.predict(batch)
    kept = first.logits.clone()
    made.predict(CASES["resnet"].batch(8))
    assert torch.equal(first.logits, kept)
