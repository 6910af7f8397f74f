"""What users do on a GPU, with the small FLUX. Skipped on a machine without one.

The kernels have tests of their own, which run on a GPU too: tests/backends/triton/kernels.
"""

import gc

import numpy as np
import pytest
import torch

import clear_attn as clear
from clear_attn import demo
from clear_attn.distill import train
from tests.helpers.training_runs import change, fill, small_settings, weights_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
PROMPT = "a red circle on a blue ground, in the middle"


def draw(pipe, steps=4, **arguments):
    """An image as float64 numbers from 0 to 255, from latents that are drawn on the CPU."""
    rng = torch.Generator("cpu").manual_seed(0)
    size = {"height": 192, "width": 160, **arguments}
    image = pipe(PROMPT, num_inference_steps=steps, generator=rng, **size).images[0]
    return np.asarray(image, float)


def linearized(dtype=torch.float32, device="cuda", **arguments):
    return clear.linearize(demo.pipeline(dtype).to(device), window=4, weights=None, **arguments)


def levels_apart(a, b):
    return np.abs(a - b).max()


def test_float32_draws_the_image_of_the_cpu():
    assert levels_apart(draw(linearized()), draw(linearized(device="cpu"))) <= 4


@pytest.mark.parametrize("backend", ["triton", "flex", "tiled", "auto"])
@pytest.mark.parametrize("down_factor", [1, 4])
def test_half_precision_draws_the_image_of_the_reference(backend, down_factor):
    expected = draw(linearized(torch.float16, down_factor=down_factor, backend="reference"))
    image = draw(linearized(torch.float16, down_factor=down_factor, backend=backend))
    assert np.abs(image - expected).mean() < 1


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_changes_nothing(offload):
    expected = draw(linearized(torch.bfloat16))
    pipe = linearized(torch.bfloat16, device="cpu")
    getattr(pipe, offload)()
    assert levels_apart(draw(pipe), expected) <= 2
    clear.restore(pipe)


@pytest.mark.parametrize("use_stream", [False, True])
def test_group_offload_has_the_new_weights_and_the_old_ones_again(use_stream):
    def local(pipe):
        return clear.linearize(pipe, window=8, down_factor=4)

    pipe = demo.pipeline(torch.bfloat16).to("cuda")
    dense, distilled = draw(pipe), draw(local(pipe))
    assert levels_apart(dense, distilled) > 2
    pipe = demo.pipeline(torch.bfloat16)
    offload = {"num_blocks_per_group": 1, "use_stream": use_stream}
    pipe.transformer.enable_group_offload(onload_device=torch.device("cuda"), **offload)
    pipe.to("cuda")
    for step, expected in ((local, distilled), (clear.restore, dense), (local, distilled)):
        step(pipe)
        assert levels_apart(draw(pipe), expected) <= 2


def test_restore_gives_back_weights_image_and_memory():
    pipe = demo.pipeline(torch.bfloat16).to("cuda")
    expected, before = draw(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    gc.collect()
    allocated = torch.cuda.memory_allocated()
    clear.linearize(pipe)
    changed = draw(pipe)
    clear.restore(pipe)
    gc.collect()
    assert not np.array_equal(changed, expected)
    assert torch.cuda.memory_allocated() <= allocated
    assert all(torch.equal(pipe.transformer.state_dict()[k], v) for k, v in before.items())
    assert np.array_equal(draw(pipe), expected)


def test_compiled_blocks():
    pipe = linearized(torch.bfloat16)
    expected = draw(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    assert np.abs(draw(pipe) - expected).mean() < 1
    assert np.abs(draw(pipe, height=128) - draw(linearized(torch.bfloat16), height=128)).mean() < 1


def test_highres():
    pipe = demo.pipeline(torch.bfloat16).to("cuda")
    side = 2 * demo.SIZE
    result = clear.highres(pipe, PROMPT, height=side, width=side, seed=0)
    assert result.image.size == (side, side)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training(tmp_path, precision, fresh_accelerate):
    settings = change(small_settings(tmp_path, fill(tmp_path / "images"), demo.path()), mixed_precision=precision)
    train(settings)
    assert all(torch.isfinite(x).all() for x in weights_of(settings).values())


def test_a_graph_of_cuda_replays_an_attention():
    plan = clear.methods.Clear(window=4).plan(clear.TokenLayout([(16, 24)], 7, device="cuda"))
    query, key, value = torch.randn(3, 1, 2, 391, 64, device="cuda", dtype=torch.bfloat16).unbind()
    expected = clear.clear_attention(query, key, value, plan, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = clear.clear_attention(query, key, value, plan, backend="triton")
    graph.replay()
    assert torch.equal(output, expected)
