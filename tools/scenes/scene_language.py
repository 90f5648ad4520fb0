"""The texts of a scene: captions in several phrasings, and the knowledge (triplets, states) of each caption.

The knowledge contains only what the caption says, as a language model would extract it: an attribute that the caption
does not mention gives no triplet. A state describes how its triplet usually looks, independently of the picture.
"""

import random
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from scene_figures import ANIMALS


@dataclass(frozen=True)
class Caption:
    """A sentence, its triplets (dicts of subject, action, object, kind) and as many states, in the same order."""

    text: str
    triplets: tuple[dict, ...]
    states: tuple[str, ...]


class Verb(NamedTuple):
    """Verb forms for "A is {doing} B{tail}", "A {does} B{tail}", "B is {passive} A" and "B {reduced} A"."""

    doing: str
    does: str
    reduced: str
    tail: str = ""
    passive: str = ""


def _verb(doing, does, reduced, tail="", passive=""):
    return Verb(doing, does, reduced, tail, passive or "being " + reduced)


def _both(reduced):
    """The passive without "being": what the second actor does during the action."""
    return reduced, "", reduced


VERBS = {
    "chase": [_verb("chasing", "chases", "chased by"), _verb("running after", "runs after", "pursued by")],
    "carry": [
        _verb("carrying", "carries", "carried on the back of", " on the back"),
        _verb("giving a piggyback ride to", "gives a piggyback ride to", "given a piggyback ride by"),
    ],
    "lift": [
        _verb("lifting", "lifts", "lifted overhead by", " overhead"),
        _verb("holding up", "holds up", "held up in the air by", " in the air"),
    ],
    "push": [
        _verb("pushing", "pushes", "pushed in a cart by", " in a cart"),
        _verb("pushing the cart of", "pushes the cart of", "pushed along in a cart by"),
    ],
    "pull": [
        _verb("pulling", "pulls", "pulled in a cart by", " in a cart"),
        _verb("pulling the cart of", "pulls the cart of", "pulled along in a cart by"),
    ],
    "kick": [
        _verb("kicking a ball to", "kicks a ball to", *_both("awaiting the ball kicked by")),
        _verb("shooting the ball at", "shoots the ball at", *_both("facing a shot from")),
    ],
    "throw": [
        _verb("throwing a ball to", "throws a ball to", *_both("catching the ball thrown by")),
        _verb("tossing a ball to", "tosses a ball to", *_both("reaching for the ball tossed by")),
    ],
    "hug": [_verb("hugging", "hugs", "hugged by"), _verb("embracing", "embraces", "embraced by")],
    "feed": [_verb("feeding", "feeds", "fed by"), _verb("spoon-feeding", "spoon-feeds", "spoon-fed by")],
    "photograph": [
        _verb("photographing", "photographs", "photographed by"),
        _verb("taking a picture of", "takes a picture of", *_both("posing for a picture by")),
    ],
    "spray": [
        _verb("spraying", "sprays", "sprayed with water by", " with water"),
        _verb("hosing down", "hoses down", "hosed down by"),
    ],
    "bow": [
        _verb("bowing to", "bows to", "greeted with a bow by"),
        _verb("bending down before", "bends down before", "honoured with a bow by"),
    ],
    "net": [
        _verb("catching", "catches", "caught in a net by", " in a net"),
        _verb("trapping", "traps", "trapped with a net by", " with a net"),
    ],
    "shelter": [
        _verb("holding an umbrella over", "holds an umbrella over", "kept dry under the umbrella of"),
        _verb("sheltering", "shelters", "sheltered from the rain by", " from the rain"),
    ],
}
SOLO_VERBS = {  # doing, does, triplet's action, triplet's object
    "jump": [
        ("jumping", "jumps", "jumping", ""),
        ("leaping into the air", "leaps into the air", "leaping into", "air"),
    ],
    "sleep": [("sleeping", "sleeps", "sleeping", ""), ("lying asleep", "lies asleep", "lying", "asleep")],
    "sit": [("sitting on a chair", "sits on a chair", "sitting on", "chair"), ("sitting", "sits", "sitting", "")],
    "read": [
        ("reading a book", "reads a book", "reading", "book"),
        ("holding an open book", "holds an open book", "holding", "open book"),
    ],
    "wave": [("waving", "waves", "waving", ""), ("raising a hand to wave", "raises a hand to wave", "raising", "hand")],
}

STATES = {
    "chase": [
        "The {s} runs behind, leaning forward with both arms stretched out, the {o} flees ahead with arms thrown up",
        "The {o} runs away in front, mouth open, and the {s} follows close behind with grasping hands",
        "The {s} is the hindmost of the two runners and reaches for the back of the {o}",
    ],
    "carry": [
        "The {s} walks bent forward under the weight of the {o}, who clings to the back with legs off the ground",
        "The {o} rides high on the back of the {s}, arms around the neck",
        "The {s} stands on the ground and holds the legs of the {o} riding behind the shoulders",
    ],
    "lift": [
        "The {s} stands with both arms straight up, and the {o} lies flat in the air above the head",
        "The {o} hangs level high up, held by the raised hands of the {s} below",
        "The {s} is below on the ground with arms up, the {o} is on top, lying in the air",
    ],
    "push": [
        "The {s} leans forward behind the cart with both hands on its handle, and the {o} sits in the cart",
        "The {o} sits in a cart in front, and the {s} shoves it from behind",
        "The {s} walks after the cart and drives it on, the {o} rides ahead in it",
    ],
    "pull": [
        "The {s} walks ahead with a rope over the shoulder, and the {o} sits in the cart at its end",
        "The {o} sits in a cart behind, and a tight rope leads to the {s} in front",
        "The {s} goes in front and tows the cart by a rope, the {o} rides after in it",
    ],
    "kick": [
        "The {s} swings one leg forward and leans back, a ball flies low towards the {o} who waits with hands ready",
        "A low ball speeds away from the raised foot of the {s}, the {o} stands opposite like a goalkeeper",
        "The {s} stands on one leg with the other in the air, the {o} crouches and faces the ball",
    ],
    "throw": [
        "The {s} stretches one arm forward after the throw, a ball flies high towards the {o} who holds both hands up",
        "A ball in a high arc leaves the hand of the {s}, the {o} stands opposite and reaches up for it",
        "The {s} strides with one arm out, the {o} looks up with open mouth and raised arms",
    ],
    "hug": [
        "The {s} and the {o} stand pressed together face to face with arms around each other, hearts above them",
        "The {s} wraps both arms around the {o}, chest to chest",
        "The {s} holds the {o} tight, and the {o} holds the {s}",
    ],
    "feed": [
        "The {s} stands with a bowl and holds a spoon to the open mouth of the {o}, who sits",
        "The {o} sits on a low seat with open mouth and gets food from the spoon of the {s}",
        "A bowl and a spoon are in the hands of the {s}, the {o} sits and eats",
    ],
    "photograph": [
        "The {s} holds a camera to the eye, its flash goes off, and the {o} poses with arms raised",
        "The {o} poses with both arms up in front of the camera of the {s}",
        "A camera with a bright flash is in the hands of the {s}, aimed at the {o}",
    ],
    "spray": [
        "The {s} holds a hose, and the jet of blue water hits the {o}, who raises both hands against it",
        "The {o} leans back, wet from drops all over, the hose is in the hands of the {s}",
        "Water shoots from the hose of the {s} at the face of the {o}",
    ],
    "bow": [
        "The {s} bends far down at the hips with lowered head, the {o} stands upright with a raised hand",
        "The {o} stands tall and greets, while the back of the {s} is bent forward",
        "The head of the {s} is low and the body folded, in front of the upright {o}",
    ],
    "net": [
        "The {s} holds a long pole whose net covers the head of the {o}, who tries to run away",
        "The head of the {o} is inside a white net, its pole is in the hands of the {s}",
        "The {s} comes from behind with a pole, the {o} is stuck under the mesh in front",
    ],
    "shelter": [
        "The {s} stretches out an umbrella over the {o}, who stands dry below it in the rain",
        "The {o} stands under the dome of the umbrella, the {s} stands beside it in the rain and holds the pole",
        "Rain falls, the {s} grips the handle, the umbrella is above the head of the {o}",
    ],
    "jump": [
        "The {s} is in the air above a shadow, arms up and legs bent",
        "Both feet of the {s} are off the ground, arms thrown up",
    ],
    "sleep": [
        "The {s} lies flat on a mat with closed eyes, letters z rise from the head",
        "The {s} is stretched out on the ground, eyes shut",
    ],
    "sit": [
        "The {s} sits on a wooden chair with bent legs and hands on the knees",
        "The hips of the {s} rest on a low seat, the back is upright",
    ],
    "read": [
        "The {s} stands and looks into an open book held in front with both hands",
        "An open white book is in the hands of the {s}",
    ],
    "wave": [
        "The {s} stands upright with one hand raised beside the head, small arcs show it moving",
        "One arm of the {s} is up in greeting, the other hangs down",
    ],
}
COLOUR_STATES = {
    "clothed": ["The {s} wears {c} clothes", "The body of the {s} is dressed in bright {c}"],
    "furry": ["The {s} is {c} all over, from the head to the legs", "The body and head of the {s} are bright {c}"],
}
SIZE_STATES = {
    "big": ["The {s} is big and reaches high up in the picture", "The {s} is tall and takes much room"],
    "small": ["The {s} is small and its head stays low in the picture", "The {s} is short and takes little room"],
}
PLACE_WORDS = {
    "meadow": ["on a meadow", "in the grass"],
    "beach": ["on a beach", "by the sea"],
    "snow": ["in the snow", "on a snowy day"],
    "desert": ["in a desert", "on hot sand"],
    "street": ["in a street", "in front of houses"],
    "room": ["in a room", "indoors"],
    "night": ["at night", "under the moon"],
}


def pick(rng: random.Random, options):
    """Like `rng.choice`, but uses only `rng.random()`, whose sequence is the same in all Python versions."""
    return options[int(rng.random() * len(options))]


def clothed(kind: str) -> bool:
    """Whether the colour of an actor is the colour of its clothes."""
    return kind not in ANIMALS and kind != "robot"


def noun_phrase(actor, mentions: frozenset, article: str) -> str:
    """For example "a big red cat", "an orange robot", "the man in blue"."""
    words = [actor.size] if "size" in mentions else []
    words += [actor.colour] if "colour" in mentions and not clothed(actor.kind) else []
    words += [actor.kind]
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    tail = f" in {actor.colour}" if "colour" in mentions and clothed(actor.kind) else ""
    return f"{article} {' '.join(words)}{tail}"


def _mentions(rng: random.Random) -> tuple[frozenset, frozenset]:
    """Chooses the attributes of each actor that a caption mentions: at least the colour of one of them."""
    named = [{"colour"} if rng.random() < 0.55 else set() for _ in range(2)]
    for attributes in named:
        if rng.random() < 0.3:
            attributes.add("size")
    if not any("colour" in attributes for attributes in named):
        pick(rng, named).add("colour")
    return frozenset(named[0]), frozenset(named[1])


def _attribute_knowledge(actor, mentions, rng):
    if "colour" in mentions:
        group = "clothed" if clothed(actor.kind) else "furry"
        action = "wearing" if group == "clothed" else "is"
        state = pick(rng, COLOUR_STATES[group]).format(s=actor.kind, c=actor.colour)
        yield {"subject": actor.kind, "action": action, "object": actor.colour, "kind": "attribute"}, state
    if "size" in mentions:
        state = pick(rng, SIZE_STATES[actor.size]).format(s=actor.kind)
        yield {"subject": actor.kind, "action": "is", "object": actor.size, "kind": "attribute"}, state


def caption(scene, form: str, rng: random.Random) -> Caption:
    """Makes a caption of a scene. If each actor does its own action, "passive" names the second actor first."""
    a, b = scene.actors
    mentions_a, mentions_b = _mentions(rng)
    article = partial(pick, rng, ("a", "a", "the"))
    na, nb = noun_phrase(a, mentions_a, article()), noun_phrase(b, mentions_b, article())
    knowledge = []
    if len(scene.actions) == 1:
        (action,) = scene.actions
        verb = pick(rng, VERBS[action])
        sentences = {
            "active": [f"{na} {said} {nb}{verb.tail}" for said in ("is " + verb.doing, verb.does, verb.doing)],
            "passive": [f"{nb} is {verb.passive} {na}", f"{nb} {verb.reduced} {na}"],
        }
        text = pick(rng, sentences[form])
        state = pick(rng, STATES[action]).format(s=a.kind, o=b.kind)
        knowledge.append(({"subject": a.kind, "action": verb.doing, "object": b.kind, "kind": "action"}, state))
    else:
        verbs = [pick(rng, SOLO_VERBS[action]) for action in scene.actions]
        for actor, action, verb in zip(scene.actors, scene.actions, verbs, strict=True):
            state = pick(rng, STATES[action]).format(s=actor.kind)
            knowledge.append(({"subject": actor.kind, "action": verb[2], "object": verb[3], "kind": "action"}, state))
        (n1, (doing1, does1, *_)), (n2, (doing2, does2, *_)) = zip((na, nb), verbs, strict=True)
        if form == "passive":
            n1, doing1, does1, n2, doing2, does2 = n2, doing2, does2, n1, doing1, does1
        sentences = [
            f"{n1} is {doing1} while {n2} is {doing2}",
            f"{n1} {does1} and {n2} {does2}",
            f"{n1} {doing1} next to {n2} {doing2}",
        ]
        text = pick(rng, sentences)
    knowledge += _attribute_knowledge(a, mentions_a, rng)
    knowledge += _attribute_knowledge(b, mentions_b, rng)
    if rng.random() < 0.3:
        text += " " + pick(rng, PLACE_WORDS[scene.place])
    triplets, states = zip(*knowledge, strict=True)
    return Caption(text[0].upper() + text[1:] + ".", triplets, states)
