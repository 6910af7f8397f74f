"""Small random ControlNets, whose outputs are not zero."""

import diffusers
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


Z_IMAGE_CONTROLNET_CONFIG = {
    "control_layers_places": (0, 1),
    "control_refiner_layers_places": (0,),
    "control_in_dim": 4,
    "add_control_noise_refiner": "control_noise_refiner",
    "dim": 32,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
}


def z_image_controlnet():
    """A ControlNet that has no layers for image and caption alone; a pipeline gives it those of its transformer."""
    torch.manual_seed(5)
    return fill_zeros(diffusers.ZImageControlNetModel(**Z_IMAGE_CONTROLNET_CONFIG))
