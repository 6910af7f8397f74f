import json

from typer.testing import CliRunner

from clear_attn.tools.cli import app
from tests.backends.triton.kernels.cases import DEVICE


def test_the_operation_with_the_fused_kernel_and_another_configuration(tmp_path):
    file = tmp_path / "rows.json"
    names = ["triton", "triton-64-64-4-3"]
    options = ["--grid", "9x18", "--window", "4", "--text", "5", "--heads", "1", "--head-dim", "16", "--runs", "1"]
    options += ["--device", DEVICE.type, "--dtype", "float16", "--json", str(file)]
    result = CliRunner().invoke(app, ["bench", *options, *(f"--variant={name}" for name in names)])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    assert [row["variant"] for row in rows] == names
    assert all(row["error"] < 2e-3 for row in rows)
