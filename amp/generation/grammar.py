"""Grammars of the replies, in the two notations that engines accept: a regex and GBNF.

A reply to Q1 is the line `none`, or one line per triplet with subject, action and object (`-` for no object)::

    action: girl | climbs | stairs
    attribute: girl | is | little

A reply to Q2 is one numbered line per triplet. Either may end with an empty line: a model without chat turns ends its
reply this way, a chat model with its own token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

COPULAS = ("is", "are", "wearing", "has", "with")
"""Words that the action of an attribute may use without being in the caption: "a red ball" -> ball | is | red."""

MAX_WORDS_IN_SLOT = 4


@dataclass(frozen=True, slots=True)
class TripletGrammar:
    """Replies to Q1.

    Attributes:
        words: Words that slots may hold: those of the caption, at least one.
        max_triplets: Maximum number of lines.
    """

    words: tuple[str, ...]
    max_triplets: int

    def regex(self) -> str:
        """Matches the whole reply, in the dialects of Rust and Python."""
        word = f"({'|'.join(map(_escape, self.words))})"
        action_word = f"({word}|{'|'.join(COPULAS)})"
        phrase = _phrase(word)
        attribute = rf"attribute: {phrase} \| {_phrase(action_word)} \| {phrase}"
        line = rf"(action: {phrase} \| {phrase} \| (-|{phrase})|{attribute})"
        return rf"(none|{line}(\n{line}){{0,{self.max_triplets - 1}}})(\n\n)?"

    def gbnf(self) -> str:
        """The same for llama.cpp."""
        word = " | ".join(map(_quote, self.words))
        copulas = " | ".join(map(_quote, COPULAS))
        return "\n".join(
            (
                rf'root ::= ("none" | line ("\n" line){{0,{self.max_triplets - 1}}}) "\n\n"?',
                'line ::= "action: " phrase " | " phrase " | " ("-" | phrase) | '
                '"attribute: " phrase " | " verb " | " phrase',
                f'phrase ::= word (" " word){{0,{MAX_WORDS_IN_SLOT - 1}}}',
                f'verb ::= (word | {copulas}) (" " (word | {copulas})){{0,{MAX_WORDS_IN_SLOT - 1}}}',
                f"word ::= {word}",
            )
        )


@dataclass(frozen=True, slots=True)
class StateGrammar:
    """Replies to Q2.

    Attributes:
        count: Number of triplets, one line each.
        max_characters: Maximum length of a state.
    """

    count: int
    max_characters: int = 160

    def regex(self) -> str:
        """Matches the whole reply, in the dialects of Rust and Python."""
        state = rf"[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]{{7,{self.max_characters - 1}}}"
        return r"\n".join(rf"{number}\. {state}" for number in range(1, self.count + 1)) + r"(\n\n)?"

    def gbnf(self) -> str:
        """The same for llama.cpp."""
        lines = r' "\n" '.join(f'"{number}. " state' for number in range(1, self.count + 1))
        return (
            rf'root ::= {lines} "\n\n"?' + "\n"
            rf"state ::= [^ \x00-\x1f\x7f] [^\x00-\x1f\x7f]{{7,{self.max_characters - 1}}}"
        )


Grammar = TripletGrammar | StateGrammar


def _phrase(word: str) -> str:
    return rf"{word}( {word}){{0,{MAX_WORDS_IN_SLOT - 1}}}"


def _escape(text: str) -> str:
    """Like `re.escape`, but leaves spaces as they are: Rust's dialect refuses an escaped space."""
    return re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
