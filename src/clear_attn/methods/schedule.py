"""Which method each layer follows in a call: dense steps, dense layers, layers with a window of their own."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clear_attn.methods.dense import Dense
from clear_attn.methods.method import Layer, Method
from clear_attn.utils.json_records import validate_record
from clear_attn.utils.validation import check_whole_number

# Fields of records of format 1, by their name today.
RENAMED = {"dense_above": "dense_above_sigma"}
CONTAINERS = {"dense_layers": list | tuple, "windows": dict}


@dataclass(frozen=True)
class Schedule:
    """Exceptions from one method in all layers at all steps, for models that keep their own weights.

    The first steps decide the layout of an image, so a model that never learned to attend locally draws better when
    they stay dense. A step is known by its sigma, the share of noise, since that is an argument of every call of a
    transformer: steps are counted by pipelines and schedulers, differently for every number of steps, size and
    strength, and not at all in training. `sigma_after_step` turns a number of steps into a sigma.

    Layers are named as in the model. A name matches every attention layer of that name or inside it
    (`"transformer_blocks"` for all of FLUX's double blocks, `"transformer_blocks.0"` for the first); of several that
    fit a layer, the longest counts.

    Args:
        dense_above_sigma (`float`, *optional*): calls with a larger sigma, 0 to 1, are dense in all layers; in flow
            matching sigma is 1 at the start and 0 at the end. By default none are.
        dense_layers (names, defaults to none): dense at every step.
        windows (names and `int`s, defaults to none): layers whose window, a radius in tokens, is their own.

    Raises:
        TypeError: a value of another kind.
        ValueError: a sigma outside 0 to 1, a window below 1, or a layer that is named in both.

    Example:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> schedule = clear.Schedule(dense_above_sigma=0.9, dense_layers=["single_transformer_blocks.0"])
        >>> pipe = clear.linearize(demo.pipeline(), window=4, weights=None, schedule=schedule)
        >>> clear.is_linearized(pipe)
        True
    """

    dense_above_sigma: float | None = None
    dense_layers: tuple[str, ...] = ()
    windows: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        above = self.dense_above_sigma
        if above is not None:
            if isinstance(above, bool) or not isinstance(above, numbers.Real):
                raise TypeError(f"dense_above_sigma must be a number, got {above!r}; it is a share of noise, 0 to 1")
            if not 0 <= above <= 1:
                raise ValueError(
                    f"dense_above_sigma must be from 0 to 1, got {above!r}; it is a share of noise, 0.9 say"
                )
            object.__setattr__(self, "dense_above_sigma", float(above))
        if isinstance(self.dense_layers, str):
            raise TypeError(
                f"dense_layers must be several names, got {self.dense_layers!r}; give ({self.dense_layers!r},)"
            )
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        remedy = "it is a radius in tokens; layers that attend to all tokens go into dense_layers"
        windows = {
            name: check_whole_number(f"the window of {name}", window, remedy) for name, window in self.windows.items()
        }
        object.__setattr__(self, "windows", windows)
        for name in (*self.dense_layers, *windows):
            if not isinstance(name, str):
                raise TypeError(f"layers are named as in the model, 'transformer_blocks.0' say, got {name!r}")
            if name in self.dense_layers and name in windows:
                raise ValueError(f"{name} is in dense_layers and in windows; leave it out of one")

    @property
    def depends_on_sigma(self) -> bool:
        """Whether calls differ by sigma. Reading it waits for the GPU."""
        return self.dense_above_sigma is not None

    def method_for(self, method: Method, layer: Layer, sigma: float | None = None) -> Method:
        """Return what a layer does in a call.

        Args:
            method: that of the model.
            layer: of the model.
            sigma: of the call; not needed unless `depends_on_sigma`.
        """
        if self.dense_above_sigma is not None and sigma is not None and sigma > self.dense_above_sigma:
            return Dense()
        name = self.names(layer.name)
        if name in self.dense_layers:
            return Dense()
        own = method.with_window(self.windows[name]) if name else method
        return own.for_layer(layer.number)

    def names(self, layer: str) -> str | None:
        """Return the name in `dense_layers` or `windows` that counts for a layer, or None."""
        fitting = (name for name in (*self.dense_layers, *self.windows) if _is_inside(layer, name))
        return max(fitting, key=len, default=None)

    def sigma_of(self, sigma: Tensor) -> float:
        """Return the sigma of a call, given that of each of its images, `[batch]` or one number.

        Raises:
            ValueError: some of its images are dense and some are not.
        """
        bound = 1.0 if self.dense_above_sigma is None else self.dense_above_sigma
        above = sigma > bound  # in the precision of the timestep
        if above.any() != above.all():
            raise ValueError(
                f"a call is dense for all its images or for none, and dense_above_sigma={self.dense_above_sigma} lies "
                f"between theirs, {[round(x, 3) for x in sigma.tolist()]}; give images of one timestep, or no "
                "dense_above_sigma"
            )
        value = float(sigma.max())
        return max(value, bound) if above.all() else min(value, bound)

    def group(self, method: Method, layers: Iterable[Layer]) -> tuple[list[Layer], dict[str, int]]:
        """Return groups of layers that follow one method in every call: a layer of each, and each layer's group."""
        sigmas = (0.0, 1.0) if self.depends_on_sigma else (None,)
        keys: dict[Any, Layer] = {}
        numbers_by_key: dict[Any, int] = {}
        groups: dict[str, int] = {}
        for layer in layers:
            key = layer.has_text, tuple(self.method_for(method, layer, sigma) for sigma in sigmas)
            keys.setdefault(key, layer)
            groups[layer.name] = numbers_by_key.setdefault(key, len(numbers_by_key))
        return list(keys.values()), groups

    def validate_layers(self, layers: Sequence[str], model: str) -> None:
        """Raise ValueError if a name matches none of a model's attention layers."""
        for name in (*self.dense_layers, *self.windows):
            if not any(_is_inside(layer, name) for layer in layers):
                raise ValueError(
                    f"the schedule names {name!r}, and this {model} has no attention layer there; it has {layers[0]} "
                    f"to {layers[-1]}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Any, where: str = "the record of a schedule") -> Schedule:
        """Return the schedule that `to_dict` wrote, in this version or an earlier one.

        Raises:
            ValueError: the record cannot be read; the error names it as `where`.
        """
        values = validate_record(record, {}, where)
        renamed = {RENAMED.get(name, name): value for name, value in values.items()}
        try:
            validate_record(renamed, {name: kind for name, kind in CONTAINERS.items() if name in renamed}, where)
            return cls(**renamed)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: the schedule cannot be read ({error})") from error


def _is_inside(layer: str, name: str) -> bool:
    return f"{layer}.".startswith(f"{name}.")


def sigma_after_step(scheduler: Any, steps: int) -> float:
    """Return a sigma between those of a run's first steps and those of the others.

    `Schedule(dense_above_sigma=sigma_after_step(pipe.scheduler, 5))` keeps five steps dense in runs like the
    scheduler's last one: with the same number of steps, size and strength.

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
        >>> round(sigma_after_step(scheduler, 2), 3)
        0.937
    """
    steps = check_whole_number("steps", steps, "it is the number of steps that stay dense")
    if getattr(scheduler, "sigmas", None) is None:
        raise TypeError(f"a {type(scheduler).__name__} has no sigmas; give a scheduler of flow matching")
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError("this scheduler has no run's timesteps yet; draw an image first, or call its set_timesteps()")
    # Some schedulers call the model twice at the same noise; and image to image begins in the middle.
    levels = list(dict.fromkeys(scheduler.sigmas[scheduler.begin_index or 0 :].tolist()))
    if steps > len(levels) - 2:
        raise ValueError(f"steps={steps} of a run of {len(levels) - 1} leaves none local; give fewer")
    # In the middle, so that rounding, as of timesteps in bfloat16, changes nothing.
    return float(levels[steps - 1] + levels[steps]) / 2
