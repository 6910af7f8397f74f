"""The private names of torch that clear_attn uses, each behind one function. No other file names one.

Docstrings say in which versions a name was read. A name that is gone raises an error that says so, or gives a safe
answer where there is one.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

READ_IN = "2.9 to 2.13"

try:
    from torch._functorch import pyfunctorch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
    from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only
    from torch.utils._triton import has_triton as _has_triton
except ImportError as error:
    raise ImportError(
        f"torch {torch.__version__} has changed a private name that clear_attn uses ({error}); install torch {READ_IN}"
    ) from error

# None where it is gone: `has_cpu_flash_attention` says so, and the log-sum-exp is computed without it.
_CPU_FLASH_ATTENTION = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _private(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise RuntimeError(
            f"torch {torch.__version__} has no {name} on {owner!r:.80}, which clear_attn uses; install torch {READ_IN}"
        ) from None


def has_triton() -> bool:
    """Whether torch can compile with Triton here, for FlexAttention on GPUs (torch 2.9 to 2.13)."""
    return bool(_has_triton())


def convert_interpreted_scalars(interpreter: Any) -> None:
    """Let scalars of Triton's interpreter be ints with NumPy 2.4, which converts no array to one.

    Triton's private name, for torch of its time (torch 2.9 to 2.13).
    """
    patch_tensor = _private(interpreter, "_patch_lang_tensor")

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def recompile_limit(limit: int) -> AbstractContextManager[None]:
    """Allow a compiled function this many compilations inside a `with` block (torch 2.9 to 2.13)."""
    patched: AbstractContextManager[None] = _private(torch._dynamo, "config").patch(recompile_limit=limit)
    return patched


def mark_static(tensor: Tensor) -> None:
    """Compile the sizes of a tensor as constants (torch 2.9 to 2.13)."""
    _private(torch._dynamo, "mark_static")(tensor)


def maybe_mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Compile one size of a tensor as a variable from the first call on, for others to reuse (torch 2.9 to 2.13)."""
    _private(torch._dynamo, "maybe_mark_dynamic")(tensor, dim)


def has_cpu_flash_attention() -> bool:
    """Whether `cpu_flash_attention` is there (torch 2.9 to 2.13)."""
    return _CPU_FLASH_ATTENTION is not None


def cpu_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention on a CPU with the log-sum-exp, which the public function does not return (torch 2.9 to 2.13)."""
    assert _CPU_FLASH_ATTENTION is not None
    output, lse = _CPU_FLASH_ATTENTION(query, key, value, attn_mask=bias, scale=scale)
    return output, lse


def inner_tensors_of(tensor: Tensor) -> list[Tensor] | None:
    """The tensors that a wrapper subclass (a quantized one) is stored as; None for others (torch 2.9 to 2.13)."""
    if not is_traceable_wrapper_subclass(tensor):
        return None
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def stored_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor is stored as: itself, or a quantized one's parts (torch 2.9 to 2.13)."""
    inner = inner_tensors_of(tensor)
    return [tensor] if inner is None else [part for each in inner for part in stored_tensors(each)]


def version_of(tensor: Tensor) -> object:
    """A value that differs after a tensor was written to; never equal where torch keeps none (torch 2.9 to 2.13)."""
    try:
        return tensor._version
    except (AttributeError, RuntimeError):  # inference tensors have none
        return object()


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor is inside a transform of `torch.func`: grad, jvp, vmap and others (torch 2.9 to 2.13)."""
    return bool(_private(_private(torch._C, "_functorch"), "is_functorch_wrapped_tensor")(tensor))


def outside_transforms() -> AbstractContextManager[Any]:
    """Leave the transforms of `torch.func` for a `with` block, for tensors that outlive them (torch 2.9 to 2.13)."""
    cleared: AbstractContextManager[Any] = _private(pyfunctorch, "temporarily_clear_interpreter_stack")()
    return cleared


def unwrap_compiled(module: Any) -> Any:
    """The module that `torch.compile` wrapped, or the module itself (torch 2.9 to 2.13)."""
    return getattr(module, "_orig_mod", module)


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """The table of a module's forward pre-hooks, to find, replace and order them (torch 2.9 to 2.13)."""
    hooks: dict[int, Any] = _private(module, "_forward_pre_hooks")
    return hooks


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """The table of a module's forward hooks, to find, replace and order them (torch 2.9 to 2.13)."""
    hooks: dict[int, Any] = _private(module, "_forward_hooks")
    return hooks


def hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """All tables of forward hooks: pre-hooks, those with keywords, hooks, those with keywords (torch 2.9 to 2.13)."""
    names = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
    return [_private(module, name) for name in names]


def remove_forward_hooks(module: nn.Module, unwanted: Callable[[Any], bool]) -> None:
    """Remove hooks, pre-hooks last, by what they are: handles do not survive a deep copy (torch 2.9 to 2.13)."""
    pre_hooks, pre_marks, hooks, marks = hook_tables(module)
    for table, with_kwargs in ((hooks, marks), (pre_hooks, pre_marks)):
        for key in [key for key, hook in table.items() if unwanted(hook)]:
            with_kwargs.pop(key, None)
            del table[key]


def leaves_of(tree: Any) -> list[Any]:
    """The values inside nested lists, tuples and dicts (torch 2.9 to 2.13)."""
    return tree_leaves(tree)


def named_leaves_of(tree: Any) -> list[tuple[str, Any]]:
    """As `leaves_of`, each with its path as text, such as "['sizes'][0]" (torch 2.9 to 2.13)."""
    return [("".join(map(str, path)), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same nesting with each tensor replaced by the function of it (torch 2.9 to 2.13)."""
    return tree_map_only(Tensor, function, tree)


def default_store() -> Any:
    """The key-value store that the ranks of the default process group met in (torch 2.9 to 2.13)."""
    return _private(torch.distributed.distributed_c10d, "_get_default_store")()


def timeout_of(group: torch.distributed.ProcessGroup) -> datetime.timedelta:
    """How long the collectives of a process group wait for the other ranks (torch 2.9 to 2.13)."""
    device_type = _private(group, "_device_types")[0]
    timeout: datetime.timedelta = _private(_private(group, "_get_backend")(device_type).options, "_timeout")
    return timeout
