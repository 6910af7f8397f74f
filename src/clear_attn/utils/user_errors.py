"""Tell errors that a user can mend from bugs, for command lines."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def is_user_error(error: BaseException) -> bool:
    """Return whether an error's message says all, so that its traceback helps nobody.

    Such are errors that a `raise` statement of this package raised, errors of files and networks, missing libraries,
    and a lack of memory. All others are bugs, here or in a library.

    Examples:
        >>> is_user_error(FileNotFoundError("no such file"))
        True
    """
    return isinstance(error, (OSError, ImportError)) or is_out_of_memory(error) or _is_raised_here(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on any device."""
    # Only CUDA has a class for this.
    out = isinstance(error, RuntimeError) and re.search("allocate memory|out of memory", str(error))
    return bool(out) or isinstance(error, MemoryError)


def _is_raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    line, file = frames[-1].line or "", Path(frames[-1].filename)
    return line.startswith("raise ") and file.is_relative_to(PACKAGE)
