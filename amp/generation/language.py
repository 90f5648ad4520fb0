"""Detects captions that aren't English. The rules and their lexicon only work for English.

Function words and non-English letters reveal the language of a text, so no vocabulary is needed. A single name ("Rio de
Janeiro"), a loanword ("café"), a typo or a caption of two nouns does not make a caption foreign.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from amp.errors import shorten

# Common words of English captions. Those in _SHARED also occur in other languages and count half.
_ENGLISH = frozenset(
    """
    the and with are by from his her their its near next through into over while who which that this there it up down
    out off for two three one some several many other of has have being another each them both behind around front
    above under during against very not looking man woman men women people boy girl boys girls child dog dogs person
    group black white red blue green brown yellow young old little small large big water snow grass ball street
    """.split()  # noqa: SIM905, a list of a hundred strings says no more
)
_SHARED = frozenset("a an in is on at to as was so no do he i me we be or son".split())  # noqa: SIM905

# Frequent words of captions in about twenty other languages. None of them is an English word.
_FOREIGN = frozenset(
    """
    der das und ein eine einen einem einer mit auf dem den im zwei drei vor neben über sich ist sind einige kind
    kinder mann frau hund hunde junge mädchen steht sitzt spielt spielen läuft rennt springt trägt
    un une les des dans sur avec est sont deux trois qui aux homme femme chien chiens enfant enfants garçon fille par
    una uno con por dos tres está están hombre mujer perro perros niño niña niños sobre
    il gli della nella sulla che sono uomo donna cane cani bambino bambina bambini ragazzo due
    um uma em com na dois duas homem mulher cachorro cão menino menina crianças são ao
    een het op twee zijn aan bij naar voor vrouw jongen meisje kinderen staat zit
    ett och og på med som av är sitter står kvinna kvinne pojke pojken flicka mannen
    się jest dwa dwie trzy pies mężczyzna kobieta przez chłopiec dziewczynka je muž žena dítě
    ve bir iki köpek adam kadın çocuk üzerinde ile için yang dengan sedang seorang anjing
    ja mies nainen koira egy és az kutya férfi nő și pe cu în care bărbat femeie câine một đang và trên người
    """.split()  # noqa: SIM905
)
_PARTICLES = frozenset("de la le el du des di den das las los van dan est en".split())  # noqa: SIM905, also parts of names, so they count half

_WORD = re.compile(r"[^\W\d_]+")
_LONG = 6  # a caption with this many words needs one English word to count as English
_SHARE = 0.01  # fraction of foreign captions below which there is no warning


def is_english(caption: str) -> bool:
    """Whether a caption may be English; True if its language can't be recognised."""
    words = _WORD.findall(caption.lower())
    if caption.isascii():
        if _FOREIGN.isdisjoint(words) and _PARTICLES.isdisjoint(words):  # the usual case
            return len(words) < _LONG or not _ENGLISH.isdisjoint(words) or _english_words(words) > 0
    else:
        letters = "".join(words)
        if letters and 2 * sum(not _is_latin(letter) for letter in letters) >= len(letters):
            return False
    other = sum(
        0.5 if word in _PARTICLES else 1.0 if word in _FOREIGN else 0.0 if word.isascii() else 0.5 for word in words
    )
    english = _english_words(words)
    return english >= other and english > 0 if other >= 1 or len(words) >= _LONG else True


def _english_words(words: list[str]) -> float:
    """Weighted number of English words."""
    return sum(
        1.0 if word in _ENGLISH or (len(word) > 4 and word.endswith("ing")) else 0.5 if word in _SHARED else 0.0
        for word in words
    )


def language_note(captions: Sequence[str], option: str) -> str | None:
    """Returns a warning for captions that the rules can't handle; None if almost all captions may be English.

    Args:
        captions: All captions that the rules are about to read.
        option: Command-line option that selects a language model instead.
    """
    foreign = [caption for caption in captions if not is_english(caption)]
    if not foreign or len(foreign) < _SHARE * len(captions):
        return None
    return (
        f"{len(foreign):,} of {len(captions):,} captions are not in English, such as {shorten(foreign[0])}; the rules "
        f"support only English and give wrong or no triplets for them; use a language model ({option} transformers, "
        "openai or vllm), or translate the captions"
    )


def _is_latin(letter: str) -> bool:
    return letter < "\u0250" or "\u1e00" <= letter < "\u1f00"
