"""Draws docs/method.png: a caption's knowledge, how it queries an image in the frozen CLIP, and re-ranking.

python tools/figures/method.py --out docs/method.png
"""

import sys
from pathlib import Path

from amp.errors import exit_on_error

with exit_on_error():
    sys.path.append(str(Path(__file__).resolve().parents[1] / "scenes"))

    import scenes
    from jsonargparse import auto_cli

    from amp.command_line import CommandLine

CAPTION = "A wizard in white is being\npushed in a cart by\na yellow dog."
KNOWLEDGE = (
    (
        ("dog", "pushing", "wizard"),
        "The dog leans forward behind the cart with both hands\non its handle, and the wizard sits in the cart",
    ),
    (("dog", "is", "yellow"), "The dog is yellow all over, from the head to the legs"),
    (("wizard", "wearing", "white"), "The body of the wizard is dressed in bright white"),
)
# Test scenes of `make demo` for this caption: the order of the frozen CLIP, and the first three after re-ranking.
FIRST_STAGE = (264, 147, 139, 289, 551, 142, 143, 679, 550, 657, 323, 518, 559, 102, 36, 736, 440, 16, 508, 0)
RERANKED = (0, 142, 139)
RIGHT = 0

FROZEN, TRAINED, DATA = "#e3e5e8", "#fbd9bd", "#f6f2e7"
INK, FAINT, LINE, GREEN, QUERY = "#1f2328", "#59636e", "#6e7781", "#1a7f37", "#bc4c00"
WIDTH, HEIGHT = 160, 92


class Canvas:
    """The axes; ten units are one inch."""

    def __init__(self) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), dpi=110, facecolor="none")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.axis("off")

    def box(
        self, x: float, y: float, width: float, height: float, text: str = "", colour: str = "white", **style
    ) -> None:
        """A rounded box with its lower left corner at (x, y) and a text in its middle."""
        from matplotlib.patches import FancyBboxPatch

        shape = {"boxstyle": "round,pad=0,rounding_size=1", "edgecolor": LINE, "linewidth": 1, **style}
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=colour, **shape))
        self.text(x + width / 2, y + height / 2, text, ha="center")

    def text(self, x: float, y: float, text: str, size: float = 12, colour: str = INK, **style) -> None:
        self.axes.text(x, y, text, **{"fontsize": size, "color": colour, "va": "center", "linespacing": 1.3, **style})

    def arrow(self, *points: tuple[float, float], colour: str = LINE) -> None:
        """A line through the points, with a head at the last one."""
        from matplotlib.patches import FancyArrowPatch

        *start, before, end = points
        bends = [*start, before]
        if len(bends) > 1:
            self.axes.plot(*zip(*bends, strict=True), color=colour, linewidth=1.5, solid_capstyle="round")
        head = {"arrowstyle": "-|>", "mutation_scale": 15, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.5}
        self.axes.add_patch(FancyArrowPatch(before, end, color=colour, **head))

    def picture(self, scene: int, x: float, y: float, side: float, patches: int = 0) -> None:
        """A test scene, with a grid of patches and a green frame around the right one."""
        from matplotlib.patches import Rectangle

        drawn = scenes.draw(scenes.make_scene(0, "test", scene), 288)
        self.axes.imshow(drawn, extent=(x, x + side, y, y + side), aspect="auto", interpolation="antialiased", zorder=2)
        for line in range(1, patches):
            step = side * line / patches
            self.axes.plot([x + step] * 2, [y, y + side], color="white", linewidth=0.9, zorder=3)
            self.axes.plot([x, x + side], [y + step] * 2, color="white", linewidth=0.9, zorder=3)
        edge = (
            {"edgecolor": GREEN, "linewidth": 3.5}
            if scene == RIGHT and not patches
            else {"edgecolor": LINE, "linewidth": 0.8}
        )
        self.axes.add_patch(Rectangle((x, y), side, side, facecolor="none", zorder=4, **edge))

    def heading(self, x: float, y: float, text: str) -> None:
        self.text(x, y - 0.8, text, size=15, weight="bold", va="baseline")


def draw_knowledge(canvas: Canvas) -> None:
    """The caption, its triplets and its states."""
    canvas.heading(3, 88, "1  Knowledge about the caption's actions")
    canvas.box(3, 66, 27, 15, CAPTION, DATA)
    canvas.text(16.5, 83.2, "caption", colour=FAINT, ha="center")
    canvas.arrow((30, 73.5), (42, 73.5))
    canvas.text(36, 76.6, "LLM\nor rules", size=11, colour=FAINT, ha="center")
    canvas.box(42, 61.5, 71, 20, colour=DATA)
    canvas.text(54.5, 83.2, "triplets", colour=FAINT, ha="center")
    canvas.text(91, 83.2, "states", colour=FAINT, ha="center")
    for (slots, state), y in zip(KNOWLEDGE, (77.2, 71, 65.6), strict=True):
        canvas.box(43, y - 2, 23, 4, ", ".join(slots))
        canvas.text(67.5, y, state, size=11.3)


def draw_queries(canvas: Canvas) -> None:
    """The encoders of caption, triplets and states, and the queries that they make."""
    canvas.box(3, 53.3, 27, 5, "text tower", FROZEN)
    canvas.box(43, 53.3, 23, 5, "triplet encoder", TRAINED)
    canvas.box(79, 53.3, 23, 5, "text tower", FROZEN)
    canvas.arrow((16.5, 66), (16.5, 58.3))
    canvas.arrow((54.5, 61.5), (54.5, 58.3))
    canvas.arrow((90.5, 61.5), (90.5, 58.3))
    for x in (16.5, 54.5, 90.5):
        canvas.arrow((x, 53.3), (x, 49.7))
    canvas.box(3, 42.3, 110, 7.4, edgecolor=QUERY)
    canvas.box(4.2, 43.5, 24.6, 5, "caption", TRAINED)
    for index, (slots, _) in enumerate(KNOWLEDGE):
        canvas.box(43.2 + 23.2 * index, 43.5, 22.4, 5, ", ".join(slots), TRAINED)
    canvas.text(36, 46, "queries", colour=QUERY, ha="center", weight="bold")


def draw_model(canvas: Canvas) -> None:
    """Draws the model: frozen and trained parts, and the attention between them."""
    canvas.heading(3, 37, "2  The queries read the image's patches")
    canvas.picture(RIGHT, 3, 10, 18, patches=6)
    canvas.text(12, 7.5, "image", colour=FAINT, ha="center")
    canvas.arrow((21, 19), (26, 19))
    canvas.box(26, 13, 14, 12, "early\nblocks", FROZEN)
    canvas.arrow((40, 22), (43, 22), (43, 28), (47, 28))
    canvas.arrow((40, 16), (43, 16), (43, 11), (47, 11))
    canvas.box(47, 24.5, 14, 7, "trained\nblock", TRAINED)
    canvas.text(42.3, 28.3, "patches", size=11, colour=FAINT, ha="right")
    canvas.arrow((61, 28), (67, 28))
    canvas.box(67, 24.5, 19, 7, "readout\n(cross-attention)", TRAINED)
    canvas.arrow((76.5, 42.3), (76.5, 31.5), colour=QUERY)
    canvas.box(47, 8, 14, 7, "late\nblocks", FROZEN)
    canvas.box(47, 2.3, 14, 3.6, "visual prompts", TRAINED)
    canvas.arrow((54, 5.9), (54, 8))
    canvas.arrow((61, 11.5), (74.7, 11.5))
    canvas.text(67.5, 13.5, "class token", size=11, colour=FAINT, ha="center")
    canvas.box(74.7, 9.7, 3.6, 3.6, "+", boxstyle="circle,pad=0")
    canvas.arrow((76.5, 24.5), (76.5, 13.3))
    canvas.arrow((78.3, 11.5), (85, 11.5))
    canvas.box(85, 7.5, 28, 8, "image feature\ngiven this caption", DATA)
    canvas.box(97, 24.5, 16, 7, "score\n(cosine)")
    canvas.arrow((105, 15.5), (105, 24.5))
    canvas.arrow((105, 42.3), (105, 31.5))
    canvas.text(104, 37, "caption feature,\nenriched", size=11, colour=FAINT, ha="right")


def draw_search(canvas: Canvas) -> None:
    """The candidates of the frozen CLIP, and their order after re-ranking."""
    canvas.axes.plot([116.3] * 2, [3, 89], color="#d0d7de", linewidth=1)
    canvas.heading(120, 88, "3  Search")
    canvas.text(120, 83.2, "the frozen CLIP's first 20 of 800 images", colour=FAINT)
    for place, scene in enumerate(FIRST_STAGE):
        row, column = divmod(place, 5)
        canvas.picture(scene, 120 + 7.7 * column, 74 - 7.7 * row, 7)
    canvas.arrow((139, 50), (139, 46.5))
    canvas.box(124, 41.5, 30, 5, "re-rank by score")
    canvas.arrow((113, 28), (118.3, 28), (118.3, 44), (124, 44))
    canvas.arrow((139, 41.5), (139, 36.5))
    canvas.text(120, 34, "first 3 after re-ranking", colour=FAINT)
    for place, scene in enumerate(RERANKED):
        canvas.picture(scene, 120 + 12.9 * place, 20, 12)
    canvas.text(120, 16.5, "the right image: 20th, now 1st", colour=GREEN, weight="bold", size=11.5)
    for x, colour, text in ((120, FROZEN, "frozen CLIP"), (139, TRAINED, "trained adapter")):
        canvas.box(x, 4.5, 3, 3, colour=colour, boxstyle="round,pad=0,rounding_size=0.4")
        canvas.text(x + 4, 5.4, text, va="baseline")


def draw(out: str = "docs/method.png") -> None:
    """Draws the figure.

    Args:
        out: PNG file.
    """
    canvas = Canvas()
    card = {"edgecolor": "#d0d7de", "linewidth": 1.5, "boxstyle": "round,pad=0,rounding_size=2"}
    canvas.box(0.4, 0.4, WIDTH - 0.8, HEIGHT - 0.8, **card)
    draw_knowledge(canvas)
    draw_queries(canvas)
    draw_model(canvas)
    draw_search(canvas)
    canvas.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))  # drawing pictures changed the limits
    canvas.figure.savefig(out)
    print(f"{out} written")


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(draw, as_positional=False, parser_class=CommandLine)
