"""State dicts, configs and parameter averages of linearized models, as docs/limits.md describes them."""

import warnings

import pytest
import torch
from diffusers.training_utils import EMAModel

import clear_attn as clear
from tests.helpers import dummy_models
from tests.helpers.snapshots import assert_same, layers_of, snapshot, train


@pytest.fixture
def transformer():
    return dummy_models.flux_transformer()


def shifted(state):
    return {name: value + 1 for name, value in state.items()}


def test_an_original_state_dict_loads_without_parameters_of_processors(transformer):
    state = shifted(transformer.state_dict())
    clear.linearize(transformer, 3, weights=None)
    transformer.load_state_dict(state)
    clear.restore(transformer)
    assert all(torch.equal(value, state[name]) for name, value in transformer.state_dict().items())


def test_an_original_state_dict_with_pooled_keys_loads_in_two_ways(transformer):
    state = shifted(transformer.state_dict())
    clear.linearize(transformer, 3, 2, weights=None)
    pooled = [attn.processor.spatial_weight.clone() for attn in layers_of(transformer).values()]
    with pytest.raises(RuntimeError, match=r"Missing key.*processor\.spatial_weight"):
        transformer.load_state_dict(state)
    transformer.load_state_dict(state, strict=False)
    after = [attn.processor.spatial_weight for attn in layers_of(transformer).values()]
    assert all(torch.equal(*pair) for pair in zip(pooled, after, strict=True))
    clear.restore(transformer).load_state_dict(state)
    assert clear.is_linearized(clear.linearize(transformer, 3, 2, weights=None))


def test_a_linearized_state_dict_can_be_loaded(transformer):
    clear.linearize(transformer, 3, 2, weights=None)
    train(transformer)
    state = {name: value.clone() for name, value in transformer.state_dict().items()}
    train(transformer)
    transformer.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in transformer.state_dict().items())


def test_from_config_makes_a_dense_model_that_warns(transformer):
    clear.linearize(transformer, 3, 2, weights=None)
    made = type(transformer).from_config(transformer.config)
    with pytest.warns(UserWarning, match="runs with dense attention; call clear_attn.linearize"):
        assert not clear.is_linearized(made)
    before = snapshot(made)
    clear.linearize(made, 3, 2, weights=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(clear.restore(made), before)


@pytest.mark.parametrize("down_factor", [1, 2])
def test_an_ema_as_the_docs_describe_it(transformer, tmp_path, down_factor):
    clear.linearize(transformer, 3, down_factor, weights=None)
    ema = EMAModel(transformer.parameters(), decay=0.5)
    train(transformer)
    ema.step(transformer.parameters())
    ema.copy_to(transformer.parameters())
    averages = [value.clone() for value in transformer.parameters()]
    clear.save_pretrained(transformer, tmp_path)
    other = clear.linearize(dummy_models.flux_transformer(), weights=tmp_path)
    assert all(torch.equal(*pair) for pair in zip(averages, other.parameters(), strict=True))
