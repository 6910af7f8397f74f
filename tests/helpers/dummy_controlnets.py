"""Small random ControlNets, whose outputs are not zero."""

import torch
from diffusers import FluxControlNetModel, SD3ControlNetModel

from tests.helpers import dummy_models


def fill_zeros(controlnet):
    """Fill parameters that start at zero with random values."""
    torch.manual_seed(3)
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return controlnet.eval()


def flux_controlnet(**changes):
    return fill_zeros(FluxControlNetModel(**{**dummy_models.FLUX_CONFIG, **changes}))


def sd3_controlnet(**changes):
    return fill_zeros(SD3ControlNetModel(**{**dummy_models.SD3_CONFIG, **changes}))
