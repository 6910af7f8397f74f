"""The losses of one step: run the teacher without gradients, then the student, on the same noisy latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clear_attn.distill import losses
from clear_attn.distill.student import STUDENT, TEACHER, Outputs, keywords
from clear_attn.models import TrainingAdapter


class Batch(NamedTuple):
    """Clean latents `[batch, channels, height, width]`, and the text that a `TrainingAdapter` encoded."""

    latents: Tensor
    text: Mapping[str, Tensor]


class Weights(NamedTuple):
    """The weight of each loss, by default the paper's."""

    flow_matching: float = 1.0
    prediction: float = 0.5
    attention: float = 0.5


class Losses(NamedTuple):
    """Each loss, and their weighted sum."""

    flow_matching: Tensor
    prediction: Tensor
    attention: Tensor
    total: Tensor


def distillation_losses(
    transformer: Any,
    training: TrainingAdapter,
    batch: Batch,
    noise: Tensor,
    sigma: Tensor,
    *,
    weights: Weights,
    matched: Sequence[str],
    guidance: float | None,
) -> Losses:
    """Return the losses of a linearized transformer's student.

    Args:
        transformer: a transformer with a student; may be wrapped, for example by DDP.
        training: the transformer's training adapter.
        batch: a batch of training data.
        noise: the noise, in the latents' shape.
        sigma: the share of noise, `[batch]` in 0..1.
        weights: the weights of the losses.
        matched: the layers with attention outputs to compare.
        guidance: the embedded guidance scale; None for a model without it.
    """
    noisy = losses.interpolate(batch.latents, noise, sigma)

    def predict(role: str) -> tuple[Tensor, dict[str, Tensor]]:
        # Each role gets new tensors, because the entry hook caches position ids by tensor.
        outputs = Outputs(matched)
        call = training.training_call(noisy, sigma, batch.text, guidance, keywords(role, outputs))
        return training.prediction(transformer(**call, return_dict=False)[0], call), outputs.by_layer

    with torch.no_grad():
        teacher, teacher_outputs = predict(TEACHER)
    student, student_outputs = predict(STUDENT)
    flow = losses.flow_matching(student, training.pack(batch.latents), training.pack(noise))
    prediction = losses.prediction(student, teacher)
    attention = losses.attention(student_outputs, teacher_outputs).to(flow.device)
    total = weights.flow_matching * flow + weights.prediction * prediction + weights.attention * attention
    return Losses(flow, prediction, attention, total)
