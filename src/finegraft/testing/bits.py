"""Everything that one can tell about a model, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = tuple(
    name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that negative zeros and not-a-numbers compare as they are stored."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).clone()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What detaching must give back: tensors bit by bit, flags, classes, hooks, modes, names and their order."""
    taken: dict[str, Any] = {"state_dict keys": list(model.state_dict())}
    for name, module in model.named_modules():
        taken[f"class of {name!r}"] = type(module)
        taken[f"mode of {name!r}"] = module.training
        taken[f"hooks of {name!r}"] = {hooks: len(getattr(module, hooks)) for hooks in _HOOKS}
        taken[f"children of {name!r}"] = list(module._modules)
        taken[f"stored tensors of {name!r}"] = (list(module._parameters), list(module._buffers))
        taken[f"attributes of {name!r}"] = sorted(vars(module))
    for name, tensor in _tensors(model).items():
        taken[f"bits of {name!r}"] = bits(tensor)
        taken[f"layout of {name!r}"] = (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.data_ptr(),
            id(tensor),
        )
        taken[f"requires_grad of {name!r}"] = tensor.requires_grad
    return taken


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The bits of every parameter and buffer, without those of grafts."""
    return {name: bits(tensor) for name, tensor in _tensors(model).items() if "finegraft" not in name.split(".")}


def unchanged(after: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Assert that two snapshots of a model are equal, and name what is not."""
    assert list(after) == list(before), f"other modules or tensors: {sorted(set(after) ^ set(before))}"
    for what, value in before.items():
        same = torch.equal(after[what], value) if isinstance(value, Tensor) else after[what] == value
        assert same, f"{what} changed" + ("" if isinstance(value, Tensor) else f" from {value} to {after[what]}")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)
