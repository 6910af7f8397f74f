"""Softmax attention over given keys, its log-sum-exp, its gradients, and merging two sets of keys."""

import pytest
import torch

from clear_attn.backends import softmax
from clear_attn.backends.softmax import expand_heads, merge_, softmax_attention, softmax_attention_backward, to_bias

SCALE = 0.3


def random_inputs(key_heads=4, dtype=torch.float64):
    shapes = (2, 4, 5, 8), (2, key_heads, 7, 8), (2, key_heads, 7, 8)
    query, key, value = (torch.randn(shape, dtype=dtype) for shape in shapes)
    mask = torch.rand(5, 7) < 0.6
    mask[:, 0] = True
    return query, key, value, mask, torch.randn(2, 1, 1, 7, dtype=dtype)


def expected(query, key, value, mask=None, bias=None):
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = SCALE * query @ key.mT
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("kernel", [True, False])
def test_output_and_log_sum_exp(key_heads, with_bias, with_mask, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(softmax, "has_lse_kernel", lambda query: False)
    query, key, value, mask, bias = random_inputs(key_heads, torch.float32)
    mask, bias = mask if with_mask else None, bias if with_bias else None
    output, lse = expected(query, key, value, mask, bias)
    alone, none = softmax_attention(query, key, value, mask, SCALE, False, bias)
    assert none is None
    torch.testing.assert_close(alone, output, atol=1e-5, rtol=0)
    both = softmax_attention(query, key, value, mask, SCALE, True, bias)
    torch.testing.assert_close(both, (output, lse), atol=1e-5, rtol=0)


def test_no_queries():
    query, key, value, *_ = random_inputs()
    output, lse = softmax_attention(query[:, :, :0], key, value, None, SCALE, True)
    assert (output.shape, lse.shape) == ((2, 4, 0, 8), (2, 4, 0))


def test_the_log_sum_exp_of_half_precision_is_float32():
    query, key, value, mask, _ = random_inputs(dtype=torch.float32)
    half = [x.bfloat16() for x in (query, key, value)]
    output, lse = softmax_attention(*half, mask, SCALE, True)
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(lse, expected(*(x.float() for x in half), mask)[1], atol=1e-2, rtol=0)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_lse", [False, True])
def test_gradients_equal_autograd(key_heads, with_bias, with_lse):
    *qkv, mask, bias = random_inputs(key_heads)
    bias = bias if with_bias else None
    inputs = [x.requires_grad_() for x in qkv]
    output, lse = expected(*inputs, mask, bias)
    grad, lse_grad = torch.randn_like(output), torch.randn_like(lse)
    loss = (output * grad).sum() + ((lse * lse_grad).sum() if with_lse else 0)
    found = softmax_attention_backward(grad, lse_grad if with_lse else None, *qkv, mask, SCALE, bias)
    torch.testing.assert_close(found, torch.autograd.grad(loss, inputs))


def test_results_of_two_sets_of_keys_merge():
    query, key, value, mask, _ = random_inputs()
    mask[:, 4] = True
    parts = [expected(query, key[:, :, s], value[:, :, s], mask[:, s]) for s in (slice(4), slice(4, None))]
    (output, lse), other = parts
    merge_(output, lse, *other)
    torch.testing.assert_close((output, lse), expected(query, key, value, mask))


def test_key_heads_are_repeated_for_their_group():
    query, key = torch.zeros(1, 4, 1, 1), torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    assert expand_heads(query, key)[0].flatten().tolist() == [1, 1, 2, 2]
    assert expand_heads(query, query)[0] is query


def test_a_mask_as_a_bias():
    mask, bias = torch.tensor([[True, False]]), torch.tensor([[1.5], [2.5]])
    assert to_bias(mask, None, torch.float32).tolist() == [[0, -torch.inf]]
    assert to_bias(mask, bias, torch.float32).tolist() == [[1.5, -torch.inf], [2.5, -torch.inf]]
