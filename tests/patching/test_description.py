"""What `info` and a processor's repr say of a linearized model."""

import types

import pytest
import torch
from diffusers import FluxMultiControlNetModel
from IPython.lib.pretty import pretty

import clear_attn as clear
from clear_attn.methods import Clear, Dense
from tests.helpers.dummy_controlnets import flux_controlnet
from tests.helpers.families import each_family


@each_family()
def test_of_each_family(family, transformer):
    clear.linearize(transformer, 3, 2, weights=None)
    found = clear.info(transformer)
    assert (found.model, found.method, found.weights) == (type(transformer).__name__, Clear(3, 2), None)
    assert (found.source, found.changed, found.restorable, found.ranks, found.controlnets) == (None, 0, True, 1, ())
    assert list(found.layers.values()) == [Clear(3, 2)] * family.layers
    assert f"{family.layers} Clear(window=3, down_factor=2)" in str(found)
    assert clear.info(torch.compile(transformer)) == clear.info(types.SimpleNamespace(transformer=transformer)) == found


def test_prints_in_a_terminal_and_in_a_notebook(pipe, flux_weights):
    found = clear.info(clear.linearize(pipe, weights=flux_weights))
    assert found.weights == str(flux_weights)
    assert repr(found) == pretty(found) == str(found)
    page = found._repr_html_()
    for words in ("Clear(window=8, down_factor=1)", str(flux_weights), "tiled: faster than flex", "none", "kept"):
        assert words in str(found)
        assert words in page


def test_the_backend_and_why(pipe):
    found = clear.info(clear.linearize(pipe, 4, weights=None, backend="flex"))
    assert (found.backend, found.backend_reason) == ("flex", "as given to linearize")
    found = clear.info(clear.linearize(pipe, 4, weights=None))
    assert (found.backend, found.backend_reason.split(",")[0]) == ("tiled", "faster than flex")
    found = clear.info(clear.linearize(pipe, method=clear.methods.Swin(side=4), weights=None))
    assert (found.backend, found.backend_reason) == (None, "Swin has an implementation of its own")
    assert "5 Swin(side=4)\n" in str(found)


def test_the_layers_of_a_schedule(pipe):
    schedule = clear.Schedule(0.9, ["single_transformer_blocks.0"], {"transformer_blocks.0": 2})
    clear.linearize(pipe, 4, weights=None, schedule=schedule)
    found = clear.info(pipe)
    assert found.schedule == schedule
    assert found.layers["single_transformer_blocks.0.attn"] == Dense()
    assert found.layers["transformer_blocks.0.attn"] == Clear(2)
    assert found.layers["transformer_blocks.1.attn"] == Clear(4)
    assert "1 Clear(window=2, down_factor=1), 3 Clear(window=4, down_factor=1), 1 Dense()" in str(found)
    assert "Schedule(dense_above_sigma=0.9" in str(found)


def test_what_was_trained_since_and_what_cannot_be_restored(trained):
    assert "parameters changed" not in str(clear.info(trained))
    with torch.no_grad():
        trained.transformer_blocks[0].attn.to_q.weight.add_(1)
    assert clear.info(trained).changed == 1
    assert "; 1 parameter changed since" in str(clear.info(trained))


def test_discarded_originals(pipe, flux_weights):
    found = clear.info(clear.linearize(pipe, weights=flux_weights, keep_original=False))
    assert not found.restorable
    assert "discarded; load the pipeline again" in str(found)


def test_controlnets(pipe):
    nets = [flux_controlnet(), flux_controlnet()]
    clear.linearize(nets[0], 5, weights=None)
    with_nets = types.SimpleNamespace(transformer=pipe.transformer, controlnet=FluxMultiControlNetModel(nets))
    clear.linearize(pipe.transformer, 4, weights=None)
    first, second = clear.info(with_nets).controlnets
    assert (first, second) == (clear.info(nets[0]), None)
    assert first.model == "FluxControlNetModel"
    assert "ControlNet 1  Clear(window=5, down_factor=1), the model's own" in str(clear.info(with_nets))
    assert "ControlNet 2  dense" in str(clear.info(with_nets))


def test_a_dense_model(pipe, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"^this FluxTransformer2DModel is dense; call clear_attn\.linearize\(pipe\)"
    ):
        clear.info(pipe)
    with pytest.raises(RuntimeError, match="this FluxControlNetModel is dense"):
        clear.info(flux_controlnet())
    with pytest.raises(TypeError, match="a Linear is not supported"):
        clear.info(torch.nn.Linear(2, 2))
    clear.linearize(pipe, 4, weights=None).transformer.save_pretrained(tmp_path)
    saved = type(pipe.transformer).from_pretrained(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"saved while it was linearized \(method=Clear\(.*weights None\), and now runs with dense"
    ):
        clear.info(saved)


def test_repr_of_processors(pipe):
    assert repr(clear.ClearAttnProcessor()) == "ClearAttnProcessor()"
    clear.linearize(pipe, 4, weights=None)
    processors = pipe.transformer.attn_processors
    assert set(map(repr, processors.values())) == {"ClearAttnProcessor(Clear(window=4, down_factor=1))"}
    schedule = clear.Schedule(0.9, windows={"transformer_blocks.0": 2})
    clear.linearize(pipe, 4, weights=None, schedule=schedule)
    processors = pipe.transformer.attn_processors
    shown = repr(processors["transformer_blocks.0.attn.processor"])
    assert shown == "ClearAttnProcessor(Clear(window=2, down_factor=1), dense above sigma 0.9)"
