"""Jointed cartoon actors: a pen for outlined shapes, and a figure whose hands and feet can be placed.

Scene units: the picture is 100 x 100 and y grows downwards. Figure units: the figure has the height 1, u points in the
direction that it faces, and v points up.
"""

import math

from PIL import Image, ImageDraw

INK = (46, 40, 48)
SKIN = (244, 201, 164)
COLOURS = {
    "red": (214, 40, 44),
    "orange": (245, 134, 30),
    "yellow": (250, 214, 48),
    "green": (52, 160, 70),
    "blue": (44, 96, 214),
    "purple": (132, 62, 172),
    "pink": (246, 140, 186),
    "white": (246, 246, 242),
}
HAIR = {"man": (92, 58, 34), "woman": (122, 62, 28), "king": (120, 116, 112), "wizard": (206, 206, 212)}
ANIMALS = ("cat", "dog", "bear", "rabbit", "frog")
HEIGHT = {"big": 48.0, "small": 34.0}  # scene units; different enough to be recognized without comparison

Point = tuple[float, float]
Colour = tuple[int, int, int]


def shade(colour: Colour, factor: float) -> Colour:
    """Darkens a colour (factor < 1) or lightens it towards white (factor > 1)."""
    if factor <= 1:
        return tuple(int(c * factor) for c in colour)
    return tuple(int(c + (255 - c) * (factor - 1)) for c in colour)


class Pen:
    """Draws outlined shapes in scene units on a supersampled canvas."""

    def __init__(self, size: int, background: Colour):
        self.scale = size / 100
        self.image = Image.new("RGB", (size, size), background)
        self.draw = ImageDraw.Draw(self.image)

    def _px(self, points):
        return [(x * self.scale, y * self.scale) for x, y in points]

    def _stroke(self, points, width: float, colour: Colour):
        pixels, radius = self._px(points), width * self.scale / 2
        self.draw.line(pixels, fill=colour, width=max(1, round(2 * radius)), joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def line(self, points, width: float, colour: Colour, outline: float = 0.0):
        """Draws a polyline with round ends. `outline` is the thickness of the ink around it."""
        if outline:
            self._stroke(points, width + 2 * outline, INK)
        self._stroke(points, width, colour)

    def disc(self, centre: Point, radius: float, colour: Colour, outline: float = 0.0, squash: float = 1.0):
        """Draws a disc, or an ellipse with the vertical radius `radius * squash`."""
        (x, y), s = centre, self.scale
        for r, c in ((radius + outline, INK), (radius, colour)) if outline else ((radius, colour),):
            ry = r * squash
            self.draw.ellipse(((x - r) * s, (y - ry) * s, (x + r) * s, (y + ry) * s), fill=c)

    def polygon(self, points, colour: Colour, outline: float = 0.0):
        """Draws a filled polygon whose outline has round corners."""
        if outline:
            self._stroke([*points, points[0], points[1]], 2 * outline, INK)
        self.draw.polygon(self._px(points), fill=colour)


# --- actors ----------------------------------------------------------------------------------------------------------

# In figure units: height of the hip, hip to shoulder, shoulder to the head's centre, radius of the head.
HIP, TORSO, NECK, HEAD = 0.36, 0.27, 0.15, 0.165
ARM, LEG = 0.17, 0.19  # length of each of the two bones of a limb
LINE = 0.9  # ink outline in scene units


def _joint(start: Point, end: Point, bone: float, bend: float) -> tuple[Point, Point]:
    """Returns the joint and the end of a limb of two equal bones that reaches from `start` towards `end`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    reach = math.hypot(dx, dy) or 1e-6
    if reach > 2 * bone:
        dx, dy, reach = dx * 2 * bone / reach, dy * 2 * bone / reach, 2 * bone
    side = bend * math.sqrt(max(bone**2 - (reach / 2) ** 2, 0.0))
    joint = (start[0] + dx / 2 - dy / reach * side, start[1] + dy / 2 + dx / reach * side)
    return joint, (start[0] + dx, start[1] + dy)


class Figure:
    """An actor in the scene. (x, y) is the ground point below its hip, and `facing` is 1 (right) or -1 (left).

    In radians, `angle` turns the whole figure forward about its hip (pi/2: lies face down), `lean` only its torso.
    """

    def __init__(self, actor, x, y, facing=1, angle=0.0, lean=0.0, hip=HIP):
        self.actor, self.facing, self.angle, self.lean, self.hip = actor, facing, angle, lean, hip
        self.height = HEIGHT[actor.size]
        self.x, self.y = x, y
        self.shoulder = (math.sin(lean) * TORSO, hip + math.cos(lean) * TORSO)
        self.head = (self.shoulder[0] + math.sin(lean) * NECK, self.shoulder[1] + math.cos(lean) * NECK)

    def at(self, u: float, v: float) -> Point:
        """Converts figure units to scene units."""
        v -= self.hip
        u, v = u * math.cos(self.angle) + v * math.sin(self.angle), v * math.cos(self.angle) - u * math.sin(self.angle)
        return self.x + self.facing * u * self.height, self.y - (v + self.hip) * self.height

    def reach(self, u: float, v: float) -> Point:
        """Converts a point relative to the shoulder (u forward, v up) to scene units. Used to place hands."""
        return self.at(self.shoulder[0] + u, self.shoulder[1] + v)

    @property
    def mouth(self) -> Point:
        return self.at(self.head[0] + HEAD * 0.95, self.head[1] - HEAD * 0.45)

    def draw(self, pen: Pen, hands, feet, mood="smile"):
        """Draws the figure. `hands` are two scene points (near, far), `feet` two (u, v) from the ground point."""
        kind, h = self.actor.kind, self.height
        colour = COLOURS[self.actor.colour]
        clothed = kind not in ANIMALS and kind != "robot"
        robed = kind in ("woman", "king", "wizard")
        leg = {"man": (58, 66, 96), "woman": SKIN, "king": (90, 70, 60), "wizard": (90, 70, 60)}.get(kind, colour)
        limb = h * (0.085 if kind != "robot" else 0.075)

        def draw_limb(start, end, bone, bend, paint, tip, tip_size):
            joint, end = _joint(start, end, bone * h, bend * self.facing)
            pen.line([start, joint, end], limb, paint, LINE)
            pen.disc(end, limb * tip_size, tip, LINE)

        hand = SKIN if clothed else ((180, 184, 192) if kind == "robot" else shade(colour, 1.35))
        shoe = INK if clothed else hand
        hip = self.at(0, self.hip)
        arm_root = self.at(self.shoulder[0], self.shoulder[1] - 0.03)
        draw_limb(arm_root, hands[1], ARM, 1, shade(colour, 0.78), shade(hand, 0.85), 0.62)
        draw_limb(hip, self.at(*feet[1]), LEG, -1, shade(leg, 0.78), shade(shoe, 0.85), 0.72)
        self._tail(pen, colour)
        draw_limb(hip, self.at(*feet[0]), LEG, -1, leg, shoe, 0.72)

        if robed:  # a robe or dress that widens downwards
            su, sv = self.shoulder
            hem = self.hip - 0.10
            robe = [(su - 0.07, sv + 0.02), (su + 0.07, sv + 0.02), (0.15, hem), (-0.15, hem)]
            pen.polygon([self.at(*p) for p in robe], colour, LINE)
        elif kind == "robot":
            su, sv = self.shoulder
            box = [(su - 0.10, sv + 0.02), (su + 0.10, sv + 0.02), (0.10, self.hip - 0.03), (-0.10, self.hip - 0.03)]
            pen.polygon([self.at(*p) for p in box], colour, LINE)
            pen.disc(self.at(su * 0.5 + 0.03, (sv + self.hip) / 2), h * 0.04, (250, 250, 250))
        else:
            spine = [self.at(0, self.hip + 0.05), self.at(self.shoulder[0], self.shoulder[1] - 0.05)]
            pen.line(spine, h * 0.2, colour, LINE)
            if kind in ANIMALS:
                belly = self.at(self.shoulder[0] * 0.5 + 0.035, (self.shoulder[1] + self.hip) / 2)
                pen.disc(belly, h * 0.06, shade(colour, 1.45))
        self._head(pen, colour, mood)
        draw_limb(arm_root, hands[0], ARM, 1, colour, hand, 0.62)

    def _tail(self, pen: Pen, colour: Colour):
        kind, h = self.actor.kind, self.height
        if kind == "cat":
            tail = [self.at(-0.06, self.hip), self.at(-0.2, self.hip + 0.02), self.at(-0.25, self.hip + 0.16)]
            pen.line(tail, h * 0.05, colour, LINE)
        elif kind == "dog":
            pen.line([self.at(-0.06, self.hip + 0.02), self.at(-0.2, self.hip + 0.12)], h * 0.06, colour, LINE)
        elif kind in ("rabbit", "bear"):
            pen.disc(self.at(-0.12, self.hip), h * 0.05, shade(colour, 1.5), LINE)

    def _head(self, pen: Pen, colour: Colour, mood: str):
        kind, h, r = self.actor.kind, self.height, HEAD

        def at(u, v):  # relative to the head's centre in head radii, leaning with the torso
            c, s = math.cos(self.lean * 0.6), math.sin(self.lean * 0.6)
            u, v = u * r, v * r
            return self.at(self.head[0] + u * c + v * s, self.head[1] + v * c - u * s)

        def disc(u, v, radius, paint, outline=LINE):
            pen.disc(at(u, v), radius * r * h, paint, outline)

        def poly(points, paint, outline=LINE):
            pen.polygon([at(*p) for p in points], paint, outline)

        dark, light = shade(colour, 0.7), shade(colour, 1.5)
        hair = HAIR.get(kind)
        if kind == "woman":
            poly([(-0.5, 1.05), (-1.15, 0.4), (-1.25, -1.35), (-0.45, -1.45), (0.1, 0.0)], hair)
        elif kind == "cat":
            poly([(-0.95, 0.3), (-0.85, 1.45), (-0.1, 0.9)], colour)
            poly([(0.1, 0.9), (0.75, 1.45), (0.9, 0.35)], colour)
        elif kind == "bear":
            disc(-0.72, 0.78, 0.38, colour)
            disc(0.62, 0.82, 0.38, colour)
        elif kind == "rabbit":
            for u in (-0.5, 0.25):
                pen.line([at(u, 0.7), at(u - 0.25, 2.0)], 0.5 * r * h, colour, LINE)
                pen.line([at(u, 0.8), at(u - 0.23, 1.9)], 0.2 * r * h, (250, 190, 200))
        elif kind == "frog":
            disc(-0.35, 0.85, 0.42, colour)
            disc(0.5, 0.85, 0.42, colour)
        elif kind == "robot":
            pen.line([at(0, 1.0), at(0, 1.6)], 0.14 * r * h, INK)
            disc(0, 1.65, 0.2, (240, 70, 60), LINE * 0.7)

        if kind == "robot":
            poly([(-1.0, -0.85), (1.0, -0.85), (1.0, 0.95), (-1.0, 0.95)], colour)
            poly([(-0.45, 0.0), (0.95, 0.0), (0.95, 0.6), (-0.45, 0.6)], (36, 44, 60), 0)
            for u in (0.0, 0.6):
                pen.disc(at(u, 0.3), 0.17 * r * h, (120, 240, 250))
        else:
            disc(0, 0, 1.0, SKIN if hair else colour)
        if kind == "frog":
            for u in (-0.25, 0.6):
                disc(u, 0.9, 0.28, (255, 255, 255), 0)
                disc(u + 0.08, 0.9, 0.15, INK, 0)
        elif kind != "robot":
            for u in (0.12, 0.62):
                disc(u, 0.18, 0.14, INK, 0)
        if kind in ("cat", "bear", "dog"):
            disc(0.62, -0.32, 0.4, light, 0)
            disc(0.85, -0.15, 0.17, INK, 0)
        if kind == "rabbit":
            disc(0.72, -0.15, 0.15, (240, 110, 140), 0)
        if kind == "cat":
            for v in (-0.15, -0.45):
                pen.line([at(0.55, -0.3), at(-0.1, v)], 0.4, INK)
        if kind == "dog":  # hanging ears, over the head
            pen.line([at(-0.65, 0.6), at(-0.95, -0.5)], 0.5 * r * h, dark, LINE * 0.8)
        if kind == "man":
            cut = [(-1.0, 0.1), (-0.9, 0.75), (-0.2, 1.12), (0.6, 0.95), (0.85, 0.55), (-0.2, 0.5), (-0.55, -0.1)]
            poly(cut, hair, LINE * 0.6)
        elif kind == "woman":
            poly([(-1.0, 0.2), (-0.75, 0.85), (0.0, 1.12), (0.8, 0.7), (0.2, 0.55), (-0.45, 0.1)], hair, LINE * 0.6)
        elif kind == "king":
            poly([(-0.4, -0.35), (0.75, -0.4), (0.5, -1.35), (-0.1, -1.2)], hair, LINE * 0.6)
            crown = [(-0.85, 0.5), (-1.0, 1.5), (-0.45, 1.05), (0.0, 1.6), (0.45, 1.05), (1.0, 1.5), (0.85, 0.5)]
            poly(crown, (255, 205, 40), LINE)
        elif kind == "wizard":
            poly([(-0.3, -0.35), (0.75, -0.4), (0.35, -1.7)], hair, LINE * 0.6)
            poly([(-1.35, 0.4), (1.35, 0.4), (0.75, 0.7), (-0.1, 2.4), (-0.8, 0.7)], colour, LINE)
            disc(0.0, 1.1, 0.22, (255, 225, 90), 0)

        if mood == "open":
            disc(0.55, -0.55, 0.24, (120, 20, 30), LINE * 0.5)
        elif mood == "asleep":
            face = SKIN if hair else colour
            for u in (0.12, 0.62):
                if kind not in ("robot", "frog"):
                    disc(u, 0.2, 0.2, face, 0)
                pen.line([at(u - 0.16, 0.14), at(u + 0.16, 0.14)], 0.6, INK)
        elif kind not in ("robot", "king", "wizard"):
            pen.line([at(0.25, -0.5), at(0.5, -0.62), at(0.78, -0.5)], 0.6, INK)
