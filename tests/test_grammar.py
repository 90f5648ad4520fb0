"""The grammar of replies: regex, GBNF and the strict check agree."""

import random
import re

import pytest

from amp.generation.grammar import COPULAS, StateGrammar, TripletGrammar
from amp.generation.replies import MAX_TRIPLETS, read_triplets
from amp.generation.words import slot_words, words_of

CAPTION = "A little girl in a pink dress isn't climbing the well-worn stairs (again) [x]"
WORDS = tuple(words_of(CAPTION))


def test_words_are_lower_case_distinct_and_without_marks():
    assert WORDS == (
        "a",
        "little",
        "girl",
        "in",
        "pink",
        "dress",
        "isn't",
        "climbing",
        "the",
        "well-worn",
        "stairs",
        "again",
        "x",
    )


@pytest.mark.parametrize(
    "caption, words",
    [
        ("", []),
        ("!!! | <> {}", []),
        ("😀 🐕", []),
        ("Größe über-alles", ["größe", "über-alles"]),
        ("男の子が 走る", ["男の子が", "走る"]),
        ("snake_case |pipe|", ["snake", "case", "pipe"]),
        ("it's -- 'quoted'", ["it's", "quoted"]),
    ],
)
def test_words_of_any_text(caption, words):
    assert words_of(caption) == words


@pytest.mark.parametrize(
    "reply, valid",
    [
        ("none", True),
        ("action: girl | climbing | stairs", True),
        ("action: girl | climbing | -", True),
        ("action: girl | climbing | stairs\nattribute: girl | is | little\n\n", True),
        ("attribute: girl | wearing | pink dress", True),
        ("attribute: girl | is | -", False),
        ("action: girl | is | stairs", False),  # a copula is not an action
        ("action: boy | climbing | stairs", False),
        ("action: girl | climbing | the well-worn stairs again x", False),  # five words
        ("Action: girl | climbing | stairs", False),
        ("action: girl | climbing", False),
        ("action: girl | climbing | stairs\n", False),  # another line or an empty line must follow
        ("", False),
    ],
)
def test_regex_by_hand(reply, valid):
    assert (re.fullmatch(TripletGrammar(WORDS, 6).regex(), reply) is not None) == valid


def test_regex_and_strict_check_agree_on_random_replies():
    """Two rules are excluded, because a regex for them would be long: no repeated line, subject differs from object."""
    random.seed(0)
    regex = re.compile(TripletGrammar(slot_words(CAPTION), MAX_TRIPLETS).regex())
    pieces = [*WORDS[:6], *COPULAS[:2], "boy", "-", "", "girl dress"]
    seen = {True: 0, False: 0}
    for _ in range(20_000):
        lines = []
        for _ in range(random.randint(1, 2)):
            slots = " | ".join(random.choice(pieces) for _ in range(random.choice((3, 3, 3, 2))))
            lines.append(f"{random.choice(('action', 'attribute', 'verb'))}: {slots}")
        slots = [line.partition(": ")[2].split(" | ") for line in lines]
        if len(set(lines)) < len(lines) or any(parts[0] == parts[-1] for parts in slots):
            continue
        reply = "\n".join(lines)
        valid = regex.fullmatch(reply) is not None
        assert read_triplets(reply, CAPTION).strict == valid, reply
        seen[valid] += 1
    assert min(seen.values()) > 100


@pytest.mark.parametrize("count", [1, 3])
def test_states_one_line_each(count):
    regex = StateGrammar(count, 20).regex()
    lines = [f"{number}. She looks up now." for number in range(1, count + 1)]
    assert re.fullmatch(regex, "\n".join(lines))
    assert re.fullmatch(regex, "\n".join(lines) + "\n\n")
    assert not re.fullmatch(regex, "\n".join([*lines, f"{count + 1}. She looks up."]))
    assert not re.fullmatch(regex, "\n".join(lines).replace("1. ", "2. "))
    assert not re.fullmatch(regex, "\n".join(lines).replace("up", "up and further than that"))
    assert not re.fullmatch(regex, "\n".join(lines).replace("up", "\x07"))


def test_llguidance_accepts_the_regex_of_any_caption():
    llguidance = pytest.importorskip("llguidance", reason='needs llguidance: pip install "open-clip-amp[generate]"')
    for caption in (
        CAPTION,
        "a. (b)* [c]+ {d}? ^e$ f|g \\h",
        "男の子が 走る 😀",
        " ".join(f"word{i}" for i in range(100)),
    ):
        for grammar in (TripletGrammar(tuple(words_of(caption)), 6), StateGrammar(6)):
            built = llguidance.LLMatcher.grammar_from_regex(grammar.regex())
            assert not llguidance.LLMatcher.validate_grammar(built)
