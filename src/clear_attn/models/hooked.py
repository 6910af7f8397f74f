"""Hooks inside a transformer, on the output of a module or the result of a method."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from clear_attn.utils._torch import forward_hooks, remove_forward_hooks


class InnerHook(Protocol):
    """A hook inside a transformer, which its entry hook finds by `ModelAdapter.inner_hooks`."""

    @property
    def module(self) -> nn.Module:
        """The module that the hook is on."""

    @property
    def hook(self) -> Callable[..., Any]:
        """The function that is called."""

    @property
    def name(self) -> str:
        """What the hook is on, for errors."""

    def installed(self) -> bool:
        """Return whether the hook is in place."""

    def install(self) -> None:
        """Put the hook in place."""

    def remove(self) -> None:
        """Take the hook away, if it is in place."""


class OutputHook(NamedTuple):
    """A forward hook on the output of a module."""

    module: nn.Module
    hook: Callable[..., Any]

    @property
    def name(self) -> str:
        return f"a {type(self.module).__name__}"

    def installed(self) -> bool:
        return any(hook is self.hook for hook in forward_hooks(self.module).values())

    def install(self) -> None:
        self.module.register_forward_hook(self.hook)

    def remove(self) -> None:
        remove_forward_hooks(self.module, functools.partial(operator.is_, self.hook))


class MethodHook(NamedTuple):
    """A hook on the result of a method, for a step that no module of the model makes.

    The hook is a function of the module, the method's arguments by name, and its result, and returns another result.
    """

    module: nn.Module
    method: str
    hook: Callable[..., Any]

    @property
    def name(self) -> str:
        return f"the method {self.method}"

    def installed(self) -> bool:
        present = vars(self.module).get(self.method)
        return isinstance(present, HookedMethod) and present.hook is self.hook

    def install(self) -> None:
        setattr(self.module, self.method, HookedMethod(*self))

    def remove(self) -> None:
        if self.installed():
            delattr(self.module, self.method)


class HookedMethod:
    """The method of a module that `MethodHook` installs on the instance; a copy of the module has its own."""

    def __init__(self, module: nn.Module, method: str, hook: Callable[..., Any]) -> None:
        self.module, self.method, self.hook = module, method, hook

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.module), self.method)
        arguments = inspect.signature(method).bind(self.module, *args, **kwargs).arguments
        return self.hook(self.module, arguments, method(self.module, *args, **kwargs))
