"""What is special to FLUX: positions in `img_ids`, reference images, diffusers' attention backends."""

import itertools

import pytest
import torch
from torch._dynamo.utils import counters

import clear_attn as clear
from clear_attn.models.parsing import position_ids
from tests.helpers import dummy_models, families, hardware
from tests.helpers.reference_model import in_raster_order, run


@pytest.fixture
def transformer():
    return families.FLUX.transformer()


@hardware.needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tiled", "flex", "reference"])
def test_regional_compilation(backend):
    """With more blocks than torch would compile one by one."""
    torch.compiler.reset()  # compilations are counted per line of code, over all tests
    transformer = families.FLUX.transformer(num_layers=torch._dynamo.config.recompile_limit + 1)
    calls = [families.FLUX.call(transformer, grid, text=text) for grid, text in (((13, 7), 7), ((18, 20), 11))]
    reference = [
        in_raster_order(transformer, [grid], clear.methods.Clear(4)) for grid, text in (((13, 7), 7), ((18, 20), 11))
    ]
    clear.linearize(transformer, 4, weights=None, backend=backend)
    transformer.compile_repeated_blocks(fullgraph=True)
    for call, model in zip(calls, reference, strict=True):
        torch.testing.assert_close(run(transformer, call), run(model, call), atol=1e-5, rtol=0)


def graphs_of(transformer, calls):
    """Return the number of compiled graphs in each of two rounds of calls, and the results."""
    torch.compiler.reset()  # compilations are counted per line of code, over all tests
    # Only the tracing matters here; other tests compile to machine code.
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    counts, results = [counters["stats"]["unique_graphs"]], []
    for _ in range(2):
        results.append([run(transformer, call) for call in calls])
        counts.append(counters["stats"]["unique_graphs"])
    return [after - before for before, after in itertools.pairwise(counts)], results


@hardware.needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tiled", "flex"])
def test_compiled_blocks_are_not_recompiled(backend):
    """Ten sizes and three text lengths take as many compilations as the original model, and two of FlexAttention."""
    transformer = families.FLUX.transformer()
    calls = [families.FLUX.call(transformer, (9 + 3 * i, 15 + 4 * i), text=(5, 12, 40)[i % 3]) for i in range(10)]
    of_dense_model, _ = graphs_of(families.FLUX.transformer(), calls)
    clear.linearize(transformer, 4, weights=None, backend=backend)
    expected = [run(transformer, call) for call in calls]
    graphs, results = graphs_of(transformer, calls)
    assert graphs[0] <= of_dense_model[0] + 2
    assert graphs[1] == 0
    for each in results:
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=0)


class TestIds:
    def test_rounded_ids_are_reconstructed(self):
        ids = dummy_models.image_ids((2, 600))
        assert ids.bfloat16().float()[:, 2].unique().numel() < 600
        positions = position_ids._parse_ids(ids.bfloat16())
        assert positions.grids == ((2, 600),)
        assert torch.equal(positions.exact, ids)

    def test_other_positions_are_not_reconstructed(self):
        assert position_ids._parse_ids((dummy_models.image_ids((4, 6)) * 1.5).bfloat16()).exact is None
        assert position_ids._parse_ids(dummy_models.image_ids((4, 6))).exact is None

    def test_batched_ids(self, transformer):
        call = families.FLUX.call(transformer, (4, 6))
        clear.linearize(transformer, 3, weights=None)
        expected = run(transformer, call)
        assert torch.equal(run(transformer, {**call, "img_ids": call["img_ids"][None]}), expected)

    def test_a_changed_tensor_is_read_again(self):
        ids = dummy_models.image_ids((4, 6))
        assert position_ids.read_ids(ids).grids == ((4, 6),)
        ids.copy_(dummy_models.image_ids((6, 4)))
        assert position_ids.read_ids(ids).grids == ((6, 4),)

    def test_under_inference_mode(self, transformer):
        clear.linearize(transformer, 3, weights=None)
        expected = run(transformer, families.FLUX.call(transformer, (4, 6)))
        with torch.inference_mode():
            output = transformer(**families.FLUX.call(transformer, (4, 6))).sample
        torch.testing.assert_close(output.clone(), expected)

    @pytest.mark.parametrize(
        ("ids", "words"),
        [
            (dummy_models.image_ids((4, 6))[:-1], "no grid of 6 columns"),
            (dummy_models.image_ids((4, 6)).flip(0).roll(3, 0), "row by row"),
            (torch.zeros(5, 2), r"got \[5, 2\]"),
        ],
    )
    def test_refuses_ids_without_a_grid(self, ids, words):
        with pytest.raises(ValueError, match=words):
            position_ids.read_ids(ids)

    def test_refuses_a_call_without_ids(self, transformer):
        clear.linearize(transformer, 3, weights=None)
        with pytest.raises(ValueError, match=r"img_ids must give .* got None"):
            run(transformer, {**families.FLUX.call(transformer, (4, 6)), "img_ids": None})

    def test_refuses_ids_for_another_image(self, transformer):
        call = families.FLUX.call(transformer, (4, 6))
        clear.linearize(transformer, 3, weights=None)
        with pytest.raises(ValueError, match="img_ids has 20 image tokens, hidden_states has 24"):
            run(transformer, {**call, "img_ids": dummy_models.image_ids((4, 5))})


@pytest.mark.parametrize("name", ["native", "_native_math", "flex"])
def test_text_queries_use_the_attention_backend_of_the_model(transformer, name, monkeypatch):
    from clear_attn.models.context import dense_attention

    clear.linearize(transformer, 4, weights=None)
    expected = run(transformer, families.FLUX.call(transformer, (9, 9)))
    used = []
    dispatch = dense_attention.dispatch_attention_fn
    monkeypatch.setattr(
        dense_attention,
        "dispatch_attention_fn",
        lambda *args, **kwargs: used.append(kwargs["backend"]) or dispatch(*args, **kwargs),
    )
    transformer.set_attention_backend(name)
    torch.testing.assert_close(run(transformer, families.FLUX.call(transformer, (9, 9))), expected, atol=1e-5, rtol=0)
    # not FlexAttention, which diffusers calls uncompiled
    assert {str(backend.value) for backend in used} == {name if name != "flex" else "native"}
    transformer.set_attention_backend("native")


def test_ids_rewritten_through_numpy():
    transformer = clear.linearize(dummy_models.flux_transformer(), 3, weights=None)
    call = dummy_models.flux_call(transformer, (6, 10))
    run(transformer, call)
    call["img_ids"].numpy()[:] = dummy_models.image_ids((10, 6)).numpy()
    changed = run(transformer, call)
    assert torch.equal(changed, run(transformer, {**call, "img_ids": dummy_models.image_ids((10, 6))}))
