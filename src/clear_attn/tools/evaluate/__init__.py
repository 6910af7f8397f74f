"""How far linearized weights are from the model they replace: the same prompts and seeds drawn by both, compared."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clear_attn.tools.evaluate.evaluation import evaluate
    from clear_attn.tools.evaluate.report import Evaluation

__all__ = ["Evaluation", "evaluate"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clear_attn.tools.evaluate import evaluation

    return getattr(evaluation, name)
