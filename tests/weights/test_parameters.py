"""Which parameters distilled weights replace, and the checks of a checkpoint."""

import pytest
import torch
from safetensors.torch import save_file

from clear_attn.weights import parameters
from clear_attn.weights.parameters import check_checkpoint, copy_values, pooled_factor, read_checkpoint
from tests.helpers import dummy_models
from tests.helpers.families import each_family
from tests.helpers.snapshots import layers_of


@each_family()
def test_replaced_parameters_are_projections_under_their_own_names(transformer):
    layers = layers_of(transformer)
    replaced = parameters.replaced_parameters(layers)
    named = dict(transformer.named_parameters())
    assert all(named[name] is parameter for name, parameter in replaced.items())
    assert {name.rpartition(".")[2] for name in replaced} <= {"weight", "bias"}
    assert all(any(name.startswith(f"{layer}.to_") for name in replaced) for layer in layers)


def test_a_block_without_an_output_projection():
    replaced = parameters.replaced_parameters(layers_of(dummy_models.flux_transformer()))
    assert "transformer_blocks.0.attn.to_out.0.weight" in replaced
    assert "single_transformer_blocks.0.attn.to_q.weight" in replaced
    assert not any(name.startswith("single_transformer_blocks.0.attn.to_out") for name in replaced)
    assert not any("add_q_proj" in name for name in replaced)


def test_copied_values_reach_fused_projections():
    transformer = dummy_models.flux_transformer()
    transformer.fuse_qkv_projections()
    layers = layers_of(transformer)
    parameters.check_replaceable(layers)
    before = parameters.replaced_parameters(layers)
    values = {"transformer_blocks.0.attn.to_k.weight": torch.full((32, 32), 2.0)}
    copy_values(values, layers)
    attn = transformer.transformer_blocks[0].attn
    assert before["transformer_blocks.0.attn.to_k.weight"] is attn.to_k.weight
    assert (attn.to_k.weight == 2).all()
    assert torch.equal(attn.to_qkv.weight, torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]))


@pytest.mark.parametrize(("side", "factor"), [(None, 1), (2, 2), (4, 4)])
def test_the_down_factor_of_a_checkpoint(side, factor):
    weights = (
        {}
        if side is None
        else {f"a.{i}.processor.spatial_weight": torch.zeros(1, 1, 1, side, 1, side, 1) for i in (0, 1)}
    )
    assert pooled_factor({"a.0.to_q.weight": torch.zeros(2, 2), **weights}) == factor


@pytest.mark.parametrize("shapes", [[(2, 2)], [(1, 1, 1, 2, 1, 3, 1)], [(1, 1, 1, 2, 1, 2, 1), (1, 1, 1, 4, 1, 4, 1)]])
def test_pooled_weights_of_other_shapes_are_refused(shapes):
    weights = {f"a.{i}.processor.spatial_weight": torch.zeros(shape) for i, shape in enumerate(shapes)}
    with pytest.raises(ValueError, match=r"must be \(1, 1, 1, f, 1, f, 1\) throughout"):
        pooled_factor(weights)


class TestFiles:
    def test_a_file_is_read(self, tmp_path):
        save_file({"x": torch.arange(3.0)}, tmp_path / "w.safetensors")
        tensors, method = read_checkpoint(tmp_path / "w.safetensors")
        assert torch.equal(tensors["x"], torch.arange(3.0))
        assert method is None

    def test_the_method_of_a_file(self, tmp_path):
        file = tmp_path / "w.safetensors"
        save_file({"x": torch.zeros(1)}, file, metadata={parameters.METHOD: '{"name": "Swin", "settings": {}}'})
        assert read_checkpoint(file)[1] == {"name": "Swin", "settings": {}}

    @pytest.mark.parametrize(
        ("content", "error", "words"),
        [
            (None, FileNotFoundError, "does not exist"),
            (b"PK\x03\x04", ValueError, "is a pickle, which could run code"),
            (b"\x80\x04", ValueError, "is a pickle, which could run code"),
            (b"nonsense", ValueError, "is not a complete safetensors file"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path, content, error, words):
        file = tmp_path / "w.safetensors"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(error, match=words):
            read_checkpoint(file)


PARAMETERS = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(torch.zeros(3))}


class TestCheckpoints:
    def test_that_fit(self):
        check_checkpoint({"a": torch.ones(2), "b": torch.ones(3).half()}, PARAMETERS, "Model")

    @pytest.mark.parametrize(
        ("checkpoint", "words"),
        [
            ({"a": torch.ones(2)}, "misses b"),
            ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "has unexpected c"),
            ({"a": torch.ones(2), "b": torch.ones(4)}, r"wrong shapes: b \[4\] instead of \[3\]"),
            ({"a": torch.ones(2), "b": torch.ones(3).int()}, "other values than .* b torch.int32"),
            ({"a": torch.ones(2), "b": torch.tensor([0, 1, torch.nan])}, "NaN or infinity, as torch.float32, in b"),
        ],
    )
    def test_that_do_not_fit(self, checkpoint, words):
        with pytest.raises(
            ValueError, match=f"does not fit this Model: it .*{words}.*weights distilled for this model"
        ):
            check_checkpoint(checkpoint, PARAMETERS, "Model")

    def test_values_too_large_for_the_models_dtype(self):
        half = {name: torch.nn.Parameter(x.detach().half()) for name, x in PARAMETERS.items()}
        with pytest.raises(ValueError, match=r"as torch\.float16, in a"):
            check_checkpoint({"a": torch.tensor([1.0, 1e6]), "b": torch.ones(3)}, half, "Model")

    def test_errors_name_three_and_count_the_rest(self):
        many = {str(i): torch.nn.Parameter(torch.zeros(1)) for i in range(5)}
        with pytest.raises(ValueError, match="misses 0, 1, 2 and 2 more"):
            check_checkpoint({}, many, "Model")
