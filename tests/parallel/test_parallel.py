"""Shards of an image without processes; on several processes, the results of one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import clear_attn as clear
from clear_attn import TokenLayout
from clear_attn.core.layout import Images
from clear_attn.core.window_mask import window_mask
from clear_attn.parallel import weights_digest
from clear_attn.parallel.communication_volume import count_volume
from clear_attn.parallel.shard import TILE_ROW, Shard, ShardPlan, halo_from, tokens_of
from clear_attn.parallel.weights_digest import digest_of
from tests.helpers import dummy_models, families, hardware, reference_attention
from tests.helpers.workers import once_in_all_workers


@st.composite
def cases(draw):
    """Return a layout, a method and a number of ranks."""
    ranks = draw(st.integers(1, 5), "ranks")
    height = draw(st.integers(TILE_ROW * (ranks - 1) + 1, TILE_ROW * (ranks + 2)), "height")
    others = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=1), "other grids")
    grids = [(height, draw(st.integers(1, 12), "width")), *others]
    clear_method = clear.methods.Clear(draw(st.integers(1, 20), "window"), draw(st.integers(1, 5), "down_factor"))
    method = draw(st.sampled_from([clear_method, clear.methods.Dense()]))
    layout = TokenLayout(grids, draw(st.integers(0, 3), "text"))
    images = draw(st.sampled_from([Images(), Images(0, 1), Images(1)]), "images")
    return layout.of_images(images) or layout, method, ranks


def plan_of(shard, method):
    return ShardPlan(shard, method.halo(), method.pooled_factor or 1)


@given(cases())
def test_shards_hold_all_tokens_once_and_attend_in_the_window(case):
    layout, method, ranks = case
    shards = [Shard(layout, rank, ranks) for rank in range(ranks)]
    plans = [plan_of(shard, method) for shard in shards]
    permutation = torch.cat([shard.permutation for shard in shards])
    assert torch.equal(permutation[shards[0].inverse_permutation], torch.arange(layout.image_tokens))
    expected = reference_attention.window_mask(layout.grids, method.halo(), layout.unit)
    for shard, plan in zip(shards, plans, strict=True):
        assert torch.equal(layout.permutation[shard.in_whole], shard.permutation)
        assert shard.counts[shard.rank] == shard.image_tokens
        assert torch.equal(shard.without_text.inverse_permutation, shard.inverse_permutation)
        received = [shards[peer].permutation[_to(plans[peer], shard.rank)] for peer, _ in plan.receives]
        raster = torch.cat([shard.permutation, *received])
        attended = torch.zeros(shard.image_tokens, layout.image_tokens, dtype=torch.bool)
        for strip in plan.strips:
            keys = len(strip.image_keys)
            assert (strip.image_keys >= 0).all()
            assert strip.needs_halo or (strip.image_keys < shard.image_tokens).all()
            mask = window_mask(strip.query, strip.key, strip.radius_sq)
            assert mask[:, keys:].all()
            attended[strip.queries[:, None], raster[strip.image_keys]] = mask[:, :keys]
        assert torch.equal(attended, expected[shard.permutation])


def _to(plan, rank):
    return next(message.tokens for message in plan.sends if message.peer == rank)


@given(cases())
def test_parts_of_pooled_cells_add_up(case):
    layout, method, ranks = case
    whole = clear.methods.Clear(5, method.pooled_factor or 1).plan(layout)
    values = torch.randn(layout.image_tokens, dtype=torch.float64)  # in raster order
    total = torch.zeros(whole.pooled_tokens, dtype=torch.float64)
    for rank in range(ranks):
        shard = Shard(layout, rank, ranks)
        plan = plan_of(shard, method)
        parts = (values[shard.permutation][plan.pool_index] * plan.pool_weight).sum(dim=1)
        total.index_add_(0, plan.cells[rank], parts)
    expected = (values[layout.permutation][whole.pool_index] * whole.pool_weight).sum(dim=1)
    torch.testing.assert_close(total, expected, atol=1e-6, rtol=0)


def test_shards_have_similar_sizes():
    layout = TokenLayout([(8 * 11 - 1, 3)], 0)
    rows = [len(tokens_of(layout, rank, 4)) // 3 for rank in range(4)]
    assert rows == [16, 24, 24, 23]


def test_a_halo_does_not_grow_with_the_height():
    halos = [
        [len(halo_from(TokenLayout([(height, 24)], 0), 2, rank, 4, 8)) for rank in (0, 1, 3)]
        for height in (64, 128, 512)
    ]
    assert halos == [[0, 7 * 24, 7 * 24]] * 3


def test_pooled_keys_grow_with_the_image():
    of = {
        height: count_volume(
            TokenLayout([(height, 24)], 5), clear.methods.Clear(8, 4), 1, 4, heads=4, head_dim=8, element=2
        )
        for height in (64, 128)
    }
    assert of[64].halo == of[128].halo == 2 * 2 * 7 * 24 * 2 * 32
    assert (of[64].pooled, of[128].pooled) == (3 * 2 * 4 * 6 * 64, 3 * 2 * 8 * 6 * 64)
    assert of[64].ring == 2 * 3 * (5 + 64 * 24) * 64 // 4
    assert of[64].all_to_all == 4 * 3 * (5 + 64 * 24) * 64 // 16


def test_too_many_ranks():
    with pytest.raises(ValueError, match="4 ranks are too many for an image of 24 x 9 tokens, which has 3 tile rows"):
        Shard(TokenLayout([(24, 9)], 2), 0, 4)


def test_without_torchrun(pipe):
    clear.linearize(pipe, 4, weights=None)
    with pytest.raises(RuntimeError, match="start the script with torchrun"):
        clear.parallelize(pipe)


def _run(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, env=environment)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran


CHECKS = {
    2: ["equal", "bytes_are_counted", "differing_calls", "differing_weights", "weights_are_read_once", "refusals"],
}
SLOW_CHECKS = {
    1: ["equal"],
    2: [
        "equal_in_all_families",
        "equal_with_cached_keys",
        *(["equal_with_flex"] if "flex" in hardware.BACKENDS else []),
        "compiled",
        "pipelines",
        "all_kinds_of_pipelines",
        "decoding",
        "cascade",
        "cascade_of_a_modular_pipeline",
        "too_many_ranks_for_a_stage",
    ],
    3: ["equal", "bytes_are_counted", "differing_calls"],
    4: ["equal", "data_and_rows", "memory_is_shared"],
}
# The models of checks, where the oldest supported diffusers lacks them.
MODELS = {"equal_with_cached_keys": "qwen21", "decoding": "qwen", "cascade_of_a_modular_pipeline": "flux3"}
# Each has its own processes, which it breaks.
STOPPED = ["a_rank_dies"]
SLOW_STOPPED = ["a_rank_hangs", "a_rank_never_calls"]


def _has_model(check):
    return MODELS.get(check, "flux") in families.FAMILIES


def _run_checks(checks, stopped):
    """Run checks on ranks, with one start of the processes, and return their output and errors."""
    present = {ranks: [name for name in names if _has_model(name)] for ranks, names in checks.items()}
    jobs = [f"{ranks}:{','.join(names)}" for ranks, names in present.items()]
    ran = _run(sys.executable, "-m", "tests.helpers.rank_checks", *jobs, *(f"3:{check}" for check in stopped))
    return ran.stdout, ran.stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return once_in_all_workers(tmp_path_factory, "rank_checks", lambda: _run_checks(CHECKS, STOPPED))


@pytest.fixture(scope="module")
def ran_slow(tmp_path_factory):
    return once_in_all_workers(tmp_path_factory, "slow_rank_checks", lambda: _run_checks(SLOW_CHECKS, SLOW_STOPPED))


def _each(checks):
    return pytest.mark.parametrize(
        ("ranks", "check"),
        [
            pytest.param(ranks, check, marks=families.needs(MODELS.get(check, "flux")))
            for ranks, names in checks.items()
            for check in names
        ],
    )


@_each(CHECKS)
def test_on_ranks(ran, ranks, check):
    output, errors = ran
    assert f"{check} on {ranks}: " in output, errors[-6000:]


@pytest.mark.slow
@_each(SLOW_CHECKS)
def test_more_on_ranks(ran_slow, ranks, check):
    output, errors = ran_slow
    assert f"{check} on {ranks}: " in output, errors[-6000:]


@pytest.mark.parametrize("check", STOPPED)
def test_a_rank_that_dies_is_named(ran, check):
    output, errors = ran
    assert output.count(f"{check}: rank 1 was named") == 2, errors[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("check", SLOW_STOPPED)
def test_a_rank_that_does_not_answer_is_named(ran_slow, check):
    output, errors = ran_slow
    assert output.count(f"{check}: rank 1 was named") == 2, errors[-6000:]


@pytest.mark.slow
def test_a_rank_that_comes_late_says_so(ran_slow):
    output, errors = ran_slow
    assert "a_rank_hangs: rank 1 came late" in output, errors[-6000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
def test_a_digest_changes_with_every_value(dtype):
    """Also with two signs, and with the order of spans."""
    tensor = (torch.randn(2 * weights_digest.SPAN * 8 // dtype.itemsize + 3) * 50).to(dtype)
    digest = digest_of(tensor)
    assert digest == digest_of(tensor.clone()) == digest_of(torch.cat([tensor[:1], tensor])[1:])
    for where in (0, 12345, len(tensor) - 1):
        other = tensor.clone()
        bits = other.view(torch.uint8)
        bits[where * dtype.itemsize] ^= 1
        assert digest_of(other) != digest, where
        bits[(where + 1) * dtype.itemsize - 1] ^= 128
        bits[5 * dtype.itemsize - 1] ^= 128
        assert digest_of(other) != digest, where
    assert digest_of(tensor.roll(weights_digest.SPAN * 8 // dtype.itemsize)) != digest


def test_only_changed_weights_are_read_again(monkeypatch):
    transformer, reads = dummy_models.flux_transformer(), []
    monkeypatch.setattr(weights_digest, "digest_of", lambda tensor: reads.append(tensor) or str(len(reads)))
    weights = weights_digest.WeightsDigest()
    lines = weights.lines(transformer)
    tensors = [*transformer.parameters(), *transformer.buffers()]
    assert len(reads) == len(tensors)
    transformer.to("cpu")
    assert weights.lines(transformer) == lines
    assert len(reads) == len(tensors)
    with torch.no_grad():
        transformer.proj_out.weight.add_(1)
    assert weights.lines(transformer) != lines
    assert len(reads) == len(tensors) + 1
    transformer.proj_out.bias = torch.nn.Parameter(transformer.proj_out.bias.detach())
    weights.lines(transformer)
    assert len(reads) == len(tensors) + 2


@pytest.mark.slow
def test_generate_under_torchrun(flux_folder, tmp_path):
    options = ("--prompt", "a red circle", "--height", 192, "--width", 128, "--window", 4, "--weights", "none")
    options = (*options, "--seed", 3, "--max-sequence-length", 24, "--steps", 2, "--strength", 0.5, "--device", "cpu")
    start = tmp_path / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 64, 3)).astype(np.uint8)).save(start)
    options = ("-m", "clear_attn", "generate", "--model", flux_folder, *options, "--init-image", start)
    _run(sys.executable, *options, "--output", tmp_path / "one.png")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    output = _run(*torchrun, *options, "--output", tmp_path / "two.png").stdout
    assert output.count("Saved") == 1
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "two.png"))
    assert np.abs(one - two).max() <= 1
