"""Makes wrong captions from triplets: subject and object are exchanged, or the action is replaced.

The triplets are changed in the same way, and the states of both captions come from the lexicon, so the right and the
wrong caption differ only in the exchanged words. Many wrong captions read unnaturally ("a ball chases a dog"), and a
model can reject them without looking at the photo. Therefore compare methods with each other, not with 50 %.
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence

from amp.data.split_captions import SplitCaptions
from amp.evaluate.choice import Choice
from amp.evaluate.verbs import verb_of
from amp.generation.states import state_of
from amp.knowledge.schema import Knowledge, Triplet

TESTS = ("swapped-roles", "swapped-actions")


def swapped_roles(captions: SplitCaptions) -> list[Choice]:
    """One choice per caption in which the subject and the object of an action triplet occur exactly once each."""
    choices = []
    for text, knowledge, image in zip(captions.texts, captions.knowledge, captions.image.tolist(), strict=True):
        for triplet in _actions(knowledge):
            one, two = triplet.subject.lower(), triplet.object.lower()
            here, there = _span(text, one), _span(text, two)
            if one == two or here is None or there is None or _overlap(here, there):
                continue
            wrong = _replace(text, {here: triplet.object, there: triplet.subject})
            exchanged = {one: triplet.object, two: triplet.subject}
            swapped = [
                Triplet(
                    exchanged.get(t.subject.lower(), t.subject),
                    t.action,
                    exchanged.get(t.object.lower(), t.object),
                    t.kind,
                )
                for t in knowledge.triplets
            ]
            choices.append(_choice(image, text, wrong, knowledge.triplets, swapped, verb_of(triplet.action)))
            break
    return choices


def swapped_actions(captions: SplitCaptions, seed: int = 0) -> list[Choice]:
    """One choice per caption in which one action is replaced by an action of another caption.

    The new action has the same verb ending and has an object exactly if the old one had one. Its verb does not occur in
    the caption's triplets. It is drawn in proportion to its frequency in the split.
    """
    pool = defaultdict(list)
    for knowledge in captions.knowledge:
        for triplet in _actions(knowledge, with_object=False):
            if verb_of(triplet.action):
                pool[_class(triplet)].append(triplet.action)
    choices = []
    for number, (text, knowledge) in enumerate(zip(captions.texts, captions.knowledge, strict=True)):
        own = {verb_of(t.action) for t in knowledge.triplets}
        for triplet in _actions(knowledge, with_object=False):
            span = _span(text, triplet.action)
            if span is None or verb_of(triplet.action) is None:
                continue
            generator = random.Random(f"{seed}/{number}")
            drawn = (generator.choice(pool[_class(triplet)]) for _ in range(50))
            other = next((action for action in drawn if verb_of(action) not in own), None)
            if other is None:
                continue
            swapped = [Triplet(t.subject, other, t.object, t.kind) if t is triplet else t for t in knowledge.triplets]
            wrong = _replace(text, {span: other})
            image = int(captions.image[number])
            choices.append(_choice(image, text, wrong, knowledge.triplets, swapped, verb_of(triplet.action)))
            break
    return choices


def _actions(knowledge: Knowledge, with_object: bool = True) -> list[Triplet]:
    return [t for t in knowledge.triplets if t.kind == "action" and (t.object or not with_object)]


def _choice(
    image: int, right: str, wrong: str, of_right: Sequence[Triplet], of_wrong: Sequence[Triplet], group: str | None
) -> Choice:
    knowledge = tuple(Knowledge(tuple(ts), tuple(state_of(t) for t in ts)) for ts in (of_right, of_wrong))
    return Choice(str(image), (right, wrong), group or "", knowledge=knowledge)


def _class(triplet: Triplet) -> tuple[str, bool]:
    """Verb ending and whether there is an object: actions of the same class usually fit into the same sentence."""
    verb = triplet.action.lower().split()[0]
    ending = next((end for end in ("ing", "ed", "s") if verb.endswith(end)), "")
    return ending, bool(triplet.object)


def _span(text: str, phrase: str) -> tuple[int, int] | None:
    """Start and end of a phrase in `text`, as whole words; None unless it occurs exactly once."""
    found = list(re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))
    return found[0].span() if len(found) == 1 and phrase else None


def _overlap(one: tuple[int, int], two: tuple[int, int]) -> bool:
    return one[0] < two[1] and two[0] < one[1]


def _replace(text: str, changes: dict[tuple[int, int], str]) -> str:
    for (start, stop), word in sorted(changes.items(), reverse=True):
        word = word[:1].upper() + word[1:] if text[start].isupper() else word
        text = text[:start] + word + text[stop:]
    return text
