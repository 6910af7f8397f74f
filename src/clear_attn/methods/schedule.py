"""Where attention stays dense or has a window of its own: by the noise of a call, and by layer."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clear_attn.utils.validation import check_whole_number


@dataclass(frozen=True)
class Schedule:
    """Exceptions from one window in all layers at all steps, for models that keep their own weights.

    The first steps decide what stands where, so a model that never learned to do without seeing far draws better
    when they stay dense. A step is told by the noise in it, for that is an argument of every call of a transformer:
    steps are counted by pipelines and schedulers, differently under every number of steps, size and strength, and not
    at all in training. `noise_after` turns a number of steps into noise.

    Layers are named as in the model. A name stands for every attention layer of that name or inside it
    (`"transformer_blocks"` for all of FLUX's double blocks, `"transformer_blocks.0"` for the first); of several that
    fit a layer, the longest counts.

    Args:
        dense_above (`float`, *optional*): calls with more noise than this share, 0 to 1, are dense in all layers; in
            flow matching the share is sigma, 1 at the start and 0 at the end. By default none are.
        dense_layers (names, defaults to none): dense at every step.
        windows (names and `int`s, defaults to none): layers whose window, a radius in tokens, is their own.

    Raises:
        TypeError: a value of another kind.
        ValueError: a share outside 0 to 1, a window below 1, or a layer that is named in both.

    Example:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> schedule = clear.Schedule(dense_above=0.9, dense_layers=["single_transformer_blocks.0"])
        >>> pipe = clear.linearize(demo.pipeline(), window=4, weights=None, schedule=schedule)
        >>> clear.is_linearized(pipe)
        True
    """

    dense_above: float | None = None
    dense_layers: tuple[str, ...] = ()
    windows: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        above = self.dense_above
        if above is not None:
            if isinstance(above, bool) or not isinstance(above, numbers.Real):
                raise TypeError(f"dense_above must be a number, got {above!r}; it is a share of noise, 0 to 1")
            if not 0 <= above <= 1:
                raise ValueError(f"dense_above must be from 0 to 1, got {above!r}; it is a share of noise, 0.9 say")
            object.__setattr__(self, "dense_above", float(above))
        if isinstance(self.dense_layers, str):
            raise TypeError(
                f"dense_layers must be several names, got {self.dense_layers!r}; give ({self.dense_layers!r},)"
            )
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        remedy = "it is a radius in tokens; layers that see all go into dense_layers"
        windows = {
            name: check_whole_number(f"the window of {name}", window, remedy) for name, window in self.windows.items()
        }
        object.__setattr__(self, "windows", windows)
        for name in (*self.dense_layers, *windows):
            if not isinstance(name, str):
                raise TypeError(f"layers are named as in the model, 'transformer_blocks.0' say, got {name!r}")
            if name in self.dense_layers and name in windows:
                raise ValueError(f"{name} is in dense_layers and in windows; leave it out of one")

    def window_of(self, layer: str) -> float | None:
        """A layer's own window, `math.inf` where it stays dense, or None where it has that of all."""
        named = {**self.windows, **dict.fromkeys(self.dense_layers, math.inf)}
        return named.get(max((name for name in named if _stands_for(name, layer)), key=len, default=""))

    def own_windows(self, layers: Iterable[str]) -> dict[float, list[str]]:
        """The layers that have a window of their own, by it."""
        found: dict[float, list[str]] = {}
        for layer in layers:
            window = self.window_of(layer)
            if window is not None:
                found.setdefault(window, []).append(layer)
        return found

    def check_layers(self, layers: Iterable[str], model: str) -> None:
        """Raises ValueError where a name stands for none of a model's attention layers."""
        there = list(layers)
        for name in (*self.dense_layers, *self.windows):
            if not any(_stands_for(name, layer) for layer in there):
                raise ValueError(
                    f"the schedule names {name!r}, and this {model} has no attention layer there; it has {there[0]} to "
                    f"{there[-1]}"
                )

    def is_dense(self, noise: Tensor) -> bool:
        """Whether a call with so much noise in its pictures, `[batch]` or one number, stays dense.

        Raises:
            ValueError: some of its pictures do and some do not.
        """
        if self.dense_above is None:
            return False
        above = noise > self.dense_above
        if above.any() != above.all():
            raise ValueError(
                f"a call is dense for all its pictures or for none, and dense_above={self.dense_above} lies between "
                f"theirs, {[round(x, 3) for x in noise.tolist()]}; give pictures of one timestep, or no dense_above"
            )
        return bool(above.all())


def _stands_for(name: str, layer: str) -> bool:
    return f"{layer}.".startswith(f"{name}.")


def noise_after(scheduler: Any, steps: int) -> float:
    """The share of noise that lies between a run's first so many steps and the others.

    `Schedule(dense_above=noise_after(pipe.scheduler, 5))` keeps five steps of a run as the scheduler's last one dense:
    of as many steps, for a picture of that size, of that strength.

    Args:
        scheduler: of flow matching, with the timesteps of a run, as every pipeline leaves it.
        steps (`int`): at least 1, and fewer than are run.

    Raises:
        TypeError: the scheduler has no sigmas; steps is not a whole number.
        ValueError: it has not run yet, or not for so many steps.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        >>> scheduler.set_timesteps(10)
        >>> [round(sigma, 3) for sigma in scheduler.sigmas.tolist()[:3]]
        [1.0, 0.96, 0.913]
        >>> round(noise_after(scheduler, 2), 3)
        0.937
    """
    steps = check_whole_number("steps", steps, "it is the number of steps that stay dense")
    if getattr(scheduler, "sigmas", None) is None:
        raise TypeError(f"a {type(scheduler).__name__} has no sigmas; give a scheduler of flow matching")
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError("this scheduler has no run's timesteps yet; draw a picture first, or call its set_timesteps()")
    # Some schedulers call the model twice at the same noise; and image to image begins in the middle.
    levels = list(dict.fromkeys(scheduler.sigmas[scheduler.begin_index or 0 :].tolist()))
    if steps > len(levels) - 2:
        raise ValueError(f"steps={steps} of a run of {len(levels) - 1} leaves none local; give fewer")
    # In the middle, so that rounding, as of timesteps in bfloat16, changes nothing.
    return float(levels[steps - 1] + levels[steps]) / 2
