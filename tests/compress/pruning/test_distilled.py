"""A teacher in the training after pruning and while sparsifying: the loss by hand, what it must and must not touch."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from data import stripes
from flat_options import flat
from nets import seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from trained import SPARSIFY, same, stopped

import dyncompress as dc
from dyncompress.compress.training.losses import Distilled, cross_entropy
from dyncompress.compress.training.trainer import fit

SPARSE: dict[str, Any] = SPARSIFY | {"macs": 0.5}
PRUNED: dict[str, Any] = {"macs": 0.4, "finetune": 2, "batch_size": 32, "lr": 1e-2}


def relabelled() -> TensorDataset:
    """The same images with other labels."""
    x, y = stripes().tensors
    return TensorDataset(x, (y + 1) % (int(y.max()) + 1))


def test_the_loss_is_hintons() -> None:
    z, taught, y = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 3, 1, 2, 2, 0])
    kl = F.kl_div(F.log_softmax(z / 2, 1), F.softmax(taught / 2, 1), reduction="batchmean")
    wanted = 0.7 * F.cross_entropy(z, y) + 0.3 * 4 * kl
    torch.testing.assert_close(Distilled(cross_entropy, 0.3)((z, taught), y), wanted)


def test_positions_without_a_label_count_for_nothing() -> None:
    z, taught, y = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.tensor([[1, -100, 4], [0, 2, -100]])
    loss, real = Distilled(cross_entropy, 0.5), y != -100
    torch.testing.assert_close(loss((z, taught), y), loss((z[real], taught[real]), y[real]))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_student_becomes_its_teacher(precision: str) -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    student, before = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), copy.deepcopy(teacher.state_dict())
    data = TensorDataset(torch.randn(256, 1, 4, 4), torch.zeros(256, dtype=torch.int64))
    options: dict[str, Any] = {"epochs": 20, "lr": 0.1, "batch_size": 32, "progress": False}
    optimizer = partial(torch.optim.SGD, momentum=0.9)
    loss = Distilled(cross_entropy, 1.0)
    AcceleratorState._reset_state(True)
    try:
        flat(fit)(student, loss, data, teacher=teacher, optimizer=optimizer, mixed_precision=precision, **options)
    finally:
        AcceleratorState._reset_state(True)
    assert teacher.training and not any((teacher.state_dict()[name] != value).any() for name, value in before.items())
    x = data.tensors[0]
    with torch.no_grad():
        mine, taught = student(x).softmax(1), teacher.eval()(x).softmax(1)
    assert (mine - taught).abs().max() < 0.02  # both are linear in x


def test_with_a_teacher_alone_labels_do_not_matter() -> None:
    first, second = (flat(dc.sparsify)(seeded(), data, **SPARSE, distill=1.0) for data in (stripes(), relabelled()))
    assert same(first, second)
    first, second = (
        flat(dc.prune)(seeded(), stripes()[0][0][None], data=data, **PRUNED, distill=1.0)
        for data in (stripes(), relabelled())
    )
    assert same(first, second)
    assert not same(first, flat(dc.prune)(seeded(), stripes()[0][0][None], data=stripes(), **PRUNED))


def test_a_distilled_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = SPARSE | {"shrink_every": 1, "epochs": 3, "distill": 0.5}
    whole = flat(dc.sparsify)(seeded(), stripes(), **options)
    with pytest.raises(KeyboardInterrupt, match="continue with resume"):
        flat(dc.sparsify)(seeded(), stripes(), loss_fn=stopped(14), run_dir=tmp_path, **options)
    assert same(flat(dc.sparsify)(seeded(), stripes(), run_dir=tmp_path, resume=True, **options), whole)
    with pytest.raises(dc.RequestError, match="has distill"):
        flat(dc.sparsify)(seeded(), stripes(), run_dir=tmp_path, resume=True, **options | {"distill": 0.25})


def test_wrong_shares() -> None:
    x = stripes()[0][0][None]
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(dc.RequestError, match="share from 0 to 1"):
            flat(dc.sparsify)(seeded(), stripes(), **SPARSE, distill=share)
        with pytest.raises(dc.RequestError, match="share from 0 to 1"):
            flat(dc.prune)(seeded(), x, data=stripes(), **PRUNED, distill=share)
    with pytest.raises(dc.RequestError, match="give finetune"):
        dc.prune(seeded(), x, macs=0.5, cuts=dc.Cuts(distill=0.5))
