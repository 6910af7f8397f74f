"""How commands report errors, warnings and interrupts: all in one form, with the names of options."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperCommand

# Arguments of functions whose options have other names.
OTHER_NAMES = {"image": "init_image", "metrics": "metric"}
# Values in Python, and what follows the name of an option instead.
SPELLED = {"None": " none", "True": ""}
# A call with its arguments, or a pair of names.
CALL = r"\w\([^()]*\)|\(\w+, \w+\)"


class Command(TyperCommand):
    """A command that loads the library first, quietly, and reports errors, warnings and interrupts in one form."""

    def invoke(self, context: Any) -> Any:
        with reported(context), on_interrupt(lambda: "nothing was saved"):
            with quiet_imports():
                importlib.import_module("clear_attn.cascade")
                importlib.import_module("clear_attn.demo")  # which imports a pipeline of diffusers
            return super().invoke(context)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep what libraries log and warn of while they are imported off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def reported(context: Any) -> Iterator[None]:
    """Report the errors that a user can mend as usage errors, and warnings in a line; bugs keep their traceback."""

    def show(message: Any, category: Any, *place: Any, **rest: Any) -> None:
        if category is UserWarning:
            typer.echo(f"Warning: {spell_options(str(message), option_names(context))}", err=True)
        else:
            before(message, category, *place, **rest)

    with warnings.catch_warnings():
        before, warnings.showwarning = warnings.showwarning, show
        try:
            yield
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            from clear_attn.utils.user_errors import is_user_error

            if not is_user_error(error):
                raise
            raise typer.BadParameter(spell_options(str(error), option_names(context)), ctx=context) from error


@contextlib.contextmanager
def on_interrupt(kept: Callable[[], str]) -> Iterator[None]:
    """After Ctrl-C in the block, say what is kept and end the program; the innermost block does."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; {kept()}", err=True)
        raise typer.Exit(130) from None


def option_names(context: Any) -> dict[str, str]:
    """Return the options of a command by the names of their arguments in Python."""
    options = {each.name: each.opts[0] for each in context.command.params}
    return {**{name: options[each] for name, each in OTHER_NAMES.items() if each in options}, **options}


def spell_options(message: str, options: Mapping[str, str]) -> str:
    """Write the arguments in a message as a command's options: `weights=None` as `--weights none`.

    A name counts if it has "=" or an underscore, or comes before "must". Calls stay as they are.

    Examples:
        >>> options = {"window": "--window", "weights": "--weights", "text_tokens": "--text-tokens"}
        >>> spell_options("window=9 and weights=None; linearize(pipe, window=8)", options)
        '--window 9 and --weights none; linearize(pipe, window=8)'
        >>> spell_options("weights= a folder; download=True", {**options, "download": "--download"})
        '--weights a folder; --download'
        >>> spell_options("window must be at least 1, as text_tokens; a window is a disc", options)
        '--window must be at least 1, as --text-tokens; a window is a disc'
    """

    def spell(match: re.Match[str]) -> str:
        name, value, must = match["name"], match["value"], match["must"] or ""
        if name is None or not (match["equals"] or must or "_" in name):
            return match[0]
        given = SPELLED.get(value, f" {value.strip(chr(39))}") if value else ""
        return f"{options[name]}{given}{must}"

    names = "|".join(map(re.escape, options))
    named = (
        rf"(?<![\w./-])(?P<name>{names})(?![\w/-])(?:(?P<equals>=)(?P<value>'[^']*'|[\w./-]*\w)?)?(?P<must> must\b)?"
    )
    return re.sub(rf"{CALL}|{named}", spell, message)
