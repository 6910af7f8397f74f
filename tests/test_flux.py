"""FLUX through its doors: everything that runs beside the image tokens, at every size, in every kind of call."""

import copy
import gc
import threading
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clear_attn as clear
from clear_attn import attention
from clear_attn.backends import dense, flex, tiled
from clear_attn.doors import layout_for
from clear_attn.families import flux
from tests import machine, reference, tiny


class RasterProcessor(torch.nn.Module):
    """The stock processor's arithmetic with a mask over raster order: CLEAR the plain way."""

    def __init__(self, stock, grids, text, config, weight):
        super().__init__()
        self.stock, self.rule = stock, (grids, text, config, weight)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        def attention(query, key, value, **_):
            output, _ = reference.attention(*(x.transpose(1, 2) for x in (query, key, value)), *self.rule)
            return output.transpose(1, 2)

        with mock.patch("diffusers.models.transformers.transformer_flux.dispatch_attention_fn", attention):
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def in_raster_order(transformer, grids, text, config):
    """A copy whose layers compute the rule densely in raster order, pooling with plain means."""
    plain = copy.deepcopy(transformer)
    weight = torch.full((config.down_factor,) * 2, 1 / config.down_factor**2)
    for name, stock in plain.attn_processors.items():
        layer = plain.get_submodule(name.removesuffix(".processor"))
        layer.set_processor(RasterProcessor(stock, grids, text, config, weight))
    return plain


def run(transformer, call):
    with torch.no_grad():
        return transformer(**call, return_dict=False)[0]


GRID = st.sampled_from([(1, 1), (3, 5), (8, 8), (13, 7), (17, 23), (16, 24)])


@given(
    grids=st.lists(GRID, min_size=1, max_size=2),
    text=st.integers(1, 40),
    window=st.integers(1, 30),
    factor=st.integers(1, 5),
    batch=st.integers(1, 3),
    guidance=st.booleans(),
    controlnet=st.booleans(),
    backend=st.sampled_from(machine.BACKENDS),
)
@settings(max_examples=30)
def test_equals_the_rule_in_raster_order(grids, text, window, factor, batch, guidance, controlnet, backend):
    transformer = tiny.flux_transformer(guidance)
    call = tiny.flux_call(transformer, *grids, text=text, batch=batch, controlnet=controlnet)
    expected = run(in_raster_order(transformer, grids, text, clear.ClearConfig(window, factor)), call)
    clear.linearize(transformer, window, factor, weights=None, backend=backend)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


def test_fused_projections(transformer):
    call = tiny.flux_call(transformer, (13, 7))
    clear.linearize(transformer, 4, weights=None)
    expected = run(transformer, call)
    transformer.fuse_qkv_projections()
    clear.linearize(transformer, 4, weights=None)
    assert transformer.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


def test_a_window_that_covers_the_grid_is_the_stock_model(transformer):
    call = tiny.flux_call(transformer, (13, 17), batch=2)
    expected = run(transformer, call)
    clear.linearize(transformer, 25, weights=None)
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


def test_positional_arguments_and_dataclass_output(transformer):
    call = tiny.flux_call(transformer, (6, 5))
    clear.linearize(transformer, 3, weights=None)
    expected = run(transformer, call)
    call.pop("guidance")
    with torch.no_grad():
        assert torch.equal(transformer(*call.values()).sample, expected)


def test_the_callers_keywords_are_left_alone(transformer):
    call = tiny.flux_call(transformer, (6, 5), controlnet=True)
    call["joint_attention_kwargs"] = {}
    before = copy.deepcopy(call)
    clear.linearize(transformer, 3, weights=None)
    with torch.no_grad():
        transformer(**call)
    torch.testing.assert_close(call, before, atol=0, rtol=0)


def test_portrait_and_landscape_in_turn(transformer):
    calls = [tiny.flux_call(transformer, grid, text=text) for grid, text in (((5, 12), 7), ((12, 5), 7), ((5, 12), 9))]
    expected = []
    for call, grid in zip(calls, ((5, 12), (12, 5), (5, 12)), strict=True):
        text = call["encoder_hidden_states"].shape[1]
        expected.append(run(in_raster_order(transformer, [grid], text, clear.ClearConfig(4, 2)), call))
    clear.linearize(transformer, 4, 2, weights=None)
    for _ in range(2):
        for call, output in zip(calls, expected, strict=True):
            torch.testing.assert_close(run(transformer, call), output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", machine.BACKENDS)
def test_two_threads_see_their_own_layouts(transformer, backend):
    clear.linearize(transformer, 4, 2, weights=None, backend=backend)
    calls = [tiny.flux_call(transformer, grid) for grid in ((5, 12), (12, 5), (9, 9), (4, 16))]
    expected = [run(transformer, call) for call in calls]
    layout_for.cache_clear()
    wrong = []

    def work(start):
        for turn in range(12):
            which = (start + turn) % len(calls)
            if not torch.allclose(run(transformer, calls[which]), expected[which], atol=1e-5):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_deep_copy_is_independent(transformer):
    call = tiny.flux_call(transformer, (9, 9))
    stock = run(transformer, call)
    clear.linearize(transformer, 3, 2, weights=None)
    expected = run(transformer, call)
    twin = copy.deepcopy(transformer)
    with torch.no_grad():
        twin.transformer_blocks[0].attn.processor.spatial_weight.mul_(2)
    assert not torch.allclose(run(twin, call), expected, atol=1e-5)
    assert torch.equal(run(transformer, call), expected)
    clear.restore(twin)
    assert clear.is_linearized(transformer)
    torch.testing.assert_close(run(twin, call), stock)
    assert torch.equal(run(transformer, call), expected)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing_with_two_sizes_in_flight(transformer, use_reentrant, factor):
    sizes = ((9, 7), (6, 11))
    calls = [tiny.flux_call(transformer, grid, seed=seed) for seed, grid in enumerate(sizes)]
    for call in calls:
        call["hidden_states"].requires_grad_()
    plain = [in_raster_order(transformer, [grid], 7, clear.ClearConfig(3, factor)) for grid in sizes]
    names = [name for name, _ in transformer.named_parameters()]

    def gradients(models):
        """Of both inputs, and of all parameters."""
        inputs = [call["hidden_states"] for call in calls]
        loss = sum(model(**call).sample.square().mean() for model, call in zip(models, calls, strict=True))
        for tensor in (*inputs, *(x for model in models for x in model.parameters())):
            tensor.grad = None
        loss.backward()
        found = [dict(model.named_parameters()) for model in dict.fromkeys(models)]
        return [x.grad for x in inputs] + [sum(each[name].grad for each in found) for name in names]

    expected = gradients(plain)
    clear.linearize(transformer, 3, factor, weights=None)
    transformer.enable_gradient_checkpointing(
        lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant)
    )
    transformer.train()
    for ours, plain_one in zip(gradients([transformer, transformer]), expected, strict=True):
        torch.testing.assert_close(ours, plain_one, atol=1e-6, rtol=1e-5)


@machine.needs_compiler
@pytest.mark.parametrize("backend", machine.BACKENDS)
def test_regional_compilation(backend):
    """Of more blocks than torch would compile one by one."""
    torch.compiler.reset()  # compilations are counted for each line of code, over all tests
    transformer = tiny.flux_transformer(num_layers=torch._dynamo.config.recompile_limit + 1)
    calls = [tiny.flux_call(transformer, grid, text=text) for grid, text in (((13, 7), 7), ((18, 20), 11))]
    plain = [
        in_raster_order(transformer, [grid], text, clear.ClearConfig(4))
        for grid, text in (((13, 7), 7), ((18, 20), 11))
    ]
    clear.linearize(transformer, 4, weights=None, backend=backend)
    layout_for.cache_clear()
    transformer.compile_repeated_blocks(fullgraph=True)
    for call, model in zip(calls, plain, strict=True):
        torch.testing.assert_close(run(transformer, call), run(model, call), atol=1e-5, rtol=0)


@machine.needs_compiler
def test_compiled_transformer(transformer):
    call = tiny.flux_call(transformer, (13, 7))
    clear.linearize(transformer, 4, 2, weights=None)
    expected = run(transformer, call)
    torch.testing.assert_close(run(torch.compile(transformer), call), expected, atol=1e-5, rtol=0)


@machine.needs_compiler
def test_twenty_sizes_stay_within_bounds(transformer, monkeypatch):
    """Caches stay bounded, FlexAttention is compiled a handful of times, and nothing takes a dense path."""
    for module in (attention, dense, tiled):
        monkeypatch.setattr(module, "softmax_attention", None)
    clear.linearize(transformer, 4, weights=None, backend="flex")
    compiled = []
    monkeypatch.setattr(
        flex, "_call", lambda *args, call=flex._call, **kwargs: compiled.append(1) or call(*args, **kwargs)
    )
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    alive = []
    for size in range(20):
        run(transformer, tiny.flux_call(transformer, (12 + size, 13 + 2 * size), text=5 + 3 * size))
        gc.collect()
        alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert len(compiled) == 20 * 4
    assert max(alive[10:]) <= alive[9], alive
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 4
    assert layout_for.cache_info().currsize <= 8
    assert len(flux._recent) <= 16
    gc.collect()
    dead = [reference for reference, *_ in flux._recent if reference() is not None]
    assert not dead


def test_gradients_of_controlnet_residuals_alone(transformer):
    call = tiny.flux_call(transformer, (6, 5), controlnet=True)
    residual = call["controlnet_block_samples"][1].requires_grad_()
    transformer.requires_grad_(False)
    clear.linearize(transformer, 3, weights=None)
    transformer(**call).sample.sum().backward()
    assert residual.grad.abs().sum() > 0


def test_another_default_device(transformer):
    call = tiny.flux_call(transformer, (9, 7))
    clear.linearize(transformer, 3, 2, weights=None)
    expected = run(transformer, call)
    layout_for.cache_clear()
    flux._recent.clear()
    with torch.device("meta"):
        assert torch.equal(run(transformer, call), expected)


class TestIds:
    def test_coarse_ids_are_counted_anew(self):
        ids = tiny.image_ids((2, 600))
        assert ids.bfloat16().float()[:, 2].unique().numel() < 600
        positions = flux._parse_ids(ids.bfloat16())
        assert positions.grids == ((2, 600),)
        assert torch.equal(positions.exact, ids)

    def test_positions_of_another_kind_are_left_alone(self):
        assert flux._parse_ids((tiny.image_ids((4, 6)) * 1.5).bfloat16()).exact is None
        assert flux._parse_ids(tiny.image_ids((4, 6))).exact is None

    def test_batched_ids(self, transformer):
        call = tiny.flux_call(transformer, (4, 6))
        clear.linearize(transformer, 3, weights=None)
        expected = run(transformer, call)
        assert torch.equal(run(transformer, {**call, "img_ids": call["img_ids"][None]}), expected)

    def test_a_changed_tensor_is_read_anew(self):
        ids = tiny.image_ids((4, 6))
        assert flux._read_ids(ids).grids == ((4, 6),)
        ids.copy_(tiny.image_ids((6, 4)))
        assert flux._read_ids(ids).grids == ((6, 4),)

    def test_under_inference_mode(self, transformer):
        clear.linearize(transformer, 3, weights=None)
        expected = run(transformer, tiny.flux_call(transformer, (4, 6)))
        with torch.inference_mode():
            output = transformer(**tiny.flux_call(transformer, (4, 6))).sample
        torch.testing.assert_close(output.clone(), expected)

    @pytest.mark.parametrize(
        ("ids", "words"),
        [
            (tiny.image_ids((4, 6))[:-1], "no grid of 6 columns"),
            (tiny.image_ids((4, 6)).flip(0).roll(3, 0), "row by row"),
            (torch.zeros(5, 2), r"got \[5, 2\]"),
        ],
    )
    def test_refuses_what_is_no_grid(self, ids, words):
        with pytest.raises(ValueError, match=words):
            flux._read_ids(ids)

    def test_refuses_a_call_without_ids(self, transformer):
        clear.linearize(transformer, 3, weights=None)
        with pytest.raises(ValueError, match=r"img_ids must tell where .* got None"):
            run(transformer, {**tiny.flux_call(transformer, (4, 6)), "img_ids": None})

    def test_refuses_controlnet_residuals_of_another_picture(self, transformer):
        call = tiny.flux_call(transformer, (4, 6), controlnet=True)
        call["controlnet_single_block_samples"] = [call["controlnet_single_block_samples"][0][:, :20]]
        clear.linearize(transformer, 3, weights=None)
        with pytest.raises(ValueError, match=r"controlnet_single_block_samples must have .* 24 image tokens, got 20"):
            run(transformer, call)

    def test_refuses_ids_for_another_picture(self, transformer):
        call = tiny.flux_call(transformer, (4, 6))
        clear.linearize(transformer, 3, weights=None)
        with pytest.raises(ValueError, match="img_ids place 20 image tokens, hidden_states has 24"):
            run(transformer, {**call, "img_ids": tiny.image_ids((4, 5))})


class TestDoor:
    def test_names_a_layer_whose_processor_was_replaced(self, transformer):
        clear.linearize(transformer, 3, weights=None)
        attn = transformer.single_transformer_blocks[1].attn
        attn.set_processor(attn._default_processor_cls())
        with pytest.raises(
            RuntimeError, match=r"single_transformer_blocks\.1\.attn was replaced by a FluxAttnProcessor"
        ):
            run(transformer, tiny.flux_call(transformer, (4, 4)))

    def test_names_a_layer_that_was_rebuilt_without_its_parameter(self, transformer):
        clear.linearize(transformer, 3, 2, weights=None)
        attn = transformer.single_transformer_blocks[0].attn
        attn.set_processor(type(attn.processor)())
        with pytest.raises(RuntimeError, match=r"single_transformer_blocks\.0\.attn was replaced"):
            run(transformer, tiny.flux_call(transformer, (4, 4)))

    def test_a_layer_without_a_layout_says_so(self, transformer):
        clear.linearize(transformer, 3, weights=None)
        with pytest.raises(RuntimeError, match=r"transformer_blocks\.0\.attn was called without a layout"):
            transformer.transformer_blocks[0].attn(torch.zeros(1, 4, 32), torch.zeros(1, 2, 32))

    def test_an_attention_mask_is_refused(self, transformer):
        clear.linearize(transformer, 3, weights=None)
        call = tiny.flux_call(transformer, (4, 4))
        call["joint_attention_kwargs"] = {"attention_mask": torch.ones(1, 1, 1, 23)}
        with pytest.raises(RuntimeError, match=r"takes no attention mask, got one of shape \[1, 1, 1, 23\]"):
            run(transformer, call)

    def test_context_parallelism_is_refused(self, transformer):
        clear.linearize(transformer, 3, weights=None)
        transformer.transformer_blocks[1].attn.processor._parallel_config = object()
        with pytest.raises(
            RuntimeError, match=r"transformer_blocks\.1\.attn does not work under .*context parallelism"
        ):
            run(transformer, tiny.flux_call(transformer, (4, 4)))


@pytest.mark.parametrize("name", ["native", "_native_math", "flex"])
def test_the_users_attention_backend_serves_text_queries(transformer, name, monkeypatch):
    from clear_attn import processors

    clear.linearize(transformer, 4, weights=None)
    expected = run(transformer, tiny.flux_call(transformer, (9, 9)))
    used = []
    dispatch = processors.dispatch_attention_fn
    monkeypatch.setattr(
        processors,
        "dispatch_attention_fn",
        lambda *args, **kwargs: used.append(kwargs["backend"]) or dispatch(*args, **kwargs),
    )
    transformer.set_attention_backend(name)
    torch.testing.assert_close(run(transformer, tiny.flux_call(transformer, (9, 9))), expected, atol=1e-5, rtol=0)
    # diffusers calls FlexAttention uncompiled: never that.
    assert {str(backend.value) for backend in used} == {name if name != "flex" else "native"}
    transformer.set_attention_backend("native")
