"""Access parameters and optimizer state of a run that is sharded over processes.

On one device and under DDP, every process has all values. ZeRO-2 shards the optimizer state and a float32 copy of the
parameters. FSDP2 shards the parameters, too.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from clear_attn.utils._torch import map_tensors


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether each process has only its shard of the optimizer state."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter's unsharded value; under FSDP2 all processes must call it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy an unsharded value into a parameter; FSDP2 takes the first process's value and shards it."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return this process's shard of the optimizer state, as plain tensors."""
    inner, masters = _zero(optimizer)
    state = map_tensors(lambda x: x.to_local() if isinstance(x, DTensor) else x, inner.state_dict())
    return {"optimizer": state, "masters": [master.detach() for master in masters]}


@torch.no_grad()
def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load the result of `optimizer_state` in a run with the same number of processes."""
    inner, masters = _zero(optimizer)
    for master, value in zip(masters, state["masters"], strict=True):
        master.copy_(value)
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    by_number = state["optimizer"]["state"].items()
    values = {number: _like(parameters[number], value) for number, value in by_number}
    inner.load_state_dict({**state["optimizer"], "state": values})


def _like(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter's state, sharded like the parameter."""
    if not isinstance(parameter, DTensor):
        return state
    local = parameter.to_local()

    def shard(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != local.shape:
            return value
        return DTensor.from_local(
            value.to(local.device),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    return {name: shard(value) for name, value in state.items()}


def _zero(optimizer: Any) -> tuple[Any, list[Tensor]]:
    """Return the inner optimizer, and under ZeRO-2 its float32 shards of the parameters."""
    inner = optimizer.optimizer  # of accelerate's wrapper
    masters = getattr(inner, "single_partition_of_fp32_groups", None)
    return (inner, []) if masters is None else (inner.optimizer, masters)
