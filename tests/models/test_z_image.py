"""What is particular to Z-Image: learned padding, captions of unequal length, a ControlNet that shares layers."""

import copy

import pytest
import torch

import clear_attn as clear
from clear_attn import methods
from clear_attn.models import adapter_for, training_adapter_for
from clear_attn.patching.target import entry_hook_of
from tests.helpers import dummy_models, dummy_pipelines, families, hardware
from tests.helpers.dummy_controlnets import z_image_controlnet
from tests.helpers.reference_model import check_compiled_blocks, check_pipeline, in_raster_order, joined, put_rule, run
from tests.helpers.snapshots import snapshot

pytestmark = families.needs("z_image")
GRIDS = {"padded": (13, 7), "whole": (8, 12)}  # 91 tokens and 5 of padding; 96 tokens
GRID = GRIDS["padded"]
UNEQUAL = {"text": 70, "batch": 3, "padded": (0, 38, 69)}  # 96, 32 and 32 tokens with their own padding


@pytest.fixture
def family():
    return families.Z_IMAGE


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("backend", hardware.BACKENDS)
def test_captions_of_unequal_length(backend, grid, transformer):
    """Each caption of a batch as if it were drawn alone."""
    call = dummy_models.z_image_call(transformer, grid, **UNEQUAL)
    expected = run(in_raster_order(transformer, [grid], clear.methods.Clear(4, 2)), call)
    clear.linearize(transformer, 4, 2, weights=None, backend=backend)
    output, scale = transformer(**call).sample, expected.abs().max().item()
    torch.testing.assert_close(joined(output), expected, atol=1e-5, rtol=0)
    for number, image in enumerate(output):
        alone = {name: value[number : number + 1] for name, value in call.items()}
        torch.testing.assert_close(run(transformer, alone), image, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize(
    "method",
    [methods.Agent(3), methods.KVCompression(2), methods.Sigmoid(), methods.Strided(3), methods.Swin(4)],
    ids=repr,
)
def test_captions_of_unequal_length_with_other_methods(method, transformer):
    call = dummy_models.z_image_call(transformer, GRID, **UNEQUAL)
    ours = clear.linearize(copy.deepcopy(transformer), method=method, weights=None)
    expected = run(put_rule(copy.deepcopy(transformer), GRID, ours), call)
    torch.testing.assert_close(run(ours, call), expected, atol=1e-5, rtol=0)


def test_lit_refuses_captions_of_unequal_length(transformer):
    clear.linearize(transformer, method=methods.LiT(), weights=None)
    with pytest.raises(RuntimeError, match="LiT does not support padded text"):
        run(transformer, dummy_models.z_image_call(transformer, GRID, **UNEQUAL))


def test_all_image_tokens_attend_to_the_learned_padding(transformer):
    """In all layers: with a window of one token, the padding still changes every token."""
    clear.linearize(transformer, 1, weights=None)
    layout, layers = clear.TokenLayout([GRID], 0), {"noise_refiner.0": 5, "layers.0": 5 + 32}
    for name, text in layers.items():
        group = entry_hook_of(transformer).groups[f"{name}.attention"]
        _, kwargs = entry_hook_of(transformer)(transformer, (), dummy_models.z_image_call(transformer, GRID))
        plan = kwargs["joint_attention_kwargs"]["clear_context"].context.groups[group].plan
        assert (plan.image_tokens, plan.text_tokens) == (layout.image_tokens, text)
        assert plan.radius_sq[plan.text].isinf().all()


@pytest.mark.slow
def test_captions_of_unequal_length_in_compiled_blocks(transformer):
    check_compiled_blocks(transformer, dummy_models.z_image_call(transformer, GRID, **UNEQUAL, controlnet=True))


def test_layers_of_captions_alone_keep_their_processors(transformer):
    clear.linearize(transformer, 3, weights=None)
    kinds = {
        name: type(block.attention.processor).__name__
        for name, block in transformer.named_modules()
        if name in ("noise_refiner.0", "context_refiner.0", "layers.0")
    }
    assert kinds == {
        "noise_refiner.0": "RefinerProcessor",
        "context_refiner.0": "ZSingleStreamAttnProcessor",
        "layers.0": "ZImageProcessor",
    }


def test_sigma_is_one_at_timestep_zero(transformer):
    """A schedule reads the timestep, which grows from 0 to 1 while sigma falls."""
    call = dummy_models.z_image_call(transformer, GRID, batch=2)
    original = run(transformer, call)
    schedule = clear.Schedule(dense_above_sigma=0.65)
    clear.linearize(transformer, 3, weights=None, schedule=schedule)
    torch.testing.assert_close(run(transformer, call), original, atol=1e-5, rtol=0)  # its sigma is 0.7
    noisy, clean = ({**call, "t": torch.full((2,), t)} for t in (0.3, 0.4))
    assert {type(method) for method in entry_hook_of(transformer).methods_of(noisy)} == {methods.Dense}
    assert set(entry_hook_of(transformer).methods_of(clean)) == {methods.Clear(3)}
    with pytest.raises(ValueError, match="all images of a call must have one window or be dense"):
        run(transformer, {**call, "t": torch.tensor([0.3, 0.4])})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"x": [torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 10)]},
            r"of one size in a call, got .*\(1, 8, 10\)",
        ),
        ({"x": [torch.zeros(4, 1, 8, 8)]}, "latent image and a caption for each image of the batch, got 1 and 2"),
        ({"x": []}, "got 0 and 2"),
        ({"x": [torch.zeros(4, 1, 8, 7)] * 2}, r"sides in multiples of 2, got \[4, 1, 8, 7\]"),
        ({"x": [torch.zeros(4, 2, 8, 8)] * 2}, r"\[channels, 1, height, width\] .* got \[4, 2, 8, 8\]"),
        ({"x": [[torch.zeros(4, 1, 8, 8)]] * 2}, "as ZImageOmniPipeline passes them, .* use ZImagePipeline"),
        (
            {"controlnet_block_samples": {0: torch.zeros(2, 91 + 32, 32)}},
            "91 image tokens, 5 of padding and 32 of the longest caption, got 123; give the ControlNet",
        ),
    ],
)
def test_refusals(change, words, transformer):
    call = dummy_models.z_image_call(transformer, GRID, batch=2)
    clear.linearize(transformer, 3, weights=None)
    expected = run(transformer, call)
    with pytest.raises(ValueError, match=words):
        run(transformer, {**call, **change})
    assert torch.equal(run(transformer, call), expected)


def test_cost_counts_the_learned_padding(transformer):
    """A caption of 33 tokens has 64 with its padding, an image of 91 has 5 more, which the refining layer has too."""
    counted = clear.cost(transformer, 16 * GRID[0], 16 * GRID[1], text_tokens=33)
    assert (counted.text_tokens, counted.padding_tokens, counted.layers_without_text) == (64, 5, 1)
    pairs = 2 * (91 + 69) ** 2 + (91 + 5) ** 2
    assert counted.dense_step_flops == 4 * pairs * 32


def test_the_method_is_put_back(transformer):
    before, call = snapshot(transformer), dummy_models.z_image_call(transformer, GRID)
    names = set(vars(transformer))
    original = run(transformer, call)
    clear.linearize(transformer, 3, weights=None)
    twin = copy.deepcopy(transformer)
    clear.restore(transformer)
    assert set(vars(transformer)) == names
    assert snapshot(transformer)["config"] == before["config"]
    assert torch.equal(run(transformer, call), original)
    assert (run(twin, call) - original).abs().max() > 1e-3
    assert torch.equal(run(clear.restore(twin), call), original)


def test_a_method_that_another_replaced_is_found_out(transformer):
    clear.linearize(transformer, 3, weights=None)
    method = next(name for name, value in vars(transformer).items() if type(value).__name__ == "HookedMethod")
    delattr(transformer, method)
    with pytest.raises(RuntimeError, match=f"the method {method} of this ZImageTransformer2DModel was replaced"):
        run(transformer, dummy_models.z_image_call(transformer, GRID))


class TestControlNet:
    @pytest.fixture
    def controlnet(self, transformer):
        return type(z_image_controlnet()).from_transformer(z_image_controlnet(), transformer)

    def test_its_residuals_are_those_of_the_dense_model(self, transformer, controlnet):
        """It shares the refining layer with its transformer."""
        call = dummy_models.z_image_call(transformer, GRID, **UNEQUAL)
        condition = [torch.randn(4, 1, 26, 14) for _ in range(3)]
        args = [call[name] for name in ("x", "t", "cap_feats")]
        with torch.no_grad():
            expected = controlnet(*args, condition)
            clear.linearize(transformer, 3, weights=None)
            residuals = controlnet(*args, condition)
        torch.testing.assert_close(residuals, expected, atol=1e-5, rtol=0)

    def test_in_its_pipeline(self):
        pipe = dummy_pipelines.z_image("ZImageControlNetPipeline", controlnet=z_image_controlnet())
        options = {"height": 72, "width": 96, "num_inference_steps": 2, "output_type": "latent"}
        options |= {"control_image": torch.rand(1, 3, 72, 96, generator=torch.Generator().manual_seed(1))}

        def draw():
            generator = torch.Generator().manual_seed(0)
            return pipe(**dummy_pipelines.z_image_captions(), **options, generator=generator).images

        check_pipeline(pipe, [(9, 12)], draw)

    def test_its_cost_is_not_counted(self):
        pipe = dummy_pipelines.z_image("ZImageControlNetPipeline", controlnet=z_image_controlnet())
        counted = clear.cost(pipe, 72, 96, window=3)
        assert (counted.controlnets, counted.uncounted_controlnets) == ((), 1)
        assert "Not counted: 1 ControlNets" in str(counted)


def test_a_pipeline_with_captions_of_unequal_length():
    pipe = dummy_pipelines.z_image()
    options = {"height": 72, "width": 96, "num_inference_steps": 2, "output_type": "latent"}

    def draw():
        return pipe(**dummy_pipelines.z_image_captions(), **options, generator=torch.Generator().manual_seed(0)).images

    check_pipeline(pipe, [(9, 12)], draw)


def test_training_uses_the_pipelines_prediction():
    """The pipeline negates what the model returns, and its timestep is 1 - sigma."""
    pipe = dummy_pipelines.z_image()
    training, captions = training_adapter_for(pipe.transformer), dummy_pipelines.z_image_captions()["prompt_embeds"]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(x)) for x in captions], batch_first=True)
    text = {"text": torch.nn.utils.rnn.pad_sequence(captions, batch_first=True), "mask": mask}
    noisy, sigma = torch.randn(2, 4, 18, 24), torch.tensor([1.0, 1.0])
    velocities = []
    step = pipe.scheduler.step

    def record(velocity, *args, **kwargs):
        velocities.append(velocity)
        return step(velocity, *args, **kwargs)

    pipe.scheduler.step = record
    options = {"height": 72, "width": 96, "num_inference_steps": 1, "output_type": "latent"}
    pipe(prompt_embeds=captions, guidance_scale=0, latents=noisy, **options)
    with torch.no_grad():
        call = training.training_call(noisy, sigma, text, None)
        output = pipe.transformer(**call, return_dict=False)[0]
    torch.testing.assert_close(training.prediction(output, call), velocities[0], atol=1e-5, rtol=0)


def test_its_adapter_names_it():
    assert adapter_for(dummy_models.z_image_transformer()).architectures[0].name == "z-image"
