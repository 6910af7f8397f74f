"""The verbs that split a linearized pipeline over ranks, and undo it."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from clear_attn.parallel.communicator import Links
from clear_attn.parallel.decode import decode_everywhere, decode_on_one_rank, weakly
from clear_attn.parallel.launch import join
from clear_attn.parallel.sharder import Sharder
from clear_attn.patching.state import install_hooks
from clear_attn.patching.target import entry_hook_of, find_transformer

PipelineOrTransformer = TypeVar("PipelineOrTransformer")


def parallelize(
    pipe: PipelineOrTransformer, mesh: DeviceMesh | dist.ProcessGroup | None = None
) -> PipelineOrTransformer:
    """Sharders the image tokens of a linearized pipeline over the ranks of a process group, in place.

    Every rank then calls the pipeline as usual, with the same arguments, and is given the same picture, which is that
    of a single process. The text encoders run on every rank; rank 0 decodes the latents for all.

    `linearize` with other settings keeps it; `restore` and `deparallelize` end it. What stays dense, as the base image
    of `highres`, every rank computes for itself.

    Args:
        pipe: a linearized diffusers pipeline or transformer; no ControlNet, which runs whole on every rank.
        mesh (*optional*): of one dimension, or a process group: the ranks that share a picture; by default all. With
            `init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "rows"))`, take `mesh["rows"]`, and give each of
            the two groups a picture of its own.

    Returns:
        ``pipe`` itself.

    Raises:
        TypeError: not a supported pipeline, a ControlNet, or Qwen-Image-Edit with `zero_cond_t`; a mesh of another
            kind.
        ValueError: not linearized, or with another method than CLEAR; a mesh of several dimensions.
        RuntimeError: not started by torchrun, and torch.distributed not initialized.
    """
    transformer, _ = find_transformer(pipe)
    if not hasattr(transformer, "proj_out"):
        raise TypeError(
            f"a {type(transformer).__name__} cannot be split over ranks; give the pipeline or its transformer, beside "
            "which ControlNets run whole on every rank"
        )
    if getattr(transformer, "zero_cond_t", False):
        raise TypeError(
            f"this {type(transformer).__name__} tells references' tokens apart inside (zero_cond_t), which is not "
            "split over ranks; draw on one"
        )
    hook = entry_hook_of(transformer)
    if hook is None:
        raise ValueError("only a linearized pipeline can be split over ranks; call clear_attn.linearize(pipe) before")
    hook.method.halo()  # raises for a method that is not split over ranks
    sharder = _sharder_over(_group_of(mesh))
    # NCCL wants all ranks in the first thing that a group does, and finds out here whether they are there.
    sharder.links.add_up(torch.zeros((), device=transformer.device))()
    install_hooks(transformer, hook.with_sharder(sharder))
    if vae := getattr(pipe, "vae", None):
        decode_on_one_rank(vae, sharder.links, weakly(transformer, _is_split))
    return pipe


def deparallelize(pipe: PipelineOrTransformer) -> PipelineOrTransformer:
    """Undoes `parallelize`: each rank computes all again. A pipeline that is not split stays so.

    Raises:
        TypeError: not a supported pipeline.
    """
    transformer, _ = find_transformer(pipe)
    if hook := entry_hook_of(transformer):
        install_hooks(transformer, hook.with_sharder(None))
    if vae := getattr(pipe, "vae", None):
        decode_everywhere(vae)
    return pipe


def _is_split(transformer: Any) -> bool:
    hook = entry_hook_of(transformer)
    return hook is not None and hook.sharder is not None


@functools.cache
def _sharder_over(group: dist.ProcessGroup) -> Sharder:
    """Once for each group, for it opens connections of its own, which last as long as the group."""
    return Sharder(Links(group))


def _group_of(mesh: object) -> dist.ProcessGroup:
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh has {mesh.ndim} dimensions, {mesh.mesh_dim_names}; give one of them, as mesh['rows']"
            )
        return mesh.get_group()
    if mesh is not None:
        raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, got a {type(mesh).__name__}")
    join()
    assert dist.group.WORLD
    return dist.group.WORLD
