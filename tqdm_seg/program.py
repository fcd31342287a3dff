"""What all programs have in common: options as dataclasses, and one way to fail.

A dataclass states the options of a program, once: `option()` gives a field its default and its help. `parse` makes a
command line of it, `takes` a typed function. Nothing here imports a library, so that help and errors of use are
immediate.
"""

import argparse
import dataclasses
import difflib
import errno
import functools
import inspect
import math
import numbers
import re
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
LONGEST = 300  # characters of an error
LARGEST = 2**63
LONGEST_SIDE = 32768  # pixels of an image
_MISSING = dataclasses.MISSING


def option(default: Any = _MISSING, *, help: str, group: str | None = None, **argument: Any) -> Any:
    """A field of an options class; `argument` is for argparse's `add_argument`, where the field's type does not say it.

    Without a default it is required: a positional argument, unless `flag=True`; `positional=True` is for one that may
    be left out. The help gets "(default: ...)", unless it speaks of a default itself. A field `from_` is `--from`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **argument})


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def whole(text: str) -> int:
    """A whole number that fits into 64 bits."""
    value = int(text)
    if abs(value) >= LARGEST:
        raise argparse.ArgumentTypeError(f"{cut(text, 30)} is too large; expected a number below 2**63")
    return value


def filled(text: str) -> str:
    """A text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text; give a value or leave it out")
    return text


def path(text: str) -> Path:
    """A path, which '' is not: it would be the working directory."""
    return Path(filled(text))


def size(text: str) -> tuple[int, int]:
    """'480x640' -> (480, 640): height, then width, as in tensors."""
    height, separator, width = text.partition("x")
    if not (separator and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no HEIGHTxWIDTH in pixels, such as 1024x2048")
    if max(len(height), len(width)) > 5 or max(int(height), int(width)) > LONGEST_SIDE:
        raise argparse.ArgumentTypeError(f"{cut(text)} is larger than {LONGEST_SIDE} pixels a side; choose less")
    return int(height), int(width)


def names(text: str) -> tuple[str, ...]:
    """'road, sky' -> ('road', 'sky')."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name between its commas")
    if len({*found}) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} has a name twice; give each one once")
    return found


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints `error: what, what to do` and exits with 2, the status of wrong use."""
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            message += did_you_mean(unknown[1], list(self._option_string_actions))
        help_ = f"; see {self.prog} --help"
        self.exit(2, f"error: {readable(message, LONGEST - len(help_))}{help_}\n")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """' (did you mean X?)' with the nearest of the known words, or nothing."""
    return "".join(f" (did you mean {near}?)" for near in difflib.get_close_matches(word, known, 1))


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def cut(text: object, length: int = 60) -> str:
    """The text on one line, no longer than `length`."""
    line = one_line(str(text))
    return line if len(line) <= length else line[: length - 3] + "..."


def readable(text: str, length: int = LONGEST) -> str:
    """The text on one line of readable length: its begin, which says what, and its end, which says what to do."""
    line, half = one_line(text), length // 2 - 3
    return line if len(line) <= length else f"{line[:half]} ... {line[-half:]}"


def parser_of(options: type, description: str | None, prog: str | None = None) -> Parser:
    """The command line of an options class: one argument per field, in groups, defaults in the help."""
    parser = Parser(
        prog=prog, description=inspect.cleandoc(description or ""), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(DEBUG, action="store_true", help="show the traceback of an error")
    groups: dict[str | None, Any] = {None: parser}
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        argument = dict(field.metadata)
        argument["help"] = re.sub(r"%(?![(%])", "%%", argument["help"])
        title, flag = argument.pop("group"), argument.pop("flag", False)
        optional = {"nargs": "?", "default": field.default} if argument.pop("positional", False) else {}
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add = groups[title].add_argument
        required = field.default is _MISSING and field.default_factory is _MISSING
        guessed = _by_type(hints[field.name], field.default)
        if "type" in argument:  # it takes the whole text
            guessed.pop("nargs", None)
        argument = guessed | argument
        if (required and not flag) or optional:
            add(field.name, **({"metavar": field.name.upper()} | optional | argument))
            continue
        if "choices" not in argument and argument.get("action", "extend") == "extend":
            argument.setdefault("metavar", _metavar(field.name, argument))
        argument["help"] += _shown_default(field.default, argument)
        argument |= {"required": True} if required else {"default": field.default}
        add(f"--{field.name.rstrip('_').replace('_', '-')}", dest=field.name, **argument)
    return parser


def _metavar(name: str, argument: dict[str, Any]) -> str:
    """What stands for an option's value in its help: by its type, else the last word of its name."""
    by_type = {whole: "N", int: "N", finite: "X", path: "FILE", size: "HxW", names: "A,B,..."}
    return "DIR" if name == "out" else by_type.get(argument.get("type"), name.split("_")[-1].upper())


def _shown_default(default: Any, argument: dict[str, Any]) -> str:
    """' (default: 3)', or nothing where the help says it or there is nothing to say."""
    if default in (_MISSING, None, "", ()) or isinstance(default, bool) or "default" in argument["help"]:
        return ""
    if isinstance(default, tuple):
        default = ("x" if argument.get("type") is size else " " if "nargs" in argument else ",").join(map(str, default))
    return f" (default: {default})".replace("%", "%%")


def _parts(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _by_type(hint: Any, default: Any = None) -> dict[str, Any]:
    """What `add_argument` needs for a field of this type: bool, int, float, str, Path, Literal, tuples, any or None."""
    hint = next(part for part in _parts(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return {"choices": list(typing.get_args(hint))}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", **_by_type(typing.get_args(hint)[0])}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction if default is True else "store_true"}
    return {"type": {int: whole, float: finite, Path: path, str: filled}[hint]}


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

    A text does for a path, and a list or one item for a tuple. The undecorated function is its `__wrapped__`.
    """

    def decorate(function: Callable[[O], R]) -> Callable[P, R]:
        hints = typing.get_type_hints(options)
        all_fields = dataclasses.fields(options)  # type: ignore[arg-type]
        required = {field.name for field in all_fields if field.default is not None}
        needed = [field.name for field in all_fields if field.default is _MISSING]
        lists = {field.name for field in all_fields if field.metadata.get("type") is names}

        @functools.wraps(function)
        def program(*args: P.args, **kwargs: P.kwargs) -> R:
            fields: Any = {name: _as_typed(name, v, hints[name]) if name in hints else v for name, v in kwargs.items()}
            for name in lists & fields.keys():
                if fields[name] and len({*fields[name]}) < len(fields[name]):
                    raise ValueError(f"{name} has a name twice: {cut(', '.join(fields[name]))}; give each one once")
            if empty := sorted(required & {name for name, value in fields.items() if value == ()}):
                raise ValueError(f"{empty[0]} is empty; name at least one")
            if missing := [name for name in needed if name not in fields]:
                raise TypeError(f"{function.__name__}() needs {', '.join(missing)}; give each by its name")
            try:
                return function(options(*args, **fields))
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    words = "file name too long, choose a shorter one"
                    raise OSError(error.errno, words, cut(error.filename or "")) from error
                raise

        program.__signature__ = inspect.signature(options).replace(  # type: ignore[attr-defined]
            return_annotation=inspect.signature(function).return_annotation
        )
        return program

    return decorate


def _as_typed(name: str, value: Any, hint: Any) -> Any:
    """The value as the field's type has it; raises ValueError, naming the field, for one of another type."""
    parts = _parts(hint)
    if value is None and type(None) in parts:
        return None
    for part in parts:
        found = _fitting(name, value, part)
        if found is not None:
            return found
    raise ValueError(f"{name} is {cut(repr(value))}; expected {' or '.join(filter(None, map(_kind, parts)))}")


def _fitting(name: str, value: Any, part: Any) -> Any:
    """The value as this one type, or None where it is of another."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if typing.get_origin(part) is tuple:
        kind, *rest = typing.get_args(part)
        items = [value] if isinstance(value, str | Path) else value
        if not isinstance(items, list | tuple) or (rest == [kind] and len(items) != 2):
            return None
        found = tuple(_as_typed(name, item, kind) for item in items)
        return None if rest == [kind] and not 1 <= min(found) <= max(found) <= LONGEST_SIDE else found
    if part is Path:
        return Path(value) if isinstance(value, Path) or (isinstance(value, str) and value.strip()) else None
    fits = {
        bool: isinstance(value, bool),
        int: number and isinstance(value, numbers.Integral) and abs(value) < LARGEST,
        float: number and math.isfinite(value),
        str: isinstance(value, str) and bool(value.strip()),
    }.get(part, isinstance(value, str) and value in typing.get_args(part))
    return value if fits else None


def _kind(part: Any) -> str:
    """What a value of this type is, in words."""
    if typing.get_origin(part) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(part)))}"
    if typing.get_origin(part) is tuple:
        kind, rest = typing.get_args(part)
        return f"(height, width), both from 1 to {LONGEST_SIDE}" if rest is kind else f"a list of {_kind(kind)}"
    words = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a text", Path: "a path"}
    return words.get(part, "")


# Options that lower the memory a program needs, where it has them.
_SAVES_MEMORY = ("batch_size", "window_batch", "crop", "window", "size", "workers")


def run(work: Callable[[], object], debug: bool = False, options: object = None) -> int:
    """Does the work; the exit status: 0, 1 after printing one line of what went wrong, 130 after Ctrl-C.

    A program that has to end with another status returns it as an int. debug: errors keep their traceback. options: of
    the program, for the advice where memory runs out.
    """
    try:
        status = work()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"error: {explain(error, options)}", file=sys.stderr)
        return 1
    return status if isinstance(status, int) and not isinstance(status, bool) else 0


def explain(error: Exception, options: object = None) -> str:
    """What went wrong, on one line."""
    text = _WORKER_TRACEBACK.sub("", str(error))
    message = readable(text, LONGEST - 60) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        what = "file not found" if isinstance(error, FileNotFoundError) else error.strerror
        return readable(f"{what}: {error.filename}{_FIXES.get(type(error), '')}")
    if _out_of_memory(error):
        lower = [f"--{name.replace('_', '-')}" for name in _SAVES_MEMORY if hasattr(options, name)]
        advice = f"lower {', '.join(lower)}" if lower else "choose a smaller model"
        return f"probably out of memory ({message}); {advice}, or use a larger device"
    if isinstance(error, OSError | ValueError | ImportError | FloatingPointError):
        return readable(text) or message
    return f"{message} ({type(error).__name__}, not foreseen: {DEBUG} shows where, please report it)"


# What torch's DataLoader puts before the message of an error in one of its workers.
_WORKER_TRACEBACK = re.compile(r"Caught \w+ in DataLoader worker process.*\n[\w.]+: ", re.DOTALL)
_FIXES = {
    IsADirectoryError: "; name a file", NotADirectoryError: "; name a folder", FileExistsError: "; choose another name",
    PermissionError: "; change its permissions or choose another place",
}  # fmt: skip


def _out_of_memory(error: Exception) -> bool:
    """Python's error, torch's, and what torch's CPU allocator, OpenCV's and a failed cuBLAS handle say."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(
        words in str(error) for words in ("can't allocate memory", "Insufficient memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
