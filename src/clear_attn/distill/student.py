"""One model, two roles: the teacher as it was, and a student that has its own projections in its processors.

Nothing is swapped: a keyword of the call says whose projections are used. So wrappers that hold parameters by view
(DDP, ZeRO, FSDP), and recomputation under gradient checkpointing, always meet the same modules.
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
    """Attention outputs of a call by layer, before any projection.

    Not a dict: DDP and FSDP copy dicts among a call's keywords, and what a layer put into the copy would be lost.

    Args:
        layers: those to keep.
    """

    def __init__(self, layers: Iterable[str] = ()) -> None:
        self.layers = frozenset(layers)
        self.by_layer: dict[str, Tensor] = {}

    def record(self, layer: str, output: Tensor) -> None:
        """Keep an output by name: a recomputation runs a layer again."""
        if layer in self.layers:
            self.by_layer[layer] = output


class LowRank(nn.Module):
    """A projection with a low-rank update, zero at first: x W^T + b + x (B A)^T.

    Args:
        base: the projection, an `nn.Linear`; not a part of this module.
        rank: number of rows of A and columns of B.
        rng: for A, on the CPU; B is zeros.
    """

    def __init__(self, base: Any, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, since a module that is an attribute becomes a submodule
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
    """An attention layer with other projections, by their names, and without a fused one."""

    fused_projections = False

    def __init__(self, attn: Any, student: Mapping[str, nn.Module]) -> None:
        self._attn = attn
        self._student = {name.partition(".")[0]: module for name, module in student.items()}

    def __getattr__(self, name: str) -> Any:
        if name == "to_out" and name in self._student and isinstance(self._attn.to_out, nn.ModuleList):
            return [self._student[name], self._attn.to_out[1]]
        return self._student[name] if name in self._student else getattr(self._attn, name)


class DistillProcessor(ClearAttnProcessor):
    """Attention of one layer: with the layer's own projections for the teacher, else with the student's.

    Args:
        local: the linearized layer's processor, copied in float32.
        student: the student's projections, by name in the layer.
    """

    def __init__(self, local: ClearAttnProcessor, student: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.adapter, self.method, self.layer, self.group = local.adapter, local.method, local.layer, local.group
        self.local = copy.deepcopy(local).float()
        self.student = nn.ModuleDict({name.replace(".", "_"): module for name, module in student.items()})
        self._student_names = tuple(student)

    def run(self, attn: Any, inputs: Inputs, context: Any) -> Any:
        """Project, attend, project out, as the context's role says."""
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
    """Return a `DistillProcessor` that is called as the layers of a model call this class."""
    return type(f"Distill{processor.__name__}", (DistillProcessor, processor), {})


def add_student(pipe: Any, rank: int | None = None, seed: int = 0) -> list[nn.Parameter]:
    """Give a linearized pipeline or transformer a student with the teacher's values, and freeze all else.

    Args:
        pipe: linearized, with its own weights.
        rank: of low-rank updates of the projections to train; None trains the projections themselves.
        seed: of the low-rank updates' first values.

    Returns:
        The parameters to train, in float32.

    Raises:
        RuntimeError: the pipeline is not linearized, or has an IP-Adapter.
        ValueError: a rank below 1.
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
        raise RuntimeError(f"{adapted} has an IP-Adapter; call pipe.unload_ip_adapter(), linearize again, then distil")
    transformer.requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for layer, attn in layers.items():
        student = {
            name.removeprefix(f"{layer}."): LowRank(module, rank, rng) if rank else copy.deepcopy(module).float()
            for name, module in projections({layer: attn}).items()
        }
        make = _with_signature_of(type(attn.processor))  # type: ignore[arg-type]
        attn.set_processor(make(attn.processor, student).requires_grad_(True))
    return list(student_parameters(transformer).values())


def processors(transformer: Any) -> dict[str, DistillProcessor]:
    """Return the processors with a student, by layer."""
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
    }


def student_values(transformer: Any) -> dict[str, Tensor]:
    """Return the student's whole values, by name in a checkpoint of distilled weights."""
    own = own_parameters({layer: processor.local for layer, processor in processors(transformer).items()})
    values = {name: whole(parameter.detach()) for name, parameter in own.items()}
    for layer, processor in processors(transformer).items():
        for projection, module in processor.projections.items():
            trained = module.values() if isinstance(module, LowRank) else dict(module.named_parameters())
            values |= {f"{layer}.{projection}.{name}": whole(value.detach()) for name, value in trained.items()}
    return values


def keywords(role: str, outputs: Outputs | None = None) -> dict[str, Any]:
    """Return the attention keywords of a call of the transformer."""
    return {ROLE: role, RECORDER: None if outputs is None else outputs.record}
