"""The residuals of linearized ControlNets are those of the rule."""

import copy

import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxMultiControlNetModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clear_attn as clear
from clear_attn.methods.clear import window_pairs
from clear_attn.models.context.context_checkpoint import ContextCheckpoint
from tests.helpers import dummy_models, families, hardware
from tests.helpers.dummy_controlnets import fill_zeros, flux_controlnet, sd3_controlnet
from tests.helpers.reference_model import in_raster_order, run
from tests.helpers.snapshots import assert_same, snapshot


def flux_call(controlnet, grid, text, batch):
    call = dummy_models.flux_call(controlnet, grid, text=text, batch=batch)
    rng = torch.Generator().manual_seed(5)
    if controlnet.input_hint_block is None:
        call["controlnet_cond"] = torch.randn(call["hidden_states"].shape, generator=rng)
    else:  # an image, which the ControlNet itself downsamples by 8 and packs
        call["controlnet_cond"] = torch.randn(batch, 3, 16 * grid[0], 16 * grid[1], generator=rng)
    if controlnet.union:
        call["controlnet_mode"] = torch.ones(batch, 1, dtype=torch.long)
    return call


def sd3_call(controlnet, grid, text, batch):
    call = dummy_models.sd3_call(families.SD3.transformer(), grid, text=text, batch=batch)
    call["controlnet_cond"] = call["hidden_states"].flip(-1)
    if controlnet.context_embedder is None:
        call["encoder_hidden_states"] = None
    return call


KINDS = {
    "flux": (flux_controlnet, {}, flux_call),
    "flux-union": (flux_controlnet, {"num_mode": 3}, flux_call),
    "flux-image": (
        flux_controlnet,
        {"patch_size": 2, "in_channels": 64, "conditioning_embedding_channels": 16},
        flux_call,
    ),
    "sd3": (sd3_controlnet, {}, sd3_call),
    "sd3-no-text": (sd3_controlnet, {"joint_attention_dim": None, "dual_attention_layers": ()}, sd3_call),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(
    grid=st.sampled_from([(1, 1), (3, 5), (13, 7), (17, 23)]),
    text=st.integers(1, 30),
    window=st.integers(1, 25),
    factor=st.integers(1, 3),
    batch=st.integers(1, 2),
    backend=st.sampled_from(hardware.BACKENDS),
)
@settings(max_examples=8)
def test_equals_the_rule_in_raster_order(kind, grid, text, window, factor, batch, backend):
    build, changes, make_call = kind
    controlnet = build(**changes)
    call = make_call(controlnet, grid, text, batch)
    expected = run(in_raster_order(controlnet, [grid], clear.methods.Clear(window, factor)), call)
    before = snapshot(controlnet)
    original = run(controlnet, call)
    clear.linearize(controlnet, window, factor, weights=None, backend=backend)
    torch.testing.assert_close(run(controlnet, call), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    clear.restore(controlnet)
    assert_same(controlnet, before)
    assert torch.equal(run(controlnet, call), original)


def test_gradients_with_checkpointing_and_two_sizes_in_flight():
    """Each recomputation uses the context of its own call."""
    controlnet = flux_controlnet()
    calls = [flux_call(controlnet, (5, 4), 7, 1), flux_call(controlnet, (3, 8), 5, 1)]
    clear.linearize(controlnet, 3, 2, weights=None)
    parameters = [x for x in controlnet.parameters() if x.requires_grad]

    def gradients():
        losses = [sum(x.square().sum() for x in controlnet(**call).controlnet_block_samples) for call in calls]
        return [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses]

    controlnet.train()
    expected = gradients()
    controlnet.enable_gradient_checkpointing()
    for ours, theirs in zip(gradients(), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    clear.restore(controlnet)
    assert not isinstance(controlnet._gradient_checkpointing_func, ContextCheckpoint)


def test_only_training_free():
    with pytest.raises(ValueError, match=r"finds none for this model, a FluxControlNetModel; give weights=None"):
        clear.linearize(flux_controlnet())


def test_in_a_pipeline_with_its_transformer(pipe):
    heads = {name: pipe.transformer.config[name] for name in ("num_attention_heads", "attention_head_dim")}
    controlnet = fill_zeros(
        FluxControlNetModel.from_transformer(pipe.transformer, num_layers=1, num_single_layers=1, **heads)
    )
    pipe = FluxControlNetPipeline(**pipe.components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator()
    image = Image.effect_noise((96, 72), 90).convert("RGB")

    def draw():
        return pipe(
            "a red circle",
            control_image=image,
            height=72,
            width=96,
            max_sequence_length=24,
            num_inference_steps=2,
            generator=rng.manual_seed(0),
            output_type="latent",
        ).images

    original = draw()
    clear.linearize(pipe, 3, weights=None)
    with_dense = draw()
    assert "ControlNet 1, dense" in str(clear.cost(pipe, 72, 96))
    clear.linearize(pipe.controlnet, 3, weights=None)
    assert "ControlNet 1  " in str(clear.cost(pipe, 72, 96))
    assert not torch.allclose(draw(), with_dense, atol=1e-4)
    clear.linearize(pipe, 20, weights=None)
    clear.linearize(pipe.controlnet, 20, weights=None)
    torch.testing.assert_close(draw(), original, atol=1e-4, rtol=0)
    clear.restore(pipe.controlnet)
    clear.restore(pipe)
    assert torch.equal(draw(), original)


def test_a_replaced_embedder_is_found():
    """A pipeline replaces it if a ControlNet of SD3.5 has none."""
    controlnet = sd3_controlnet(use_pos_embed=False, joint_attention_dim=None, dual_attention_layers=())
    call = sd3_call(controlnet, (11, 20), 7, 1)
    clear.linearize(controlnet, 4, weights=None)
    controlnet.pos_embed = copy.deepcopy(families.SD3.transformer().pos_embed)
    with pytest.raises(RuntimeError, match="a PatchEmbed of this SD3ControlNetModel was replaced"):
        run(controlnet, call)
    expected = run(in_raster_order(clear.restore(copy.deepcopy(controlnet)), [(11, 20)], clear.methods.Clear(4)), call)
    clear.linearize(controlnet, 4, weights=None)
    torch.testing.assert_close(run(controlnet, call), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_cost_of_one_without_text():
    controlnet = sd3_controlnet(joint_attention_dim=None, dual_attention_layers=())
    counted = clear.cost(controlnet, 64, 64)
    assert (counted.layers, counted.layers_without_text) == (3, 3)
    assert counted.step_flops == counted.flops(3 * window_pairs((counted.height, counted.width), counted.method.window))


def test_several_are_linearized_one_by_one():
    several = FluxMultiControlNetModel([flux_controlnet(), flux_controlnet()])
    with pytest.raises(TypeError, match=r"one by one: for net in controlnet\.nets"):
        clear.linearize(several, weights=None)


def test_made_from_a_linearized_transformer_it_is_not_linearized():
    transformer = clear.linearize(families.FLUX.transformer(), 4, weights=None)
    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    controlnet = FluxControlNetModel.from_transformer(transformer, num_layers=1, num_single_layers=1, **heads)
    assert not clear.is_linearized(controlnet)


@hardware.needs_compiler
def test_compiled():
    controlnet = flux_controlnet()
    call = flux_call(controlnet, (11, 20), 7, 1)
    clear.linearize(controlnet, 4, weights=None)
    expected = run(controlnet, call)
    torch.testing.assert_close(run(torch.compile(controlnet), call), expected, atol=1e-4, rtol=1e-4)
