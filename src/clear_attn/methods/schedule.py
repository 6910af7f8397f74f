"""Choose the method of each layer in each call: dense steps, dense layers, windows per layer."""

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

# Fields that were renamed since format 1.
RENAMED = {"dense_above": "dense_above_sigma"}
CONTAINERS = {"dense_layers": list | tuple, "windows": dict}


@dataclass(frozen=True)
class Schedule:
    """Keep some steps or layers dense, or give layers their own window, in models that were not distilled.

    The first steps decide the layout of an image. A model that never learned local attention draws better images when
    these steps stay dense. A schedule identifies a step by its sigma, the share of noise, because every call of a
    transformer has it. The number of a step means something else for each scheduler, size and strength.
    `sigma_after_step` turns a number of steps into a sigma.

    A layer's name matches every attention layer of that name or inside it: `"transformer_blocks"` matches all of
    FLUX's double blocks, `"transformer_blocks.0"` the first. If several names match a layer, the longest one counts.

    Args:
        dense_above_sigma (`float`, *optional*): calls with a larger sigma, 0 to 1, are dense in all layers. In flow
            matching sigma is 1 at the start and 0 at the end. By default no call is dense.
        dense_layers (names, defaults to none): layers that are dense at every step.
        windows (names and `int`s, defaults to none): the window of a layer, a radius in tokens.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a sigma is outside 0 to 1, a window is below 1, or a layer is in both `dense_layers` and `windows`.

    Examples:
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
                    f"dense_above_sigma must be from 0 to 1, got {above!r}; it is a share of noise, such as 0.9"
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
                raise TypeError(f"layers are named as in the model, such as 'transformer_blocks.0', got {name!r}")
            if name in self.dense_layers and name in windows:
                raise ValueError(f"{name} is in dense_layers and in windows; leave it out of one")

    @property
    def depends_on_sigma(self) -> bool:
        """Whether calls differ by sigma. Reading it waits for the GPU."""
        return self.dense_above_sigma is not None

    def method_for(self, method: Method, layer: Layer, sigma: float | None = None) -> Method:
        """Return the method of a layer in a call.

        Args:
            method: the method of the linearized model.
            layer: a layer of the model.
            sigma: the sigma of the call; needed only if `depends_on_sigma`.
        """
        if self.dense_above_sigma is not None and sigma is not None and sigma > self.dense_above_sigma:
            return Dense()
        return self.method_of(method, layer.name).for_layer(layer.number)

    def method_of(self, method: Method, layer: str) -> Method:
        """Return the method that the schedule gives the layer of a name, in calls that are not dense."""
        name = self.names(layer)
        if name in self.dense_layers:
            return Dense()
        return method.with_window(self.windows[name]) if name else method

    def describe(self, method: Method, layer: str) -> str:
        """Return `method_of` in words, with the sigma above which it is dense."""
        above = "" if self.dense_above_sigma is None else f", dense above sigma {self.dense_above_sigma:g}"
        return f"{self.method_of(method, layer)!r}{above}"

    def names(self, layer: str) -> str | None:
        """Return the longest name in `dense_layers` or `windows` that matches a layer, or None."""
        matching = (name for name in (*self.dense_layers, *self.windows) if _is_inside(layer, name))
        return max(matching, key=len, default=None)

    def sigma_of(self, sigma: Tensor) -> float:
        """Return the sigma of a call, given the sigma of each image, `[batch]` or one number.

        Raises:
            ValueError: some of the images are dense and some are not.
        """
        bound = 1.0 if self.dense_above_sigma is None else self.dense_above_sigma
        above = sigma > bound  # in the precision of the timestep
        if above.any() != above.all():
            raise ValueError(
                f"all images of a call must be dense or none, and dense_above_sigma={self.dense_above_sigma} is "
                f"between their sigmas, {[round(x, 3) for x in sigma.tolist()]}; give all images one timestep, or "
                "leave dense_above_sigma out"
            )
        value = float(sigma.max())
        return max(value, bound) if above.all() else min(value, bound)

    def group(self, method: Method, layers: Iterable[Layer]) -> tuple[list[Layer], dict[str, int]]:
        """Group the layers that share a method in every call: return a layer per group and the group of each layer."""
        sigmas = (0.0, 1.0) if self.depends_on_sigma else (None,)
        first_layers: dict[Any, Layer] = {}
        numbers_by_key: dict[Any, int] = {}
        groups: dict[str, int] = {}
        for layer in layers:
            key = layer.has_text, layer.images, tuple(self.method_for(method, layer, sigma) for sigma in sigmas)
            first_layers.setdefault(key, layer)
            groups[layer.name] = numbers_by_key.setdefault(key, len(numbers_by_key))
        return list(first_layers.values()), groups

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
    """Return a sigma that separates a run's first steps from the others.

    `Schedule(dense_above_sigma=sigma_after_step(pipe.scheduler, 5))` keeps five steps dense. It holds for runs with
    the same number of steps, size and strength as the scheduler's last one.

    Args:
        scheduler: a flow-matching scheduler that has the timesteps of a run, as after a pipeline's call.
        steps (`int`): the number of first steps, at least 1 and less than the steps of the run.

    Raises:
        TypeError: the scheduler has no sigmas, or steps is not a whole number.
        ValueError: the scheduler has no timesteps yet, or too few of them.

    Examples:
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
    # Some schedulers call the model twice at the same sigma, and image-to-image starts in the middle.
    levels = list(dict.fromkeys(scheduler.sigmas[scheduler.begin_index or 0 :].tolist()))
    if steps > len(levels) - 2:
        raise ValueError(f"steps={steps} of a run of {len(levels) - 1} leaves none local; give fewer")
    # The midpoint, so that rounding timesteps to bfloat16 does not move a step to the other side.
    return float(levels[steps - 1] + levels[steps]) / 2
