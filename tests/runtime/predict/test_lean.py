"""What the pieces of a gated model do when they run: how often they wait for a decision, what they copy and write."""

from collections import Counter
from typing import Any

import pytest
import torch
from cases import CASES, call, gated_graph
from dynamic_models import gated
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dyncompress as dc
from dyncompress.passes.gates.insert_gates import GATES, POLICY, InsertGates
from dyncompress.runtime.predict.dynamic import DynamicModel

pytestmark = pytest.mark.filterwarnings("ignore:the .* gates cost")  # the models are tiny
COPIES = ("index_select", "index_add", "index_add_", "clone", "add")


class Ops(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def forced(name: str, gate: str, bias: float) -> DynamicModel:
    """A model whose gates are all open, or all closed."""
    dyn = gated(name, gate)
    with torch.no_grad():
        for path, parameter in dyn.trunk.named_parameters():
            if path.startswith("gates") and path.endswith("out.bias"):
                parameter.fill_(bias)
    return dyn


def reads(dyn: DynamicModel, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a call waits for numbers of the device, by what it waits with."""
    lists, plain = Counter[str](), Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        lists["tolist"] += 1
        return plain(tensor)

    with monkeypatch.context() as patched, Ops() as ops:
        patched.setattr(Tensor, "tolist", counted)
        dyn.predict(x)
    found = lists + ops.count
    names = ("_local_scalar_dense", "nonzero", "count_nonzero", "is_nonzero", "tolist")
    return {name: found[name] for name in names if found[name]}


@pytest.mark.parametrize("gate", GATES)
def test_a_decision_is_waited_for_once(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At batch 1 one number is read per gate; beyond, the rows are, and nothing else; a policy's are read at once."""
    for size, read in ((1, "_local_scalar_dense"), (6, "nonzero")):
        for dyn in (forced("resnet", gate, 1e4), forced("resnet", gate, -1e4), gated("resnet", gate)):
            found = reads(dyn, CASES["resnet"].batch(size), monkeypatch)
            assert found == ({"tolist": 1} if gate == POLICY else {read: 4})


def test_a_policy_is_read_once_per_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that stay after an exit are fewer, and have places of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        dyn = DynamicModel(dc.InsertExits(1)(gated_graph("resnet", POLICY)).gm).eval()
    x = CASES["resnet"].batch(6)
    with torch.no_grad():
        first, last = dyn.all_logits(x)
        half = float(first.softmax(-1).amax(-1).median())
        dyn.policy = dc.ExitPolicy("max-softmax", (half,), (1.0,))
        stages = [stage for stage in dyn._pieces().stages if len(stage.branch_macs) > 1]
        assert reads(dyn, x, monkeypatch) == {"tolist": len(stages), "nonzero": 1}  # and who stays
        answer = dyn.predict(x)
        assert 0 < int((answer.exit_index == 0).sum()) < 6
        expected = torch.where((answer.exit_index == 0)[:, None], first, last)
    torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 6])
def test_branches_that_all_or_none_need_copy_nothing(size: int) -> None:
    x = CASES["resnet"].batch(size)
    for bias, sums in ((1e4, 4), (-1e4, 0)):
        dyn = forced("resnet", "pooled", bias)
        with Ops() as ops:
            dyn.predict(x)
        assert not any(ops.count[name] for name in COPIES) and ops.count["add_"] == sums


def test_rows_are_added_where_they_are() -> None:
    """No copy of a shortcut that nobody reads afterwards."""
    torch.manual_seed(0)
    dyn, x = gated("vit"), CASES["vit"].batch(9)
    with Ops() as ops:
        answer = dyn.predict(x)
    assert answer.gates is not None
    opened = answer.gates.sum(0)
    mixed = int(((opened > 0) & (opened < 9)).sum())
    assert mixed and ops.count["index_add_"] == mixed and not ops.count["index_add"]


class Reread(nn.Module):
    """The shortcut of `a` is read again at the end, that of `b` through a view made before, that of `c` not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        z = torch.relu(y + torch.tanh(self.a(y)))
        seen = z[:, :4]
        w = torch.relu(z + torch.tanh(self.b(z)))
        return torch.cat((w + torch.tanh(self.c(w)), y, seen), 1)


def test_what_is_read_again_is_not_written_to() -> None:
    torch.manual_seed(0)
    gm = InsertGates()(dc.capture(Reread(), torch.randn(2, 8))).gm.eval()
    with torch.no_grad():
        for k in range(3):
            gm.get_parameter(f"gates.{k}.out.weight").mul_(40)
            gm.get_parameter(f"gates.{k}.out.bias").zero_()
    dyn, x = DynamicModel(gm).eval(), torch.randn(16, 8)
    with Ops() as ops:
        answer = dyn.predict(x)
    assert answer.gates is not None and (answer.gates.any(0) & ~answer.gates.all(0)).all()
    assert (ops.count["index_add_"], ops.count["clone"]) == (3, 2)  # what is read again is copied
    with torch.no_grad():
        torch.testing.assert_close(answer.logits, gm(x)[-1])


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_gradients_of_calls_in_evaluation_mode(name: str) -> None:
    torch.manual_seed(0)
    dyn, batch = gated(name), CASES[name].batch(6)
    found, wanted = [
        torch.autograd.grad(logits.sum(), dyn.trunk.get_parameter(next(n for n, _ in dyn.trunk.named_parameters())))[0]
        for logits in (dyn(batch), dyn.trunk(batch)[-1])
    ]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_layers_of_a_gate_are_found_anew() -> None:
    dyn, x = gated("resnet"), CASES["resnet"].batch(4)
    dyn.predict(x)
    layer = dyn.trunk.gates._modules["1"].out = nn.Linear(16, 1)
    for bias in (-1e4, 1e4):
        nn.init.constant_(layer.bias, bias)
        assert (dyn.predict(x).gates[:, 1] == (bias > 0)).all()


@pytest.mark.parametrize("name", ["resnet", "vit", "text"])
@pytest.mark.parametrize("shrunk", [False, True])
def test_steps_of_a_recurrent_gate_are_cells(name: str, shrunk: bool) -> None:
    """Also where the hidden state has become narrower; what they decide is what the written-out steps decide."""
    gm, batch = gated_graph(name, "recurrent"), CASES[name].batch(8)
    if shrunk:
        keep = {a.name: list(range(0, a.size, 2)) for a in dc.infer_axes(gm) if a.prunable and a.size > 1}
        gm = dc.shrink(gm, keep)
    dyn = DynamicModel(gm).eval()
    body = dyn._pieces().stages[0].body
    assert body.code.count("torch.lstm_cell(") == len(dyn.gates) - 1 > 1
    assert body.code.count("torch.sigmoid(") == 2  # of the first step, which has nothing before it
    with torch.no_grad():
        torch.testing.assert_close(call(dyn.predict, batch).logits, call(gm, batch)[-1], rtol=1e-4, atol=1e-5)
