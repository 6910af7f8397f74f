"""Each method compared with its rule, written densely for all pairs in raster order."""

import dataclasses
import math
import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from clear_attn import methods
from clear_attn.core.layout import TokenLayout
from clear_attn.methods import groups
from clear_attn.methods import sigmoid as sigmoid_of
from clear_attn.methods.records import method_from_dict
from clear_attn.models.processors.processor import ClearAttnProcessor
from tests.helpers.method_rules import RULES

GRIDS = [(5, 7), (13, 9), (1, 1), (20, 3)]


def dense(query, key, value, scale, bias):
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


CASES = [
    (methods.LiT(1, 0), 0),
    (methods.LiT(None, 3), 0),
    (methods.LiT(1), 0),
    *((method, number) for method in (methods.Swin(4), methods.Swin(5)) for number in (0, 3)),
    (methods.Strided(3), 0),
    (methods.Strided(), 0),
    (methods.KVCompression(3), 0),
    (methods.KVCompression(), 0),
    (methods.Agent(3), 0),
    (methods.Agent(), 0),
    (methods.Sigmoid(), 0),
]
each_case = pytest.mark.parametrize(("method", "number"), CASES, ids=[f"{m}-{n}" for m, n in CASES])


def make(method, number=0, dtype=torch.float64):
    """Return a processor with random parameters."""
    processor = ClearAttnProcessor(None, method, methods.Layer("layer", number, True, 2, 8))
    for parameter in processor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return processor.to(dtype)


def run(processor, qkv, plan, bias=None):
    """Attend from all queries, as a context does."""
    method = processor.method.for_layer(processor.layer.number)
    options = methods.Options(qkv[0].shape[-1] ** -0.5, "auto", dense, methods.ScoreBias.on_plan(plan, bias))
    return method.attend(*qkv, plan, list(processor.parameters()), options)


def attend(processor, qkv, grid, text, text_first, bias=None):
    """Return attention of the image queries, for query, key and value in raster order, text first."""
    layout = TokenLayout([grid], text, text_first=text_first)
    plan = processor.method.for_layer(processor.layer.number).plan(layout)
    tokens = torch.arange(text + layout.image_tokens)
    image = tokens[text:][layout.permutation]
    into = torch.cat([tokens[:text], image] if text_first else [image, tokens[:text]])
    joint = run(processor, [x[:, :, into] for x in qkv], plan, bias)
    return joint[:, :, into.argsort()][:, :, text:]


def random_qkv(grid, text, dtype=torch.float64):
    return [torch.randn(2, 2, text + grid[0] * grid[1], 8, dtype=dtype, requires_grad=True) for _ in range(3)]


@each_case
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("text", "text_first"), [(0, True), (7, True), (7, False)])
def test_equals_the_rule_with_gradients(method, number, grid, text, text_first):
    processor, qkv = make(method, number), random_qkv(grid, text)
    output = attend(processor, qkv, grid, text, text_first)
    expected = RULES[type(method)](method, number)(qkv[0][:, :, text:], *qkv[1:], grid, processor)
    torch.testing.assert_close(output, expected)
    inputs, weight = [*qkv, *processor.parameters()], torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((x * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        for x in (output, expected)
    ]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(attend(processor, qkv, grid, text, text_first), expected)


@each_case
@pytest.mark.parametrize("text_first", [True, False])
def test_text_tokens_that_are_keys_alone(method, number, text_first):
    """Query and output have image tokens alone."""
    grid, text = (13, 9), 7
    processor, qkv = make(method, number), random_qkv(grid, text)
    layout = TokenLayout([grid], text, text_first=text_first, text_queries=False)
    plan = method.for_layer(number).plan(layout)
    image = text + layout.permutation
    into = torch.cat([torch.arange(text), image] if text_first else [image, torch.arange(text)])
    output = run(processor, [qkv[0][:, :, image], *(x[:, :, into] for x in qkv[1:])], plan)
    output = output[:, :, layout.inverse_permutation]
    expected = RULES[type(method)](method, number)(qkv[0][:, :, text:], *qkv[1:], grid, processor)
    torch.testing.assert_close(output, expected)
    inputs, weight = [*qkv, *processor.parameters()], torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((x * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        for x in (output, expected)
    ]
    torch.testing.assert_close(*gradients)


@each_case
def test_in_chunks(method, number, monkeypatch):
    monkeypatch.setattr(groups, "QUERIES_AT_A_TIME", 4)
    monkeypatch.setattr(sigmoid_of, "MAX_SCORES", 2000)
    test_equals_the_rule_with_gradients(method, number, (13, 9), 7, True)


@each_case
def test_bfloat16(method, number):
    processor, qkv = make(method, number, torch.float32), random_qkv((13, 9), 7, torch.bfloat16)
    output = attend(processor, qkv, (13, 9), 7, True)
    assert output.dtype == torch.bfloat16
    wide = [x.float() for x in qkv]
    expected = RULES[type(method)](method, number)(wide[0][:, :, 7:], *wide[1:], (13, 9), processor)
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("method", {type(method): method for method, _ in CASES}.values(), ids=repr)
def test_compiled(method):
    processor, qkv = make(method, 0, torch.float32), random_qkv((13, 9), 7, torch.float32)
    plan = method.plan(TokenLayout([(13, 9)], 7))
    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    outputs = [call(processor, qkv, plan) for call in (compiled, run)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(x.square().sum(), qkv) for x in outputs]
    torch.testing.assert_close(*gradients)


@each_case
@pytest.mark.parametrize("text_first", [True, False])
def test_hidden_text_keys_have_no_effect(method, number, text_first):
    processor, (query, key, value) = make(method, number), random_qkv((5, 7), 7)
    bias = torch.zeros(2, 7, dtype=torch.float64)
    bias[:, 5:] = -1000.0
    qkv = query, key, value
    if not method.supports_bias:
        with pytest.raises(RuntimeError, match="does not support padded text"):
            attend(processor, qkv, (5, 7), 7, text_first, bias)
        return
    kept = [x[:, :, [*range(5), *range(7, 42)]] for x in qkv]
    output = attend(processor, qkv, (5, 7), 7, text_first, bias)
    if isinstance(method, methods.Sigmoid):  # which counts all keys, hidden or not
        scores = query[:, :, 7:] @ kept[1].mT / 8**0.5 - math.log(42)
        expected = scores.sigmoid() @ kept[2]
    else:
        expected = attend(processor, kept, (5, 7), 5, text_first)
    torch.testing.assert_close(output, expected)


@each_case
@pytest.mark.parametrize("text_first", [True, False])
def test_a_bias_of_text_keys_equals_the_rule(method, number, text_first):
    if not method.supports_bias:
        pytest.skip("the method refuses a bias, which the test above checks")
    processor, qkv = make(method, number), random_qkv((5, 7), 7)
    bias = torch.randn(2, 7, dtype=torch.float64)
    output = attend(processor, qkv, (5, 7), 7, text_first, bias)
    rule = RULES[type(method)](method, number)
    expected = rule(qkv[0][:, :, 7:], *qkv[1:], (5, 7), processor, bias[:, None, None])
    torch.testing.assert_close(output, expected)
    weight, inputs = torch.randn_like(expected), [*qkv, *processor.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad((x * weight).sum(), inputs) for x in (output, expected)))


@each_case
def test_fewer_key_heads_than_query_heads(method, number):
    processor, (query, key, value) = make(method, number), random_qkv((5, 7), 3)
    few = key[:, :1], value[:, :1]
    output = attend(processor, (query, *few), (5, 7), 3, True)
    expected = attend(processor, (query, *(x.expand(-1, 2, -1, -1) for x in few)), (5, 7), 3, True)
    torch.testing.assert_close(output, expected)


def text_queries(text, image, inner):
    return 4 * text * (text + image) * inner


def layer_gflops(method):
    """Return the GFLOPs of a layer at 1024 x 1024 pixels with 512 text tokens, as in table 2 of CLEAR's paper."""
    return (sum(method.flops((64, 64), 512, 24, 128).values()) + text_queries(512, 4096, 3072)) / 1e9


# The paper has 67.7 for three of them: 67.65 are attention, the rest is compression.
TABLE = {
    methods.KVCompression(): 67.70,
    methods.Agent(): 80.54,
    methods.Strided(): 67.65,
    methods.Swin(): 67.65,  # in layers without shifted windows
    methods.Sigmoid(): 260.92,
}


@pytest.mark.parametrize(("method", "gflops"), TABLE.items(), ids=str)
def test_flops_of_the_papers_table(method, gflops):
    assert layer_gflops(method) == pytest.approx(gflops, abs=0.01)


def test_flops_of_linear_attention_in_the_papers_table():
    linear = methods.LiT(heads=1, kernel_size=0).flops((64, 64), 512, 24, 128)
    assert sum(linear.values()) + 2 * 512 * 3072**2 == 4 * 4608 * 3072**2 == pytest.approx(174.0e9, abs=0.06e9)


@pytest.mark.parametrize("grid", [*GRIDS, (33, 40), (32, 32)], ids=str)
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("method", [methods.Swin(4), methods.Swin(5), methods.Strided(3), methods.Strided(50)], ids=str)
def test_flops_count_pairs(method, number, grid):
    rule = RULES[type(method)](method, number)
    key = torch.eye(grid[0] * grid[1], dtype=torch.float64)[None, None]
    processor = types.SimpleNamespace(method=method)
    weights = rule(torch.zeros_like(key), torch.zeros_like(key), key, grid, processor)
    counted = method.for_layer(number).flops(grid, 3, 2, 8)
    assert sum(flops for name, flops in counted.items() if "text" not in name) == 4 * 16 * int((weights > 0).sum())
    assert counted["image queries, text keys"] == 4 * 16 * 3 * grid[0] * grid[1]


FIELDS = [
    (methods.Swin, "side"),
    (methods.Strided, "stride"),
    (methods.KVCompression, "factor"),
    (methods.Agent, "factor"),
]


@pytest.mark.parametrize(("method", "field"), FIELDS)
def test_settings(method, field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        method(**{field: 0})
    with pytest.raises(TypeError, match=f"{field} must be a whole number, got 2.5"):
        method(**{field: 2.5})
    other = dataclasses.replace(method(), **{field: 7})
    assert method_from_dict(other.to_dict()) == other


def test_a_convolution_has_an_odd_side():
    with pytest.raises(ValueError, match="kernel_size must be odd, or 0 for no convolution, got 4"):
        methods.LiT(kernel_size=4)


def test_one_image_only():
    layout = TokenLayout([(4, 4), (3, 3)], 0)
    for method in (method for method, *_ in CASES if not method.supports_segments):
        with pytest.raises(ValueError, match="attends in one image, and this call has 2"):
            method.plan(layout)
