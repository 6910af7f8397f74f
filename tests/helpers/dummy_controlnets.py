"""Small random ControlNets, whose outputs are not zero."""

import torch
from diffusers import FluxControlNetModel, SD3ControlNetModel

from tests.helpers import dummy_models


def wake(controlnet):
    """Random values for what is zero until it is trained."""
    torch.manual_seed(3)
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return controlnet.eval()


def flux_controlnet(**changes):
    return wake(FluxControlNetModel(**{**dummy_models.FLUX_CONFIG, **changes}))


def sd3_controlnet(**changes):
    return wake(SD3ControlNetModel(**{**dummy_models.SD3_CONFIG, **changes}))
