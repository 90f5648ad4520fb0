"""The drawn action scenes. Each is a pure function of (seed, split, index).

A scene has two actors (kind, colour, size), an action between them or one action each, and a place. In every block of
eight scenes two are twins of other scenes in it: one with swapped roles, one with another action, and both with the
same actors and place. A model that only recognises objects can't tell twins apart.

    scene = make_scene(seed=0, split="test", index=5)
    picture = draw(scene, 144)          # PIL image
    sentences = captions(scene)         # three Caption(text, triplets, states)
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from scene_actions import PAIR, PLACES, SOLO, backdrop
from scene_figures import ANIMALS, COLOURS, HEIGHT, Pen
from scene_language import Caption, caption, pick

KINDS = ("man", "woman", "king", "wizard", "robot", *ANIMALS)
BLOCK = 8
TWINS = {5: (4, "roles"), 7: (6, "action")}  # slot in a block: (slot of its original, what changes)
SYMMETRIC = ("hug",)  # swapping the roles changes nothing
_ALIKE = (("push", "pull"), ("kick", "throw"), ("carry", "lift"), ("feed", "photograph"), ("net", "shelter"))
LOOKALIKE = {one: other for pair in _ALIKE for one, other in (pair, pair[::-1])}
SOLO_SHARE = 0.15


@dataclass(frozen=True)
class Actor:
    """An actor: kind, colour (of the clothes, for people) and size."""

    kind: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """Content of a scene. With one action, actors[0] does it to actors[1]. With two actions, each actor does its own.

    `twin` is the index (same seed and split) of the scene from which this one was derived, and `change` is what differs
    ("roles" or "action"). They are None and "" for all other scenes. `name` seeds the layout and the captions.
    """

    actors: tuple[Actor, Actor]
    actions: tuple[str, ...]
    place: str
    name: str
    twin: int | None = None
    change: str = ""


def _others(options, taken):
    return [option for option in options if option not in taken]


def make_scene(seed: int, split: str, index: int) -> Scene:
    """The scene at `index` of a split. It does not depend on the number of scenes drawn."""
    block, slot = divmod(index, BLOCK)
    original, change = TWINS.get(slot, (slot, ""))
    rng = random.Random(f"open-clip-amp scene {seed} {split} {block * BLOCK + original}")
    kinds, colours = [], []
    for _ in range(2):
        kinds.append(pick(rng, _others(KINDS, kinds)))
        colours.append(pick(rng, _others(tuple(COLOURS), colours)))
    actors = tuple(Actor(kind, colour, pick(rng, tuple(HEIGHT))) for kind, colour in zip(kinds, colours, strict=True))
    if rng.random() < SOLO_SHARE:
        first = pick(rng, tuple(SOLO))
        actions = (first, pick(rng, _others(SOLO, (first,))))
    else:
        swapped = any(source == slot and what == "roles" for source, what in TWINS.values()) or change == "roles"
        actions = (pick(rng, _others(PAIR, SYMMETRIC if swapped else ())),)
    place = pick(rng, tuple(PLACES))
    if change == "roles":
        actors = actors[::-1]
    elif change == "action" and len(actions) == 2:
        actions = (actions[0], pick(rng, _others(SOLO, actions)))
    elif change == "action":
        lookalike = LOOKALIKE.get(actions[0])
        actions = (lookalike if lookalike and rng.random() < 0.5 else pick(rng, _others(PAIR, actions)),)
    twin = block * BLOCK + original if change else None
    return Scene(actors, actions, place, f"{seed} {split} {index}", twin, change)


def draw(scene: Scene, size: int = 144) -> Image.Image:
    """Draws a scene as a square RGB picture of `size` pixels; half of the scenes are mirrored."""
    rng = random.Random(f"open-clip-amp layout {scene.name}")
    pen = Pen(2 * size, PLACES[scene.place][0])
    horizon, ground, x = 60 + rng.random() * 10, 82 + rng.random() * 7, 46 + rng.random() * 8
    mirrored = rng.random() < 0.5
    backdrop(pen, scene.place, horizon, rng)
    if len(scene.actions) == 1:
        PAIR[scene.actions[0]](pen, *scene.actors, x, ground, rng)
    else:
        for actor, action, place in zip(scene.actors, scene.actions, (x - 22, x + 22), strict=True):
            SOLO[action](pen, actor, place, ground, 1 if rng.random() < 0.5 else -1)
    picture = pen.image.reduce(2)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture


def captions(scene: Scene, count: int = 3) -> list[Caption]:
    """The first `count` captions of a scene: the first is active, the second passive, the others either."""
    said = []
    for k in range(count):
        rng = random.Random(f"open-clip-amp caption {scene.name} {k}")
        form = ("active", "passive")[k] if k < 2 else pick(rng, ("active", "passive"))
        said.append(caption(scene, form, rng))
    return said


def contact_sheet(scenes: list[Scene], columns: int = 4, size: int = 200) -> Image.Image:
    """A sheet of scenes, each with its first caption below."""
    font = ImageFont.load_default(12)
    text_height, gap = 46, 8
    rows = -(-len(scenes) // columns)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + text_height + gap) + gap), (255, 255, 255))
    ink = ImageDraw.Draw(sheet)
    for k, scene in enumerate(scenes):
        x, y = gap + k % columns * (size + gap), gap + k // columns * (size + text_height + gap)
        sheet.paste(draw(scene, size), (x, y))
        lines, line = [], ""
        for word in captions(scene, 1)[0].text.split():
            if line and ink.textlength(f"{line} {word}", font) > size:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        for row, text in enumerate([*lines, line][:3]):
            ink.text((x, y + size + 2 + row * 14), text, (40, 40, 40), font)
    return sheet
