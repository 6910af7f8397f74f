"""FLOPs of a run: the sum of what its steps cost, each counted by hand, at the sigmas of the pipeline's own run."""

import inspect
import json
import math

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler

import clear_attn as clear
from clear_attn import Schedule
from clear_attn.methods import Clear, Dense
from clear_attn.models._diffusers import diffusers_version
from clear_attn.models.pipeline_defaults import pixels_per_token
from clear_attn.patching.target import entry_hook_of, find_transformer
from tests.helpers import dummy_models, dummy_pipelines, families
from tests.helpers.modular_pipelines import MODULAR, PROMPT, needs_modular_pipelines

PAIRS = ((0.8, 7), (0.5, 5))


def flops_of_step(height, width, text, channels, windows, batch):
    """Return the FLOPs of one step, given each layer's window (None for dense), written with a loop over pairs."""
    total = 0
    for window in windows:
        pairs = text * (text + height * width) + height * width * text
        for dy in range(-height + 1, height):
            for dx in range(-width + 1, width):
                if window is None or dy**2 + dx**2 < window**2:
                    pairs += (height - abs(dy)) * (width - abs(dx))
        total += 4 * pairs * channels
    return batch * total


def test_equals_the_sum_of_the_steps(pipe):
    sigmas = [1.0, 0.95, 0.9, 0.85, 0.8, 0.6, 0.5, 0.3, 0.1]
    windows = [None, None, 7, 7, 5, 5, 3, 3, 3]
    schedule = Schedule(0.9, ("single_transformer_blocks.0",), {"transformer_blocks.1": 4}, PAIRS)
    counted = clear.cost(pipe, 80, 96, window=3, schedule=schedule, text_tokens=7, batch=2, sigmas=sigmas)
    layers = [name.removesuffix(".attn.processor") for name in pipe.transformer.attn_processors]

    def own(layer, window):
        if window is None or layer == "single_transformer_blocks.0":
            return None
        return 4 if layer == "transformer_blocks.1" else window

    size = counted.height, counted.width, 7, counted.heads * counted.head_dim
    steps = [flops_of_step(*size, [own(layer, window) for layer in layers], 2) for window in windows]
    assert counted.run_flops == sum(steps)
    assert counted.dense_run_flops == 9 * flops_of_step(*size, [None] * len(layers), 2)
    assert counted.run_ratio == counted.dense_run_flops / sum(steps)
    assert counted.step_flops == steps[-1]
    assert [(phase.method, phase.sigmas) for phase in counted.run] == [
        (Dense(), (1.0, 0.95)),
        (Clear(7), (0.9, 0.85)),
        (Clear(5), (0.8, 0.6)),
        (Clear(3), (0.5, 0.3, 0.1)),
    ]


def test_without_a_schedule_all_steps_cost_the_same(pipe):
    counted = clear.cost(pipe, 128, 128, window=3, steps=28)
    assert (counted.steps, counted.run_flops) == (28, 28 * counted.step_flops)
    assert counted.run_ratio == counted.ratio
    assert str(counted).count("28 steps") == 2


def test_phases_with_the_same_window_are_one(pipe):
    schedule = Schedule(windows_by_sigma=((0.8, 3), (0.5, 5)))
    counted = clear.cost(pipe, 128, 128, window=3, schedule=schedule, sigmas=[1, 0.6, 0.2])
    assert [(phase.method, phase.sigmas) for phase in counted.run] == [(Clear(3), (1, 0.2)), (Clear(5), (0.6,))]


def test_bounds_are_compared_in_the_precision_of_a_timestep(pipe):
    """The sigma of a step is a float32, which may be larger than the same number as a float64."""
    schedule = Schedule(windows_by_sigma=((0.6, 5),))
    sigma = float(torch.tensor(0.6))
    assert sigma > 0.6
    (phase,) = clear.cost(pipe, 128, 128, window=3, schedule=schedule, sigmas=[sigma]).run
    assert phase.method == Clear(3)


PIPELINES = {
    **{name: (kind.ordinary, kind.call) for name, kind in MODULAR.items() if "FLUX.3" not in name},
    "FLUX.2 klein": (dummy_pipelines.flux2, lambda: {"height": 40, "width": 48, **dummy_pipelines.flux2_text()}),
    "Chroma": (lambda: dummy_pipelines.chroma(diffusers.ChromaPipeline), lambda: PROMPT),
}


def sigmas_after(pipe):
    return [float(timestep) / 1000 for timestep in pipe.scheduler.timesteps]


@needs_modular_pipelines
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [name for name in PIPELINES if "reference" not in name and "Kontext" not in name])
def test_sigmas_are_those_of_the_pipeline(name, dynamic):
    make, call = PIPELINES[name]
    pipe = make()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=dynamic, base_image_seq_len=9, max_image_seq_len=400, max_shift=1.7
    )
    pipe.set_progress_bar_config(disable=True)
    taken = inspect.signature(type(pipe).__call__).parameters  # a modular pipeline may take more
    keywords = {name: value for name, value in call().items() if name in taken}
    pipe(**keywords, num_inference_steps=4, output_type="latent")
    transformer, adapter = find_transformer(pipe)
    token = pixels_per_token(pipe, transformer, adapter)
    counted = clear.cost(pipe, call()["height"], call()["width"], window=3, steps=4)
    assert call()["height"] // token == counted.height
    (phase,) = counted.run
    assert phase.sigmas == pytest.approx(sigmas_after(pipe), rel=1e-6)
    if dynamic:  # it depends on the size
        larger = clear.cost(pipe, 4 * call()["height"], 4 * call()["width"], window=3, steps=4)
        assert larger.run[0].sigmas[1] > phase.sigmas[1] + 1e-3


@needs_modular_pipelines
def test_sigmas_of_a_modular_pipeline():
    kind = MODULAR["FLUX.3"]
    pipe = kind.pipeline()
    kind.draw(pipe)
    counted = clear.cost(pipe, kind.call()["height"], kind.call()["width"], window=3, steps=2)
    assert counted.run[0].sigmas == pytest.approx(sigmas_after(pipe), rel=1e-6)


# FLUX.1's pipeline gives its scheduler a `mu` even if the shift is static.
takes_any_mu = pytest.mark.skipif(diffusers_version() < (0, 37), reason="UniPC refuses the mu of FLUX.1's pipeline")


@pytest.mark.parametrize(
    ("make", "dynamic"),
    [
        pytest.param(dummy_models.flux_pipeline, False, marks=takes_any_mu),
        (dummy_models.flux_pipeline, True),
        (dummy_models.sd3_pipeline, False),
        (dummy_models.sd3_pipeline, True),
    ],
)
def test_sigmas_of_a_scheduler_that_makes_its_own(make, dynamic):
    pipe = make()
    pipe.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, use_dynamic_shifting=dynamic
    )
    pipe("a red circle", num_inference_steps=5, max_sequence_length=24, output_type="latent", height=64, width=64)
    counted = clear.cost(pipe, 64, 64, window=3, steps=5)
    assert counted.run[0].sigmas == pytest.approx(sigmas_after(pipe), rel=1e-6)


def test_sigmas_of_a_scheduler_with_two_calls_for_a_step():
    pipe = dummy_models.sd3_pipeline()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    pipe("a red circle", num_inference_steps=3, output_type="latent", height=64, width=64)
    counted = clear.cost(pipe, 64, 64, window=3, steps=3)
    assert counted.steps == 5
    assert counted.run[0].sigmas == pytest.approx(sigmas_after(pipe), rel=1e-6)


def test_the_pipelines_scheduler_is_not_changed(pipe):
    before = dict(vars(pipe.scheduler))
    clear.cost(pipe, 128, 128, steps=3)
    assert all(vars(pipe.scheduler)[name] is value for name, value in before.items())


def test_counts_are_those_of_the_calls_that_are_made(pipe):
    """Run the pipeline, note each call's methods, and add up what a call with them costs."""
    schedule = Schedule(0.97, windows_by_sigma=((0.9, 7), (0.5, 5)))
    clear.linearize(pipe, 3, weights=None, schedule=schedule)
    hook = entry_hook_of(pipe.transformer)
    methods = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: methods.append(hook.method_of(kwargs)), prepend=True, with_kwargs=True
    )
    pipe("a red circle", num_inference_steps=9, max_sequence_length=24, output_type="latent", height=128, width=128)
    assert len(set(methods)) == 4
    each = [clear.cost(pipe, 128, 128, method=own, schedule=Schedule()) for own in methods]
    counted = clear.cost(pipe, 128, 128, steps=9)
    assert counted.run_flops == sum(one.step_flops for one in each)


class TestTable:
    def counted(self, pipe, **options):
        return clear.cost(pipe, 512, 512, window=3, schedule=Schedule(0.97, (), {}, PAIRS), **options)

    def test_of_a_run(self, pipe):
        counted = self.counted(pipe, sigmas=[1, 0.9, 0.85, 0.7, 0.2])
        text = str(counted)
        lines = [line for line in text.splitlines() if "step" in line]
        assert lines[0].endswith(f"{counted.run_ratio:.1f} times fewer FLOPs of attention in 5 steps")
        assert [line.split("  ")[0] for line in lines[1:6]] == [
            "1 step, sigma 1.000, method=Dense()",
            "2 steps, sigma 0.900 to 0.850, window=7, down_factor=1",
            "1 step, sigma 0.700, window=5, down_factor=1",
            "1 step, sigma 0.200, window=3, down_factor=1",
            "all 5 steps",
        ]
        assert "all 5 steps" in counted._repr_html_()
        assert max(map(len, text.splitlines())) <= 132

    def test_without_a_run(self, pipe):
        text = str(self.counted(pipe))
        remark = (
            "Steps above sigma 0.97 are dense, above sigma 0.8 have window 7, above sigma 0.5 have window 5; this "
            "counts one below; steps= counts a run."
        )
        assert remark in text.splitlines()
        assert "all 0 steps" not in text

    def test_as_json(self, pipe):
        record = json.loads(json.dumps(self.counted(pipe, sigmas=[1, 0.9, 0.2]).to_dict()))
        assert record["windows_by_sigma"] == [[0.8, 7], [0.5, 5]]
        assert [each["sigmas"] for each in record["run"]] == [[1], [0.9], [0.2]]
        assert record["run_gflops"] == pytest.approx(sum(each["step_gflops"] for each in record["run"]))
        assert json.loads(json.dumps(self.counted(pipe).to_dict()))["run_gflops"] is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "error", "words"),
        [
            ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
            ({"steps": 2.5}, TypeError, "steps must be a whole number, got 2.5"),
            ({"steps": 2, "sigmas": [1]}, ValueError, "steps=2 and sigmas are both given"),
            ({"sigmas": []}, ValueError, "sigmas is empty"),
            ({"sigmas": [1, 1.5]}, ValueError, "must be from 0 to 1, got 1.5"),
            ({"sigmas": [math.nan]}, ValueError, "must be from 0 to 1, got nan"),
        ],
    )
    def test_values(self, pipe, given, error, words):
        with pytest.raises(error, match=words):
            clear.cost(pipe, 128, 128, **given)

    def test_no_scheduler(self, pipe):
        words = "steps=4 needs a pipeline with a scheduler of flow matching, got a FluxTransformer2DModel with none"
        with pytest.raises(ValueError, match=words):
            clear.cost(pipe.transformer, 128, 128, steps=4)
        assert clear.cost(pipe.transformer, 128, 128, sigmas=torch.tensor([1, 0.5])).steps == 2

    def test_a_scheduler_that_takes_no_sigmas(self, pipe):
        pipe.scheduler = FlowMatchHeunDiscreteScheduler()
        with pytest.raises(
            ValueError, match="takes no sigmas, which a FluxPipeline gives it; give the sigmas of a run"
        ):
            clear.cost(pipe, 128, 128, steps=4)
        with pytest.raises(ValueError, match="does not support"):
            pipe("a red circle", num_inference_steps=2, output_type="latent")

    def test_a_model_without_sigmas(self):
        pipe = diffusers.DiTPipeline(families.DIT.transformer(), None, diffusers.DDIMScheduler())
        with pytest.raises(ValueError, match="needs a pipeline with a scheduler of flow matching, got a DiTPipeline"):
            clear.cost(pipe, 64, 64, steps=4)
