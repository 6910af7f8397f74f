"""Methods in whole models: linearize, restore, save, load, distil, count."""

import copy
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import clear_attn as clear
from clear_attn import methods
from clear_attn.distill.student import add_student, student_values
from clear_attn.patching.saving import save_values
from tests.helpers import dummy_models
from tests.helpers.families import each_family, each_family_with_each
from tests.helpers.placement import align
from tests.helpers.reference_model import joined, put_rule, run
from tests.helpers.snapshots import assert_same, layers_of, snapshot, train

GRID = (9, 13)
METHODS = [
    methods.Agent(3),
    methods.KVCompression(2),
    methods.LiT(),
    methods.LiT(heads=None, kernel_size=0),
    methods.Sigmoid(),
    methods.Strided(3),
    methods.Swin(4),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def perturb(transformer):
    """Change the parameters of the processors by random values, and return the transformer."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for processor in own_processors(transformer):
            for parameter in processor.parameters(recurse=False):  # without those of an IP-Adapter
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return transformer


def own_processors(transformer):
    return [module for module in transformer.modules() if isinstance(module, clear.ClearAttnProcessor)]


@each_family_with_each("method", METHODS)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_the_rule_in_raster_order(family, method, batch):
    original, grid = family.transformer(), family.grid(*GRID)
    call = family.call_without_mask(original, grid, batch=batch, controlnet=True)
    ours = perturb(clear.linearize(copy.deepcopy(original), method=method, weights=None))
    expected = run(put_rule(copy.deepcopy(original), grid, ours), call)
    torch.testing.assert_close(run(ours, call), expected, atol=1e-5, rtol=0)
    assert (expected - run(original, call)).abs().max() > 1e-3


@each_family()
@pytest.mark.parametrize("method", [methods.Swin(40), methods.Strided(1)], ids=repr)
def test_a_method_that_leaves_nothing_out_equals_the_original_model(family, transformer, method):
    call = family.call(transformer, GRID)
    original = run(transformer, call)
    clear.linearize(transformer, method=method, weights=None)
    torch.testing.assert_close(run(transformer, call), original, atol=1e-5, rtol=0)


@each_family_with_each("method", METHODS)
def test_gradients_under_checkpointing_with_two_sizes_in_flight(family, transformer, method):
    sizes = family.grid(11, 6), family.grid(4, 9)
    calls = [family.call_without_mask(transformer, grid, seed=seed) for seed, grid in enumerate(sizes)]
    ours = perturb(clear.linearize(copy.deepcopy(transformer), method=method, weights=None)).train()
    ruled = [put_rule(copy.deepcopy(transformer), grid, ours).train() for grid in sizes]
    names = [name for name, _ in transformer.named_parameters()]
    own = [parameter for processor in own_processors(ours) for parameter in processor.parameters()]

    def gradients(models):
        loss = sum(joined(model(**call)).square().mean() for model, call in zip(models, calls, strict=True))
        each = [dict(model.named_parameters()) for model in dict.fromkeys(models)]
        found = torch.autograd.grad(loss, [p[n] for p in each for n in names] + own, allow_unused=True)
        found = [0 if x is None else x for x in found]
        return [sum(found[i : len(names) * len(each) : len(names)]) for i in range(len(names))] + found[
            len(names) * len(each) :
        ]

    expected = gradients(ruled)
    ours.enable_gradient_checkpointing()
    for name, mine, theirs in zip([*names, *own], gradients([ours, ours]), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@each_family_with_each("method", METHODS)
def test_restore_is_bit_for_bit(family, transformer, method):
    call = family.call_without_mask(transformer, GRID)
    before, original = snapshot(transformer), run(transformer, call)
    clear.linearize(transformer, method=method, weights=None)
    assert clear.is_linearized(transformer)
    clear.linearize(transformer, 4, weights=None)
    clear.linearize(transformer, method=method, weights=None)
    clear.restore(transformer)
    assert_same(transformer, before)
    assert torch.equal(run(transformer, call), original)
    with clear.linearized(transformer, method=method, weights=None):
        assert not torch.equal(run(transformer, call), original)
    assert_same(transformer, before)


class TestSaved:
    @each_family_with_each("method", METHODS)
    def test_and_loaded(self, family, transformer, method, tmp_path):
        call = family.call_without_mask(transformer, GRID)
        perturb(clear.linearize(transformer, method=method, weights=None))
        with torch.no_grad():
            next(iter(layers_of(transformer).values())).to_out[0].weight.mul_(1.5)
        expected = run(transformer, call)
        clear.save_pretrained(transformer, tmp_path)
        other = clear.linearize(family.transformer(), weights=tmp_path)
        assert torch.equal(run(other, call), expected)
        assert clear.linearize(family.transformer(), method=method, weights=tmp_path)
        assert type(method).__name__ in (tmp_path / "README.md").read_text()

    @pytest.fixture
    def folder(self, tmp_path):
        transformer = clear.linearize(dummy_models.flux_transformer(), method=methods.Swin(4), weights=None)
        train(transformer)
        clear.save_pretrained(transformer, tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                {"method": methods.Swin(5)},
                r"Swin\(side=5\) does not fit weights that were distilled for method=Swin\(side=4\)",
            ),
            ({"method": methods.LiT()}, "does not fit weights"),
            ({"window": 4}, r"window=4 is a setting of CLEAR, and this is Swin\(side=4\)"),
        ],
    )
    def test_for_another(self, folder, given, message):
        transformer = dummy_models.flux_transformer()
        before = snapshot(transformer)
        with pytest.raises(ValueError, match=message):
            clear.linearize(transformer, weights=folder, **given)
        assert_same(transformer, before)

    def test_for_clear(self, tmp_path):
        transformer = clear.linearize(dummy_models.flux_transformer(), 4, weights=None)
        train(transformer)
        clear.save_pretrained(transformer, tmp_path)
        with pytest.raises(ValueError, match="distilled for window=4"):
            clear.linearize(dummy_models.flux_transformer(), method=methods.Swin(), weights=tmp_path)

    @pytest.mark.parametrize(
        "settings",
        [
            {"name": "Unheard", "settings": {}},
            {"name": "Swin", "settings": {"depth": 3}},
            {"name": "Swin", "settings": {"side": 0}},
        ],
    )
    def test_in_a_record_that_cannot_be_read(self, folder, settings):
        file = folder / "clear_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "method": settings}))
        with pytest.raises(ValueError, match=r"Unheard|depth|side must be at least 1"):
            clear.linearize(dummy_models.flux_transformer(), weights=folder)


class TestSavedWhole:
    @pytest.fixture
    def save_whole(self, pipe, tmp_path):
        def save_whole(method):
            clear.linearize(pipe, method=method, weights=None)
            pipe.save_pretrained(tmp_path)
            loaded = FluxPipeline.from_pretrained(tmp_path)
            align(loaded.transformer)
            return loaded

        return save_whole

    def test_can_be_linearized_again(self, pipe, save_whole):
        back = save_whole(methods.Swin(4))
        with pytest.warns(UserWarning, match=r"method=Swin\(side=4\)"):
            assert not clear.is_linearized(back)
        clear.linearize(back)
        call = dummy_models.flux_call(pipe.transformer, (5, 9), text=11)
        assert torch.equal(run(back.transformer, call), run(pipe.transformer, call))

    def test_with_parameters_of_its_own_is_refused(self, save_whole):
        with pytest.raises(ValueError, match="attention processors had trained weights"):
            clear.linearize(save_whole(methods.LiT()))

    def test_for_another(self, save_whole):
        back = save_whole(methods.Swin(4))
        with pytest.raises(ValueError, match=r"does not fit this pipeline, .* method=Swin\(side=4\)"):
            clear.linearize(back, method=methods.Swin(5))
        with pytest.raises(ValueError, match=r"window=3 is a setting of CLEAR, and this is Swin\(side=4\)"):
            clear.linearize(back, window=3)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": methods.LiT}, TypeError, r"as clear_attn.methods.LiT\(\), got <class"),
        ({"method": "LiT"}, TypeError, "got 'LiT'"),
        ({"method": methods.LiT(), "window": 8}, ValueError, "window=8 and method=LiT.* both given"),
        ({"method": methods.LiT(), "down_factor": 2}, ValueError, "down_factor=2 and method=LiT.* both given"),
        ({"method": methods.LiT(), "backend": "tiled"}, ValueError, "backend='tiled' is one of CLEAR's"),
        ({"method": methods.LiT(), "weights": "auto"}, ValueError, "finds none for this model"),
        ({"method": methods.LiT(heads=3)}, ValueError, "heads=3 does not divide the 32 channels"),
        (
            {"method": methods.LiT(), "schedule": clear.Schedule(windows={"transformer_blocks": 3})},
            ValueError,
            "window of their own",
        ),
    ],
)
def test_arguments_that_do_not_go_together(transformer, given, error, message):
    before = snapshot(transformer)
    with pytest.raises(error, match=message):
        clear.linearize(transformer, **{"weights": None, **given})
    assert_same(transformer, before)


MASKS = {"added": torch.float32, "boolean": torch.bool}


@each_family_with_each("method", METHODS, padding=True)
@pytest.mark.parametrize("dtype", MASKS.values(), ids=MASKS)
def test_padded_text(family, method, dtype):
    """Equals the rule with the original model's own mask, or the method refuses padded text."""
    original, grid = family.transformer(), family.grid(*GRID)
    call = family.call(original, grid, batch=2, padded=(1, 3), dtype=dtype)
    ours = perturb(clear.linearize(copy.deepcopy(original), method=method, weights=None))
    if not method.supports_bias:
        with pytest.raises(RuntimeError, match="LiT does not support padded text"):
            run(ours, call)
        return
    output = run(ours, call)
    expected = run(put_rule(copy.deepcopy(original), grid, ours), call)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert (run(ours, {**call, family.padding_mask(call): None}) - output).abs().max() > 1e-4


@each_method
def test_with_an_ip_adapter(method):
    original = dummy_models.flux_transformer()
    for block in original.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 6, num_tokens=(3,), scale=0.7))
    call = dummy_models.flux_call(original, GRID, batch=2)
    without = run(original, {**call, "joint_attention_kwargs": {"ip_hidden_states": [torch.zeros(2, 3, 6)]}})
    call["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(2, 3, 6)]}
    before = run(original, call)
    ours = perturb(clear.linearize(copy.deepcopy(original), method=method, weights=None))
    expected = run(put_rule(copy.deepcopy(original), GRID, ours), call)
    torch.testing.assert_close(run(ours, call), expected, atol=1e-5, rtol=0)
    assert (before - without).abs().max() > 1e-3
    assert torch.equal(run(clear.restore(ours), call), before)


def test_an_ip_adapter_stays_frozen():
    transformer = dummy_models.flux_transformer()
    for block in transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 6, num_tokens=(3,), scale=0.7).requires_grad_(False))
    clear.linearize(transformer, window=3, down_factor=2, weights=None)
    trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert any(name.endswith("processor.spatial_weight") for name in trained)
    assert not any("_ip" in name for name in trained)


def test_reference_images():
    transformer = clear.linearize(dummy_models.flux_transformer(), method=methods.Swin(), weights=None)
    with pytest.raises(ValueError, match="attends in one image, and this call has 2"):
        transformer(**dummy_models.flux_call(transformer, (5, 7), (5, 7)))


def test_highres(pipe):
    clear.linearize(pipe, method=methods.Swin(), weights=None)
    with pytest.raises(RuntimeError, match="highres draws with CLEAR"):
        clear.highres(pipe, "a red disc", height=256, width=256)


def test_dense_layers_and_steps(family, transformer):
    call = family.call(transformer, GRID)
    original = run(transformer, call)
    layers = [name.removesuffix(".processor") for name in transformer.attn_processors]
    for schedule in (clear.Schedule(dense_layers=layers), clear.Schedule(dense_above_sigma=0)):
        clear.linearize(transformer, method=methods.LiT(), weights=None, schedule=schedule)
        torch.testing.assert_close(run(transformer, call), original, atol=1e-5, rtol=0)
    clear.linearize(transformer, method=methods.LiT(), weights=None, schedule=clear.Schedule(dense_layers=layers[:-1]))
    assert (run(transformer, call) - original).abs().max() > 1e-3


@each_method
def test_in_half_precision(family, method):
    transformer = perturb(clear.linearize(family.transformer(), method=method, weights=None))
    call = family.call(transformer, GRID)
    expected = run(transformer, call)
    half = {key: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in call.items()}
    half |= {key: x for key, x in call.items() if key.endswith("_ids")}
    output = run(transformer.bfloat16(), half)
    assert output.dtype == torch.bfloat16
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()


@each_family_with_each("method", METHODS, training=True)
def test_student(family, method, tmp_path):
    """The trained parameters of a method are saved, and give the same output when loaded."""
    transformer = clear.linearize(family.transformer(), method=method, weights=None)
    parameters = add_student(transformer)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    call = family.call(transformer, GRID)
    if not method.supports_bias and "attention_mask" in call:
        call["attention_mask"] = None
    output = joined(transformer(**call))
    gradients = torch.autograd.grad(output.square().mean(), parameters)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    save_values(transformer, method, student_values(transformer), tmp_path)
    loaded = clear.linearize(family.transformer(), weights=tmp_path)
    torch.testing.assert_close(run(loaded, call), output.detach(), atol=1e-5, rtol=0)


# CLEAR's table 2, FLUX.1-dev at 1024 px.
@pytest.mark.parametrize(
    ("method", "gflops"),
    [
        (methods.Sigmoid(), 260.9),
        (methods.KVCompression(), 67.7),
        (methods.Agent(), 80.5),
        (methods.Strided(), 67.7),
        (methods.Swin(), 66.16),  # 67.7 in the paper, without shifted windows
    ],
    ids=repr,
)
def test_cost_equals_the_paper(method, gflops):
    with torch.device("meta"):
        transformer = dummy_models.FluxTransformer2DModel()
    cost = clear.cost(transformer, 1024, 1024, method=method)
    assert cost.layer_gflops == pytest.approx(gflops, abs=0.06)
    assert cost.ratio == pytest.approx(cost.dense_layer_gflops / cost.layer_gflops)
    assert re.search(rf"a layer .* {cost.layer_gflops:,.1f}  GFLOPs", str(cost))
    assert type(method).__name__ in str(cost)
    assert cost.to_dict()["method"]["name"] == type(method).__name__


def test_cost_of_a_linearized_model(transformer):
    text = 7
    clear.linearize(transformer, method=methods.Strided(2), weights=None)
    own = clear.cost(transformer, 160, 240, text_tokens=text)
    assert own == clear.cost(clear.restore(transformer), 160, 240, text_tokens=text, method=methods.Strided(2))
    with pytest.raises(ValueError, match=r"window=3 and method=Strided\(stride=2\) are both given"):
        clear.cost(transformer, 160, 240, window=3, method=methods.Strided(2))


def test_cost_is_the_sum_over_the_layers():
    """In SD3.5, windows are shifted in every second layer with text, and in every second layer without."""
    transformer, grid, text = dummy_models.sd3_transformer(), (5, 9), 7
    method = methods.Swin(4)
    clear.linearize(
        transformer, method=method, weights=None, schedule=clear.Schedule(dense_layers=["transformer_blocks.2"])
    )
    cost = clear.cost(transformer, 80, 144, text_tokens=text)
    numbers = {"transformer_blocks.0.attn": 0, "transformer_blocks.0.attn2": 0, "transformer_blocks.1.attn": 1}
    for layer, kind in numbers.items():
        assert transformer.get_submodule(layer).processor.layer.number == kind
    tokens = grid[0] * grid[1]
    alone = sum(method.flops(grid, 0, 2, 16).values())
    with_text = sum(sum(method.for_layer(number).flops(grid, text, 2, 16).values()) for number in (0, 1))
    of_text, dense = 2 * 4 * 32 * text * (text + tokens), 4 * 32 * (text + tokens) ** 2
    assert cost.step_flops == alone + with_text + of_text + dense


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (dummy_models.flux_transformer, {"method": methods.LiT(heads=5)}, ValueError, "heads=5 does not divide"),
        (
            dummy_models.flux_transformer,
            {"method": methods.LiT(), "schedule": clear.Schedule(windows={"transformer_blocks": 3})},
            ValueError,
            "window of their own",
        ),
    ],
)
def test_cost_refuses_what_linearize_refuses(model, given, error, message):
    with pytest.raises(error, match=message):
        clear.cost(model(), 160, 240, **given)


def test_cost_names_what_is_quadratic():
    of = {method: str(clear.cost(dummy_models.flux_transformer(), 160, 240, method=method)) for method in METHODS}
    for method, text in of.items():
        assert ("square of the tokens" in text) == (not isinstance(method, (methods.LiT, methods.Swin)))


def test_a_plan_is_made_once_for_a_size(monkeypatch):
    made = []
    plan = methods.Strided.plan
    monkeypatch.setattr(methods.Strided, "plan", lambda self, layout: made.append(layout) or plan(self, layout))
    transformer = clear.linearize(dummy_models.flux_transformer(), method=methods.Strided(5), weights=None)
    for grid in ((6, 11), (6, 11), (7, 11), (6, 11)):
        run(transformer, dummy_models.flux_call(transformer, grid))
    assert [layout.grids for layout in made] == [((6, 11),), ((7, 11),)]


def test_fused_projections_are_used():
    transformer = dummy_models.flux_transformer()
    transformer.fuse_qkv_projections()
    with torch.no_grad():
        transformer.transformer_blocks[0].attn.to_qkv.weight.mul_(1.3)
    call = dummy_models.flux_call(transformer, GRID)
    expected = run(transformer, call)
    clear.linearize(transformer, method=methods.Strided(1), weights=None)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


def test_a_file_without_its_record_knows_its_method(tmp_path):
    transformer = clear.linearize(dummy_models.flux_transformer(), method=methods.Swin(4), weights=None)
    train(transformer)
    clear.save_pretrained(transformer, tmp_path)
    alone = tmp_path / "alone.safetensors"
    (tmp_path / "clear_weights.safetensors").rename(alone)
    (tmp_path / "clear_config.json").unlink()
    loaded = clear.linearize(dummy_models.flux_transformer(), weights=alone)
    call = dummy_models.flux_call(transformer, GRID)
    assert torch.equal(run(loaded, call), run(transformer, call))


def test_a_scale_where_there_are_no_scores():
    transformer = clear.linearize(dummy_models.flux_transformer(), method=methods.LiT(), weights=None)
    call = dummy_models.flux_call(transformer, GRID)
    with pytest.raises(RuntimeError, match="no scores to scale"):
        transformer(**{**call, "joint_attention_kwargs": {"clear_scale_multiplier": 1.2}})


def test_many_gpus():
    transformer = clear.linearize(dummy_models.flux_transformer(), method=methods.Swin(4), weights=None)
    with pytest.raises(ValueError, match=r"only CLEAR can be split over ranks, and this is Swin\(side=4\)"):
        clear.parallelize(transformer)


class TestOwn:
    """A method that a user defines."""

    @staticmethod
    def define(frozen=True, **fields):
        class Template(methods.ImageMethod):
            quadratic = None

            def parameters_for(self, layer):
                return {"scale": torch.linspace(0.1, 0.9, layer.heads)[:, None, None]}

            def attend_image(self, query, key, value, plan, parameters, options):
                return query * parameters[0]

            def flops(self, grid, text_tokens, heads, head_dim):
                return {"nothing": 0}

        members = {"__annotations__": {name: type(value) for name, value in fields.items()}, **fields}
        made = type("Own", (Template,), {**members, "__module__": "notebook", "__qualname__": "Own"})
        return dataclasses.dataclass(frozen=frozen)(made)

    def test_is_saved_under_its_modules_name(self, tmp_path):
        transformer = clear.linearize(dummy_models.flux_transformer(), method=self.define(side=2)(), weights=None)
        clear.linearize(transformer, method=self.define(side=2)(side=3), weights=None)  # defined again
        train(transformer)
        clear.save_pretrained(transformer, tmp_path)
        again = self.define(side=2)
        loaded = clear.linearize(dummy_models.flux_transformer(), method=again(side=3), weights=tmp_path)
        call = dummy_models.flux_call(transformer, GRID)
        assert torch.equal(run(loaded, call), run(transformer, call))
        record = json.loads((tmp_path / "clear_config.json").read_text())
        assert record["method"] == {"name": "notebook.Own", "settings": {"side": 3}}
        assert methods.parse("Own(side=4)") == again(side=4)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            ({"frozen": False, "side": 2}, "must be a frozen dataclass"),
            ({"side": frozenset({1, 2})}, "must be a frozen dataclass"),
            ({"side": ((1, 2), (3,))}, "is read back from JSON as|unhashable"),
        ],
    )
    def test_what_could_not_be_saved(self, make, message):
        transformer = dummy_models.flux_transformer()
        before = snapshot(transformer)
        with pytest.raises(TypeError, match=message):
            clear.linearize(transformer, method=self.define(**make)(), weights=None)
        assert_same(transformer, before)


def test_numbers_of_other_libraries(tmp_path):
    transformer = clear.linearize(dummy_models.flux_transformer(), method=methods.Swin(np.int64(4)), weights=None)
    train(transformer)
    clear.save_pretrained(transformer, tmp_path)
    assert type(methods.Swin(np.int64(4)).side) is int
