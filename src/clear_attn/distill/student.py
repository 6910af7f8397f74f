"""One trunk, two models: the teacher as it stands, and the student's own projections beside it in its processors.

Nothing is swapped: a call says by a keyword which of the two computes, so that wrappers that hold parameters by view
(DDP, ZeRO, FSDP) and recomputation for gradients see the same modules always.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_attn.distill.sharding import whole
from clear_attn.models.class_names import is_instance
from clear_attn.models.context.context import RECORDER, ROLE
from clear_attn.models.processors.processor import ClearAttnProcessor, Inputs
from clear_attn.patching.target import entry_hook_of, find_transformer, processors_of
from clear_attn.weights.parameters import own_parameters, projections

TEACHER, STUDENT = "teacher", "student"


class Outputs:
    """What attention gives in a call, by layer, before any projection.

    Not a dict: wrappers copy those among a call's keywords (DDP and FSDP, to move or cast what is in them), and what a
    layer put into the copy would be lost.

    Args:
        layers: those to keep.
    """

    def __init__(self, layers: Iterable[str] = ()) -> None:
        self.layers = frozenset(layers)
        self.by_layer: dict[str, Tensor] = {}

    def record(self, layer: str, output: Tensor) -> None:
        """Keep an output by name, never appended: recomputation for gradients runs a layer again."""
        if layer in self.layers:
            self.by_layer[layer] = output


class LowRank(nn.Module):
    """A projection plus a low-rank update of it, at first none: x W^T + b + x (B A)^T.

    Args:
        base: the projection, an `nn.Linear`; not a part of this module.
        rank (`int`): the rows of A and columns of B.
        rng: for A, on the CPU; B is zeros.
    """

    def __init__(self, base: Any, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, for what is an attribute of a module becomes a part of it
        device = base.weight.device
        down = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5, generator=rng)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self._base[0](x)
        return base + F.linear(F.linear(x, self.down), self.up)

    def values(self) -> dict[str, Tensor]:
        """Of the projection with its update, by parameter."""
        base = {name: whole(parameter.detach()) for name, parameter in self._base[0].named_parameters()}
        update = whole(self.up.detach()) @ whole(self.down.detach())
        return {**base, "weight": base["weight"].float() + update}


class LayerView:
    """An attention layer with other projections, by their dotted names, and without a fused one."""

    fused_projections = False

    def __init__(self, attn: Any, student: Mapping[str, nn.Module]) -> None:
        self._attn = attn
        self._student = {name.partition(".")[0]: module for name, module in student.items()}

    def __getattr__(self, name: str) -> Any:
        if name == "to_out" and name in self._student and isinstance(self._attn.to_out, nn.ModuleList):
            return [self._student[name], self._attn.to_out[1]]
        return self._student[name] if name in self._student else getattr(self._attn, name)


class DistillProcessor(ClearAttnProcessor):
    """Of one layer: dense attention with the layer's own projections, or a method's with the student's.

    Args:
        local: the layer's processor, of which it has a copy in float32.
        student: the student's projections, by name in the layer.
    """

    def __init__(self, local: ClearAttnProcessor, student: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.adapter, self.method, self.layer, self.group = local.adapter, local.method, local.layer, local.group
        self.local = copy.deepcopy(local).float()
        self.student = nn.ModuleDict({name.replace(".", "_"): module for name, module in student.items()})
        self._names_of_student = tuple(student)

    def run(self, attn: Any, inputs: Inputs, context: Any) -> Any:
        """Project, attend, project out, as the context's role says."""
        context = self.validate_call(inputs, context)
        teaches = context.role == TEACHER
        view = LayerView(attn, {} if teaches else self.projections)
        query, key, value, rest = self.adapter.project(view, inputs)
        if teaches:
            joint = context.attend_densely(self.group, query, key, value, self.attention_backend)
        else:
            joint = self.local.as_module(query, key, value, context)
        if context.record is not None and self.layer:
            context.record(self.layer.name, joint)
        return self.adapter.project_out(view, joint, inputs, rest)

    @property
    def projections(self) -> dict[str, nn.Module]:
        """The student's, by name in the layer."""
        return dict(zip(self._names_of_student, self.student.values(), strict=True))


def add_student(pipe: Any, rank: int | None = None, seed: int = 0) -> list[nn.Parameter]:
    """Gives a linearized pipeline or transformer a student, which starts as its teacher, and freezes all else.

    Args:
        pipe: linearized, with its own weights.
        rank (`int`, *optional*): train low-rank updates of the projections; by default the projections themselves.
        seed (`int`): of the low-rank updates' first values.

    Returns:
        The parameters to train, in float32.

    Raises:
        RuntimeError: the pipeline is not linearized, or has an IP-Adapter.
        TypeError: a model that cannot be distilled yet.
        ValueError: a rank below 1.
    """
    transformer, adapter = find_transformer(pipe)
    if entry_hook_of(transformer) is None:
        raise RuntimeError("only a linearized model can have a student; call clear_attn.linearize(..., weights=None)")
    layers = adapter.attention_layers(transformer)
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}; leave it out to train whole projections")
    names = adapter.ip_adapter_processors
    adapted = next((layer for layer, attn in layers.items() if is_instance(attn.processor, names)), None)
    if adapted:
        raise RuntimeError(f"{adapted} has an IP-Adapter; call pipe.unload_ip_adapter(), linearize again, then distil")
    kinds = {type(processor) for processor in processors_of(layers).values()}
    if any(kind.__call__ is not ClearAttnProcessor.__call__ for kind in kinds):
        raise TypeError(
            f"a {type(transformer).__name__} cannot be distilled: its layers call their processors in a way of their "
            "own; give a FLUX.1, Stable Diffusion 3 or DiT"
        )
    transformer.requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for layer, attn in layers.items():
        of_layer = projections({layer: attn})
        student = {
            name.removeprefix(f"{layer}."): LowRank(module, rank, rng) if rank else copy.deepcopy(module).float()
            for name, module in of_layer.items()
        }
        attn.set_processor(DistillProcessor(attn.processor, student).requires_grad_(True))
    return list(student_parameters(transformer).values())


def processors(transformer: Any) -> dict[str, DistillProcessor]:
    """By layer."""
    return {
        processor.layer.name: processor
        for processor in transformer.modules()
        if isinstance(processor, DistillProcessor) and processor.layer
    }


def student_parameters(transformer: Any) -> dict[str, nn.Parameter]:
    """What is trained, by name in the transformer."""
    return {
        f"{layer}.processor.{name}": parameter
        for layer, processor in processors(transformer).items()
        for name, parameter in processor.named_parameters()
    }


def student_values(transformer: Any) -> dict[str, Tensor]:
    """The student's whole values under the names of a checkpoint of distilled weights."""
    own = own_parameters({layer: processor.local for layer, processor in processors(transformer).items()})
    values = {name: whole(parameter.detach()) for name, parameter in own.items()}
    for layer, processor in processors(transformer).items():
        for projection, module in processor.projections.items():
            trained = module.values() if isinstance(module, LowRank) else dict(module.named_parameters())
            values |= {f"{layer}.{projection}.{name}": whole(value.detach()) for name, value in trained.items()}
    return values


def keywords(role: str, outputs: Outputs | None = None) -> dict[str, Any]:
    """What a call of the transformer says in its `joint_attention_kwargs`."""
    return {ROLE: role, RECORDER: None if outputs is None else outputs.record}
