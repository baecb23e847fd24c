"""Networks that tests train once and share, and the settings, losses and comparisons of tests that train."""

from functools import cache
from typing import Any

import torch
from data import digits, make_stripes, signs
from flat_options import flat
from nets import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from dyncompress.compress.evaluation.evaluate import collect_logits
from dyncompress.compress.training.losses import cross_entropy
from dyncompress.compress.training.trainer import fit
from dyncompress.passes.capture.capture import capture
from dyncompress.passes.exits.insert_exits import InsertExits
from dyncompress.runtime.predict.dynamic import DynamicModel

QUIET: dict[str, Any] = {"device": "cpu", "progress": False}
SPARSIFY: dict[str, Any] = {"epochs": 3, "finetune": 1, "batch_size": 32, "lr": 1e-2, "device": "cpu"}


def convolution(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


@cache
def on_digits() -> nn.Module:
    """A convolutional network, in evaluation mode; not to be changed."""
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [convolution(1, 12), convolution(12, 24, 2), convolution(24, 24), convolution(24, 32)]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        flat(fit)(model, F.cross_entropy, digits().train, epochs=8, lr=0.02, batch_size=64, **QUIET)
    return model.eval()


@cache
def on_signs() -> nn.Module:
    """An `Mlp`, in evaluation mode; not to be changed."""
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = Mlp()
        flat(fit)(net, F.cross_entropy, signs(), epochs=30, lr=0.02, batch_size=64, **QUIET)
    return net.eval()


def on_stripes(net: nn.Module, steps: int) -> nn.Module:
    """The network after steps on all of the stripes at once, in evaluation mode."""
    train, optimizer = make_stripes().train, torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(net(train.inputs), train.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def inserted(net: nn.Module, head: str = "auto") -> DynamicModel:
    """An `Mlp` with two exits of the same weights at every call."""
    torch.manual_seed(3)
    return DynamicModel(InsertExits(2, head)(capture(net, torch.randn(2, 8))).gm)


def accuracies(dynamic: DynamicModel) -> list[float]:
    """Of every exit of a dynamic `Mlp`."""
    logits, labels = collect_logits(dynamic, signs())
    return [float((z.argmax(-1) == labels).double().mean()) for z in logits]


def info(model: DynamicModel) -> dict[str, Any]:
    """What `convert` says of a model it made."""
    return model.trunk.meta["info"]["convert"]


def accuracy_and_macs(model: DynamicModel, data: Dataset[Any]) -> tuple[float, float]:
    """Accuracy and mean MACs, one sample at a time."""
    right = spent = 0
    for i in range(len(data)):  # type: ignore[arg-type]
        x, y = data[i]
        out = model.predict(x.unsqueeze(0))
        right += int(out.logits.argmax() == y)
        spent += int(out.macs)
    return right / len(data), spent / len(data)  # type: ignore[arg-type]


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    return float((model.eval()(x).argmax(-1) == y).double().mean())


def stopped(step: int) -> Any:
    """The loss, until some step."""
    seen = iter(range(10**6))

    def loss(output: Any, labels: Tensor) -> Tensor:
        if next(seen) == step:
            raise KeyboardInterrupt
        return cross_entropy(output, labels)

    return loss


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
