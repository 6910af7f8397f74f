"""What a run holds where it is spread over processes: whole parameters, and each process's part of the optimizer.

On one device and under DDP every process holds all of it. ZeRO-2 spreads the optimizer's state and a copy of the
parameters in float32; FSDP2 the parameters too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_spread(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of its own of the optimizer's state."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def whole(parameter: Tensor) -> Tensor:
    """A parameter's whole value; under FSDP2 all processes have to ask for it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Gives a parameter a whole value; under FSDP2 the first process's, and each keeps its part."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """This process's part, of plain tensors."""
    inner, masters = _zero(optimizer)
    state = _map(inner.state_dict(), lambda tensor: tensor.to_local() if isinstance(tensor, DTensor) else tensor)
    return {"optimizer": state, "masters": [master.detach() for master in masters]}


@torch.no_grad()
def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """The reverse of `optimizer_state`, in a run spread over as many processes."""
    inner, masters = _zero(optimizer)
    for master, value in zip(masters, state["masters"], strict=True):
        master.copy_(value)
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    by_number = state["optimizer"]["state"].items()
    values = {number: _like(parameters[number], value) for number, value in by_number}
    inner.load_state_dict({**state["optimizer"], "state": values})


def _like(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state, spread as the parameter is."""
    if not isinstance(parameter, DTensor):
        return state
    local = parameter.to_local()

    def spread(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != local.shape:
            return value
        return DTensor.from_local(
            value.to(local.device),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    return {name: spread(value) for name, value in state.items()}


def _zero(optimizer: Any) -> tuple[Any, list[Tensor]]:
    """The optimizer that computes, and under ZeRO-2 the parts of the parameters that it computes on."""
    inner = optimizer.optimizer  # of accelerate's wrapper
    masters = getattr(inner, "single_partition_of_fp32_groups", None)
    return (inner, []) if masters is None else (inner.optimizer, masters)


def _map(value: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, dict):
        return {name: _map(each, of_tensor) for name, each in value.items()}
    return [_map(each, of_tensor) for each in value] if isinstance(value, list) else value
