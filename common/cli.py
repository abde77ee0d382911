"""Command lines: flags made from a dataclass, and errors that end in one line."""

import argparse
import contextlib
import copy
import functools
import io
import math
import os
import signal
import sys
import textwrap
from dataclasses import field, fields


class UserError(ValueError):
    """A mistake that a user can correct: the programs print it as one line, without a traceback."""


@contextlib.contextmanager
def expecting(what, form: str):
    """Turns whatever a file or model of another form raises into one line for the user."""
    try:
        yield
    except Exception as error:
        # A file that cannot be opened is named already. (Those of transformers have no number.)
        if isinstance(error, UserError) or getattr(error, "errno", None):
            raise
        # On one line, and cut, since some of transformers list every class that it has.
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise UserError(f"{what}: expected {form} ({reason})") from None


@functools.cache
def note(text: str):
    """Prints a line on stderr, once however often it is called."""
    # stderr may lie on the full disk that the note is about.
    with contextlib.suppress(OSError):
        print(f"note: {text}", file=sys.stderr, flush=True)


def flag(default, help: str, choices=(), low=-math.inf, high=math.inf, positional=False):
    """A field of a dataclass that is also a command-line flag, whose type is that of the default.

    A number must be within low .. high; a default of "" means "not given" and is valid.
    """
    rules = dict(default=default, help=help, choices=choices, low=low, high=high,
                 positional=positional)
    # A copy, since a list would be shared by all instances.
    return field(default_factory=lambda: copy.copy(default), metadata=rules)


def flag_name(flag_field) -> str:
    return "--" + flag_field.name.replace("_", "-")


def check_ranges(cfg):
    """Raises UserError if a value is none of its flag's choices, or a number out of its range."""
    for flag_field in fields(cfg):
        value, rules = getattr(cfg, flag_field.name), flag_field.metadata
        valid, expected = True, f"{rules['low']} to {rules['high']}"
        if rules["choices"]:
            valid = value in rules["choices"] or value == rules["default"]
            expected = ", ".join(rules["choices"])
        elif isinstance(value, (int, float)):
            # NaN and infinity are no settings, whatever the range.
            valid = math.isfinite(value) and rules["low"] <= value <= rules["high"]
        if not valid:
            raise UserError(f"{flag_name(flag_field)} {value}: expected {expected}")


def parse_config(cls, argv=None, recipes={}):
    """An instance of the dataclass `cls`, whose fields are `flag`s, from the command line.

    Given flags win over recipes[name], which wins over the defaults. The name is the given
    --recipe, or else the given --data. Raises UserError if the line does not fit.
    """
    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A flag that is not given stays absent, so that it overrides no recipe.
        argument_default=argparse.SUPPRESS)
    parser.error = refuse
    for flag_field in fields(cls):
        rules = flag_field.metadata
        default, help = rules["default"], rules["help"]
        if default not in ("", []):
            help += f" (default: {default})"
        options = {"help": help.replace("%", "%%")}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, list):
            options["nargs"] = "*" if rules["positional"] else "+"
        else:
            options.update(type=type(default), choices=rules["choices"] or None)
        name = flag_field.name if rules["positional"] else flag_name(flag_field)
        parser.add_argument(name, **options)
    given = vars(parser.parse_args(argv))
    recipe = recipes.get(given.get("recipe") or given.get("data"), {})
    cfg = cls(**{**recipe, **given})
    check_ranges(cfg)
    return cfg


# torch raises these as RuntimeErrors. {what their text contains: what is printed, "" for the text}
ENVIRONMENT_ERRORS = {
    "by peer": "another rank ended; see its message",
    "shared memory": "/dev/shm is too small for loader workers: in Docker give --ipc=host; "
                     "--workers 0 needs none",
    "invalid device ordinal": "there are fewer GPUs than processes: lower --nproc_per_node",
    "C++ compiler": "--compile needs a C++ compiler, such as g++",
    "DataLoader worker (pid": "",
    "out of memory": "",
    "allocate memory": ""}


def run(program):
    """Calls a program's main(). What a user can cause ends in one line on stderr and status 2,
    Ctrl-C in status 130, a bug in a traceback."""
    # A terminal may not know every character of a caption or token. stdout is None if it is closed,
    # and another object in a notebook.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # A program may have let Ctrl-C end its imports without a traceback.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 2
    try:
        program()
        # A full disk shows here rather than at exit.
        if sys.stdout is not None:
            sys.stdout.flush()
        return
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (UserError, OSError, ImportError) as error:
        message = str(error)
    except MemoryError:
        message = "out of memory"
    except RuntimeError as error:
        known = [line for text, line in ENVIRONMENT_ERRORS.items() if text in str(error)]
        if not known:
            raise
        message = known[0] or str(error)
    # An error in a loader worker arrives as the text of its traceback, whose last line tells.
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].rpartition("UserError: ")[2]
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"{rank}error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(status)
