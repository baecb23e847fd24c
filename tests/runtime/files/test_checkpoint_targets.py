"""Only functions of the closed set have a name in a checkpoint, and only their names lead to a function."""

import pytest
import torch

import dyncompress as dc
from dyncompress.runtime.files.allowed_operators import FUNCTIONS, find_target, target_name


def test_closed_set_of_functions() -> None:
    for name, function in FUNCTIONS.items():
        assert find_target(name) is function and target_name(function) == name
    aten = torch.ops.aten
    for op in (
        aten.add.Tensor,
        aten.relu_.default,
        aten.__and__.Tensor,
        aten.sym_size.int,
        aten.arange.start,
        aten.to.device,
    ):
        assert find_target(target_name(op)) is op
    refused = (
        "os.system", "builtins.eval", "operator.attrgetter", "operator.methodcaller", "torch.load", "aten.add",
        "aten.__class__.default", "aten.add.__class__", "aten.add.op", "aten.from_file.default", "aten.save.default",
        "aten.set_data.default", "aten.set_.source_Storage", "aten.resize_.default", "aten.backward.default",
        "aten.max_pool2d_with_indices_backward.default", "aten.manual_seed.default", "aten.format.default",
        "aten.add.Tensor.overloadpacket", "prims.add.default", "aten.record_stream.default", "", "aten..", None, 3, {},
    )  # fmt: skip
    for name in refused:
        with pytest.raises(dc.RequestError, match="outside the operators"):
            find_target(name)
