"""The columns of the matrix: operations on a pipeline, and the expected result."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.helpers import hardware
from tests.matrix.operations import (
    Operation,
    attention_broadcast,
    cache_dit,
    cast_layerwise,
    compile_blocks,
    compile_whole,
    deep_copy,
    first_block_cache,
    fuse_projections,
    fused_lora,
    gguf_file,
    int8,
    load_again_before,
    lora,
    nf4,
    nothing,
    offload_groups,
    offload_sequentially,
    offload_whole,
    one_lora,
    save_and_load,
    share,
    taylor_seer,
    to_bfloat16,
    two_loras,
    unfuse_linearize_fuse,
    unfused_lora,
    without_offload_linearize_offload,
)
from tests.matrix.rows import ROWS

BEFORE, AFTER = "before", "after"


class Refusal(NamedTuple):
    """An expected error, and an operation that does what the error says, on the refused pipeline."""

    words: str
    remedy: Operation


class Column(NamedTuple):
    """An operation on a pipeline.

    Attributes:
        do: changes a pipeline in place, or returns another one.
        same: an operation with the same effect on the numbers of a dense pipeline; by default `do`.
        changes: whether it changes numbers.
        orders: whether it is done before linearizing, after it, or both.
        trained: whether distilled weights are loaded, or the model keeps its own.
        call: keywords of the pipeline's call.
        refusals: expected errors, by family and order.
        not_in_diffusers: families and rows that diffusers itself does not support, and a pattern of its error.
        tolerance: relative to the largest latent; changed numbers must differ by twice as much.
        marks: pytest marks.
    """

    do: Operation
    same: Operation | None = None
    changes: bool = False
    orders: tuple[str, ...] = (BEFORE, AFTER)
    trained: bool = True
    call: dict[str, Any] = {}  # noqa: RUF012
    refusals: dict[tuple[str, str], Refusal] = {}  # noqa: RUF012
    not_in_diffusers: dict[str, str] = {}  # noqa: RUF012
    tolerance: float = 2e-5
    marks: tuple[Any, ...] = ()

    def missing(self, name: str) -> str | None:
        """Return the pattern of diffusers' own error if it does not support this for a row, else None."""
        return self.not_in_diffusers.get(name) or self.not_in_diffusers.get(ROWS[name].family)


def for_all(families: tuple[str, ...], orders: tuple[str, ...], refusal: Refusal) -> dict[tuple[str, str], Refusal]:
    return {(family, order): refusal for family in families for order in orders}


ALL = tuple(dict.fromkeys(row.family for row in ROWS.values()))


def quantized(quantize: Operation) -> Refusal:
    return Refusal("as in a quantized model, .* linearize it, then quantize it", load_again_before(quantize))


# These pipelines do not set a cache context for their calls.
CACHELESS = "image-to-image", "inpaint", "Fill", "Control", "ControlNet", "two ControlNets", "Kontext"
NO_ENABLE_CACHE = dict.fromkeys(("SD3", "Krea 2", "FLUX.3", "Z-Image"), "has no attribute 'enable_cache'")
NO_CACHE = {
    **NO_ENABLE_CACHE,
    **{f"FLUX {kind}": "No cache context is set" for kind in CACHELESS},
    "Chroma": "No cache context is set",
}
NOT_REGISTERED = dict.fromkeys(("Chroma", "Qwen-Image 2.1"), "Block'> not registered")
NO_FIRST_BLOCK_CACHE = {**NO_CACHE, "FLUX.2": "unsupported operand type", **NOT_REGISTERED}
# It mixes the two calls of guidance, and Qwen-Image does not pad their texts to one length.
UNPADDED = "Qwen-Image", "Qwen-Image 2.1 text-to-image", "Qwen-Image 2.1 without a cache of keys"
NO_BROADCAST = {**NO_ENABLE_CACHE, **dict.fromkeys(UNPADDED, "must match the size of tensor")}
STEPS = {"num_inference_steps": 5, "strength": None}


COLUMNS = {
    "nothing else": Column(nothing, orders=(AFTER,)),
    "own weights": Column(nothing, orders=(AFTER,), trained=False),
    "a LoRA": Column(one_lora, changes=True),
    "two LoRAs": Column(two_loras, changes=True),
    "a LoRA's scale changed": Column(lora(11, "one", 0.3), changes=True),
    "a LoRA's scale in the call": Column(one_lora, changes=True, call={"attention_kwargs": {"scale": 0.4}}),
    "a fused LoRA": Column(
        fused_lora,
        changes=True,
        refusals=for_all(ALL, (BEFORE,), Refusal(r"fused .* call pipe\.unfuse_lora\(\) first", unfuse_linearize_fuse)),
    ),
    "a fused LoRA, own weights": Column(fused_lora, changes=True, orders=(BEFORE,), trained=False),
    "a LoRA fused and unfused": Column(unfused_lora, changes=True),
    "`fuse_qkv_projections`": Column(
        fuse_projections,
        same=nothing,
        not_in_diffusers={"Z-Image": "has no attribute 'fuse_qkv_projections'"},
        refusals={
            ("SD3", AFTER): Refusal(
                r"was replaced by a FusedJointAttnProcessor2_0 .* call clear_attn\.linearize\(\) again",
                lambda pipe, cell: cell.linearize(pipe),
            )
        },
    ),
    "model offload": Column(offload_whole, same=nothing),
    "sequential offload": Column(
        offload_sequentially,
        same=nothing,
        refusals=for_all(
            ALL, (BEFORE,), Refusal(r"call pipe\.remove_all_hooks\(\) first", without_offload_linearize_offload)
        ),
    ),
    "group offload, blocks": Column(offload_groups("block_level"), same=nothing),
    "group offload, leaves": Column(offload_groups("leaf_level"), same=nothing),
    "layerwise casting": Column(
        cast_layerwise,
        changes=True,
        not_in_diffusers={"FLUX IP-Adapter": "must have the same dtype, but got Float8"},
        tolerance=1e-3,
    ),
    "`pipe.to`": Column(to_bfloat16, tolerance=0.03),
    "`compile_repeated_blocks`": Column(
        compile_blocks,
        same=nothing,
        not_in_diffusers={"SD3": "_repeated_blocks"},
        marks=(hardware.needs_compiler,),
    ),
    "`torch.compile`": Column(compile_whole, same=nothing, marks=(hardware.needs_compiler,)),
    "FirstBlockCache": Column(first_block_cache, changes=True, call=STEPS, not_in_diffusers=NO_FIRST_BLOCK_CACHE),
    "PyramidAttentionBroadcast": Column(attention_broadcast, changes=True, call=STEPS, not_in_diffusers=NO_BROADCAST),
    "cache-dit": Column(
        cache_dit,
        changes=True,
        call=STEPS,
        not_in_diffusers={
            "SD3 ControlNet": "has no attribute 'context_pre_only'",
            "FLUX.3": "not in allowed classes",  # cache-dit's own
            "Z-Image ControlNet": "unexpected keyword argument 'joint_attention_kwargs'",
        },
    ),
    "TaylorSeer": Column(taylor_seer, changes=True, call=STEPS, not_in_diffusers=NO_CACHE),
    "int8 (torchao)": Column(int8, changes=True, refusals=for_all(ALL, (BEFORE,), quantized(int8))),
    "int8 (torchao), own weights": Column(int8, changes=True, orders=(BEFORE,), trained=False),
    "nf4 (bitsandbytes)": Column(nf4, changes=True, refusals=for_all(ALL, (BEFORE,), quantized(nf4))),
    "nf4 (bitsandbytes), own weights": Column(nf4, changes=True, orders=(BEFORE,), trained=False),
    "GGUF, own weights": Column(gguf_file, changes=True, orders=(BEFORE,), trained=False),
    "`save_pretrained`, `from_pretrained`": Column(
        save_and_load, same=nothing, not_in_diffusers={"FLUX two ControlNets": "has no attribute 'save_config'"}
    ),
    "`deepcopy`": Column(deep_copy, same=nothing),
    "a transformer shared by pipelines": Column(share, same=nothing),
}
