"""What the kernels take when they are compiled without a GPU. Limits hold for the Triton of .ci/constraints.txt."""

import json

import pytest
import torch
from typer.testing import CliRunner

from clear_attn.backends.triton.ahead_of_time import SHARED_LIMIT, compile_kernel
from clear_attn.backends.triton.configurations import CHOSEN, KERNELS, Configuration, configuration
from clear_attn.backends.triton.support import triton_version, unsupported_triton
from clear_attn.tools.cli import app

if obstacle := unsupported_triton():
    pytest.skip(f"the kernels cannot be compiled: {obstacle}", allow_module_level=True)
pinned = pytest.mark.skipif(triton_version() != (3, 6), reason="limits hold for Triton 3.6")
MATRIX = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
# head_dim 256 may spill in the gradients of keys, on Hopper and Blackwell.
MOST_SPILLED = {"forward": 0, "query_gradient": 0, "key_gradients": 16, "shared_key_gradients": 16}
# What spills more and was the fastest on an H200.
MOST_SPILLED_ON_HOPPER = {"forward": 88, "query_gradient": 16, "key_gradients": 144, "shared_key_gradients": 240}


def chosen(kernel, architecture, head_dim, **arguments):
    return compile_kernel(kernel, architecture, head_dim, configuration(architecture, kernel, head_dim), **arguments)


def check(kernel, architecture, head_dim):
    compiled = chosen(kernel, architecture, head_dim)
    family = "v_mfma" if architecture.startswith("gfx") else "HMMA"
    assert compiled.matrix_instruction == MATRIX.get(architecture, family)
    assert compiled.spilled_bytes <= (MOST_SPILLED_ON_HOPPER if architecture == "sm_90" else MOST_SPILLED)[kernel]
    assert compiled.shared_bytes <= SHARED_LIMIT[architecture]
    assert compiled.atomics == 0
    assert len(compiled.loops) == (1 if kernel == "shared_key_gradients" else 2)
    if architecture.startswith("sm"):
        # 16 bytes each: all of a step's two blocks, at the least.
        each = configuration(architecture, kernel, head_dim)
        blocks = 2 * each.columns * head_dim * 2 // (16 * 32 * each.warps)
        assert each.stages == 1 or all(loop.async_copies >= blocks for loop in compiled.loops)
    return compiled


@pinned
def test_the_loops_on_hopper():
    blocks, singles = check("forward", "sm_90", 128).loops
    assert configuration("sm_90", "forward", 128)[:2] == (128, 64)
    # Without the limit of 128 registers 362 and 465, and slower.
    assert len(blocks.instructions) <= 420
    assert len(singles.instructions) <= 520
    assert singles.async_copies >= 8


@pinned
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("architecture", CHOSEN)
@pytest.mark.parametrize("kernel", KERNELS)
def test_limits(kernel, architecture, head_dim):
    check(kernel, architecture, head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CHOSEN)
@pytest.mark.parametrize("kernel", KERNELS)
def test_wide_heads_fit_in_shared_memory(kernel, architecture):
    assert chosen(kernel, architecture, 256).shared_bytes <= SHARED_LIMIT[architecture]


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 48, 96, 160])
@pytest.mark.parametrize("kernel", KERNELS)
def test_other_sizes_of_heads_float16_and_bias_compile(kernel, head_dim):
    chosen(kernel, "sm_90", head_dim, dtype=torch.float16, has_bias=True)


def test_an_architecture_that_triton_does_not_know():
    with pytest.raises(ValueError, match="unknown architecture 'h100'; write it as sm_90 or gfx942"):
        compile_kernel("forward", "h100", 64, Configuration(128, 64, 8, 3))


class TestCommand:
    @pytest.mark.slow
    def test_rows(self, tmp_path):
        file = tmp_path / "rows.json"
        options = ["--level", "compile", "--arch", "sm_90", "--head-dim", "16", "--json", str(file)]
        result = CliRunner().invoke(app, ["bench", *options])
        assert result.exit_code == 0, result.output
        assert "a model, not measured" in result.output
        rows = json.loads(file.read_text())
        assert {row["kernel"] for row in rows if row["chosen"]} == set(KERNELS)
        assert all(row["level"] == "compile" and row["arch"] == "sm_90" and row["head_dim"] == 16 for row in rows)
        assert all(row["registers"] > 0 and row["shared_bytes"] > 0 and row["instructions_per_step"] for row in rows)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--level", "compile"], "--arch"),
            (["--arch", "sm_90"], "--level compile"),
            (["--level", "compile", "--arch", "gfx1100"], "gfx1100"),
            (["--level", "compile", "--arch", "sm_90", "--head-dim", "20"], "got 20"),
        ],
    )
    def test_errors(self, options, message):
        result = CliRunner().invoke(app, ["bench", *options])
        assert result.exit_code == 2
        assert message in result.output
