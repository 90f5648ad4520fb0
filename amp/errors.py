"""How a command ends: errors that a user can fix, interruptions and failing outputs are one line, never a traceback."""

from __future__ import annotations

import errno
import math
import os
import re
import select
import sys
import threading
import unicodedata
from _thread import interrupt_main
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TextIO

from amp.extras import missing

_HIDDEN = "***"
_WORD = r"(?:token|secret|password|passwd)"  # also words of captions, and endings of file names
_KEY = r"(?:api[_-]?key|secret[_-]?key|(?:access|auth|api|client|session|refresh|hf)[_-](?:token|secret|key))"
_SECRET = rf"(?:{_KEY}|{_WORD})"
_VALUE = r"[\"']?(?P<value>[^\s\"',}\])]+)"
_SECRETS = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # NAME:PASSWORD of an address
    re.compile(rf"(?i)(?<![\w.-])--[\w.-]*{_SECRET}[ =]+(?P<value>[^\s-]\S*)"),
    re.compile(rf"(?i){_KEY}[\"']?\s*[=:]\s*{_VALUE}"),
    re.compile(rf"(?i)(?<![\w./\\-])[\w-]*{_WORD}[\"']?\s*=\s*{_VALUE}"),
    re.compile(rf"(?i)[\"'][\w-]*{_WORD}[\"']\s*:\s*{_VALUE}"),  # JSON
    re.compile(rf"(?i)\{{\s*[\w-]*{_WORD}\s*:\s*{_VALUE}"),  # YAML on one line
    re.compile(rf"(?i)authorization[\"']?\s*[=:]\s*[\"']?(?:(?:basic|bearer|token)\s+)?{_VALUE}"),
    # Of a request's head; "Basic training" in a caption is none.
    re.compile(r"\b(?:Basic|Bearer) (?=[\w+/.~-]*(?:[\d=]|[a-z][A-Z]))(?P<value>[\w+/=.~-]{8,})"),
    re.compile(r"\b(?:sk-|github_pat_|ghp_)[\w-]{12,}"),  # keys that can be told by their beginning
    re.compile(r"\bhf_(?=[a-z]*[A-Z\d])[A-Za-z\d]{12,}(?![\w-]|\.\w)"),  # unlike hf_captions.csv
)
_SECRETS_OUTSIDE = (
    re.compile(rf"(?i)(?<![./\\]){_WORD}\s*:\s*{_VALUE}"),  # YAML and heads of requests
    re.compile(r"\b(?:Basic|Bearer) (?P<value>[\w+/=.~-]{8,})"),
)


class AmpError(ValueError):
    """Wrong input. The message names the file, the key, the value seen, the value expected and the next step.

    Attributes:
        messages: Those of `Problems`, where several are said at once.
    """

    messages: tuple[str, ...] = ()


class Problems:
    """Errors of several inputs, so that one message names all of them instead of the first.

    Attributes:
        found: The messages so far.
    """

    SHOWN = 10

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keeps an :class:`AmpError` raised inside instead of letting it pass."""
        try:
            yield
        except AmpError as error:
            self.found += error.messages or [str(error)]

    def check(self) -> None:
        """Raises AmpError with all messages, if there is any."""
        found = tuple(dict.fromkeys(self.found))  # one file may be read for two purposes
        if len(found) == 1:
            raise AmpError(found[0])
        if found:
            more = len(found) - self.SHOWN
            listed = "; ".join(f"({n}) {text}" for n, text in enumerate(found[: self.SHOWN], start=1))
            error = AmpError(f"{len(found)} errors: {listed}{f'; and {more} more' if more > 0 else ''}")
            error.messages = found
            raise error


def too_many_skipped(
    where: object, lost: dict[str, tuple[int, int]], option: str, allowed: float, reasons: Sequence[str], note: str = ""
) -> str | None:
    """What to say if more is skipped than an option allows; None if it is not.

    Args:
        where: File or folder that the skipped entries belong to.
        lost: How many are skipped, and of how many, by what they are called, such as ``entries``.
        option: Name of the option, such as ``--max_skipped``.
        allowed: Its value, the largest fraction of each that may be skipped.
        reasons: Why, one text per skipped entry. The first three are shown.
        note: A clause after the counts, such as what was not written.
    """
    shares = {what: count / total if total else 0.0 for what, (count, total) in lost.items()}
    worst = max(shares.values())
    if worst <= allowed:
        return None
    counts = " and ".join(f"{n:,} of {of:,} {what} ({shares[what]:.2%})" for what, (n, of) in lost.items() if n)
    allow = f", or allow it with {option} {math.ceil(worst * 100) / 100:g}" if worst < 1 else ""
    clauses = [
        f"{where}: {counts} can't be used, above {option} {allowed:g}",
        note,
        f"first: {'; '.join(reasons[:3])}",
        f"correct the input{allow}",
    ]
    return "; ".join(clause for clause in clauses if clause)


def require(package: str, who: str, otherwise: str = "") -> ModuleType:
    """Imports a package that only an extra installs.

    Args:
        package: Name of the module, such as ``spacy``.
        who: What needs it, such as ``the rules``.
        otherwise: What to do without the package.

    Raises:
        AmpError: The package can't be imported. The message names the extra that installs it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        error.name = error.name or package  # a library that the package loads is missing
        if (said := missing(error, who)) is None:
            raise
        raise AmpError(f"{said}{f', or {otherwise}' if otherwise else ''}") from error


# Exit statuses, those of shells and well-known tools.
WRONG_INPUT, NOT_WRITTEN, INTERRUPTED, PIPE_CLOSED = 2, 1, 130, 141


@contextmanager
def exit_on_error(kept: str = "") -> Iterator[None]:
    """Ends a command in words: the decorator of every `main`, and the block around a script's imports.

    | what happens inside                                   | on stderr                          | exit status |
    |-------------------------------------------------------|------------------------------------|-------------|
    | :class:`AmpError`                                     | ``amp search: error: ...``         | 2           |
    | a package of an extra is not installed                | the same, with the extra's name    | 2           |
    | a file, or standard output, can't be read or written  | the same, with the file's name     | 1           |
    | Ctrl-C                                                | ``amp search: interrupted; kept``  | 130         |
    | nobody reads standard output any more (``| head``)    | nothing                            | 141         |

    Characters that standard output or standard error can't encode are shown as escapes. Any other exception is a defect
    of the program and keeps its traceback.

    Args:
        kept: What an interrupted command leaves behind, and what to do next.
    """
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    show_lost = sys.unraisablehook

    def raise_again(lost: sys.UnraisableHookArgs) -> None:
        # Ctrl-C in a callback that can't pass it on, such as that of an import's lock: without this it would be lost.
        if lost.exc_type is KeyboardInterrupt:
            timer = threading.Timer(0.05, interrupt_main)
            timer.daemon = True
            timer.start()
        else:
            show_lost(lost)

    sys.unraisablehook = raise_again
    try:
        try:
            yield
        except AmpError as error:
            message = str(error)
            if "Original Traceback" in message:  # from a DataLoader's worker, which passes it on below a traceback
                message = message.rstrip().splitlines()[-1].partition(": ")[2]
            complain(f"error: {message}", outside=False)
            raise SystemExit(WRONG_INPUT) from None
        except ModuleNotFoundError as error:
            if (said := missing(error)) is None:
                raise
            complain(f"error: {said}")
            raise SystemExit(WRONG_INPUT) from None
        except KeyboardInterrupt:
            complain(f"interrupted; {kept}" if kept else "interrupted")
            raise SystemExit(INTERRUPTED) from None
        finally:
            sys.unraisablehook = show_lost
            if sys.stdout is not None:
                sys.stdout.flush()  # at the interpreter's own end a failure could no longer be reported
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
        if not gone:  # another pipe, such as one to a worker
            raise
        for stream in gone:
            _drop_output(stream)
        raise SystemExit(PIPE_CLOSED) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        name = error.filename
        if name is None and full:  # our files have their names in the error
            name = "standard output"
            _drop_output(sys.stdout)
        if name is None or not error.strerror:
            raise
        complain(f"error: {os.fsdecode(name)}: {error.strerror}" + ("; make room and try again" if full else ""))
        raise SystemExit(NOT_WRITTEN) from None


def complain(message: str, outside: bool = True) -> None:
    """Prints ``COMMAND: message`` on stderr, the command as it was typed, without secrets and control characters."""
    line = f"{typed_command()}: {without_secrets(message, outside)}"
    newline = "\n" if message.startswith("interrupted") and sys.stderr.isatty() else ""  # after the terminal's ^C
    with suppress(OSError):  # a full disk or a closed pipe; the exit status still tells
        print(newline + printable(line), file=sys.stderr, flush=True)


def typed_command() -> str:
    """The running command as it was typed: ``amp search``, ``launchers/train.py`` or ``python -m amp``."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None and sys.argv[0] == module.origin:
        name = f"python -m {module.name.removesuffix('.__main__')}"
    else:
        program = Path(sys.argv[0])
        name = str(program) if program.suffix == ".py" else program.stem
    if name in ("amp", "python -m amp") and len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        name += f" {sys.argv[1]}"
    return printable(name)


def _has_no_reader(stream: TextIO | None) -> bool:
    try:
        waiting = select.poll()
        waiting.register(stream.fileno(), select.POLLOUT)  # type: ignore[union-attr]
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in waiting.poll(0))
    except (AttributeError, OSError, ValueError):  # no stream, or one without a descriptor
        return False


def _drop_output(stream: TextIO | None) -> None:
    """Sends what is left in the stream's buffer nowhere, so that the interpreter's end doesn't fail over it."""
    with suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def shorten(value: object, limit: int = 80) -> str:
    """``repr(value)`` on one line, cut to ``limit`` characters: how a message shows the value that was seen."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # lists in lists in lists; a number of thousands of digits
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str) -> str:
    """One line without control characters: those in file names and captions could move the cursor, change what was
    printed before, or reverse the order of letters; each is shown as its escape."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def without_secrets(text: str, outside: bool = True) -> str:
    """The text with passwords in addresses, and what is named or looks like a key, replaced by ``***``.

    Args:
        text: Any text.
        outside: Whether it repeats a command line, a configuration or a server's answer. Messages of our own may quote
            captions and file names, in which "password: a word" and "results.token: not found" are no secrets.
    """
    for pattern in (*_SECRETS, *(_SECRETS_OUTSIDE if outside else ())):
        text = pattern.sub(_hide, text)
    return text


def public_command(command: Sequence[str]) -> list[str]:
    """A command line fit to be kept in a file beside the data: without secrets."""
    after_secret = [False, *(bool(re.fullmatch(rf"(?i)--[\w.-]*{_SECRET}", part)) for part in command)]
    return [_HIDDEN if hide else without_secrets(part) for part, hide in zip(command, after_secret, strict=False)]


def _hide(match: re.Match) -> str:
    if "value" not in match.re.groupindex:
        return _HIDDEN
    return match[0].removesuffix(match["value"]) + _HIDDEN


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
