"""One image on many ranks of torch.distributed, with the same result as on one."""

from clear_attn.parallel.parallelization import deparallelize, parallelize

__all__ = ["deparallelize", "parallelize"]
