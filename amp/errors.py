"""Error handling of commands: user errors, interruptions and failing outputs are one line, never a traceback."""

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
_WORD = r"(?:token|secret|password|passwd)"  # these also occur in captions and in file names
_KEY = r"(?:api[_-]?key|secret[_-]?key|(?:access|auth|api|client|session|refresh|hf)[_-](?:token|secret|key))"
_SECRET = rf"(?:{_KEY}|{_WORD})"
_VALUE = r"[\"']?(?P<value>[^\s\"',}\])]+)"
_SECRETS = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # NAME:PASSWORD in a URL
    re.compile(
        r"://[^\s?\"'<>]+\?(?P<value>[^\s\"'<>;,)]*(?i:sig|auth|token|key|credential|secret|pass)[^\s\"'<>;,)]*)"
    ),
    re.compile(rf"(?i)(?<![\w.-])--[\w.-]*{_SECRET}[ =]+(?P<value>[^\s-]\S*)"),
    re.compile(rf"(?i){_KEY}[\"']?\s*[=:]\s*{_VALUE}"),
    re.compile(rf"(?i)(?<![\w./\\-])[\w-]*{_WORD}[\"']?\s*=\s*{_VALUE}"),
    re.compile(rf"(?i)[\"'][\w-]*{_WORD}[\"']\s*:\s*{_VALUE}"),  # JSON
    re.compile(rf"(?i)\{{\s*[\w-]*{_WORD}\s*:\s*{_VALUE}"),  # YAML on one line
    re.compile(rf"(?i)authorization[\"']?\s*[=:]\s*[\"']?(?:(?:basic|bearer|token)\s+)?{_VALUE}"),
    # In request headers; "Basic training" in a caption doesn't match.
    re.compile(r"\b(?:Basic|Bearer) (?=[\w+/.~-]*(?:[\d=]|[a-z][A-Z]))(?P<value>[\w+/=.~-]{8,})"),
    re.compile(r"\b(?:sk-|github_pat_|ghp_)[\w-]{12,}"),  # keys recognised by their prefix
    re.compile(r"\bhf_(?=[a-z]*[A-Z\d])[A-Za-z\d]{12,}(?![\w-]|\.\w)"),  # unlike hf_captions.csv
)
_SECRETS_OUTSIDE = (
    re.compile(rf"(?i)(?<![./\\]){_WORD}\s*:\s*{_VALUE}"),  # YAML and request headers
    re.compile(r"\b(?:Basic|Bearer) (?P<value>[\w+/=.~-]{8,})"),
)


class AmpError(ValueError):
    """Invalid input. The message names the file, the key, the value seen, the value expected and the next step.

    Attributes:
        messages: The messages of `Problems`, if it raised several at once.
    """

    messages: tuple[str, ...] = ()


class Problems:
    """Collects the errors of several inputs, so that one message names all of them instead of the first.

    Attributes:
        found: The messages collected so far.
    """

    SHOWN = 10

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collects an `AmpError` raised inside the block instead of passing it on."""
        try:
            yield
        except AmpError as error:
            self.found += error.messages or [str(error)]

    def check(self) -> None:
        """Raises `AmpError` with all messages, if there are any."""
        found = tuple(dict.fromkeys(self.found))  # a file that is read twice reports its error twice
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
    """Returns the error message if more is skipped than an option allows, else None.

    Args:
        where: File or folder that the skipped entries belong to.
        lost: Number skipped and total number, by the name of what is counted, such as `entries`.
        option: Name of the option, such as `--max_skipped`.
        allowed: Its value, the largest fraction of each that may be skipped.
        reasons: One text per skipped entry. The first three are shown.
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
    """Imports a package that only an extra of this project installs.

    Args:
        package: Name of the module, such as `spacy`.
        who: What needs the package, such as `the rules`.
        otherwise: What to do instead of installing the package.

    Raises:
        AmpError: The package can't be imported. The message names the extra that installs it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        error.name = error.name or package  # unnamed if a library that the package loads is missing
        if (said := missing(error, who)) is None:
            raise
        raise AmpError(f"{said}{f', or {otherwise}' if otherwise else ''}") from error


# Exit statuses, as used by shells and well-known tools.
WRONG_INPUT, NOT_WRITTEN, INTERRUPTED, PIPE_CLOSED = 2, 1, 130, 141


@contextmanager
def exit_on_error(kept: str = "") -> Iterator[None]:
    """Ends a command with a message instead of a traceback. Decorates every `main` and wraps the imports of scripts.

    | what happens inside                                | on stderr                       | exit status |
    |----------------------------------------------------|---------------------------------|-------------|
    | `AmpError`                                         | `amp search: error: ...`        | 2           |
    | an optional package is not installed               | the same, with its extra's name | 2           |
    | a file or standard output can't be read or written | the same, with the file's name  | 1           |
    | Ctrl-C                                             | `amp search: interrupted; kept` | 130         |
    | the reader of standard output is gone (`| head`)   | nothing                         | 141         |

    Characters that standard output or standard error can't encode are shown as escapes. Any other exception is a bug
    and keeps its traceback.

    Args:
        kept: What an interrupted command leaves behind, and what to do next.
    """
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    show_lost = sys.unraisablehook

    def raise_again(lost: sys.UnraisableHookArgs) -> None:
        # Python drops a Ctrl-C inside a callback that can't raise, such as that of an import lock, so raise it again.
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
            if "Original Traceback" in message:  # from a DataLoader worker, which puts its traceback before it
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
                sys.stdout.flush()  # a failure at interpreter exit could no longer be reported
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
        if name is None and full:  # errors of our own files contain their names
            name = "standard output"
            _drop_output(sys.stdout)
        if name is None or not error.strerror:
            raise
        complain(f"error: {os.fsdecode(name)}: {error.strerror}" + ("; make room and try again" if full else ""))
        raise SystemExit(NOT_WRITTEN) from None


def complain(message: str, outside: bool = True) -> None:
    """Prints `COMMAND: message` on stderr, with the command as typed and without secrets or control characters."""
    line = f"{typed_command()}: {without_secrets(message, outside)}"
    newline = "\n" if message.startswith("interrupted") and sys.stderr.isatty() else ""  # after the terminal's ^C
    with suppress(OSError):  # a full disk or a closed pipe; the exit status still shows the error
        print(newline + printable(line), file=sys.stderr, flush=True)


def typed_command() -> str:
    """The running command as it was typed: `amp search`, `launchers/train.py` or `python -m amp`."""
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
    """Discards the rest of the stream's buffer, so that interpreter exit doesn't fail on it."""
    with suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def shorten(value: object, limit: int = 80) -> str:
    """`repr(value)` on one line, cut to `limit` characters, for messages."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # deeply nested lists, or a number with thousands of digits
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str) -> str:
    """Replaces control characters by their escapes, which makes the text one line.

    Control characters in file names and captions could move the cursor, overwrite earlier output or reverse letters.
    """
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def without_secrets(text: str, outside: bool = True) -> str:
    """Replaces passwords in URLs, and values that look like or are named as keys, by `***`.

    Args:
        text: Any text.
        outside: Whether the text repeats a command line, a configuration or a server's answer. Our own messages may
            quote captions and file names, in which "password: a word" and "results.token: not found" are not secrets.
    """
    for pattern in (*_SECRETS, *(_SECRETS_OUTSIDE if outside else ())):
        text = pattern.sub(_hide, text)
    return text


def public_command(command: Sequence[str]) -> list[str]:
    """A command line without secrets, to be stored in a file next to the data."""
    after_secret = [False, *(bool(re.fullmatch(rf"(?i)--[\w.-]*{_SECRET}", part)) for part in command)]
    return [_HIDDEN if hide else without_secrets(part) for part, hide in zip(command, after_secret, strict=False)]


def _hide(match: re.Match) -> str:
    if "value" not in match.re.groupindex:
        return _HIDDEN
    return match[0].removesuffix(match["value"]) + _HIDDEN


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
