"""The texts that knowledge becomes before CLIP's text tower reads it."""

from amp.knowledge.schema import Knowledge, Triplet

STATE_TEMPLATE = "Fine-grained state description of action triplet <{subject}, {action}, {object}> is {state}"
"""The template of the paper, sec. 3.3 "Action State Prompts"."""


def state_text(triplet: Triplet, state: str) -> str:
    """The action state prompt of one triplet."""
    return STATE_TEMPLATE.format(subject=triplet.subject, action=triplet.action, object=triplet.object, state=state)


def select(knowledge: Knowledge, max_triplets: int) -> list[tuple[Triplet, str]]:
    """The (triplet, state) pairs a caption keeps: actions before attributes, `max_triplets` at most."""
    pairs = list(zip(knowledge.triplets, knowledge.states, strict=True))
    return sorted(pairs, key=lambda pair: pair[0].kind != "action")[:max_triplets]


def state_texts(knowledge: Knowledge, max_triplets: int) -> list[str]:
    """The action state prompts of a caption, in the order of `select`."""
    return [state_text(triplet, state) for triplet, state in select(knowledge, max_triplets)]
