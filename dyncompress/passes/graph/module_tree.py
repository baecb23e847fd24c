"""Modules and tensors at dotted paths: put there, with the plain modules on the way, shared, and taken out again."""

from torch import Tensor, nn


def holder_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, "" for `root` itself; plain modules are made where there are none."""
    for part in filter(None, path.split(".")):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def put_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a dotted path; it gets the children of what is there already."""
    parent, _, name = path.rpartition(".")
    holder = holder_at(root, parent)
    if (there := holder._modules.get(name)) is not None:
        module._modules.update(there._modules)
    holder.add_module(name, module)


def put_tensor(root: nn.Module, path: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Puts a parameter, or any other tensor as a buffer, at a dotted path."""
    parent, _, name = path.rpartition(".")
    holder = holder_at(root, parent)
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(name, tensor)
    else:
        holder.register_buffer(name, tensor, persistent=persistent)


def remove_tensor(root: nn.Module, path: str) -> None:
    """Removes a tensor and the modules that it leaves empty; it may be gone already."""
    *parents, leaf = path.split(".")
    owners = [root]
    for part in parents:
        if part not in owners[-1]._modules:
            return
        owners.append(getattr(owners[-1], part))
    owners[-1]._parameters.pop(leaf, None)
    owners[-1]._buffers.pop(leaf, None)
    for owner, child, part in reversed(list(zip(owners, owners[1:], parents, strict=False))):
        if not any(True for _ in [*child.parameters(), *child.buffers(), *child.children()]):
            del owner._modules[part]


def sharing(module: nn.Module) -> nn.Module:
    """A plain module that holds what another one holds; what is added to it, the other does not get."""
    plain = nn.Module()
    plain._modules, plain._parameters = dict(module._modules), dict(module._parameters)
    plain._buffers = dict(module._buffers)
    return plain
