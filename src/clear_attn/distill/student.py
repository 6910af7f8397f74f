"""One model in two roles: the teacher with the original projections, and a student with its own in the processors.

No module is swapped: a keyword of the call selects the projections. Wrappers that hold views of parameters (DDP, ZeRO,
FSDP), and recomputation under gradient checkpointing, therefore always use the same modules.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_attn.distill.sharding import whole
from clear_attn.models.class_names import is_instance
from clear_attn.models.context.context import RECORDER, ROLE, STUDENT, TEACHER
from clear_attn.models.processors.processor import ClearAttnProcessor, Inputs
from clear_attn.patching.target import find_target
from clear_attn.weights.parameters import own_parameters, projections

__all__ = ["STUDENT", "TEACHER", "Outputs", "add_student", "keywords", "student_parameters", "student_values"]


class Outputs:
    """Record attention outputs of a call by layer, before any projection.

    This is not a dict, because DDP and FSDP copy dicts in a call's keywords, and outputs in the copy would be lost.

    Args:
        layers: the layers to record.
    """

    def __init__(self, layers: Iterable[str] = ()) -> None:
        self.layers = frozenset(layers)
        self.by_layer: dict[str, Tensor] = {}

    def record(self, layer: str, output: Tensor) -> None:
        """Record an output. A recomputation of the layer overwrites it."""
        if layer in self.layers:
            self.by_layer[layer] = output


class LowRank(nn.Module):
    """A projection with a low-rank update that starts at zero: x W^T + b + x (B A)^T.

    Args:
        base: the projection, an `nn.Linear`, which does not become a submodule.
        rank: the number of rows of A and columns of B.
        rng: a generator on the CPU for A; B starts as zeros.
    """

    def __init__(self, base: Any, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        self._base = (base,)  # a tuple, so that it does not become a submodule
        device = base.weight.device
        down = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5, generator=rng)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self._base[0](x)
        return base + F.linear(F.linear(x, self.down), self.up)

    def values(self) -> dict[str, Tensor]:
        """Return the parameters of the projection with its update, by name."""
        base = {name: whole(parameter.detach()) for name, parameter in self._base[0].named_parameters()}
        update = whole(self.up.detach()) @ whole(self.down.detach())
        return {**base, "weight": base["weight"].float() + update}


class LayerView:
    """An attention layer with some projections replaced, and without a fused projection."""

    fused_projections = False

    def __init__(self, attn: Any, student: Mapping[str, nn.Module]) -> None:
        self._attn = attn
        self._student = {name.partition(".")[0]: module for name, module in student.items()}

    def __getattr__(self, name: str) -> Any:
        if name == "to_out" and name in self._student and isinstance(self._attn.to_out, nn.ModuleList):
            return [self._student[name], self._attn.to_out[1]]
        return self._student[name] if name in self._student else getattr(self._attn, name)


class DistillProcessor(ClearAttnProcessor):
    """Compute the attention of one layer with the original projections for the teacher, else with the student's.

    Args:
        local: the linearized layer's processor, which is copied in float32.
        student: the student's projections, by name in the layer.
    """

    def __init__(self, local: ClearAttnProcessor, student: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.adapter, self.method, self.layer, self.group = local.adapter, local.method, local.layer, local.group
        self.local = copy.deepcopy(local).float()
        self.student = nn.ModuleDict({name.replace(".", "_"): module for name, module in student.items()})
        self._student_names = tuple(student)

    def run(self, attn: Any, inputs: Inputs, context: Any) -> Any:
        """Return the layer's output in the context's role: project, attend, project out."""
        context = self.validate_call(inputs, context)
        view = LayerView(attn, {} if context.role == TEACHER else self.projections)
        query, key, value, rest = self.adapter.project(view, inputs)
        joint = self.local.as_module(query, key, value, context)
        if context.record is not None and self.layer:
            context.record(self.layer.name, joint)
        return self.adapter.project_out(view, joint, inputs, rest)

    @property
    def projections(self) -> dict[str, nn.Module]:
        """The student's projections, by name in the layer."""
        return dict(zip(self._student_names, self.student.values(), strict=True))


@functools.cache
def _with_signature_of(processor: type[ClearAttnProcessor]) -> type[DistillProcessor]:
    """Return a `DistillProcessor` class with the signature of another processor class."""
    return type(f"Distill{processor.__name__}", (DistillProcessor, processor), {})


def add_student(pipe: Any, rank: int | None = None, seed: int = 0) -> list[nn.Parameter]:
    """Add a student with the teacher's values to a linearized pipeline or transformer, and freeze all other parameters.

    Args:
        pipe: a linearized pipeline or transformer with its own weights.
        rank: the rank of low-rank updates to train; None trains the projections themselves.
        seed: the seed of the low-rank updates.

    Returns:
        The parameters to train, in float32.

    Raises:
        RuntimeError: the pipeline is not linearized, or has an IP-Adapter.
        ValueError: the rank is below 1.
    """
    target = find_target(pipe)
    transformer, layers = target.transformer, target.layers
    if target.hook is None:
        raise RuntimeError("only a linearized model can have a student; call clear_attn.linearize(..., weights=None)")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}; leave it out to train whole projections")
    names = target.adapter.ip_adapter_processors
    adapted = next((layer for layer, attn in layers.items() if is_instance(attn.processor, names)), None)
    if adapted:
        raise RuntimeError(f"{adapted} has an IP-Adapter; call pipe.unload_ip_adapter(), linearize again, then distill")
    transformer.requires_grad_(False)
    rng, described = torch.Generator().manual_seed(seed), target.adapter.describe_layers(transformer)
    for layer, attn in layers.items():
        student = {
            name.removeprefix(f"{layer}."): LowRank(module, rank, rng) if rank else copy.deepcopy(module).float()
            for name, module in projections({layer: attn}).items()
        }
        make = _with_signature_of(type(attn.processor))  # type: ignore[arg-type]
        attn.set_processor(make(attn.processor, student).requires_grad_(described[layer].has_image))
    return list(student_parameters(transformer).values())


def processors(transformer: Any) -> dict[str, DistillProcessor]:
    """Return the processors that have a student, by layer."""
    return {
        processor.layer.name: processor
        for processor in transformer.modules()
        if isinstance(processor, DistillProcessor) and processor.layer
    }


def student_parameters(transformer: Any) -> dict[str, nn.Parameter]:
    """Return the parameters to train, by name in the transformer."""
    return {
        f"{layer}.processor.{name}": parameter
        for layer, processor in processors(transformer).items()
        for name, parameter in processor.named_parameters()
        if parameter.requires_grad  # layers that attend among references alone are not trained
    }


def student_values(transformer: Any) -> dict[str, Tensor]:
    """Return the student's unsharded values, by their names in a checkpoint of distilled weights."""
    own = own_parameters({layer: processor.local for layer, processor in processors(transformer).items()})
    values = {name: whole(parameter.detach()) for name, parameter in own.items()}
    for layer, processor in processors(transformer).items():
        for projection, module in processor.projections.items():
            trained = module.values() if isinstance(module, LowRank) else dict(module.named_parameters())
            values |= {f"{layer}.{projection}.{name}": whole(value.detach()) for name, value in trained.items()}
    return values


def keywords(role: str, outputs: Outputs | None = None) -> dict[str, Any]:
    """Return the attention keywords for a call of the transformer in a role."""
    return {ROLE: role, RECORDER: None if outputs is None else outputs.record}
