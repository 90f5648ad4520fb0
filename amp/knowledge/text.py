"""The texts made from knowledge for CLIP's text tower."""

import re
from html import unescape

from amp.knowledge.schema import Knowledge, Triplet

SLOT_TOKENS = 5
"""Maximum tokens per subject, action or object, S (our choice)."""
CONTEXT_TOKENS = 77
"""Maximum tokens of a text in CLIP, including start and end tokens. Other models have other limits (SigLIP: 64)."""

# CLIP's tokenizer first splits texts into these parts, and each part into one or more tokens.
_PARTS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)
FEW_WORDS = 25
"""Texts with at most this many words are not checked, because hardly any of them is cut."""

STATE_TEMPLATE = "Fine-grained state description of action triplet <{subject}, {action}, {object}> is {state}"
"""The template of the paper, sec. 3.3 "Action State Prompts"."""
STATE_BEGINNING = STATE_TEMPLATE.partition("{")[0]
TRIPLET_TEMPLATE = "A photo capturing a {subject} performing {action} in relation to {object}."
"""The hand-crafted template of the paper's Table 2. For an intransitive action, the object is empty."""


def state_text(triplet: Triplet, state: str) -> str:
    """The action state prompt of one triplet."""
    return STATE_TEMPLATE.format(subject=triplet.subject, action=triplet.action, object=triplet.object, state=state)


def triplet_text(triplet: Triplet) -> str:
    """The hand-crafted prompt of one triplet."""
    return TRIPLET_TEMPLATE.format(subject=triplet.subject, action=triplet.action, object=triplet.object)


def surely_cut(text: str) -> bool:
    """Whether a text certainly exceeds `CONTEXT_TOKENS`. Counts words, so no tokenizer (and no torch) is loaded.

    A word of several tokens counts once, so some texts that are cut are not found. Every text that is found is cut.
    """
    return text.count(" ") >= FEW_WORDS and len(_PARTS.findall(unescape(unescape(text)))) + 2 > CONTEXT_TOKENS


def select(knowledge: Knowledge, max_triplets: int) -> list[tuple[Triplet, str]]:
    """The (triplet, state) pairs kept for a caption: actions before attributes, at most `max_triplets`."""
    pairs = list(zip(knowledge.triplets, knowledge.states, strict=True))
    return sorted(pairs, key=lambda pair: pair[0].kind != "action")[:max_triplets]


def state_texts(knowledge: Knowledge, max_triplets: int) -> list[str]:
    """The action state prompts of a caption, in the order of `select`."""
    return [state_text(triplet, state) for triplet, state in select(knowledge, max_triplets)]


def tower_texts(knowledge: Knowledge, max_triplets: int, setting: str) -> list[str]:
    """The texts of a caption's knowledge for the frozen text tower, one per kept triplet, in the order of `select`.

    Args:
        knowledge: Knowledge of the caption.
        max_triplets: Maximum triplets per caption, K.
        setting: Value of `PromptConfig.knowledge`. There are no texts for `triplets`, `caption` and `none`.
    """
    if setting in ("both", "states"):
        return state_texts(knowledge, max_triplets)
    if setting == "template":
        return [triplet_text(triplet) for triplet, _ in select(knowledge, max_triplets)]
    return []
