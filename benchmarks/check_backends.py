"""Compare each backend on this machine's GPU with the rule: the small case of the self-check.

Example: python benchmarks/check_backends.py --head-dim 128
"""

import argparse

import torch

from clear_attn.backends import self_check
from clear_attn.backends.selection import BACKENDS


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device, failed = torch.device(arguments.device), False
    for name in ("triton", "flex", "tiled"):
        for dtype in (torch.bfloat16, torch.float16):
            for needs_grad in (False, True):
                call = device, dtype, arguments.head_dim, needs_grad
                what = f"{name}, {dtype}, head_dim {arguments.head_dim}{', gradients' * needs_grad}"
                if reason := BACKENDS[name].unsupported_reason(*call):
                    print(f"{what}: left out, {reason}")
                elif wrong := self_check.checked(name, BACKENDS[name].attend, *call):
                    failed |= name != "flex"  # auto takes another where it fails
                    print(f"{what}: {wrong}")
                else:
                    print(f"{what}: right")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
