"""What linearize, restore and their context managers change, undo bit for bit, and refuse before any change."""

import copy
import pickle

import accelerate
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save, save_file
from torch.utils._pytree import tree_map

import clear_attn as clear
from clear_attn.patching import state
from tests.helpers.families import each_family
from tests.helpers.reference_model import joined
from tests.helpers.snapshots import assert_same, checkpoint_for, snapshot


def test_linearize_and_restore_a_pipeline(pipe):
    before = snapshot(pipe.transformer)
    assert not clear.is_linearized(pipe)
    assert clear.linearize(pipe, 4, weights=None) is pipe
    assert clear.is_linearized(pipe)
    assert clear.is_linearized(pipe.transformer)
    assert clear.restore(pipe) is pipe
    assert not clear.is_linearized(pipe)
    assert_same(pipe.transformer, before)


@each_family()
def test_restore_puts_back_replaced_weights(transformer, checkpoint):
    before = snapshot(transformer)
    clear.linearize(transformer, 4, weights=checkpoint)
    values = load_file(checkpoint)
    assert all(torch.equal(value, values[name]) for name, value in transformer.state_dict().items() if name in values)
    clear.restore(transformer)
    assert_same(transformer, before)


def test_restore_of_what_is_not_linearized_changes_nothing(transformer):
    before = snapshot(transformer)
    clear.restore(transformer)
    assert_same(transformer, before)


@each_family()
def test_other_hooks_stay(family, transformer):
    calls = []
    transformer.register_forward_pre_hook(lambda *_: calls.append("before"))
    before = snapshot(transformer)
    clear.linearize(transformer, 4, weights=None)
    transformer.register_forward_hook(lambda *_: calls.append("after"))
    clear.restore(transformer)
    transformer(**family.call(transformer, (3, 3)))
    assert calls == ["before", "after"]
    assert snapshot(transformer)["hooks"][0] == before["hooks"][0]


@each_family()
def test_again_with_other_settings_starts_from_the_original(transformer, checkpoint):
    before = snapshot(transformer)
    clear.linearize(transformer, 4, weights=checkpoint)
    clear.linearize(transformer, 3, weights=None)
    current = snapshot(transformer)["state"]
    assert all(torch.equal(value, current[name]) for name, value in before["state"].items())
    clear.linearize(transformer, 5, weights=checkpoint)
    clear.restore(transformer)
    assert_same(transformer, before)


def test_down_factor_comes_from_the_weights(transformer, checkpoint):
    clear.linearize(transformer, 4, weights=checkpoint)
    assert clear.cost(transformer, 64, 64).method == clear.methods.Clear(4, 2)
    clear.linearize(transformer, weights=None)
    assert clear.cost(transformer, 64, 64).method == clear.methods.Clear(16)


def test_fused_projections_follow_the_weights(family, transformer, checkpoint):
    call = family.call(transformer, (5, 7))
    clear.linearize(transformer, 3, weights=checkpoint)
    expected = transformer(**call).sample
    clear.restore(transformer)
    transformer.fuse_qkv_projections()
    before = snapshot(transformer)
    clear.linearize(transformer, 3, weights=checkpoint)
    torch.testing.assert_close(transformer(**call).sample, expected, atol=1e-5, rtol=0)
    clear.restore(transformer)
    assert_same(transformer, before)


def test_processors_take_dtype_and_attention_backend(transformer):
    transformer.to(torch.bfloat16)
    transformer.transformer_blocks[0].attn.processor._attention_backend = "sentinel"
    clear.linearize(transformer, 4, 2, weights=None)
    processors = list(transformer.attn_processors.values())
    assert {processor.spatial_weight.dtype for processor in processors} == {torch.bfloat16}
    assert processors[0]._attention_backend == "sentinel"


@each_family()
def test_in_bfloat16(family, transformer):
    transformer.to(torch.bfloat16)
    call = tree_map(
        lambda x: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x,
        family.call(transformer, (11, 20)),
    )
    expected = joined(transformer(**call))
    clear.linearize(transformer, 40, weights=None)
    output = joined(transformer(**call))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, atol=0.05, rtol=0)


class TestLinearized:
    def test_returns_to_the_original_pipeline(self, transformer, checkpoint):
        before = snapshot(transformer)
        with clear.linearized(transformer, 4, weights=checkpoint) as inside:
            assert inside is transformer
            assert clear.is_linearized(transformer)
        assert_same(transformer, before)

    def test_returns_to_a_linearized_pipeline(self, family, transformer, checkpoint):
        call = family.call(transformer, (11, 20))
        clear.linearize(transformer, 3, weights=checkpoint)
        expected, config = transformer(**call).sample, clear.cost(transformer, 64, 64)
        before = snapshot(transformer)
        with clear.linearized(transformer, 8, weights=None):
            assert not torch.allclose(transformer(**call).sample, expected)
        after = snapshot(transformer)
        assert all(torch.equal(value, after["state"][name]) for name, value in before["state"].items())
        assert after["processors"] == before["processors"]
        assert clear.cost(transformer, 64, 64) == config
        assert torch.equal(transformer(**call).sample, expected)

    def test_returns_after_an_error_and_after_other_calls(self, transformer, checkpoint):
        before = snapshot(transformer)

        def interrupted():
            with clear.linearized(transformer, 4, weights=None):
                clear.linearize(transformer, 5, weights=checkpoint)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert_same(transformer, before)
        with clear.linearized(transformer, 4, weights=None):
            clear.restore(transformer)
        assert_same(transformer, before)


class TestKeepOriginal:
    def test_offloaded_before_a_block(self, transformer, checkpoint):
        clear.linearize(transformer, 4, weights=checkpoint)
        accelerate.cpu_offload(transformer, execution_device="cpu")
        with pytest.raises(RuntimeError, match="remove_all_hooks"), clear.linearized(transformer, 5, weights=None):
            pass

    def test_discarded(self, transformer, checkpoint):
        clear.linearize(transformer, 4, weights=checkpoint, keep_original=False)
        before = snapshot(transformer)
        for operation in (clear.restore, lambda x: clear.linearize(x, 4, weights=None)):
            with pytest.raises(RuntimeError, match="discarded by linearize"):
                operation(transformer)
            assert_same(transformer, before)

    def test_nothing_is_discarded_without_weights(self, transformer):
        before = snapshot(transformer)
        clear.linearize(transformer, 4, weights=None, keep_original=False)
        clear.restore(transformer)
        assert_same(transformer, before)


# Seven steps: values, four processors, hooks, metadata. The first time, two hooks are registered too, in SD3 a third.
@pytest.mark.parametrize(
    ("linearized_before", "at"), [*((False, at) for at in range(1, 10)), *((True, at) for at in range(1, 8))]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_at_any_step_is_rolled_back(
    family, transformer, checkpoint, monkeypatch, linearized_before, at, error
):
    if linearized_before:
        clear.linearize(transformer, 7, weights=checkpoint)
    call = family.call(transformer, (5, 7))
    expected, before = transformer(**call).sample, snapshot(transformer)
    steps = []

    def failing(function):
        def step(*args, **kwargs):
            steps.append(function)
            if len(steps) == at:
                raise error
            return function(*args, **kwargs)

        return step

    attention = type(transformer.transformer_blocks[0].attn)
    with monkeypatch.context() as patched:
        patched.setattr(state, "copy_values", failing(state.copy_values))
        patched.setattr(attention, "set_processor", failing(attention.set_processor))
        patched.setattr(state, "install_hooks", failing(state.install_hooks))
        patched.setattr(state, "_set_metadata", failing(state._set_metadata))
        for name in ("register_forward_hook", "register_forward_pre_hook"):
            patched.setattr(torch.nn.Module, name, failing(getattr(torch.nn.Module, name)))
        with pytest.raises(error):
            clear.linearize(transformer, 4, weights=checkpoint)
    assert torch.equal(transformer(**call).sample, expected)
    after = snapshot(transformer)
    assert all(torch.equal(value, after["state"][name]) for name, value in before["state"].items())
    assert after["processors"] == before["processors"]
    assert after["hooks"] == before["hooks"]
    assert after["config"] == before["config"]
    assert clear.is_linearized(transformer) == linearized_before


class TestRefusals:
    """Each error leaves the transformer unchanged."""

    @pytest.fixture(autouse=True)
    def untouched(self, transformer):
        before = snapshot(transformer)
        yield
        assert_same(transformer, before)

    @pytest.mark.parametrize("thing", [None, 7, torch.nn.Linear(2, 2), object()])
    def test_not_a_pipeline(self, thing, transformer):
        for operation in (clear.linearize, clear.restore, clear.is_linearized, lambda x: clear.cost(x, 64, 64)):
            with pytest.raises(
                TypeError, match=rf"a {type(thing).__name__} is not supported; .*FluxTransformer2DModel"
            ):
                operation(thing)

    @pytest.mark.parametrize("name", ["window", "down_factor"])
    @pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
    def test_numbers(self, transformer, name, value, error):
        with pytest.raises(error, match=f"{name} must be .* got {value}"):
            clear.linearize(transformer, **{name: value}, weights=None)

    def test_backend(self, transformer):
        with pytest.raises(ValueError, match="unknown backend 'cutlass'; choose one of auto, triton, flex"):
            clear.linearize(transformer, weights=None, backend="cutlass")

    def test_flex_where_it_cannot_run(self, transformer, monkeypatch):
        monkeypatch.setattr("clear_attn.backends.flex.unsupported_device", lambda device: "no compiler")
        with pytest.raises(RuntimeError, match="backend='flex' cannot run on this machine: on cpu, no compiler; "):
            clear.linearize(transformer, weights=None, backend="flex")

    def test_foreign_processor(self, transformer):
        class Foreign:
            pass

        attn = transformer.transformer_blocks[1].attn
        original = attn.processor
        attn.set_processor(Foreign())
        with pytest.raises(RuntimeError, match=r"transformer_blocks\.1\.attn has a Foreign"):
            clear.linearize(transformer, weights=None)
        attn.set_processor(original)

    def test_context_parallelism(self, transformer):
        processor = transformer.transformer_blocks[1].attn.processor
        processor._parallel_config = object()
        with pytest.raises(
            RuntimeError, match=r"transformer_blocks\.1\.attn runs under diffusers' context parallelism"
        ):
            clear.linearize(transformer, weights=None)
        processor._parallel_config = None

    def test_parameters_on_meta(self, family):
        with torch.device("meta"):
            absent = family.transformer()
        with pytest.raises(RuntimeError, match=r"meta device.*remove_all_hooks"):
            clear.linearize(absent, weights=None)

    def test_no_published_weights(self, transformer):
        with pytest.raises(ValueError, match="weights=None"):
            clear.linearize(transformer)

    def test_missing_file_and_directory(self, transformer, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no-such\.safetensors' does not exist"):
            clear.linearize(transformer, weights=tmp_path / "no-such.safetensors")
        with pytest.raises(FileNotFoundError, match="is a directory"):
            clear.linearize(transformer, weights=tmp_path)

    def test_truncated(self, transformer, checkpoint):
        whole = checkpoint.read_bytes()
        for length in (0, 5, 100, len(whole) - 1):
            checkpoint.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="not a complete safetensors file"):
                clear.linearize(transformer, weights=checkpoint)

    def test_an_empty_file(self, transformer, tmp_path):
        save_file({}, tmp_path / "empty.safetensors")
        with pytest.raises(ValueError, match=r"empty\.safetensors holds no tensors"):
            clear.linearize(transformer, weights=tmp_path / "empty.safetensors")

    def test_not_a_path(self, transformer):
        with pytest.raises(TypeError, match="weights must be a path, a Hub id, 'auto' or None, got 5 of type int"):
            clear.linearize(transformer, weights=5)

    def test_fused_projections_that_were_changed_alone(self, family, checkpoint):
        fused = family.transformer()
        fused.fuse_qkv_projections()
        with torch.no_grad():
            fused.transformer_blocks[1].attn.to_qkv.weight.add_(1)
        before = snapshot(fused)
        with pytest.raises(
            RuntimeError, match=r"transformer_blocks\.1\.attn\.to_qkv\.weight differs from the projections"
        ):
            clear.linearize(fused, weights=checkpoint)
        assert_same(fused, before)

    def test_offloaded_to_disk(self, family, checkpoint, tmp_path):
        offloaded = family.transformer()
        offloaded.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk")
        )
        with pytest.raises(RuntimeError, match=r"are offloaded to .*linearize the pipeline first"):
            clear.linearize(offloaded, weights=checkpoint)

    def test_pickles(self, transformer, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (pytest.fail, ("the pickle was loaded",))

        disguised = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.bin")]
        torch.save({"x": torch.zeros(1)}, disguised[0])
        disguised[1].write_bytes(pickle.dumps(Bomb()))
        disguised[2].write_bytes(b"anything")
        for file in disguised:
            with pytest.raises(ValueError, match=f"{file.name} is a pickle"):
                clear.linearize(transformer, weights=file)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda x: x.pop("transformer_blocks.0.attn.to_q.weight"), "misses transformer_blocks.0.attn.to_q.weight"),
            (lambda x: x.update(extra=torch.zeros(1)), "has unexpected extra"),
            (
                lambda x: x.update({"transformer_blocks.0.attn.to_k.bias": torch.zeros(5)}),
                r"wrong shapes: transformer_blocks.0.attn.to_k.bias \[5\] instead of \[32\]",
            ),
            (lambda x: x["transformer_blocks.1.attn.to_v.bias"].fill_(float("nan")), "NaN or infinity, .*to_v.bias"),
            (lambda x: x["transformer_blocks.1.attn.to_v.bias"].fill_(float("inf")), "NaN or infinity, .*to_v.bias"),
            (
                lambda x: x.update({"transformer_blocks.0.attn.to_k.bias": torch.zeros(32, dtype=torch.int32)}),
                r"other values than .*: transformer_blocks.0.attn.to_k.bias torch.int32",
            ),
            (
                lambda x: x.update({"transformer_blocks.0.attn.to_k.bias": torch.zeros(32).to(torch.float8_e4m3fn)}),
                r"other values than .*: transformer_blocks.0.attn.to_k.bias torch.float8_e4m3fn",
            ),
            (
                lambda x: x.update({"transformer_blocks.0.attn.processor.spatial_weight": torch.zeros(3, 3)}),
                "spatial_weight must be",
            ),
        ],
    )
    def test_checkpoints_that_do_not_fit(self, transformer, checkpoint, change, words):
        values = load_file(checkpoint)
        change(values)
        save_file(values, checkpoint)
        with pytest.raises(ValueError, match=words):
            clear.linearize(transformer, weights=checkpoint)

    def test_values_too_large_for_the_model(self, family, checkpoint):
        values = load_file(checkpoint)
        values["transformer_blocks.1.attn.to_v.bias"][3] = 1e6
        save_file(values, checkpoint)
        half = family.transformer().half()
        before = snapshot(half)
        with pytest.raises(ValueError, match=r"NaN or infinity, as torch\.float16, in .*to_v\.bias"):
            clear.linearize(half, weights=checkpoint)
        assert_same(half, before)

    def test_parameters_that_take_no_weights(self, family, checkpoint):
        quantized = family.transformer()
        to_k = quantized.transformer_blocks[1].attn.to_k
        to_k.weight = torch.nn.Parameter(to_k.weight.detach().to(torch.int8), requires_grad=False)
        before = snapshot(quantized)
        with pytest.raises(
            RuntimeError, match=r"transformer_blocks\.1\.attn\.to_k\.weight has .* as in a quantized model"
        ):
            clear.linearize(quantized, weights=checkpoint)
        assert_same(quantized, before)

    def test_checkpoint_of_another_model(self, family, transformer, tmp_path):
        other = family.transformer(num_layers=5)
        save_file(checkpoint_for(other), tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=rf"does not fit this {type(transformer).__name__}: .* and \d+ more"):
            clear.linearize(transformer, weights=tmp_path / "other.safetensors")

    @pytest.mark.parametrize("given", [1, 3])
    def test_another_down_factor_than_the_weights(self, transformer, checkpoint, given):
        with pytest.raises(ValueError, match=f"down_factor={given} does not fit weights .* down_factor=2"):
            clear.linearize(transformer, 4, given, weights=checkpoint)


def test_a_pipeline_survives_a_deep_copy(pipe):
    before = snapshot(pipe.transformer)
    clear.linearize(pipe, 4, weights=None)
    twin = copy.deepcopy(pipe)
    clear.restore(pipe)
    assert clear.is_linearized(twin)
    clear.restore(twin)
    assert not clear.is_linearized(twin)
    assert_same(pipe.transformer, before)


# A safetensors file starts with the length of its header, which may look like the start of a pickle or a zip file.
@pytest.mark.parametrize("header", [0x4080, 0x4B50])
def test_a_file_that_only_starts_like_a_pickle(transformer, tmp_path, header):
    values = checkpoint_for(transformer)
    whole = save(values)
    length = int.from_bytes(whole[:8], "little")
    assert length < header
    changed = header.to_bytes(8, "little") + whole[8 : 8 + length].ljust(header) + whole[8 + length :]
    assert changed[:2] in (b"\x80\x40", b"PK")
    (tmp_path / "weights.safetensors").write_bytes(changed)
    clear.linearize(transformer, weights=tmp_path / "weights.safetensors")
    assert all(torch.equal(transformer.state_dict()[name], value) for name, value in values.items())


def test_restore_waits_until_offloaded_weights_are_back(transformer, checkpoint):
    before = snapshot(transformer)
    clear.linearize(transformer, 4, weights=checkpoint)
    accelerate.cpu_offload(transformer, execution_device="cpu")
    with pytest.raises(RuntimeError, match=r"meta device.*remove_all_hooks"):
        clear.restore(transformer)
    assert clear.is_linearized(transformer)
    accelerate.hooks.remove_hook_from_module(transformer, recurse=True)
    clear.restore(transformer)
    after = snapshot(transformer)
    assert all(torch.equal(value, after["state"][name]) for name, value in before["state"].items())


@each_family(lora=True)
class TestLora:
    @pytest.fixture
    def transformer(self, transformer):
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
        return transformer

    def test_is_kept(self, family, transformer, checkpoint):
        call = family.call(transformer, (5, 7))
        before = joined(transformer(**call))
        clear.linearize(transformer, 30, weights=None)
        torch.testing.assert_close(joined(transformer(**call)), before, atol=1e-5, rtol=0)
        clear.linearize(transformer, 30, weights=checkpoint)
        with_lora = joined(transformer(**call))
        transformer.disable_lora()
        assert not torch.allclose(joined(transformer(**call)), with_lora, atol=1e-3)
        transformer.enable_lora()
        clear.restore(transformer)
        assert torch.equal(joined(transformer(**call)), before)

    def test_fused_inside_a_block_is_not_overwritten(self, transformer, checkpoint):
        clear.linearize(transformer, 4, weights=checkpoint)
        with (  # noqa: PT012
            pytest.raises(RuntimeError, match=r"call pipe.unfuse_lora\(\) first"),
            clear.linearized(transformer, 5, weights=None),
        ):
            transformer.fuse_lora()
            before = snapshot(transformer)
        assert_same(transformer, before)

    def test_fused_is_refused_where_its_weights_would_be_replaced(self, transformer, checkpoint):
        clear.linearize(transformer, 4, weights=checkpoint)
        transformer.fuse_lora()
        before = snapshot(transformer)
        for operation in (clear.restore, lambda x: clear.linearize(x, 4, weights=checkpoint)):
            with pytest.raises(
                RuntimeError, match=r"to_q has the LoRA default fused .* call pipe.unfuse_lora\(\) first"
            ):
                operation(transformer)
            assert_same(transformer, before)
        transformer.unfuse_lora()
        clear.restore(transformer)
        transformer.fuse_lora()
        clear.linearize(transformer, 4, weights=None)


def test_later_changes_by_others_are_kept(transformer):
    original = type(transformer.transformer_blocks[0].attn.processor)
    clear.linearize(transformer, 4, weights=None)
    transformer.set_attention_backend("_native_math")
    clear.linearize(transformer, 5, weights=None)
    chosen = {str(processor._attention_backend.value) for processor in transformer.attn_processors.values()}
    assert chosen == {"_native_math"}

    class Foreign(original):
        pass

    foreign = Foreign()
    transformer.transformer_blocks[1].attn.set_processor(foreign)
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.1\.attn has a Foreign"):
        clear.linearize(transformer, 5, weights=None)
    clear.restore(transformer)
    processors = transformer.attn_processors
    assert processors.pop("transformer_blocks.1.attn.processor") is foreign
    assert {type(processor).__name__ for processor in processors.values()} == {original.__name__}
    assert {str(processor._attention_backend.value) for processor in processors.values()} == {"_native_math"}


def test_parallelism_enabled_later_is_kept(transformer):
    clear.linearize(transformer, 4, weights=None)
    for processor in transformer.attn_processors.values():
        processor._parallel_config = "sentinel"
    with pytest.raises(RuntimeError, match="runs under diffusers' context parallelism"):
        clear.linearize(transformer, 5, weights=None)
    clear.restore(transformer)
    assert {processor._parallel_config for processor in transformer.attn_processors.values()} == {"sentinel"}


def test_parameters_made_in_other_modes_are_normal(transformer):
    with torch.inference_mode():
        clear.linearize(transformer, 4, 2, weights=None)
    assert not transformer.transformer_blocks[0].attn.processor.spatial_weight.is_inference()
    with torch.device("meta"):
        clear.linearize(transformer, 4, 3, weights=None)
    assert not transformer.transformer_blocks[0].attn.processor.spatial_weight.is_meta


@each_family()
def test_other_hooks_get_raster_order(family, transformer):
    call, seen = family.call(transformer, (5, 7)), []
    transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(joined([kwargs[family.image]])), with_kwargs=True
    )
    transformer.register_forward_hook(lambda _, args, output: seen.append(joined(output)))
    clear.linearize(transformer, 3, weights=None)
    transformer.register_forward_hook(lambda _, args, output: seen.append(joined(output)))
    output = joined(transformer(**call))
    expected = [joined([call[family.image]]), output, output]
    assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))
