"""The texts that knowledge becomes before CLIP's text tower reads it."""

import re
from html import unescape

from amp.knowledge.schema import Knowledge, Triplet

SLOT_TOKENS = 5
"""Tokens kept of each subject, action and object, S (our choice)."""
CONTEXT_TOKENS = 77
"""Tokens of a text that CLIP reads, with the marks of start and end. Other models have other limits (SigLIP: 64)."""

# Each part is one token or more: CLIP's tokenizer divides texts here before it divides words.
_PARTS = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)
FEW_WORDS = 25
"""Words of a text that isn't looked at more closely: hardly any of so few is cut."""

STATE_TEMPLATE = "Fine-grained state description of action triplet <{subject}, {action}, {object}> is {state}"
"""The template of the paper, sec. 3.3 "Action State Prompts"."""
TRIPLET_TEMPLATE = "A photo capturing a {subject} performing {action} in relation to {object}."
"""The hand-crafted template of the paper's Table 2, which an intransitive action leaves without an object."""


def state_text(triplet: Triplet, state: str) -> str:
    """The action state prompt of one triplet."""
    return STATE_TEMPLATE.format(subject=triplet.subject, action=triplet.action, object=triplet.object, state=state)


def triplet_text(triplet: Triplet) -> str:
    """The hand-crafted prompt of one triplet."""
    return TRIPLET_TEMPLATE.format(subject=triplet.subject, action=triplet.action, object=triplet.object)


def surely_cut(text: str) -> bool:
    """Whether a text is longer than `CONTEXT_TOKENS`, by its words, so that no tokenizer (and no torch) is loaded.

    Words of several tokens count once, so a text that is cut may not be found; one that is found is cut.
    """
    return text.count(" ") >= FEW_WORDS and len(_PARTS.findall(unescape(unescape(text)))) + 2 > CONTEXT_TOKENS


def select(knowledge: Knowledge, max_triplets: int) -> list[tuple[Triplet, str]]:
    """The (triplet, state) pairs a caption keeps: actions before attributes, `max_triplets` at most."""
    pairs = list(zip(knowledge.triplets, knowledge.states, strict=True))
    return sorted(pairs, key=lambda pair: pair[0].kind != "action")[:max_triplets]


def state_texts(knowledge: Knowledge, max_triplets: int) -> list[str]:
    """The action state prompts of a caption, in the order of `select`."""
    return [state_text(triplet, state) for triplet, state in select(knowledge, max_triplets)]


def tower_texts(knowledge: Knowledge, max_triplets: int, setting: str) -> list[str]:
    """What the frozen text tower reads of a caption's knowledge, one text a kept triplet, in the order of `select`.

    Args:
        knowledge: Of the caption.
        max_triplets: K.
        setting: `PromptConfig.knowledge`; nothing is read for ``triplets``, ``caption`` and ``none``.
    """
    if setting in ("both", "states"):
        return state_texts(knowledge, max_triplets)
    if setting == "template":
        return [triplet_text(triplet) for triplet, _ in select(knowledge, max_triplets)]
    return []
