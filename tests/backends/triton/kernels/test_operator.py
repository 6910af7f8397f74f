import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from clear_attn import TokenLayout, clear_attention, methods
from clear_attn.backends import triton
from clear_attn.backends.selection import BACKENDS
from clear_attn.backends.triton import operator
from clear_attn.core.coordinates import select_rows
from clear_attn.core.region import AttentionRegion
from tests.backends.triton.kernels.cases import DEVICE, EXACT, TOLERANCE, distance

SCALE = 0.25


def plan_of(grid, text=7, window=4):
    return methods.Clear(window).plan(TokenLayout([grid], text, device=DEVICE))


def random_inputs(tokens, dtype=torch.float16, heads=1, head_dim=16):
    return [torch.randn(1, heads, tokens, head_dim, dtype=dtype, device=DEVICE).requires_grad_() for _ in range(3)]


def test_opcheck():
    plan = plan_of((5, 9))
    lists = list(plan.key_lists)
    sizes = [7, 45, 7, 45, 0]
    arguments = *random_inputs(52, EXACT), None, lists, lists, sizes, 45, -7, SCALE
    torch.library.opcheck(torch.ops.clear_attn.triton, arguments)


def test_derivatives_beyond_a_backward_pass_are_refused():
    plan = plan_of((5, 9))

    def attend(*tensors):
        return clear_attention(*tensors, plan, backend="triton")

    inputs = random_inputs(52)
    with pytest.raises(RuntimeError, match="neither forward-mode derivatives nor transforms"):
        torch.func.jvp(attend, tuple(x.detach() for x in inputs), tuple(torch.randn_like(x) for x in inputs))
    (gradient,) = torch.autograd.grad(attend(*inputs).float().square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='triton' has no second derivatives"):
        gradient.float().square().sum().backward()


def test_one_compiled_graph_serves_all_sizes():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def attend(query, key, value, plan):
        return clear_attention(query, key, value, plan, backend="triton") + 1

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for grid in [(5, 9), (11, 20), (9, 18), (13, 12)]:
        plan = plan_of(grid)
        BACKENDS["triton"].prepare(plan)
        qkv = random_inputs(plan.tokens)
        assert torch.equal(compiled(*qkv, plan), attend(*qkv, plan))
    assert len(graphs) <= 2


def test_gradients_through_a_compiled_graph():
    plan = plan_of((5, 9))
    BACKENDS["triton"].prepare(plan)
    qkv = random_inputs(plan.tokens)

    def attend(query, key, value):
        return (clear_attention(query * 2, key, value, plan, backend="triton").float() ** 2).sum()

    expected = torch.autograd.grad(attend(*qkv), qkv)
    compiled = torch.autograd.grad(torch.compile(attend, fullgraph=True, backend="aot_eager")(*qkv), qkv)
    assert all(distance(a, b) < 2e-3 for a, b in zip(compiled, expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    plan = plan_of((5, 9))
    qkv = random_inputs(plan.tokens)

    def attend(query, key, value):
        return clear_attention(query, key, value, plan, backend="triton").float().square()

    expected = torch.autograd.grad(attend(*qkv).sum(), qkv)
    for x in qkv:
        x.grad = None
    checkpoint(attend, *qkv, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(x.grad, b) for x, b in zip(qkv, expected, strict=True))


@pytest.mark.parametrize(("before", "after"), [(0, 70), (67, 3)])
def test_a_region_of_local_queries_with_a_halo(before, after):
    layout = TokenLayout([(24, 11), (12, 6)], 0)
    queries = select_rows(layout.segments, [slice(8, 16), slice(4, 8)])
    keys = select_rows(layout.segments, [slice(3, 21), slice(1, 11)])
    tokens = len(queries.y)
    region = AttentionRegion(queries, keys, before, after, tokens, slice(0, tokens), 5, DEVICE)
    lengths, results = (tokens, region.key_tokens, region.key_tokens), []
    qkv = [torch.randn(1, 1, length, 16, dtype=EXACT, device=DEVICE) for length in lengths]
    for name, dtype in (("triton", EXACT), ("reference", torch.float64)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in qkv]
        output, lse = BACKENDS[name].attend(*leaves, region, None, SCALE, True)
        loss = output.double().square().sum() + lse.double().sum()
        results.append([output, lse, *torch.autograd.grad(loss, leaves)])
    assert max(distance(a, b) for a, b in zip(*results, strict=True)) < TOLERANCE[EXACT]


@pytest.mark.parametrize(
    "method", [methods.Swin(8), methods.Swin(7).for_layer(1), methods.Strided(2), methods.Strided(3)], ids=str
)
@pytest.mark.parametrize("text_queries", [True, False])
def test_partitions(method, text_queries):
    layout = TokenLayout([(18, 21)], 66, device=DEVICE, text_queries=text_queries)
    plan = method.plan(layout)
    label = plan._label
    mask = torch.from_numpy(np.equal.outer(label, label))
    qkv = random_inputs(layout.tokens, EXACT)
    output, _ = triton.attend(qkv[0][:, :, -plan.tokens :], *qkv[1:], plan, None, SCALE, False)
    query, key, value = (x.double().cpu() for x in qkv)
    scores = query[:, :, layout.image_keys] @ key.mT * SCALE
    allowed = torch.nn.functional.pad(mask, (66, 0), value=True)
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value
    image = output[:, :, plan.image]
    assert distance(image, expected) < TOLERANCE[EXACT]
    gradients = [torch.autograd.grad(x.double().square().sum(), qkv) for x in (image, expected)]
    assert max(distance(a, b) for a, b in zip(*gradients, strict=True)) < TOLERANCE[EXACT]


def test_offsets_beyond_32_bits(tmp_path):
    grid, tokens, row = (4, 10), 40, 2**26
    plan = plan_of(grid, text=0)
    storage = (
        torch.from_file(str(tmp_path / "sparse"), shared=True, size=tokens * row, dtype=torch.float16)
        if DEVICE.type == "cpu"
        else torch.empty(tokens * row, dtype=torch.float16, device=DEVICE)
    )
    far = storage.view(1, 1, tokens, row)[..., :16]
    qkv = [x.detach() for x in random_inputs(tokens)]
    expected = clear_attention(*qkv, plan, backend="triton")
    for number in range(3):
        far.copy_(qkv[number])
        changed = [far if each == number else x for each, x in enumerate(qkv)]
        assert torch.equal(clear_attention(*changed, plan, backend="triton"), expected)


def test_autocast_computes_in_half_precision():
    plan = plan_of((5, 9), text=0)
    qkv = [x.detach() for x in random_inputs(45, torch.float32)]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output = clear_attention(*qkv, plan, backend="triton")
    assert output.dtype == torch.bfloat16
    expected = clear_attention(*(x.bfloat16() for x in qkv), plan, backend="triton")
    assert torch.equal(output, expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("dtype", "head_dim", "reason"),
        [
            (torch.float32, 16, "takes bfloat16 and float16, got float32; use backend='auto' or 'tiled'"),
            (torch.float16, 20, "a multiple of 16 up to 256, got 20"),
            (torch.float16, 272, "a multiple of 16 up to 256, got 272"),
        ],
    )
    def test_what_the_kernels_do_not_take(self, dtype, head_dim, reason):
        qkv = random_inputs(52, dtype, head_dim=head_dim)
        with pytest.raises(RuntimeError, match=reason):
            clear_attention(*qkv, plan_of((5, 9)), backend="triton")

    def test_a_kernel_that_fails_names_architecture_and_configuration(self, monkeypatch):
        class Broken:
            def __getattr__(self, name):
                raise MemoryError("out of resource: shared memory")

        monkeypatch.setattr(operator, "load_kernels", Broken)
        match = "'forward' failed on sm_90 with 128x64, 8 warps, 2 stages, 128 registers, head_dim 16: out of resource"
        with pytest.raises(RuntimeError, match=match):
            clear_attention(*random_inputs(52), plan_of((5, 9)), backend="triton")
