"""Each method against its rule written again, densely, for all pairs and in raster order."""

import dataclasses
import types

import pytest
import torch

from clear_attn import methods
from clear_attn.layout import TokenLayout

GRIDS = [(5, 7), (13, 9), (1, 1), (20, 3)]
LAYER = types.SimpleNamespace(heads=2, inner_dim=16)


def places(grid):
    return torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, 2)


def softmax(query, key, value, mask=True):
    """Of image queries to all keys, text first; the mask is of image tokens, or of what stands for them."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if mask is not True:
        seen[:, -mask.shape[1] :] = mask
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


def swin(method, number):
    def rule(query, key, value, grid, processor):
        move = number % 2 * (method.side - method.side // 2)
        window = (places(grid) + move) // method.side
        return softmax(query, key, value, (window[:, None] == window).all(-1))

    return rule


def strided(query, key, value, grid, processor):
    phase = places(grid) % processor.method.stride
    return softmax(query, key, value, (phase[:, None] == phase).all(-1))


CASES = [
    *((method, number, swin(method, number)) for method in (methods.Swin(4), methods.Swin(5)) for number in (0, 3)),
    (methods.Strided(3), 0, strided),
    (methods.Strided(), 0, strided),
]
each_case = pytest.mark.parametrize(("method", "number", "rule"), CASES, ids=[f"{m}-{n}" for m, n, _ in CASES])


def make(method, number=0, dtype=torch.float64):
    """A processor with random parameters."""
    processor = method.processor(LAYER, "layer", number)
    for parameter in processor.parameters():
        torch.nn.init.normal_(parameter)
    return processor.to(dtype)


def attend(processor, qkv, grid, text, text_first):
    """The image queries' rows of `processor.attend`, of raster-ordered, text-first query, key and value."""
    layout = TokenLayout([grid], text, processor.method, text_first=text_first)
    processor.method.prepare(layout)
    tokens = torch.arange(text + layout.image_tokens)
    image = tokens[text:][layout.order]
    into = torch.cat([tokens[:text], image] if text_first else [image, tokens[:text]])
    joint = processor.attend(*(x[:, :, into] for x in qkv), layout, "auto")
    return joint[:, into.argsort()][:, text:].unflatten(2, (2, 8)).transpose(1, 2)


def random_qkv(grid, text, dtype=torch.float64):
    return [torch.randn(2, 2, text + grid[0] * grid[1], 8, dtype=dtype, requires_grad=True) for _ in range(3)]


@each_case
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("text", "text_first"), [(0, True), (7, True), (7, False)])
def test_is_the_rule_with_gradients(method, number, rule, grid, text, text_first):
    processor, qkv = make(method, number), random_qkv(grid, text)
    output = attend(processor, qkv, grid, text, text_first)
    expected = rule(qkv[0][:, :, text:], *qkv[1:], grid, processor)
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
def test_bfloat16(method, number, rule):
    processor, qkv = make(method, number, torch.float32), random_qkv((13, 9), 7, torch.bfloat16)
    output = attend(processor, qkv, (13, 9), 7, True)
    assert output.dtype == torch.bfloat16
    wide = [x.float() for x in qkv]
    torch.testing.assert_close(
        output.float(), rule(wide[0][:, :, 7:], *wide[1:], (13, 9), processor), atol=0.05, rtol=0.05
    )


@each_case
def test_compiled(method, number, rule):
    processor, qkv = make(method, number, torch.float32), random_qkv((13, 9), 7, torch.float32)
    layout = TokenLayout([(13, 9)], 7, method)
    method.prepare(layout)
    torch.compiler.reset()
    compiled = torch.compile(processor.attend, backend="aot_eager", fullgraph=True)
    outputs = [call(*qkv, layout, "auto") for call in (compiled, processor.attend)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(x.square().sum(), qkv) for x in outputs]
    torch.testing.assert_close(*gradients)


def text_queries(text, image, inner):
    return 4 * text * (text + image) * inner


def layer_gflops(method):
    """At 1024 x 1024 pixels with 512 text tokens, as in table 2 of CLEAR's paper."""
    return (sum(method.work((64, 64), 512, 24, 128).values()) + text_queries(512, 4096, 3072)) / 1e9


# The paper's 67.7, to its last digit, takes what KV compression does to pool; the others are 67.65.
@pytest.mark.parametrize(("method", "gflops"), [(methods.Strided(), 67.65)], ids=str)
def test_work_of_the_table(method, gflops):
    assert layer_gflops(method) == pytest.approx(gflops, abs=0.01)


def test_work_of_swin_is_the_tables_where_windows_are_whole():
    method = methods.Swin()
    plain, moved = (4 * 3072 * method.window_pairs((64, 64), moved) / 1e9 for moved in (False, True))
    assert plain == pytest.approx(67.65 - 4 * 3072 * 512 * (4096 + 4608) / 1e9, abs=0.01)
    assert moved == pytest.approx(4 * 3072 * (2 * 8**2 + 3 * 16**2) ** 2 / 1e9)
    assert layer_gflops(method) == pytest.approx(67.65 - (plain - moved) / 2, abs=0.01)


@pytest.mark.parametrize("grid", [*GRIDS, (33, 40)], ids=str)
@pytest.mark.parametrize("method", [methods.Swin(4), methods.Swin(5), methods.Strided(3), methods.Strided(50)], ids=str)
def test_work_counts_visible_pairs(method, grid):
    layout = TokenLayout([grid], 0, method)
    method.prepare(layout)
    kinds = [
        sum(group.queries.numel() * group.keys.shape[1] for group in each.tiles.groups()) for each in layout.prepared
    ]
    own = [flops for name, flops in method.work(grid, 3, 2, 8).items() if "text" not in name]
    assert sum(own) == 4 * 16 * sum(kinds) // len(kinds)
    assert method.work(grid, 3, 2, 8)["image queries, text keys"] == 4 * 16 * 3 * grid[0] * grid[1]


@pytest.mark.parametrize(("method", "field"), [(methods.Swin, "side"), (methods.Strided, "stride")])
def test_settings(method, field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        method(**{field: 0})
    with pytest.raises(TypeError, match=f"{field} must be a whole number, got 2.5"):
        method(**{field: 2.5})
    other = dataclasses.replace(method(), **{field: 7})
    assert methods.named(other.settings()) == other


def test_one_picture_only():
    for method in (methods.Swin(), methods.Strided()):
        with pytest.raises(ValueError, match="attends in one picture, and this call brings 2"):
            method.prepare(TokenLayout([(4, 4), (3, 3)], 0, method))
