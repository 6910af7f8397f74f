"""The command line: `accelerate launch -m clear_attn.distill`."""

from __future__ import annotations

import sys

from accelerate import PartialState
from transformers import HfArgumentParser

from clear_attn.distill import Settings, train
from clear_attn.utils.user_errors import is_user_error


def main() -> None:
    parser = HfArgumentParser(Settings, prog="clear_attn.distill")
    settings, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"there is no option {unknown[0]}; see --help")
    try:
        folder = train(settings)
    except Exception as error:
        if not is_user_error(error):
            raise
        sys.exit(f"error: {error}")
    if PartialState().is_main_process:
        print(f"Saved {folder}: use it with clear_attn.linearize(pipe, weights={str(folder)!r})")


if __name__ == "__main__":
    main()
