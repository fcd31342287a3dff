"""What all programs have in common: options as dataclasses, and one way to fail.

A dataclass states the options of a program, once: `option()` gives a field its default and its help. `parse` makes a
command line of it, `takes` a typed function. Nothing here imports a library, so that help and errors of use are
immediate.
"""

import argparse
import dataclasses
import functools
import inspect
import math
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
O = TypeVar("O")  # noqa: E741
R = TypeVar("R")

DEBUG = "--debug"
_MISSING = dataclasses.MISSING


def option(default: Any = _MISSING, *, help: str, group: str | None = None, **argument: Any) -> Any:
    """A field of an options class; `argument` is for argparse's `add_argument`, where the field's type does not say it.

    Without a default it is required: a positional argument, unless `flag=True`. `%(default)s` in the help is replaced.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **argument})


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def size(text: str) -> tuple[int, int]:
    """'480x640' -> (480, 640): height, then width, as in tensors."""
    height, separator, width = text.partition("x")
    if not (separator and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no HEIGHTxWIDTH in pixels, such as 1024x2048")
    return int(height), int(width)


def names(text: str) -> tuple[str, ...]:
    """'road, sky' -> ('road', 'sky')."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name between its commas")
    return found


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints `error: what, what to do` and exits with 2, the status of wrong use."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def parser_of(options: type, description: str | None, prog: str | None = None) -> Parser:
    """The command line of an options class: one argument per field, in groups, defaults in the help."""
    parser = Parser(
        prog=prog, description=inspect.cleandoc(description or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(DEBUG, action="store_true", help="show the traceback of an error")
    groups: dict[str | None, Any] = {None: parser}
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        argument = dict(field.metadata)
        title, flag = argument.pop("group"), argument.pop("flag", False)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add = groups[title].add_argument
        required = field.default is _MISSING and field.default_factory is _MISSING
        argument = _by_type(hints[field.name], field.default) | argument
        if required and not flag:
            add(field.name, **({"metavar": field.name.upper()} | argument))
        else:
            argument |= {"required": True} if required else {"default": field.default}
            add(f"--{field.name.replace('_', '-')}", **argument)
    return parser


def _by_type(hint: Any, default: Any) -> dict[str, Any]:
    """What `add_argument` needs for a field of this type: bool, int, float, str, Path, Literal, any of them or None."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return {"choices": list(typing.get_args(hint))}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction if default is True else "store_true"}
    return {"type": {int: int, float: finite, Path: Path}[hint]} if hint in (int, float, Path) else {}


def parse(options: Callable[..., O], description: str | None, argv: Sequence[str], prog: str | None = None) -> O:
    """The options on a command line; exits with 2 and one line for wrong use."""
    parser = parser_of(options, description, prog)  # type: ignore[arg-type]
    values = vars(parser.parse_args(argv))
    values.pop(DEBUG.strip("-"))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return options(**values)
    except ValueError as error:
        parser.error(str(error))


def takes(options: Callable[P, O]) -> Callable[[Callable[[O], R]], Callable[P, R]]:
    """Decorates `program(options)`, so that it is called with the fields of `options`: `program(model=..., out=...)`.

    The undecorated function is its `__wrapped__`.
    """

    def decorate(function: Callable[[O], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def program(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(options(*args, **kwargs))

        program.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]
        return program

    return decorate


def run(work: Callable[[], object], debug: bool = False) -> int:
    """Does the work; the exit status: 0, 1 after printing one line of what went wrong, 130 after Ctrl-C.

    A program that has to end with another status returns it as an int. debug: errors keep their traceback.
    """
    try:
        status = work()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        expected = isinstance(error, (OSError, ValueError, ImportError, FloatingPointError))
        message = " ".join(str(error).split()) or type(error).__name__
        hint = "" if expected else f" ({type(error).__name__}, not foreseen: {DEBUG} shows where, please report it)"
        print(f"error: {message}{hint}", file=sys.stderr)
        return 1
    return status if isinstance(status, int) and not isinstance(status, bool) else 0
