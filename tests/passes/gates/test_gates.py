"""Skip gates: the graph with gates, and what of it runs."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, GATED, WITH_BRANCHES, call, gated_graph, graph, logits_of, model, rows
from dynamic_models import gated
from nets import ResNet
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import dyncompress as dc
from dyncompress.compress.thresholds.candidates import collect_cached
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.passes.gates.insert_gates import GATES, InsertGates
from dyncompress.passes.gates.read_gates import deciding, graph_gates
from dyncompress.runtime.predict.dynamic import DynamicModel

pytestmark = pytest.mark.filterwarnings("ignore:the .* gates cost")  # the models are tiny


@pytest.mark.parametrize(("name", "branches"), WITH_BRANCHES.items())
def test_every_residual_branch_gets_a_gate(name: str, branches: int) -> None:
    result = InsertGates()(graph(name))
    assert len(result.report.gates) == branches and not result.report.left
    assert DynamicModel(result.gm).gates == list(result.report.gates)


@pytest.mark.parametrize(("name", "gate"), GATED)
def test_skipping_gives_what_masking_gives(name: str, gate: str) -> None:
    """The graph itself multiplies by zero or one; `predict`, calls and streams compute open branches only."""
    torch.manual_seed(0)  # a batch of which not everybody needs every branch
    dyn, batch = gated(name, gate), CASES[name].batch(9)
    with torch.no_grad():
        masked = call(dyn.trunk, batch)[-1]
        alone = torch.cat([call(dyn.predict, rows(batch, [i])).logits for i in range(9)])
        streamed = torch.cat([p.logits for p in dyn.predict_stream([batch, rows(batch, [2, 0])], max_batch=4)])
        for other in (call(dyn, batch), call(dyn.predict, batch).logits, alone, streamed[:9]):
            torch.testing.assert_close(other, masked, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(streamed[9:], masked[[2, 0]], rtol=1e-4, atol=1e-5)
    opened = call(dyn.predict, batch).gates.float()
    assert 0 < opened.mean() < 1


def by_hand(net: ResNet, x: Tensor, opened: Tensor) -> Tensor:
    """The residual network's forward pass, sample by sample, with a loop over its blocks."""
    out = []
    for image, row in zip(x, opened, strict=True):
        y = net.stem(image[None])
        for block, run in zip(net.blocks, row.tolist(), strict=True):
            short = block.down(y)
            y = F.relu(short + block.b2(block.c2(F.relu(block.b1(block.c1(y)))))) if run else F.relu(short)
        out.append(net.fc(y.mean((2, 3))))
    return torch.cat(out)


@torch.no_grad()
def test_the_decisions_are_those_of_the_answer() -> None:
    dyn, x = gated("resnet"), CASES["resnet"].batch(8)
    answer = dyn.predict(x)
    torch.testing.assert_close(answer.logits, by_hand(model("resnet"), x, answer.gates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_macs_are_those_that_were_computed(name: str) -> None:
    dyn, batch = gated(name), CASES[name].batch(6)
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        macs = dyn.predict(batch).macs
    assert counter.get_total_flops() == 2 * int(macs.sum())


def test_a_skipped_branch_computes_nothing_and_an_open_one_its_samples() -> None:
    dyn, x = gated("resnet"), CASES["resnet"].batch(16)
    seen: dict[int, int] = {}
    for k in range(4):
        block = dyn.trunk.get_submodule(f"blocks.{k}.c1")
        block.register_forward_hook(lambda m, args, out, k=k: seen.__setitem__(k, len(args[0])))
    opened = dyn.predict(x).gates.sum(0)
    assert [seen.get(k, 0) for k in range(4)] == opened.tolist()
    with torch.no_grad():
        for k in range(4):
            dyn.trunk.get_parameter(f"gates.{k}.out.bias").fill_(-1e4)
    seen.clear()
    assert not dyn.predict(x[:1]).gates.any() and not seen


@pytest.mark.parametrize("gate", ["pooled", "recurrent", "policy"])
def test_exits_and_gates_in_one_model(gate: str) -> None:
    """A sample that leaves has run, and paid for, the open branches before its exit only."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        gm = InsertExits(2)(gated_graph("resnet", gate)).gm
    dyn, x = DynamicModel(gm).eval(), CASES["resnet"].batch(12)
    first, _, last = dyn.all_logits(x)
    score = first.softmax(-1).amax(-1)
    dyn.policy = dc.ExitPolicy("max-softmax", (float(score.median()), None), (1.0, 1.0))
    answer = dyn.predict(x)
    assert 0 < int((answer.exit_index == 0).sum()) < 12
    expected = torch.where((answer.exit_index == 0)[:, None], first, last)
    torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-5)
    whole = dyn.with_policy(dc.ExitPolicy("max-softmax", (1.0, None), (1.0, 1.0))).predict(x)
    left = answer.exit_index == 0
    assert torch.equal(answer.gates[~left], whole.gates[~left])
    assert not answer.gates[left][:, -1].any() and (answer.macs[left] < whole.macs[left]).all()
    with FlopCounterMode(display=False) as counter:
        dyn.predict(x)
    heads = sum(stage.head_macs for stage in dyn._pieces().stages)
    assert counter.get_total_flops() == 2 * int(answer.macs.sum()) and heads > 0


def test_thresholds_count_what_gates_skip() -> None:
    """By the mean of each stage: exact for all samples together, whatever exit they all leave at."""
    gm = InsertExits(2)(gated_graph("resnet")).gm
    dyn, x = DynamicModel(gm).eval(), CASES["resnet"].batch(40)
    cached = collect_cached(dyn, TensorDataset(x, torch.zeros(40, dtype=torch.int64)))
    for thresholds in ((None, None), (None, 0.0), (0.0, None)):
        policy = dc.ExitPolicy("max-softmax", thresholds)
        answer = dyn.with_policy(policy).predict(x)
        assert cached.play(policy).mean_cost == pytest.approx(answer.macs.double().mean().item())
        assert answer.macs.double().mean() < dyn._pieces().exit_macs(tuple(t is not None for t in thresholds))[-1]


@pytest.mark.parametrize("gate", GATES)
def test_a_checkpoint_carries_gates(gate: str, tmp_path) -> None:
    dyn, x = gated("resnet", gate), CASES["resnet"].batch(5)
    dc.save(dyn, tmp_path / "m.dyn.safetensors")
    again = dc.load(tmp_path / "m.dyn.safetensors")
    before, after = dyn.predict(x), again.predict(x)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.gates, after.gates)
    assert torch.equal(before.macs, after.macs)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_gated_model_can_be_shrunk(name: str) -> None:
    """The gates' own layers included: the shrunk model equals the masked one."""
    gm, batch = gated_graph(name), CASES[name].batch(7)
    keep = {a.name: list(range(0, a.size, 2)) for a in dc.infer_axes(gm) if a.prunable and a.size > 1}
    small, reference = dc.shrink(gm, keep, exact=True), dc.mask(gm, keep)
    assert len(small.state_dict()["gates.0.squeeze.weight"]) < 16
    torch.testing.assert_close(call(small, batch)[-1], call(reference, batch)[-1], rtol=1e-4, atol=1e-5)
    answer = call(DynamicModel(small).eval().predict, batch)
    torch.testing.assert_close(answer.logits, call(reference, batch)[-1], rtol=1e-4, atol=1e-5)


class Recorder(nn.Module):
    """Factors for training: a constant for each gate."""

    def forward(self, logit: Tensor, k: int) -> Tensor:
        return torch.full_like(logit, 0.5 * k)


def test_training_sees_logits_and_may_set_the_factors() -> None:
    gm, x = gated_graph("resnet"), CASES["resnet"].batch(3)
    (logits,), odds, factors = deciding(gm, Recorder())(x)
    assert odds.shape == (3, 4) and factors[0].tolist() == [0, 0.5, 1.0, 1.5]
    opened = DynamicModel(gm).eval().predict(x).gates
    assert torch.equal(odds[:, 0] > 0, opened[:, 0])
    assert logits.shape == (3, 10) and not torch.equal(logits, gm(x)[0])
    assert next(gm.parameters()) is next(p for p in deciding(gm, Recorder()).parameters())


def test_names_of_branches_and_wrong_requests() -> None:
    gm = graph("resnet")
    result = InsertGates(branches=("blocks.2:branch",))(gm)
    assert [gate.branch for gate in graph_gates(result.gm)] == ["blocks.2:branch"]
    with pytest.raises(dc.RequestError, match=r"no gate can skip 'blocks.9:branch': those that can be skipped are"):
        InsertGates(branches=("blocks.9:branch",))(gm)
    with pytest.raises(dc.RequestError, match="use one of pooled"):
        InsertGates("gumbel")
    with pytest.raises(dc.RequestError, match="no residual branch that can be skipped"):
        InsertGates()(graph("vgg"))
    with pytest.raises(dc.RequestError, match="reads an image"):
        InsertGates("ff2")(graph("vit"))
    with pytest.raises(dc.RequestError, match="already has a module named 'gates'"):
        InsertGates()(result.gm)
    with pytest.warns(UserWarning, match="ff1 gates cost"):
        InsertGates("ff1")(gm)


def test_a_branch_of_another_type_has_no_gate() -> None:
    """What comes out would be of one type or the other, as gates decide."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return x.double() + self.branch(x)

    with pytest.raises(dc.RequestError, match="are of different types"):
        InsertGates()(dc.capture(Mixed(), torch.randn(2, 8)))


@pytest.mark.parametrize("gate", ["pooled", "policy"])
def test_no_samples(gate: str) -> None:
    answer = gated("resnet", gate).predict(torch.randn(0, 3, 16, 16))
    assert answer.logits.shape == (0, 10) and answer.gates.shape == (0, 4) and answer.macs.shape == (0,)


def test_the_output_of_a_dict_model() -> None:
    batch = CASES["text"].batch(4)
    opened = call(gated("text").predict, batch)
    assert opened.logits.shape == logits_of(call(model("text"), batch)).shape
