"""Features that are likely to conflict: adapters, offloading and ControlNets together; compiled graphs and sizes."""

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.utils import counters

import clear_attn as clear
from clear_attn.distill.student import add_student
from tests.helpers import families, hardware
from tests.helpers.reference_model import in_raster_order, put_in_raster_order, run
from tests.helpers.snapshots import checkpoint_for, snapshot
from tests.matrix import operations
from tests.matrix.operations import Cell
from tests.matrix.rows import GRID, ROWS, controlled, flux, flux_controlnet, load_ip_adapter

CONFIG = clear.methods.Clear(3, 2)


def with_rule(pipe, grids=(GRID,), config=CONFIG):
    put_in_raster_order(pipe.transformer, grids, config)
    return pipe


def assert_close(drawn, expected):
    torch.testing.assert_close(drawn, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


def linearize(pipe):
    return clear.linearize(pipe, CONFIG.window, CONFIG.down_factor, weights=None)


@pytest.mark.parametrize(
    "offload", [operations.offload_whole, operations.offload_sequentially, operations.offload_groups("leaf_level")]
)
@pytest.mark.parametrize("name", ["FLUX text-to-image", "SD3 text-to-image"])
def test_loras_under_offloading(name, offload, tmp_path):
    row = ROWS[name]
    cell = Cell(row, tmp_path, linearize)
    pipe = row.pipeline()
    operations.two_loras(pipe, cell)
    expected = row.draw(with_rule(pipe))
    pipe = row.pipeline()
    operations.one_lora(pipe, cell)
    linearize(pipe)
    operations.lora(12, "two")(pipe, cell)
    pipe.set_adapters(["one", "two"], [0.7, -0.4])
    offload(pipe, cell)
    assert_close(row.draw(pipe), expected)


def test_distilled_weights_for_a_gguf_file(tmp_path):
    row = ROWS["FLUX text-to-image"]
    pipe = row.pipeline()
    save_file(checkpoint_for(pipe.transformer), tmp_path / "weights.safetensors")
    operations.gguf_file(pipe, Cell(row, tmp_path, linearize))
    before = snapshot(pipe.transformer)
    with pytest.raises(RuntimeError, match=r"has the type GGUFParameter .* as in a quantized model"):
        clear.linearize(pipe, 3, weights=tmp_path / "weights.safetensors")
    after = snapshot(pipe.transformer)
    assert {**after, "state": None} == {**before, "state": None}


def test_weights_quantized_after_linearizing_are_not_overwritten(tmp_path):
    row = ROWS["FLUX text-to-image"]
    pipe = row.pipeline()
    save_file(checkpoint_for(pipe.transformer), tmp_path / "weights.safetensors")
    clear.linearize(pipe, 3, weights=tmp_path / "weights.safetensors")
    operations.int8(pipe, Cell(row, tmp_path, linearize))
    expected = row.draw(pipe)
    for operation in (clear.restore, linearize, lambda pipe: clear.save_pretrained(pipe, tmp_path / "saved")):
        with pytest.raises(RuntimeError, match=r"as in a quantized model, .* load the model again in bfloat16"):
            operation(pipe)
        assert torch.equal(row.draw(pipe), expected)
    assert not (tmp_path / "saved").exists()


class TestIPAdapter:
    row = ROWS["FLUX IP-Adapter"]

    def test_with_a_controlnet(self):
        def build():
            pipe = flux("FluxControlNetPipeline", controlnet=flux_controlnet())
            load_ip_adapter(pipe)
            return pipe

        def draw(pipe):
            return self.row.draw(pipe, **controlled(pipe))

        expected = draw(with_rule(build()))
        pipe = linearize(build())
        assert_close(draw(pipe), expected)
        pipe.set_ip_adapter_scale(0.0)
        assert (draw(pipe) - expected).abs().max() > 1e-2

    def test_a_scale_set_while_linearized_stays(self):
        other = self.row.pipeline()
        other.set_ip_adapter_scale([0.2, 0.9])
        expected = self.row.draw(other)
        pipe = linearize(self.row.pipeline())
        pipe.set_ip_adapter_scale([0.2, 0.9])
        clear.restore(pipe)
        assert torch.equal(self.row.draw(pipe), expected)

    def test_loaded_and_unloaded_after_linearizing(self):
        text_to_image = ROWS["FLUX text-to-image"]
        expected = self.row.draw(with_rule(self.row.pipeline()))
        pipe = linearize(text_to_image.pipeline())
        load_ip_adapter(pipe)
        with pytest.raises(RuntimeError, match=r"by a FluxIPAdapterAttnProcessor .* clear_attn\.linearize\(\) again"):
            self.row.draw(pipe)
        linearize(pipe)
        assert_close(self.row.draw(pipe), expected)
        pipe.unload_ip_adapter()
        with pytest.raises(RuntimeError, match=r"by a FluxAttnProcessor .* clear_attn\.linearize\(\) again"):
            text_to_image.draw(pipe)
        linearize(pipe)
        assert_close(text_to_image.draw(pipe), text_to_image.draw(with_rule(text_to_image.pipeline())))
        clear.restore(pipe)
        assert torch.equal(text_to_image.draw(pipe), text_to_image.draw(text_to_image.pipeline()))

    def test_its_own_weights_keep_their_dtype(self):
        pipe = self.row.pipeline()
        before = pipe.transformer.transformer_blocks[0].attn.processor.to_k_ip[0].weight
        pipe.transformer.to(torch.bfloat16)
        pipe.transformer.transformer_blocks[0].attn.processor.float()
        linearize(pipe)
        processor = pipe.transformer.transformer_blocks[0].attn.processor
        assert processor.to_k_ip[0].weight is before
        assert (before.dtype, processor.spatial_weight.dtype) == (torch.float32, torch.bfloat16)

    def test_proportional_attention_keeps_it_or_refuses_it(self):
        pipe = self.row.pipeline()
        with (
            pytest.raises(RuntimeError, match=r"FluxIPAdapterAttnProcessor, whose scores .* cannot scale"),
            clear.proportional_attention(pipe),
        ):
            pass
        linearize(pipe)
        with clear.proportional_attention(pipe):
            pipe.set_ip_adapter_scale(0.0)
            without = self.row.draw(pipe)
            pipe.set_ip_adapter_scale(0.7)
            assert (self.row.draw(pipe) - without).abs().max() > 1e-2

    def test_no_student_would_drop_it(self):
        pipe = linearize(self.row.pipeline())
        with pytest.raises(RuntimeError, match=r"transformer_blocks\.0\.attn has an IP-Adapter; call pipe\.unload"):
            add_student(pipe)


@hardware.needs_compiler
def test_compiled_at_changing_sizes():
    """The second round of sizes compiles nothing. For FLUX see `test_compiled_blocks_are_not_recompiled`."""
    transformer = families.SD3.transformer(num_layers=2)
    grids = [(9, 12), (5, 15), (12, 9)]
    calls = [families.SD3.call(transformer, grid) for grid in grids]
    reference = [in_raster_order(transformer, [grid], CONFIG) for grid in grids]
    torch.compiler.reset()
    compiled, model = [], torch.compile(linearize(transformer), backend="eager")
    for _ in range(2):
        before = counters["stats"]["unique_graphs"]
        for call, dense in zip(calls, reference, strict=True):
            assert_close(run(model, call), run(dense, call))
        compiled.append(counters["stats"]["unique_graphs"] - before)
    assert compiled[0] > 0
    assert compiled[1] == 0
