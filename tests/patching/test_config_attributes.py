"""Attributes that others set on the config of a transformer, which are not entries."""

import clear_attn as clear
from tests.helpers.families import each_family


@each_family()
def test_attributes_that_others_set(family):
    """diffusers does so for Control LoRAs of FLUX, which widen the image embedder."""
    transformer = family.transformer()
    config = transformer.config
    before, entry = dict(config), config.in_channels
    config.in_channels, config.of_others = 2 * entry, "kept"

    def check(linearized):
        assert transformer.config.in_channels == 2 * entry
        assert transformer.config["in_channels"] == entry
        assert transformer.config.of_others == "kept"
        assert ("clear_attn" in transformer.config) == linearized == hasattr(transformer.config, "clear_attn")

    clear.linearize(transformer, 3, weights=None)
    check(linearized=True)
    transformer.config.in_channels = 4 * entry
    clear.linearize(transformer, 5, weights=None)
    assert transformer.config.in_channels == 4 * entry
    assert transformer.config.clear_attn == transformer.config["clear_attn"]
    transformer.config.in_channels = 2 * entry
    clear.restore(transformer)
    check(linearized=False)
    with clear.linearized(transformer, window=3, weights=None):
        check(linearized=True)
    check(linearized=False)
    assert dict(transformer.config) == before
