"""One process of a distillation on several, for tests on a CPU, where accelerate supports neither ZeRO-2 nor FSDP2.

torchrun --nproc_per_node 2 -m tests.helpers.training_worker KIND SETTINGS_AS_JSON
"""

import json
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

from clear_attn.distill import Settings, train
from clear_attn.distill import training_run as training


def set_state(**state):
    """Set what accelerate reads from the launcher's environment only on GPUs."""
    for each in (PartialState, AcceleratorState):
        each._shared_state |= state


def ddp(**options):
    return Accelerator(cpu=True, **options)


def zero2(**options):
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2), **options)
    set_state(num_processes=dist.get_world_size(), process_index=dist.get_rank())
    torch.Tensor.cuda = lambda tensor: tensor  # Prodigy sums its estimate over processes on CUDA
    return accelerator


def fsdp2(**options):
    accelerator = Accelerator(cpu=True, **options)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    set_state(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator


if __name__ == "__main__":
    kind, settings = sys.argv[1:]
    training.Accelerator = {"ddp": ddp, "zero2": zero2, "fsdp2": fsdp2}[kind]
    train(Settings(**json.loads(settings)))
