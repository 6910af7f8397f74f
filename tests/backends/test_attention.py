import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_attn.backends import flex, selection, tiled
from clear_attn.backends import reference as dense
from clear_attn.backends.attention import clear_attention, pool
from clear_attn.backends.selection import BACKENDS, select_backend
from clear_attn.core.layout import TokenLayout
from clear_attn.core.window_mask import window_mask
from clear_attn.methods import Clear
from tests.helpers import hardware, reference_attention


def attend(qkv, grids, text, config, weight, text_first=True, **kwargs):
    """Call `clear_attention` on inputs in raster order, text first; return its results in the same order."""
    layout = TokenLayout(grids, text, text_first=text_first)
    plan = config.plan(layout)
    tokens = torch.arange(text + plan.image_tokens)
    image = tokens[text:][layout.permutation]
    into = torch.cat([tokens[:text], image] if text_first else [image, tokens[:text]])
    query, key, value = (x[:, :, into] for x in qkv)
    pooled = None
    if config.down_factor > 1:
        pooled = tuple(pool(x[:, :, plan.image], plan, weight) for x in (key, value))
    output, lse = clear_attention(query, key, value, plan, pooled=pooled, return_lse=True, **kwargs)
    alone = clear_attention(query, key, value, plan, pooled=pooled, **kwargs)
    torch.testing.assert_close(alone, output, atol=1e-5, rtol=0)
    back = into.argsort()
    return alone[:, :, back], lse[:, :, back]


GRID = st.sampled_from([(1, 1), (1, 37), (7, 13), (16, 16), (17, 23), (24, 40), (29, 31)])
CASES = {
    "grids": st.lists(GRID, min_size=1, max_size=2),
    "text": st.sampled_from([0, 1, 7, 77, 128, 150]),
    "window": st.sampled_from([1, 2, 3, 5, 8, 13, 21, 64]),
    "factor": st.integers(1, 5),
    "batch": st.integers(1, 3),
    "text_first": st.booleans(),
}


def check(backend, grids, text, window, factor, batch, text_first):
    config = Clear(window, factor)
    tokens = text + sum(height * width for height, width in grids)
    qkv = torch.randn(3, batch, 2, tokens, 16).unbind()
    weight = 2 * torch.rand(factor, factor) / factor**2  # near the mean
    expected, expected_lse = reference_attention.attention(*qkv, grids, text, config, weight)
    output, lse = attend(qkv, grids, text, config, weight, text_first, backend=backend)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-6)


@given(**CASES)
@settings(max_examples=30)
def test_tiled_is_the_rule(**case):
    check("tiled", **case)


@given(**CASES)
@settings(max_examples=20)
def test_reference_is_the_rule(**case):
    check("reference", **case)


@hardware.needs_compiler
@given(**CASES)
@settings(max_examples=20)
def test_flex_is_the_rule(**case):
    check("flex", **case)


@hardware.needs_compiler
@pytest.mark.parametrize("grid", [(1, 1), (9, 11), (8, 16), (5, 26)])
def test_flex_around_the_size_of_one_block(grid):
    for _ in range(5):
        check("flex", [grid], 0, 3, 1, 1, True)


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("backend", ["tiled", "reference", "auto"])
def test_gradients(backend, factor):
    grids, text, config = [(17, 23)], 9, Clear(4, factor)
    inputs = [torch.randn(2, 2, text + 17 * 23, 16, requires_grad=True) for _ in range(3)]
    inputs.append(torch.rand(factor, factor, requires_grad=True))
    expected = reference_attention.attention(*inputs[:3], grids, text, config, inputs[3])
    results = attend(inputs[:3], grids, text, config, inputs[3], backend=backend)
    directions = [torch.randn_like(x) for x in results]
    used = inputs[: 4 if factor > 1 else 3]
    for wanted in (1, 2):  # gradients of the output, then of the log-sum-exp too
        both = (torch.autograd.grad(x[:wanted], used, directions[:wanted], True) for x in (results, expected))
        for ours, dense_one in zip(*both, strict=True):
            torch.testing.assert_close(ours, dense_one, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("backend", hardware.BACKENDS)
def test_text_tokens_that_are_keys_alone(backend, factor, text_first):
    """Query and output have image tokens alone."""
    grids, text, config = [(9, 14), (5, 3)], 6, Clear(4, factor)
    layout = TokenLayout(grids, text, text_first=text_first, text_queries=False)
    plan, tokens = config.plan(layout), text + layout.image_tokens
    gradients = backend != "flex"  # it has none on a CPU
    qkv = [torch.randn(2, 2, tokens, 16, requires_grad=gradients) for _ in range(3)]
    weight, bias = torch.rand(factor, factor) / factor**2, torch.zeros(2, tokens)
    bias[1, 4:text] = -1000.0
    expected, expected_lse = reference_attention.attention(*qkv, grids, text, config, weight, bias=bias[:, None, None])
    image = text + layout.permutation
    into = torch.cat([torch.arange(text), image] if text_first else [image, torch.arange(text)])
    key, value = (x[:, :, into] for x in qkv[1:])
    pooled = tuple(pool(x[:, :, plan.image_keys], plan, weight) for x in (key, value)) if factor > 1 else None
    key_bias = torch.nn.functional.pad(bias[:, into], (0, plan.pooled_tokens))
    query, options = qkv[0][:, :, image], {"pooled": pooled, "key_bias": key_bias, "return_lse": True}
    results = clear_attention(query, key, value, plan, backend=backend, **options)
    results = [x[:, :, layout.inverse_permutation] for x in results]
    expected = expected[:, :, text:], expected_lse[:, :, text:]
    torch.testing.assert_close(results, list(expected), atol=1e-5, rtol=1e-6)
    if gradients:
        both = (torch.autograd.grad(x[0].square().sum() + x[1].sum(), qkv) for x in (results, expected))
        torch.testing.assert_close(*both, atol=2e-5, rtol=1e-5)


def test_operators_pass_opcheck():
    """Check shapes, strides and gradients, under compilation."""
    plan = Clear(4).plan(TokenLayout([(13, 20)], 0))  # without text: the operator leaves its rows to its caller
    for return_lse in (False, True):
        qkv = [torch.randn(1, 2, 260, 16, requires_grad=True) for _ in range(3)]
        torch.library.opcheck(tiled._tiled, (*qkv, list(plan.tiles), [0, 0], None, 0.25, return_lse))


@pytest.mark.parametrize("backend", hardware.BACKENDS)
def test_any_memory_layout(backend):
    plan = Clear(3).plan(TokenLayout([(9, 11)], 5))
    qkv = torch.randn(3, 1, 2, 16, 104).transpose(-1, -2).unbind()
    expected = clear_attention(*(x.contiguous() for x in qkv), plan, backend="reference", return_lse=True)
    results = clear_attention(*qkv, plan, backend=backend, return_lse=True)
    torch.testing.assert_close(results, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(clear_attention(*qkv, plan, backend=backend), expected[0], atol=1e-5, rtol=0)


def test_gradients_of_a_compiled_graph():
    plan = Clear(4).plan(TokenLayout([(13, 20)], 7))
    qkv = [torch.randn(1, 2, 267, 16, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(lambda *parts: clear_attention(*parts, plan).square().sum(), fullgraph=True)
    plan.tiles  # noqa: B018
    plain = torch.autograd.grad(clear_attention(*qkv, plan).square().sum(), qkv)
    for ours, expected in zip(torch.autograd.grad(compiled(*qkv), qkv), plain, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inside", [False, True])
def test_gradients_under_autocast(inside):
    plan = Clear(4).plan(TokenLayout([(13, 20)], 7))
    query, key, value = torch.randn(3, 1, 2, 267, 16).unbind()
    qkv = [
        query.requires_grad_(),
        key.requires_grad_(),
        value.bfloat16().requires_grad_(),
    ]  # query and key in float32, as after norms
    with torch.autocast("cpu", torch.bfloat16):
        output = clear_attention(*qkv, plan, backend="tiled")
        _, lse = clear_attention(*qkv, plan, backend="tiled", return_lse=True)
    assert output.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    exact = clear_attention(*(x.double() for x in qkv), plan, backend="reference")
    direction = torch.randn_like(exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        ours = torch.autograd.grad(output, qkv, direction.bfloat16())
    for gradient, expected, x in zip(ours, torch.autograd.grad(exact, qkv, direction), qkv, strict=True):
        assert gradient.dtype == x.dtype
        assert (gradient - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", hardware.BACKENDS)
def test_half_precision(backend, dtype):
    grids, config = [(17, 23)], Clear(5, 2)
    qkv = torch.randn(3, 1, 2, 20 + 17 * 23, 16).to(dtype).unbind()
    weight = torch.rand(2, 2) / 2
    expected, _ = reference_attention.attention(*(x.float() for x in qkv), grids, 20, config, weight)
    output, _ = (x.float() for x in attend_half(qkv, grids, config, weight, backend))
    assert (output - expected).abs().max() < 0.05


def attend_half(qkv, grids, config, weight, backend):
    layout = TokenLayout(grids, 20)
    plan = config.plan(layout)
    into = torch.cat([torch.arange(20), 20 + layout.permutation])
    query, key, value = (x[:, :, into] for x in qkv)
    pooled = tuple(pool(x[:, :, plan.image], plan, weight) for x in (key, value))
    output = clear_attention(query, key, value, plan, pooled=pooled, backend=backend)
    assert output.dtype == query.dtype
    return output[:, :, into.argsort()], output


def test_partial_results_merge_by_their_log_sum_exp():
    plan = Clear(5).plan(TokenLayout([(12, 20)], 10))
    query, key, value = torch.randn(3, 1, 2, 250, 16).unbind()
    whole = tiled.attend(query, key, value, plan, None, 0.25, False)[0][:, :, plan.image]
    bare = Clear(5).plan(TokenLayout([(12, 20)], 0))
    parts = [tiled.attend(query[:, :, 10:], key[:, :, 10:], value[:, :, 10:], bare, None, 0.25, True)]
    scores = query[:, :, 10:] @ key[:, :, :10].transpose(-1, -2) * 0.25
    parts.append((scores.softmax(-1) @ value[:, :, :10], scores.logsumexp(-1)))
    lse = torch.stack([part[1] for part in parts])
    shares = lse.softmax(dim=0)[..., None]
    merged = sum(share * part[0] for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(merged, whole, atol=1e-5, rtol=0)


def test_scale():
    qkv = torch.randn(3, 1, 2, 5 + 99, 16).unbind()
    expected, _ = reference_attention.attention(*qkv, [(9, 11)], 5, Clear(3), scale=0.7)
    for backend in hardware.BACKENDS:
        output, _ = attend(qkv, [(9, 11)], 5, Clear(3), None, backend=backend, scale=0.7)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_chunks_of_tiles_change_nothing(monkeypatch):
    qkv = torch.randn(3, 2, 2, 5 + 40 * 40, 16).unbind()
    whole, _ = attend(qkv, [(40, 40)], 5, Clear(4), None, backend="tiled")
    monkeypatch.setattr(tiled, "GATHERED_ELEMENTS_ON_CPU", 1)
    chunked, _ = attend(qkv, [(40, 40)], 5, Clear(4), None, backend="tiled")
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=0)


@hardware.needs_compiler
def test_flex_inside_an_outer_compiled_graph():
    plan = Clear(6).plan(TokenLayout([(24, 24)], 16))

    def block(x, scale):
        # Views with an offset, made inside the graph: FlexAttention alone computes these wrongly on a CPU.
        query, key, value = (x * scale).chunk(3, dim=-1)
        return clear_attention(query, key, value, plan, backend="flex") + 1

    x = torch.randn(1, 2, 16 + 576, 48)
    with torch.no_grad():
        expected = block(x, 1.5)
        compiled = torch.compile(block, fullgraph=True)(x, 1.5)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=0)


def check_double():
    grids, config = [(17, 23)], Clear(5)
    qkv = torch.randn(3, 1, 2, 20 + 17 * 23, 16, dtype=torch.float64).unbind()
    expected, _ = reference_attention.attention(*qkv, grids, 20, config)
    layout = TokenLayout(grids, 20)
    plan = config.plan(layout)
    into = torch.cat([torch.arange(20), 20 + layout.permutation])
    output = clear_attention(*(x[:, :, into] for x in qkv), plan)
    torch.testing.assert_close(output[:, :, into.argsort()], expected, atol=1e-10, rtol=0)


def test_flex_as_a_part_of_an_outer_graph(monkeypatch):
    """Check flex without its custom operator, as on a GPU."""
    monkeypatch.setitem(BACKENDS, "flex", BACKENDS["flex"]._replace(attend=flex.attend_directly))
    plan = Clear(6).plan(TokenLayout([(24, 24)], 16))
    plan.block_indices  # noqa: B018
    query, key, value = torch.randn(3, 1, 2, 16 + 576, 16).unbind()
    expected = clear_attention(query, key, value, plan, backend="reference")
    compiled = torch.compile(clear_attention, fullgraph=True, backend="eager")
    with torch.no_grad():
        output = compiled(query, key, value, plan, backend="flex")
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_the_log_sum_exp_under_autocast():
    plan = Clear(3).plan(TokenLayout([(9, 11)], 5))
    qkv = torch.randn(3, 1, 2, 5 + 99, 16).unbind()
    _, expected = clear_attention(*qkv, plan, backend="tiled", return_lse=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = clear_attention(*qkv, plan, backend="tiled", return_lse=True)
    assert torch.equal(lse, expected)


def test_gradients_of_pooled_keys_alone():
    plan = Clear(2, 2).plan(TokenLayout([(8, 8)], 2))
    qkv = torch.randn(3, 1, 1, 66, 16).unbind()
    pooled = tuple(torch.randn(2, 1, 1, 16, 16, requires_grad=True).unbind())
    clear_attention(*qkv, plan, pooled=pooled).sum().backward()
    with pytest.raises(RuntimeError, match="no gradients on a CPU"):
        clear_attention(*qkv, plan, pooled=pooled, backend="flex")


@pytest.mark.parametrize("backend", hardware.BACKENDS)
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("text_first", [True, False])
def test_a_bias_per_key_and_fewer_key_heads(backend, factor, text_first):
    """Compare with the rule: scores of grouped heads plus the bias, under the mask."""
    layout = TokenLayout([(9, 11)], 5, text_first=text_first)
    plan = Clear(3, factor).plan(layout)
    query, key, value = torch.randn(2, 4, 104, 16), torch.randn(2, 2, 104, 16), torch.randn(2, 2, 104, 16)
    bias = torch.randn(2, plan.key_tokens)
    bias[0, plan.text.start] = -1000.0  # hidden
    weight = torch.rand(factor, factor)
    pooled = tuple(pool(x[:, :, layout.image], plan, weight) for x in (key, value)) if factor > 1 else None
    grads = backend != "flex"
    inputs = [x.requires_grad_(grads) for x in (query, key, value)]
    output = clear_attention(*inputs, plan, pooled=pooled, key_bias=bias, backend=backend)

    keys, values = (
        torch.cat([x, *([p] if pooled else [])], 2).repeat_interleave(2, 1)
        for x, p in zip((key, value), pooled or (None, None), strict=True)
    )
    scores = query @ keys.mT / 4 + bias[:, None, None]
    mask = torch.ones(104, plan.key_tokens, dtype=torch.bool)
    mask[layout.image] = window_mask(plan.query, plan.key, plan.radius_sq)
    mask[layout.text, 104:] = False
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    if grads and pooled is None:
        direction = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad(x, inputs, direction) for x in (output, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


class TestRefusals:
    plan = Clear(2).plan(TokenLayout([(4, 4)], 2))
    qkv = torch.randn(3, 1, 1, 18, 8).unbind()

    def test_unknown_backend(self):
        with pytest.raises(ValueError, match=r"unknown backend 'fast'.* tiled"):
            clear_attention(*self.qkv, self.plan, backend="fast")

    def test_wrong_number_of_tokens(self):
        with pytest.raises(ValueError, match=r"key must be \[batch, heads, 18, head_dim\].*got \[1, 1, 17, 8\]"):
            clear_attention(self.qkv[0], self.qkv[1][:, :, 1:], self.qkv[2], self.plan)

    def test_a_head_dim_that_differs_from_the_query(self):
        with pytest.raises(ValueError, match=r"value must be .* shaped as the query.*got \[1, 1, 18, 4\]"):
            clear_attention(self.qkv[0], self.qkv[1], self.qkv[2][..., :4], self.plan)

    def test_key_heads_that_do_not_divide_the_query_heads(self):
        query, key, value = torch.randn(1, 3, 18, 8), torch.randn(1, 2, 18, 8), torch.randn(1, 2, 18, 8)
        with pytest.raises(ValueError, match="key has 2 heads, which do not divide the query's 3"):
            clear_attention(query, key, value, self.plan)

    def test_a_bias_of_another_shape(self):
        with pytest.raises(ValueError, match=r"key_bias must be \[batch, keys\], \[1, 18\], got \[1, 17\]"):
            clear_attention(*self.qkv, self.plan, key_bias=torch.zeros(1, 17))

    def test_pooled_keys_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"pooled must be None for .* down_factor 1, got shapes \[\(1, 1, 3, 8\)"):
            clear_attention(*self.qkv, self.plan, pooled=(self.qkv[0][:, :, :3],) * 2)
        with pytest.raises(ValueError, match=r"pooled must be two tensors of shape \[1, 1, 4, 8\] .* got shapes \[\]"):
            clear_attention(*self.qkv, Clear(2, 2).plan(TokenLayout([(4, 4)], 2)))

    def test_flex_with_gradients_on_a_cpu(self):
        qkv = [x.clone().requires_grad_() for x in self.qkv]
        with pytest.raises(RuntimeError, match="no gradients on a CPU; use backend='auto' or 'tiled'"):
            clear_attention(*qkv, self.plan, backend="flex")

    def test_dense_on_a_long_sequence(self):
        plan = Clear(2).plan(TokenLayout([(91, 91)], 0))
        qkv = torch.randn(3, 1, 1, 91 * 91, 8).unbind()
        with pytest.raises(ValueError, match=f"at most {dense.MAX_IMAGE_TOKENS} image tokens, got {91 * 91}"):
            clear_attention(*qkv, plan, backend="reference")


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Chip(NamedTuple):
    name: str
    shared_memory_per_block_optin: int


class TestAuto:
    def test_gives_the_reason(self):
        choice = select_backend(CPU, torch.float32, 64, needs_grad=True)
        assert choice.backend == "tiled"
        assert "no gradients on a CPU" in choice.reason

    def test_takes_the_fastest_measured_backend(self):
        choice = select_backend(CPU, torch.float32, 64, needs_grad=False)
        assert "benchmarks/results/auto-cpu-*.json" in choice.reason
        times = defaultdict(dict)
        for file in (Path(__file__).parents[2] / "benchmarks/results").glob("auto-cpu-*.json"):
            for row in json.loads(file.read_text()):
                if row["variant"] in ("flex", "tiled"):
                    times[file.name, row["height"], row["window"]][row["variant"]] = row["median_s"]
        assert len(times) == 24
        assert all(each[choice.backend] <= 1.1 * min(each.values()) for each in times.values())

    def test_falls_back_to_tiled_on_unknown_devices_and_warns_once(self, caplog):
        selection._warn_once.cache_clear()
        for _ in range(3):
            choice = select_backend(torch.device("mps"), torch.float16, 128, needs_grad=False)
        assert choice.backend == "tiled"
        assert ["mps" in record.message for record in caplog.records] == [True]

    def test_known_devices_get_no_warning(self, caplog):
        select_backend(CPU, torch.float32, 64, needs_grad=False)
        assert not caplog.records

    @pytest.mark.parametrize(
        ("triton", "hip", "memory", "backend", "reason"),
        [
            (True, None, 227, "flex", "blocks of keys"),
            (True, None, 99, "tiled", "RTX gives a kernel 99 KiB of shared memory"),
            (True, "7.0", 227, "tiled", "ROCm"),
            (False, None, 227, "tiled", "needs Triton"),
        ],
    )
    def test_on_a_gpu(self, monkeypatch, triton, hip, memory, backend, reason):
        flex._unsupported_device.cache_clear()
        monkeypatch.setattr(flex, "has_triton", lambda: triton)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Chip("RTX", memory * 1024))
        try:
            choice = select_backend(GPU, torch.bfloat16, 64, needs_grad=False)
        finally:
            flex._unsupported_device.cache_clear()
        assert choice.backend == backend
        assert reason in choice.reason

    def test_what_flex_cannot_do_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(flex, "unsupported_device", lambda device: None)
        for dtype, head_dim, needs_grad, reason in (
            (torch.bfloat16, 8, False, "head_dim below 16 on CUDA, got 8"),
            (torch.bfloat16, 64, True, "gradients"),
            (torch.float64, 64, False, "torch.float64"),
        ):
            choice = select_backend(GPU, dtype, head_dim, needs_grad)
            assert choice.backend == "tiled"
            assert reason in choice.reason

    def test_double_precision(self):
        check_double()

    def test_without_a_compiler(self, monkeypatch):
        flex._unsupported_device.cache_clear()
        monkeypatch.setenv("CXX", "no-such-compiler")
        try:
            reason = flex.unsupported_reason(CPU, torch.float32, 64, needs_grad=False)
        finally:
            flex._unsupported_device.cache_clear()
        assert "'no-such-compiler' was not found" in reason
