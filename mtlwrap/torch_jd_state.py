"""The state of a method of TorchJD: taken, put back, brought to a device, and what of it has changed."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtlwrap.plain_data import encoded, mapped, same

# By the path of each part, by attribute.
State = dict[str, dict[str, Any]]
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_KEY = "_state_key"
_NASH = "_init_optim_problem"


def is_stateful(module: nn.Module) -> bool:
    """Whether TorchJD says that a part keeps something from step to step."""
    import torchjd

    return isinstance(module, torchjd.Stateful)


def reset_parts(method: nn.Module) -> None:
    """Have each part that can begin anew."""
    for module in method.modules():
        if is_stateful(module):
            module.reset()  # type: ignore[operator]


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """A part's own buffers, those that are None too, and what it keeps in plain attributes."""
    plain = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return {**plain, **module._buffers}


def assign(module: nn.Module, name: str, value: Any) -> None:
    """Set a buffer or a plain attribute, past properties and checks."""
    (module._buffers if name in module._buffers else vars(module))[name] = value


def snapshot(method: nn.Module) -> State:
    """A copy of the state."""
    return {
        path: {name: mapped(value, lambda tensor: tensor.detach().clone()) for name, value in attributes_of(m).items()}
        for path, m in method.named_modules()
    }


def restore(method: nn.Module, state: State) -> None:
    """Put a copy of a state back."""
    modules = dict(method.named_modules())
    for path, attributes in state.items():
        if path in modules:
            for late in attributes_of(modules[path]).keys() - attributes.keys():
                delattr(modules[path], late)
            for name, value in attributes.items():
                assign(modules[path], name, mapped(value, torch.clone))


def fresh_state(method: nn.Module) -> State:
    """The state after a reset, or as it is where there is no reset; the method stays as it was."""
    used, parameters = snapshot(method), [parameter.detach().clone() for parameter in method.parameters()]
    reset_parts(method)
    fresh = snapshot(method)
    restore(method, used)
    with torch.no_grad():
        for parameter, value in zip(method.parameters(), parameters, strict=True):
            parameter.copy_(value)
    return fresh


def settle(method: nn.Module, given: Tensor) -> None:
    """Bring what the method keeps to the device and precision of what it is given.

    Options that are tensors do not come along when a model is moved, and some states remember their device and
    precision and start afresh on another.
    """
    for module in method.modules():
        device, attributes = given.device, attributes_of(module)
        if _KEY in attributes:
            key = attributes[_KEY] if isinstance(attributes[_KEY], tuple) else (attributes[_KEY],)
            _check_size(module, tuple(part for part in key if isinstance(part, int)), given)
            if not any(isinstance(part, torch.dtype) for part in key):
                continue  # it looks after this itself
            if not any(isinstance(part, torch.device) for part in key):
                device = torch.device("cpu")  # where TorchJD keeps it
            assign(module, _KEY, tuple(_renewed(part, device, given.dtype) for part in key))
            attributes = dict(module._buffers)
        for name, value in attributes.items():
            assign(module, name, mapped(value, partial(_like, device=device, dtype=given.dtype)))


def _renewed(part: Any, device: torch.device, dtype: torch.dtype) -> Any:
    return dtype if isinstance(part, torch.dtype) else device if isinstance(part, torch.device) else part


def _like(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _check_size(module: nn.Module, sizes: tuple[int, ...], given: Tensor) -> None:
    if sizes != tuple(given.shape[: len(sizes)]):
        raise ValueError(
            f"{type(module).__name__} of torchjd holds the state of gradients of shape {sizes}, got "
            f"{tuple(given.shape)[: len(sizes)]}: it would silently start afresh. Keep the size of the batch (drop "
            "the last, smaller one), use a balancer of mtlwrap, or call reset()."
        )


def complete(module: nn.Module) -> None:
    """Make what NashMTL makes in its first step only, from what was restored."""
    make = getattr(module, _NASH, None)
    if make is not None and getattr(module, "step", False):
        make()


def changes_since(method: nn.Module, fresh: State) -> State:
    """What differs from the fresh state, as plain data."""
    changes: State = {}
    for path, module in method.named_modules():
        for name, value in attributes_of(module).items():
            known = fresh.get(path, {})
            if name in known and same(value, known[name]):
                continue
            try:
                changes.setdefault(path, {})[name] = encoded(value)
            except TypeError:
                if not hasattr(module, _NASH):  # whose solver is made again by complete
                    _warn_unsaved(module, name, value)
    return {path: entries for path, entries in changes.items() if entries}


def _warn_unsaved(module: nn.Module, name: str, value: Any) -> None:
    warnings.warn(
        f"TorchJD: {type(module).__name__}.{name} has changed and is not in the state_dict, for a "
        f"{type(value).__name__} cannot be saved as plain data. Training will not resume exactly.",
        UserWarning,
        stacklevel=2,
    )
