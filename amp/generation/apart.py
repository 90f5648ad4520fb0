"""The rules in a process of their own, which loads spaCy while this process loads PyTorch."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from amp.errors import AmpError
from amp.imports import left_out, loading

if TYPE_CHECKING:
    from amp.knowledge.schema import Knowledge


class RulesProcess:
    """Generates the knowledge of captions by rules in another process, like `KnowledgeGenerator("rules")` in this one.

    The process begins to load when the object is made, and ends with it or with this process. Make the object in the
    main thread, before PyTorch is imported.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        # A new process inherits ignored signals. So Ctrl-C in a terminal ends only this process, which ends the other.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()
        self._loaded = False

    def check(self) -> None:
        """Waits until the rules are loaded.

        Raises:
            AmpError: spaCy or its model can't be loaded.
        """
        if not self._loaded:
            self._receive()
            self._loaded = True

    def __call__(self, captions: Sequence[str]) -> list[Knowledge]:
        """Returns the knowledge of each caption.

        Raises:
            AmpError: The rules can't be loaded, or the process has ended.
        """
        self.check()
        try:
            self._pipe.send(list(captions))
        except ConnectionError:
            raise _ended() from None
        return self._receive()

    def _receive(self):
        try:
            found = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise _ended() from None
        if isinstance(found, AmpError):
            raise found
        return found


def _ended() -> AmpError:
    return AmpError(
        "the process of the rules has ended, expected it to run as long as this one; it may have been killed for lack "
        "of memory; run the command again, or search with --knowledge none"
    )


def _serve(pipe: Connection) -> None:
    """Loads the rules, says so, and answers lists of captions until the other end of the pipe is closed."""
    from amp.generation.query import KnowledgeGenerator

    with suppress(EOFError, ConnectionError):  # the other process has ended
        try:
            # spaCy imports PyTorch if it is installed, but the rules don't need it.
            with loading(), left_out("torch"):
                generate = KnowledgeGenerator("rules")
        except AmpError as error:
            pipe.send(error)
            return
        pipe.send(None)
        while True:
            pipe.send(generate(pipe.recv()))
