"""What all commands share: options, small files, user errors on one line with status 2, an end with their launcher."""

from __future__ import annotations

import argparse
import ctypes
import difflib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Errors that the user can fix.
USER_ERRORS = (ValueError, OSError, NotImplementedError, ImportError)
LAUNCHER = "NATZOO_LAUNCHER"  # environment variable with the process id of natzoo.launch
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
# Characters that control a terminal or reverse the reading direction, and bytes of file names that are not UTF-8.
_UNPRINTABLE = re.compile("[^\\n\\t -~\u00a0-\ud7ff\ue000-\U0010ffff]|[\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def run(main: Callable[[], Any], after_interrupt: str = "") -> None:
    """Call the main function of a program and exit without a traceback on a user error or Ctrl-C.

    With NATTEN_TRACEBACK=1 in the environment, user errors print a traceback.

    Args:
        main: the function.
        after_interrupt: hint to print after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have characters that the terminal lacks
    end_with_launcher()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except USER_ERRORS as error:
        if os.environ.get("NATTEN_TRACEBACK"):
            raise
        print(printable(f"error: {_message(error)}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("; ".join(filter(None, ("interrupted", after_interrupt))), file=sys.stderr)
        sys.exit(130)


def printable(text: str) -> str:
    """Escape all characters that a terminal would interpret or cannot print, except line breaks and tabs.

    Names of files, classes and weights come from other people's data.
    """
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 epoch", "2 epochs"."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def end_with_launcher() -> None:
    """On Linux, let the kernel kill this process when torchrun dies, and the processes it forks when this one dies.

    Without this, the processes of a run whose launcher was killed train on, and data-loading workers without a run
    wait. A process that torchrun did not start is not killed.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    os.register_at_fork(after_in_child=end_with_parent)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun
        end_with_parent()
        launcher = os.environ.get(LAUNCHER)
        if launcher and os.getppid() != int(launcher):  # it died first
            sys.exit(1)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # str(error) would start with [Errno N]
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Parser without abbreviations. An error is one line; it suggests the closest option, or a better order."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self._words: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self._words = list(sys.argv[1:] if args is None else args)
        parsed = super().parse_known_args(self._words, namespace)
        option, path = self._swallowed()
        is_for_file = bool(option) and self._option_string_actions[option].nargs == "?"
        if is_for_file and os.path.isdir(path) and not any(Path(path).glob("*.pth")):  # not the folder of a run
            self.error(f"{path} is a folder")
        return parsed

    def error(self, message: str) -> NoReturn:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        words = [word.partition("=")[0] for word in self._words if word.startswith("--") and word != "--"]
        unknown = [word for word in words if word not in known]
        option, path = self._swallowed()
        if unknown:
            names = closest(unknown[0], known)
            hint = f"did you mean {' or '.join(names)}?" if names else "--help lists all options."
            message = f"{unknown[0]} is unknown; {hint}"
        elif option:
            message += f"; put {path} before {option}"
        self.exit(2, printable(f"error: {message}\n"))

    def _swallowed(self) -> tuple[str, str]:
        """Return an option and the path that it took, if the path is likely to be a missing positional argument.

        Options with an optional value or any number of values take a path that follows them.
        """
        option = ""
        for word in self._words if self._words[:1] and self._words[0].startswith("-") else ():
            if word.startswith("-"):
                action = self._option_string_actions.get(word)
                option = word if action and action.nargs in ("?", "*", "+") else ""
            elif option and os.path.exists(word):
                return option, word
        return "", ""


def closest(word: str, names: Iterable[str]) -> list[str]:
    """Return up to three names that a misspelled word may mean: names that it begins, else initials, else similar ones.

    Hyphens and underscores do not count: "--warm-up" begins "--warmup-epochs". "--learning-rate" has the initials "lr".
    """

    def initials(name: str) -> str:
        return "".join(part[0] for part in re.split("[-_]+", name) if part)

    plain = {re.sub("[-_]", "", name).lower(): name for name in names}
    key = re.sub("[-_]", "", word).lower()
    found = [name for text, name in plain.items() if text.startswith(key)]
    found = found or [name for text, name in plain.items() if initials(word) == text or initials(name) == key]
    found = found or [plain[text] for text in difflib.get_close_matches(key, plain, cutoff=0.7)]
    return found[:3]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def require_file(path: Path, remedy: str, option: str = "") -> None:
    """Raise FileNotFoundError, naming the option if there is one, unless the path is a regular file.

    Devices and FIFOs do not count: reading them may never end.
    """
    if not os.path.isfile(path):  # unlike path.is_file(), also False for a name that is too long
        is_there = os.path.exists(path)
        problem = "is a folder" if os.path.isdir(path) else "is not a regular file" if is_there else "does not exist"
        raise FileNotFoundError(f"{option} {path} {problem}; {remedy}.".lstrip())


def read_text(path: Path, remedy: str, option: str = "", limit: int = 2**24) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        remedy: what to do if it cannot be read, for the message.
        option: the option that names the file, for the message.
        limit: largest size in bytes.

    Raises:
        FileNotFoundError: if it is not a regular file.
        ValueError: if it is too large, or not text in UTF-8.
    """
    require_file(path, remedy, option)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    name = f"{option} {path}".lstrip()
    if len(content) > limit:
        raise ValueError(f"{name} has more than {limit} bytes; {remedy}.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8 (byte {error.start} is invalid); {remedy}.") from error


def read_json(path: Path, remedy: str, option: str = "", limit: int = 2**24) -> Any:
    """Read a JSON file; arguments and errors are those of `read_text`.

    Raises:
        ValueError: also if it is not valid JSON, or is nested too deeply.
    """
    text = read_text(path, remedy, option, limit)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{f'{option} {path}'.lstrip()} is not valid JSON ({error}); {remedy}.") from error


def is_relative_name(name: object) -> bool:
    """Return whether a name in someone else's file is printable, and relative without a scheme and without `..`."""
    if not isinstance(name, str) or not 0 < len(name) < 1024 or printable(name) != name or {"\n", "\t"} & set(name):
        return False
    return not scheme_of(name) and not name.startswith(("/", "~")) and ".." not in name.split("/")


def scheme_of(name: str) -> str:
    """Return the scheme of a URL in lower case, or "" for a path."""
    match = re.match("([a-zA-Z][a-zA-Z0-9+.-]*):", name)
    return match[1].lower() if match else ""


def create_folder(path: Path, option: str) -> None:
    """Create a folder and its parents.

    Raises:
        OSError: naming the option, if the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"{option} {path} cannot be created ({error.strerror}); choose another folder."
        raise OSError(error.errno, text) from error
