"""How far linearized weights are from the model they replace: the same prompts and seeds drawn by both, compared."""

from clear_attn.tools.evaluate.evaluation import evaluate
from clear_attn.tools.evaluate.report import Evaluation

__all__ = ["Evaluation", "evaluate"]
