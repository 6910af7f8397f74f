import errno
import json
import os

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.attention.flex_attention import create_block_mask
from typer.testing import CliRunner

from clear_attn.backends.selection import BACKENDS, flex
from clear_attn.methods import Clear
from clear_attn.profiling.cost_report import Cost
from clear_attn.tools.bench import bench_command, measure, raster, runner
from clear_attn.tools.bench import model_level as model
from clear_attn.tools.bench.case import Case
from clear_attn.tools.bench.measure import Subject
from clear_attn.tools.cli import app
from tests.helpers import hardware, reference_attention

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--heads", "2", "--head-dim", "32", "--text", "9", "--runs", "2"]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Return a function that runs the command and returns its result and its rows."""
    monkeypatch.setattr(runner, "MATMUL", {"cpu": (64, 3)})

    def call(*options, expected=0):
        path = tmp_path / "rows.json"
        result = CliRunner().invoke(app, ["bench", *SMALL, *options, "--json", str(path)])
        assert result.exit_code == expected, result.output
        return result, json.loads(path.read_text()) if path.exists() else None

    return call


@hardware.needs_compiler
def test_one_operation(bench):
    result, rows = bench("--grid", "12x17", "--grid", "20x20", "--window", "5")
    assert [row["variant"] for row in rows] == ["dense", "raster-flex", "flex", "tiled"] * 2
    for row in rows:
        assert row["error"] < 1e-5
        assert row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["peak_bytes"] > 0
        assert not row["extrapolated"]
        cost = Cost.of_layer((row["height"], row["width"]), 9, 1, 64, Clear(5))
        assert row["visible_flops"] == (cost.dense_step_flops if row["variant"] == "dense" else cost.step_flops)
        assert row["flops_per_s"] == row["visible_flops"] / row["median_s"]
        assert row["matmul_flops_per_s"] > 0
    assert "12 x 17 tokens (192 x 272 px)" in result.output
    assert "backend='auto' takes tiled here" in result.output
    assert "dense-pooled is left out" in result.output


def test_a_share_of_the_dense_queries_is_marked(bench):
    result, rows = bench("--grid", "12x17", "--window", "5", "--dense-queries", "100")
    assert [row["variant"] for row in rows if row["extrapolated"]] == ["dense"]
    assert [row["variant"] for row in rows if row["peak_bytes"] is None] == ["dense"]
    assert "dense (flash_attention) *" in result.output


@hardware.needs_compiler
def test_pooled_keys(bench):
    _, rows = bench("--grid", "12x17", "--window", "5", "--down-factor", "3", "--batch", "2")
    assert [row["variant"] for row in rows] == ["dense", "dense-pooled", "raster-flex", "flex", "tiled"]
    assert max(row["error"] for row in rows) < 1e-5
    assert rows[1]["visible_flops"] == 2 * 4 * 64 * (12 * 17) * (4 * 6)


def test_forward_and_backward(bench):
    result, rows = bench("--grid", "9x11", "--window", "4", "--backward", "--down-factor", "2")
    assert [row["variant"] for row in rows] == ["dense", "tiled"]
    assert max(row["error"] for row in rows) < 1e-5
    assert rows[1]["visible_flops"] == 3.5 * Cost.of_layer((9, 11), 9, 1, 64, Clear(4, 2)).step_flops
    assert "flex is left out: FlexAttention has no gradients on a CPU" in result.output


def test_one_step_of_a_model(bench):
    variants = [option for name in ("dense", "tiled", "bound") for option in ("--variant", name)]
    result, rows = bench("--level", "model", "--grid", "8x9", "--window", "3", "--blocks", "1", *variants)
    assert [row["variant"] for row in rows] == ["dense", "tiled", "bound"]
    assert all(row["extrapolated"] and row["blocks"] == 3 for row in rows)
    assert rows[1]["error"] < 1e-5
    assert rows[1]["visible_flops"] == 57 * Cost.of_layer((8, 9), 9, 1, 64, Clear(3)).step_flops
    assert rows[2]["visible_flops"] == 0
    assert "scaled from 3 of 57 blocks" in result.output
    assert "\nbound: a step in which attention takes no time, the most that any attention can save.\n" in result.output


def test_nothing_is_left_to_time(bench):
    result, rows = bench("--grid", "9x11", "--variant", "dense-pooled", expected=2)
    assert "nothing is left to time" in result.output
    assert rows is None


def test_variants_that_are_out_of_memory_are_left_out(bench, monkeypatch):
    def attend(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setitem(BACKENDS, "tiled", BACKENDS["tiled"]._replace(attend=attend))
    result, rows = bench("--grid", "9x11", "--window", "4", "--variant", "tiled", "--variant", "dense")
    assert [row["variant"] for row in rows] == ["dense"]
    assert "tiled is left out: it is out of memory" in result.output


def test_a_wrong_result_ends_with_an_error(bench, monkeypatch):
    wrong = BACKENDS["tiled"]._replace(attend=lambda query, *rest: (query, None))
    monkeypatch.setitem(BACKENDS, "tiled", wrong)
    result, _ = bench("--grid", "9x11", "--window", "4", "--variant", "tiled", expected=1)
    assert "tiled at 9x11, window 4" in result.output
    assert "off the rule" in result.output


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(bench, tmp_path, suffix):
    path = tmp_path / f"times.{suffix}"
    bench("--grid", "9x11", "--grid", "20x20", "--window", "4", "--variant", "dense", "--plot", str(path))
    if suffix == "png":  # more than one color
        assert len(Image.open(path).convert("RGB").getcolors(10**6)) > 10
    else:
        assert "<svg" in path.read_text()


def test_an_interrupt_keeps_the_rows_so_far(bench, monkeypatch, tmp_path):
    measure_case = runner._measure_with_matmul

    def interrupted(subjects, case, runs):
        if case.width == 13:
            raise KeyboardInterrupt
        return measure_case(subjects, case, runs)

    monkeypatch.setattr(runner, "_measure_with_matmul", interrupted)
    options = ["--grid", "9x11", "--grid", "9x13", "--window", "4", "--variant", "dense"]
    result, rows = bench(*options, expected=130)
    assert [row["width"] for row in rows] == [11]
    assert result.stderr.endswith("rows.json has 1 row\n")
    assert "Interrupted; " in result.stderr
    chart = tmp_path / "times.png"
    result, _ = bench(*options, "--plot", str(chart), "--overwrite", expected=130)
    assert result.stderr.endswith(f"rows.json and {chart} have 1 row\n")


def test_a_full_disk_ends_no_measurement(bench, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(bench_command, "atomic_text", full)
    options = ["--grid", "9x11", "--grid", "9x13", "--window", "4", "--variant", "dense"]
    result, _ = bench(*options, expected=2)
    assert "rows.json could not be written (No space left on device)\n" in result.stderr
    assert "Error: Invalid value: [Errno 28] No space left on device: " in result.stderr
    assert "9 x 13 tokens" in result.stdout


def test_a_size_in_pixels_and_a_window_that_covers_it(bench):
    result, rows = bench("--pixels", "100x150", "--window", "9", "--variant", "dense")
    assert [(row["height"], row["width"]) for row in rows] == [(6, 9)]
    assert "Warning: 100 x 150 px is not a multiple of 16 px; it is rounded down to 96 x 144 px" in result.stderr
    assert "window=9, down_factor=1 covers 6 x 9 tokens: nothing is saved." not in result.stdout
    result, _ = bench("--pixels", "96x144", "--window", "10", "--variant", "dense", "--overwrite")
    assert "window=10, down_factor=1 covers 6 x 9 tokens: nothing is saved." in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "12"], "'12' is not a size"),
        (["--grid", "0x4"], "'0x4' is not a size"),
        (["--pixels", "15x1024"], "15 x 1024 px is less than one token of 16 px"),
        (["--device", "tpu"], "'tpu' does not exist; there is cpu"),
        (["--device", "cuda:7"], "'cuda:7' does not exist"),
        (["--variant", "fast"], "'fast' is none of dense"),
        (
            ["--level", "model", "--variant", "raster-flex"],
            "'raster-flex' is none of dense, triton, flex, tiled, bound",
        ),
        (["--level", "model", "--backward"], "a step is timed forward only"),
        (["--plot", "times.txt"], "names no image format"),
        (["--plot", "nowhere/times.png"], "no such directory"),
        (["--plot", "."], "is a directory"),
    ],
)
def test_errors_come_before_the_work(bench, monkeypatch, options, message):
    monkeypatch.setattr(runner, "run", None)
    result, rows = bench(*options, expected=2)
    assert message in " ".join(result.output.replace("│", " ").split())
    assert rows is None


def test_refuses_head_dims_that_flux_cannot_have():
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", "--level", "model", "--head-dim", "40"])
    assert result.exit_code == 2
    assert "head_dim divisible by 32, got 40" in " ".join(result.output.replace("│", " ").split())


@hardware.needs_compiler
@given(
    grid=st.sampled_from([(16, 16), (7, 37), (30, 9)]),
    text=st.sampled_from([0, 1, 40, 200]),
    window=st.integers(1, 40),
    factor=st.integers(1, 3),
)
@settings(max_examples=15)
def test_raster_order_is_the_rule(grid, text, window, factor):
    tokens, config = text + grid[0] * grid[1], Clear(window, factor)
    query, key, value = torch.randn(3, 1, 2, tokens, 16).unbind()
    weight = torch.full((factor, factor), 1 / factor**2)
    expected, _ = reference_attention.attention(query, key, value, [grid], text, config, weight)
    if factor > 1:
        pooled = [reference_attention.pool(x[:, :, text:], [grid], factor, weight) for x in (key, value)]
        key, value = (torch.cat(parts, dim=2) for parts in zip((key, value), pooled, strict=True))
    attend = raster.raster_attention(grid, text, window, factor, CPU)
    torch.testing.assert_close(attend(query, key, value, 0.25), expected, atol=1e-5, rtol=0)


def test_raster_order_visits_the_blocks_of_torch(monkeypatch):
    """And no others, so that the comparison is fair."""
    given_lists = []
    monkeypatch.setattr(flex, "attend_blocks", lambda *args: (given_lists.append(args[3:5]), None))
    raster.raster_attention((25, 30), 50, 6, 1, CPU)(*torch.randn(3, 1, 1, 800, 16), 0.25)
    lists, seen = given_lists[0]
    blocks = create_block_mask(seen, None, None, 800, 800, device="cpu")
    assert torch.equal(lists.partial_count, blocks.kv_num_blocks)
    assert torch.equal(lists.full_count, blocks.full_kv_num_blocks)


class TestMeasure:
    def test_runs_alternate_and_parts_are_weighted(self, monkeypatch):
        clock, order = iter(range(1000)), []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))

        def one(name):
            def call(mark):
                order.append(name)
                mark()

            return Subject(name, call, (1.0, 10.0))

        timings = measure.measure([one("a"), one("b")], CPU, 3)
        assert order == ["a", "a", "b", "b", *"ababab"]
        assert [timing.seconds for timing in timings] == [[11.0] * 3] * 2

    def test_peak_memory(self):
        held = torch.randn(1000)

        def call(mark):
            torch.randn(1000, 1000)
            return held + torch.randn(2000, 1000).sum()

        (timing,) = measure.measure([Subject("", call)], CPU, 1)
        assert 8_000_000 <= timing.peak_bytes < 8_100_000

    def test_context_around_a_run(self):
        results, (query, key, value) = [], torch.randn(3, 1, 1, 2, 4).unbind()
        subject = Subject(
            "",
            lambda mark: results.append(F.scaled_dot_product_attention(query, key, value) is value),
            around=model.AttentionIsItsValues,
        )
        measure.measure([subject], CPU, 2)
        assert results == [True] * 4


def test_the_bound_is_attention_that_returns_its_values():
    query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
    with model.AttentionIsItsValues():
        assert F.scaled_dot_product_attention(query, key, value) is value
        assert F.scaled_dot_product_attention(query=query, key=key, value=value) is value
    assert F.scaled_dot_product_attention(query, key, value) is not value


def test_the_model_is_flux_dev(monkeypatch):
    """It has the config of the Hub."""
    made = {}
    monkeypatch.setattr(model, "FluxTransformer2DModel", lambda **config: made.update(config) or torch.nn.Module())
    model.transformer(Case(8, 8, 8, 1, torch.bfloat16, CPU))
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(guidance_embeds=True).config
    assert all(theirs[name] == value for name, value in made.items())
    assert torch.get_default_dtype() == torch.float32


def test_bytes_between_ranks(tmp_path):
    file = tmp_path / "ranks.json"
    options = ["--device", "cpu", "--grid", "32x24", "--window", "4", "--text", "5", "--heads", "2", "--head-dim", "16"]
    options += ["--ranks", "1", "--ranks", "4", "--json", str(file)]
    result = CliRunner().invoke(app, ["bench", *options, "--attention-seconds", "2", "--rest-seconds", "1"])
    assert result.exit_code == 0, result.output
    one, four = json.loads(file.read_text())
    assert four["traffic"]["halo"] == 2 * 2 * 3 * 24 * 2 * 16 * 4  # keys and values, both sides, rows, columns, ...
    assert (one["layer_bytes"], one["step_bytes"]) == (0, 0)
    assert set(one["seconds"].values()) == {3.0}
    # A quarter of attention, 8 of 32 rows of the rest and its text, and the time of the bytes.
    least = 2 / 4 + (8 * 24 + 5) / (32 * 24 + 5) + four["step_bytes"] / 12.5e9
    assert least < four["seconds"]["Ethernet, 12.5 GB/s"] < least + 0.1
    options.append("--overwrite")
    result = CliRunner().invoke(app, ["bench", *options, "--ranks", "5"])
    assert "5 ranks are too many" in result.output
    for extra in (["--rest-seconds", "5"], ["--plot", str(tmp_path / "out.png")]):
        result = CliRunner().invoke(app, ["bench", *options, *extra])
        assert result.exit_code == 2
    result = CliRunner().invoke(app, ["bench", "--grid", "16x16", "--device", "cpu", "--rest-seconds", "5"])
    assert "need --ranks" in result.output
