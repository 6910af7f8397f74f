"""Split a linearized pipeline over ranks, and undo it."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from clear_attn.parallel.communicator import Communicator
from clear_attn.parallel.decode import decode_on_every_rank, decode_on_one_rank
from clear_attn.parallel.launch import join
from clear_attn.parallel.sharder import RankSharder
from clear_attn.patching.state import install_hooks
from clear_attn.patching.target import PipelineOrTransformer, entry_hook_of, find_transformer


def parallelize(
    pipe: PipelineOrTransformer, mesh: DeviceMesh | dist.ProcessGroup | None = None
) -> PipelineOrTransformer:
    """Split the image tokens of a linearized pipeline over the ranks of a process group, in place.

    Every rank then calls the pipeline as usual with the same arguments, and gets the same image as a single process.
    The text encoders run on every rank; rank 0 decodes the latents for all. The ranks' weights are compared here, and
    again in the next call after they have changed.

    `linearize` with other settings keeps the split; `restore` and `deparallelize` end it. Dense calls, such as the base
    image of `highres`, are computed by every rank for itself.

    Args:
        pipe: a linearized diffusers pipeline or transformer. A ControlNet is not split.
        mesh (*optional*): a mesh of one dimension or a process group, the ranks that share an image; by default all
            ranks. With `init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "rows"))`, give `mesh["rows"]`; each
            of the two groups then draws its own image.

    Returns:
        ``pipe`` itself.

    Raises:
        TypeError: the pipeline is not supported, or is a ControlNet or Qwen-Image-Edit with `zero_cond_t`; the mesh has
            another type.
        ValueError: the pipeline is not linearized, or with another method than CLEAR; the mesh has several dimensions;
            the ranks hold different weights.
        RuntimeError: the process was not started by torchrun, and torch.distributed is not initialized; a rank does not
            call it.

    Examples:
        Under torchrun, on every rank:

        >>> pipe = clear.parallelize(clear.linearize(pipe, window=8))  # doctest: +SKIP
        >>> seeded = torch.Generator().manual_seed(0)  # doctest: +SKIP
        >>> image = pipe(prompt, height=8192, width=8192, generator=seeded).images[0]  # doctest: +SKIP
    """
    transformer, adapter = find_transformer(pipe)
    if adapter.output_layer(transformer) is None:
        raise TypeError(
            f"a {type(transformer).__name__} cannot be split over ranks; give the pipeline or its transformer. "
            "ControlNets are not split"
        )
    if getattr(transformer, "zero_cond_t", False):
        raise TypeError(
            f"this {type(transformer).__name__} treats reference tokens apart (zero_cond_t), which cannot be split "
            "over ranks; draw on one"
        )
    hook = entry_hook_of(transformer)
    if hook is None:
        raise ValueError("only a linearized pipeline can be split over ranks; call clear_attn.linearize(pipe) before")
    hook.method.halo()  # raises for a method that is not split over ranks
    sharder = _sharder_over(_group_of(mesh))
    # NCCL needs all ranks in the first operation of a group.
    sharder.communicator.all_reduce(torch.zeros((), device=transformer.device))()
    sharder.check_weights(transformer)
    install_hooks(transformer, hook.with_sharder(sharder))
    if vae := getattr(pipe, "vae", None):
        decode_on_one_rank(vae, sharder.communicator, transformer)
    return pipe


def deparallelize(pipe: PipelineOrTransformer) -> PipelineOrTransformer:
    """Undo `parallelize`: each rank computes whole images again. A pipeline that is not split stays as it is.

    Raises:
        TypeError: the pipeline is not supported.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> pipe = demo.pipeline()
        >>> clear.deparallelize(pipe) is pipe
        True
    """
    transformer, _ = find_transformer(pipe)
    if hook := entry_hook_of(transformer):
        install_hooks(transformer, hook.with_sharder(None))
    if vae := getattr(pipe, "vae", None):
        decode_on_every_rank(vae)
    return pipe


@functools.cache
def _sharder_over(group: dist.ProcessGroup) -> RankSharder:
    """Return the sharder of a group, made once: it opens connections that last as long as the group."""
    return RankSharder(Communicator(group))


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
