"""Choose the method of each layer in each call: dense steps and layers, windows per layer and by sigma."""

from __future__ import annotations

import dataclasses
import itertools
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
CONTAINERS = {"dense_layers": list | tuple, "windows": dict, "windows_by_sigma": list | tuple}
PAIRS = "windows_by_sigma must be pairs of a sigma and a window, such as ((0.9, 32), (0.6, 16))"


@dataclass(frozen=True)
class Schedule:
    """Keep steps or layers dense, or give layers or steps their own window, in models that were not distilled.

    The first steps decide the layout of an image. A model that never learned local attention draws better images when
    these steps are dense or have a wide window; narrow windows draw the detail. A schedule identifies a step by its
    sigma, the share of noise, because every call of a transformer has it. The number of a step means something else for
    each scheduler, size and strength. `sigma_after_step` turns a number of steps into a sigma.

    A layer's name matches every attention layer of that name or inside it: `"transformer_blocks"` matches all of
    FLUX's double blocks, `"transformer_blocks.0"` the first. If several names match a layer, the longest one counts.

    Args:
        dense_above_sigma (`float`, *optional*): calls with a larger sigma, 0 to 1, are dense in all layers. In flow
            matching sigma is 1 at the start and 0 at the end. By default no call is dense.
        dense_layers (names, defaults to none): layers that are dense at every step.
        windows (names and `int`s, defaults to none): the window of a layer, a radius in tokens, at every step that is
            not dense.
        windows_by_sigma (pairs of a `float` and an `int`, defaults to none): a sigma, and the window of calls with a
            larger one. Sigmas fall, and `dense_above_sigma` is above them. Calls at the last sigma or below have the
            window of the linearized model. Pooled keys are the same in all calls. Layers that `dense_layers` or
            `windows` names do not change.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a sigma is outside 0 to 1, sigmas do not fall, a window is below 1, or a layer is in both
            `dense_layers` and `windows`.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> schedule = clear.Schedule(dense_above_sigma=0.9, dense_layers=["single_transformer_blocks.0"])
        >>> pipe = clear.linearize(demo.pipeline(), window=4, weights=None, schedule=schedule)
        >>> clear.is_linearized(pipe)
        True

        Window 16 while the layout is decided, then 8, then that of the linearized model:

        >>> schedule = clear.Schedule(windows_by_sigma=((0.9, 16), (0.6, 8)))
        >>> [schedule.window_above(sigma) for sigma in (1.0, 0.9, 0.7, 0.6)]
        [16, 8, 8, None]
    """

    dense_above_sigma: float | None = None
    dense_layers: tuple[str, ...] = ()
    windows: Mapping[str, int] = field(default_factory=dict)
    windows_by_sigma: tuple[tuple[float, int], ...] = ()

    def __post_init__(self) -> None:
        if self.dense_above_sigma is not None:
            object.__setattr__(self, "dense_above_sigma", check_sigma("dense_above_sigma", self.dense_above_sigma))
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
        object.__setattr__(self, "windows_by_sigma", _check_pairs(self.windows_by_sigma))
        for before, after in itertools.pairwise(self.bounds):
            if before <= after:
                raise ValueError(
                    f"sigmas must fall, dense_above_sigma first and then those of windows_by_sigma, got {after:g} "
                    f"after {before:g}; sort them, or leave one out"
                )

    @property
    def bounds(self) -> tuple[float, ...]:
        """The sigmas at which methods change, falling. A call at a bound belongs to those below it."""
        dense = () if self.dense_above_sigma is None else (self.dense_above_sigma,)
        return (*dense, *(above for above, _ in self.windows_by_sigma))

    @property
    def levels(self) -> tuple[float | None, ...]:
        """A sigma for each set of methods that calls have, falling; None alone if they do not depend on sigma."""
        return (1.0, *self.bounds) if self.bounds else (None,)

    @property
    def depends_on_sigma(self) -> bool:
        """Whether calls differ by sigma. Reading it waits for the GPU."""
        return bool(self.bounds)

    def method_for(self, method: Method, layer: Layer, sigma: float | None = None) -> Method:
        """Return the method of a layer in a call.

        Args:
            method: the method of the linearized model.
            layer: a layer of the model.
            sigma: the sigma of the call; needed only if `depends_on_sigma`.
        """
        if self.dense_above_sigma is not None and sigma is not None and sigma > self.dense_above_sigma:
            return Dense()
        return self.method_of(method, layer.name, sigma).for_layer(layer.number)

    def method_of(self, method: Method, layer: str, sigma: float | None = None) -> Method:
        """Return the method that the schedule gives the layer of a name, in calls that are not dense.

        Without a sigma it is that of calls below all bounds.
        """
        name = self.names(layer)
        if name in self.dense_layers:
            return Dense()
        window = self.windows[name] if name else self.window_above(sigma)
        return method if window is None else method.with_window(window)

    def window_above(self, sigma: float | None) -> int | None:
        """Return the window of `windows_by_sigma` at a sigma, or None."""
        return next((window for above, window in self.windows_by_sigma if sigma is not None and sigma > above), None)

    def describe(self, method: Method, layer: str) -> str:
        """Return `method_of` in words, with the sigmas above which it differs."""
        named = self.names(layer) is not None
        wider = "" if named else "".join(f", window {w} above sigma {above:g}" for above, w in self.windows_by_sigma)
        dense = "" if self.dense_above_sigma is None else f", dense above sigma {self.dense_above_sigma:g}"
        return f"{self.method_of(method, layer)!r}{dense}{wider}"

    def names(self, layer: str) -> str | None:
        """Return the longest name in `dense_layers` or `windows` that matches a layer, or None."""
        matching = (name for name in (*self.dense_layers, *self.windows) if _is_inside(layer, name))
        return max(matching, key=len, default=None)

    def sigma_of(self, sigma: Tensor) -> float:
        """Return the sigma of a call, given the sigma of each image, `[batch]` or one number.

        Raises:
            ValueError: a bound is between the sigmas of the images.
        """
        # Bounds are compared in the precision of the timestep. The result is on the same side of each.
        value = float(sigma.max())
        for bound in self.bounds:
            larger = sigma > bound
            if larger.any() != larger.all():
                name = "dense_above_sigma" if bound == self.dense_above_sigma else "a sigma of windows_by_sigma"
                raise ValueError(
                    f"all images of a call must have one window or be dense, and {name}={bound} is between their "
                    f"sigmas, {[round(x, 3) for x in sigma.tolist()]}; give all images one timestep, or leave {name} "
                    "out"
                )
            if larger.all():
                break
            value = min(value, bound)
        return value

    def group(self, method: Method, layers: Iterable[Layer]) -> tuple[list[Layer], dict[str, int]]:
        """Group the layers that share a method in every call: return a layer per group and the group of each layer."""
        first_layers: dict[Any, Layer] = {}
        numbers_by_key: dict[Any, int] = {}
        groups: dict[str, int] = {}
        for layer in layers:
            key = layer.has_text, layer.images, tuple(self.method_for(method, layer, sigma) for sigma in self.levels)
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
        if self.windows_by_sigma and all(self.names(layer) for layer in layers):
            raise ValueError(
                f"dense_layers and windows name all layers of this {model}, which leaves none for windows_by_sigma; "
                "leave it out, or name fewer layers"
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


def check_sigma(name: str, value: Any) -> float:
    """Return a sigma as a float, or raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}; it is a share of noise, 0 to 1")
    if not 0 <= (number := float(value)) <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value!r}; it is a share of noise, such as 0.9")
    return number


def _check_pairs(given: Any) -> tuple[tuple[float, int], ...]:
    """Return `windows_by_sigma` as tuples, or raise TypeError or ValueError."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{PAIRS}, got {given!r}")
    pairs = []
    for pair in given:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise TypeError(f"{PAIRS}, got {pair!r} in it")
        above = check_sigma("a sigma of windows_by_sigma", pair[0])
        remedy = "it is a radius in tokens; steps that attend to all tokens are above dense_above_sigma"
        pairs.append((above, check_whole_number(f"the window above sigma {above:g}", pair[1], remedy)))
    return tuple(pairs)


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
