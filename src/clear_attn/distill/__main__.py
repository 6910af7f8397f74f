"""What `accelerate launch -m clear_attn.distill` runs."""

from __future__ import annotations

import sys

from transformers import HfArgumentParser

from clear_attn.distill import Settings, train


def main() -> None:
    (settings,) = HfArgumentParser(Settings, prog="clear_attn.distill").parse_args_into_dataclasses()
    try:
        folder = train(settings)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(f"Saved {folder}: use it with clear_attn.linearize(pipe, weights={str(folder)!r})")


if __name__ == "__main__":
    main()
