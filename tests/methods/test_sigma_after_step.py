"""The sigma between two steps of a run."""

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

import clear_attn as clear
from clear_attn import Schedule, methods, sigma_after_step


def scheduler_of(**options):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(**{"num_inference_steps": 10, **options})
    return scheduler


def test_is_between_two_steps():
    scheduler = scheduler_of()
    for steps in (1, 4, 9):
        sigma = sigma_after_step(scheduler, steps)
        assert (scheduler.timesteps / 1000 > sigma).sum() == steps
        assert (scheduler.timesteps.bfloat16() / 1000 > sigma).sum() == steps


def test_counts_from_the_first_step_of_the_run():
    scheduler = scheduler_of()
    scheduler.set_begin_index(4)
    assert (scheduler.timesteps[4:] / 1000 > sigma_after_step(scheduler, 2)).sum() == 2


def test_steps_of_two_calls():
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(10)
    assert (
        len(set((scheduler.timesteps / 1000)[scheduler.timesteps / 1000 > sigma_after_step(scheduler, 3)].tolist()))
        == 3
    )


def test_in_a_pipeline(pipe):
    """The given number of steps is dense."""
    draw = {"height": 64, "width": 64, "num_inference_steps": 5, "max_sequence_length": 24, "output_type": "latent"}
    pipe("a red circle", **draw)
    clear.linearize(pipe, 2, weights=None, schedule=Schedule(sigma_after_step(pipe.scheduler, 2)))
    seen = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            kwargs["joint_attention_kwargs"]["clear_context"].groups[0].method == methods.Dense()
        ),
        with_kwargs=True,
    )
    pipe("a red circle", **draw)
    assert seen == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("steps", "error", "words"),
    [
        (0, ValueError, "steps must be at least 1, got 0"),
        (2.0, TypeError, "whole number, got 2.0"),
        (10, ValueError, "steps=10 of a run of 10 leaves none local"),
    ],
)
def test_refuses(steps, error, words):
    with pytest.raises(error, match=words):
        sigma_after_step(scheduler_of(), steps)


def test_refuses_a_scheduler_that_has_not_run():
    with pytest.raises(ValueError, match="no run's timesteps yet"):
        sigma_after_step(FlowMatchEulerDiscreteScheduler(), 2)
    with pytest.raises(TypeError, match="a str has no sigmas"):
        sigma_after_step("euler", 2)
