"""Functions that use private names of torch. No other file uses one.

Docstrings give the versions in which a name was read. If a name is missing, the function raises an error or returns a
safe default.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

READ_IN = "2.9 to 2.14"

try:
    from torch._functorch import pyfunctorch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
    from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only
    from torch.utils._triton import has_triton as _has_triton
except ImportError as error:
    raise ImportError(
        f"torch {torch.__version__} has changed a private name that clear_attn uses ({error}); install torch {READ_IN}"
    ) from error

# None if it is missing; the log-sum-exp is then computed without it.
_CPU_FLASH_ATTENTION = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _private(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise RuntimeError(
            f"torch {torch.__version__} has no {name} on {owner!r:.80}, which clear_attn uses; install torch {READ_IN}"
        ) from None


def has_triton() -> bool:
    """Return whether torch can compile with Triton here, for FlexAttention on GPUs (torch 2.9 to 2.14)."""
    return bool(_has_triton())


def convert_interpreted_scalars(interpreter: Any) -> None:
    """Make scalars of Triton's interpreter convertible to int with NumPy 2.4, which no longer converts arrays.

    The private name is Triton's, of the version that torch installs (torch 2.9 to 2.14).
    """
    patch_tensor = _private(interpreter, "_patch_lang_tensor")

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def recompile_limit(limit: int) -> AbstractContextManager[None]:
    """Set the limit of compilations of a function inside a `with` block (torch 2.9 to 2.14)."""
    patched: AbstractContextManager[None] = _private(torch._dynamo, "config").patch(recompile_limit=limit)
    return patched


def mark_static(tensor: Tensor) -> None:
    """Mark the sizes of a tensor as constants of compiled graphs (torch 2.9 to 2.14)."""
    _private(torch._dynamo, "mark_static")(tensor)


def maybe_mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Mark one size of a tensor as variable in compiled graphs, from the first call on (torch 2.9 to 2.14)."""
    _private(torch._dynamo, "maybe_mark_dynamic")(tensor, dim)


def has_cpu_flash_attention() -> bool:
    """Return whether `cpu_flash_attention` is available (torch 2.9 to 2.14)."""
    return _CPU_FLASH_ATTENTION is not None


def cpu_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return CPU attention and its log-sum-exp, which the public function does not return (torch 2.9 to 2.14)."""
    assert _CPU_FLASH_ATTENTION is not None
    output, lse = _CPU_FLASH_ATTENTION(query, key, value, attn_mask=bias, scale=scale)
    return output, lse


def inner_tensors_of(tensor: Tensor) -> list[Tensor] | None:
    """Return the tensors in a wrapper subclass, such as a quantized one; None for other tensors (torch 2.9 to 2.14)."""
    if not is_traceable_wrapper_subclass(tensor):
        return None
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def stored_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that store a tensor: itself, or the parts of a quantized one (torch 2.9 to 2.14)."""
    inner = inner_tensors_of(tensor)
    return [tensor] if inner is None else [part for each in inner for part in stored_tensors(each)]


def version_of(tensor: Tensor) -> object:
    """Return a value that changes when a tensor is written to; new each time without a version (torch 2.9 to 2.14)."""
    try:
        return tensor._version
    except (AttributeError, RuntimeError):  # inference tensors have none
        return object()


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a tensor is inside a transform of `torch.func`, such as grad, jvp or vmap (torch 2.9 to 2.14)."""
    return bool(_private(_private(torch._C, "_functorch"), "is_functorch_wrapped_tensor")(tensor))


def outside_transforms() -> AbstractContextManager[Any]:
    """Leave the transforms of `torch.func` in a `with` block, to make tensors that outlive them (torch 2.9 to 2.14)."""
    cleared: AbstractContextManager[Any] = _private(pyfunctorch, "temporarily_clear_interpreter_stack")()
    return cleared


def unwrap_compiled(module: Any) -> Any:
    """Return the module that `torch.compile` wrapped, or the module itself (torch 2.9 to 2.14)."""
    return getattr(module, "_orig_mod", module)


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """Return the table of a module's forward pre-hooks (torch 2.9 to 2.14)."""
    hooks: dict[int, Any] = _private(module, "_forward_pre_hooks")
    return hooks


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """Return the table of a module's forward hooks (torch 2.9 to 2.14)."""
    hooks: dict[int, Any] = _private(module, "_forward_hooks")
    return hooks


def hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """Return the tables of pre-hooks, their keyword flags, hooks and their keyword flags (torch 2.9 to 2.14)."""
    names = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
    return [_private(module, name) for name in names]


def remove_forward_hooks(module: nn.Module, unwanted: Callable[[Any], bool]) -> None:
    """Remove hooks that a function selects, pre-hooks last; handles do not survive a deep copy (torch 2.9 to 2.14)."""
    pre_hooks, pre_hook_flags, hooks, hook_flags = hook_tables(module)
    for table, with_kwargs in ((hooks, hook_flags), (pre_hooks, pre_hook_flags)):
        for key in [key for key, hook in table.items() if unwanted(hook)]:
            with_kwargs.pop(key, None)
            del table[key]


def leaves_of(tree: Any) -> list[Any]:
    """Return the values inside nested lists, tuples and dicts (torch 2.9 to 2.14)."""
    return tree_leaves(tree)


def named_leaves_of(tree: Any) -> list[tuple[str, Any]]:
    """Return the values of `leaves_of`, each with its path as text, such as "['sizes'][0]" (torch 2.9 to 2.14)."""
    return [("".join(map(str, path)), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to each tensor inside nested lists, tuples and dicts (torch 2.9 to 2.14)."""
    return tree_map_only(Tensor, function, tree)


def default_store() -> Any:
    """Return the key-value store of the default process group (torch 2.9 to 2.14)."""
    return _private(torch.distributed.distributed_c10d, "_get_default_store")()


def timeout_of(group: torch.distributed.ProcessGroup) -> datetime.timedelta:
    """Return the timeout of the collectives of a process group (torch 2.9 to 2.14)."""
    device_type = _private(group, "_device_types")[0]
    timeout: datetime.timedelta = _private(_private(group, "_get_backend")(device_type).options, "_timeout")
    return timeout
