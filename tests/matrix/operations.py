"""Operations on a pipeline, before or after it is linearized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    GGUFQuantizationConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import nn

import clear_attn as clear
from tests.matrix.rows import Row


class Cell(NamedTuple):
    """One test: a row, a folder for files, and a function that linearizes the pipeline."""

    row: Row
    folder: Path
    linearize: Callable[[Any], Any]


Operation = Callable[[Any, Cell], Any]


def nothing(pipe: Any, cell: Cell) -> None:
    pass


# LoRA

ADAPTED = (
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "ff.net.2",
    "proj_mlp",
    "to_qkv_mlp_proj",
    "img_mlp.net.2",
    "attention.to_q",
    "img_mlp.out",
)


def lora(seed: int, name: str, adapter_scale: float | None = None) -> Operation:
    def load(pipe: Any, cell: Cell) -> None:
        rng = torch.Generator().manual_seed(seed)
        values = {}
        for layer, module in sorted(pipe.transformer.named_modules()):
            if layer.endswith(ADAPTED):
                values[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, module.in_features, generator=rng) / 2
                values[f"transformer.{layer}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=rng) / 2
        pipe.load_lora_weights(values, adapter_name=name)
        if adapter_scale is not None:
            pipe.set_adapters(name, adapter_scale)

    return load


one_lora = lora(11, "one")


def two_loras(pipe: Any, cell: Cell) -> None:
    one_lora(pipe, cell)
    lora(12, "two")(pipe, cell)
    pipe.set_adapters(["one", "two"], [0.7, -0.4])


def fused_lora(pipe: Any, cell: Cell) -> None:
    one_lora(pipe, cell)
    pipe.fuse_lora(components=["transformer"])


def unfused_lora(pipe: Any, cell: Cell) -> None:
    fused_lora(pipe, cell)
    pipe.unfuse_lora(components=["transformer"])


def unfuse_linearize_fuse(pipe: Any, cell: Cell) -> None:
    pipe.unfuse_lora(components=["transformer"])
    cell.linearize(pipe)
    pipe.fuse_lora(components=["transformer"])


def fuse_projections(pipe: Any, cell: Cell) -> None:
    pipe.transformer.fuse_qkv_projections()


# Offloading and dtypes


def offload_whole(pipe: Any, cell: Cell) -> None:
    accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")


def offload_sequentially(pipe: Any, cell: Cell) -> None:
    accelerate.cpu_offload(pipe.transformer, execution_device="cpu")


def without_offload_linearize_offload(pipe: Any, cell: Cell) -> None:
    pipe.remove_all_hooks()
    cell.linearize(pipe)
    offload_sequentially(pipe, cell)


def offload_groups(level: str) -> Operation:
    def offload(pipe: Any, cell: Cell) -> None:
        blocks = 1 if level == "block_level" else None
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type=level, num_blocks_per_group=blocks
        )

    return offload


def cast_layerwise(pipe: Any, cell: Cell) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def to_bfloat16(pipe: Any, cell: Cell) -> Any:
    """Cast a copy: rows share all parts but the transformer."""
    return copy.deepcopy(pipe).to(torch.bfloat16)


# Compilation: traced without generating machine code, which other tests do


def compile_blocks(pipe: Any, cell: Cell) -> None:
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def compile_whole(pipe: Any, cell: Cell) -> None:
    torch.compiler.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


# Caches


def first_block_cache(pipe: Any, cell: Cell) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))


def attention_broadcast(pipe: Any, cell: Cell) -> None:
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,  # not all pipelines have a current timestep
        )
    )


def cache_dit(pipe: Any, cell: Cell) -> None:
    """Enable the cache of the package cache-dit, which the documentation of diffusers recommends."""
    package = pytest.importorskip("cache_dit")
    config = package.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=10.0)
    package.enable_cache(pipe, cache_config=config)


def taylor_seer(pipe: Any, cell: Cell) -> None:
    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32)
    )


# Quantization


def _is_in_a_block(name: str) -> bool:
    return "blocks" in name or "layers." in name


def int8(pipe: Any, cell: Cell) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())


def nf4(pipe: Any, cell: Cell) -> None:
    """Install layers of bitsandbytes by hand: diffusers does it only on GPUs."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(pipe.transformer.named_modules()):
        if type(module) is nn.Linear and _is_in_a_block(name):
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, torch.float32, quant_type="nf4"
            )
            layer.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(pipe.transformer.get_submodule(parent), child, layer.to("cpu"))


def gguf_file(pipe: Any, cell: Cell) -> None:
    """Save the transformer to a GGUF file of 8-bit blocks and load it."""
    gguf = pytest.importorskip("gguf")
    transformer = pipe.transformer
    writer = gguf.GGUFWriter(cell.folder / "model.gguf", "flux")
    values = transformer.state_dict()
    for name in (
        type(transformer).from_config(transformer.config).state_dict()
    ):  # without adapters, which are in other files
        value = values[name]
        module = transformer.get_submodule(name.rpartition(".")[0])
        fits = _is_in_a_block(name) and type(module) is nn.Linear and value.ndim == 2 and value.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value.float().numpy(), kind), raw_dtype=kind)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    transformer.save_config(cell.folder / "config")
    pipe.transformer = type(transformer).from_single_file(
        str(cell.folder / "model.gguf"),
        config=str(cell.folder / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    cell.row.set_up(pipe)


def load_again_before(quantize: Operation) -> Operation:
    """Return an operation that loads the pipeline again, linearizes and then quantizes it."""

    def start_over(pipe: Any, cell: Cell) -> Any:
        pipe = cell.row.pipeline()
        cell.linearize(pipe)
        quantize(pipe, cell)
        return pipe

    return start_over


# The pipeline itself


def save_and_load(pipe: Any, cell: Cell) -> Any:
    linearized = clear.is_linearized(pipe)
    pipe.save_pretrained(cell.folder / "whole")
    absent = {name: part for name, part in pipe.components.items() if not hasattr(part, "save_pretrained")}
    loaded = type(pipe).from_pretrained(cell.folder / "whole", **absent)
    cell.row.set_up(loaded)
    if linearized:
        with pytest.warns(UserWarning, match=r"saved while it was linearized .* call clear_attn\.linearize"):
            assert not clear.is_linearized(loaded)
        cell.linearize(loaded)
    return loaded


def deep_copy(pipe: Any, cell: Cell) -> Any:
    twin = copy.deepcopy(pipe)
    clear.restore(pipe)
    return twin


def share(pipe: Any, cell: Cell) -> Any:
    """Return a second pipeline with the same transformer."""
    return type(pipe)(**pipe.components)
