"""How far linearized weights are from the model they replace: the same prompts and seeds drawn by both, compared."""

from clear_attn.evaluate.report import Evaluation
from clear_attn.evaluate.run import evaluate

__all__ = ["Evaluation", "evaluate"]
