"""What timing work on any device needs: to wait until the device has done what it was given."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_IMMEDIATE = ("cpu", "meta")  # a call returns when its work is done


def wait_for(device: torch.device) -> None:
    """Lets the device finish what it was given."""
    if device.type not in _IMMEDIATE:
        torch.accelerator.synchronize(device)


def device_of(inputs: Any) -> torch.device:
    """Where a call with these inputs works: the device of the first tensor that is not on the CPU, if there is one."""
    devices = (leaf.device for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
