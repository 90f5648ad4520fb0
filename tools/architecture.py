"""Draws docs/architecture.png: the files and programs, and the computation of a training or re-ranking step.

python tools/architecture.py --out docs/architecture.png
"""

from amp.errors import exit_on_error

with exit_on_error():
    from jsonargparse import auto_cli

    from amp.command_line import CommandLine

# name -> (x, y, kind, text). One unit is about the height of a box.
BOXES = {
    "captions": (0.0, 3.2, "file", "captions\nCSV, JSONL, Karpathy"),
    "photos": (0.0, 1.6, "file", "photos"),
    "generation": (2.9, 4.6, "program", "amp generate_knowledge\namp.generation"),
    "knowledge": (5.8, 4.6, "file", "knowledge.jsonl\ntriplets, states"),
    "writer": (5.8, 2.4, "program", "amp make_shards\namp.data.conversion"),
    "shards": (8.7, 2.4, "file", "shards\ntars, manifest.json"),
    "train": (11.6, 2.4, "program", "amp train\namp.train, amp.data"),
    "adapter": (14.5, 2.4, "file", "adapter.safetensors\ntrained weights, base's hash"),
    "evaluate": (17.4, 4.6, "program", "amp evaluate, report\namp.evaluate, amp.report"),
    "search": (17.4, 2.4, "program", "amp search\namp.search"),
    "publish": (17.4, 0.2, "program", "amp publish\namp.publish"),
    "text": (2.9, -3.6, "frozen", "frozen text tower\ncaption T, states D"),
    "triplets": (2.9, -5.4, "trained", "triplet encoder (eq. 4-5)\namp.model.layers"),
    "adapt": (6.6, -4.5, "trained", "the interaction, per caption:\nreadout's queries, or\nprompts of eq. 6"),
    "early": (6.6, -2.6, "frozen", "image blocks 0 to l - 1\namp.model.towers"),
    "interaction": (
        10.3,
        -3.6,
        "trained",
        "the interaction, per pair:\nreadout, aim (eq. 7-8), cat\namp.model.interactions",
    ),
    "late": (14.0, -3.6, "frozen", "image blocks l to L - 1\nand visual prompts (readout:\nbefore the interaction)"),
    "score": (17.4, -3.6, "program", "cosine with the caption\namp.retrieval.scorer"),
}
ARROWS = [
    ("captions", "generation"),
    ("generation", "knowledge"),
    ("knowledge", "writer"),
    ("captions", "writer"),
    ("photos", "writer"),
    ("writer", "shards"),
    ("shards", "train"),
    ("train", "adapter"),
    ("adapter", "evaluate"),
    ("adapter", "search"),
    ("adapter", "publish"),
    ("text", "adapt"),
    ("triplets", "adapt"),
    ("adapt", "interaction"),
    ("early", "interaction"),
    ("interaction", "late"),
    ("late", "score"),
]
COLOURS = {"file": "#f3efe4", "program": "#dbe7f6", "frozen": "#e4e4e4", "trained": "#fbdcc4"}
WIDTH, HEIGHT = 2.5, 1.05


def draw(out: str = "docs/architecture.png") -> None:
    """Draws the diagram.

    Args:
        out: PNG file.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure = Figure(figsize=(17, 8.6), dpi=90)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1.6, 19.1), ylim=(-6.4, 5.9))
    axes.axis("off")
    for start, end in ARROWS:
        (x0, y0, *_), (x1, y1, *_) = BOXES[start], BOXES[end]
        sideways = x1 - x0 > 0.1
        ends = (
            ((x0 + WIDTH / 2, y0), (x1 - WIDTH / 2, y1)) if sideways else ((x0, y0 - HEIGHT / 2), (x1, y1 + HEIGHT / 2))
        )
        axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=14, color="#555555", linewidth=1.2))
    for x, y, kind, text in BOXES.values():
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        style = "square,pad=0" if kind == "file" else "round,pad=0,rounding_size=0.12"
        axes.add_patch(
            FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor=COLOURS[kind], edgecolor="#555555")
        )
        axes.text(x, y, text, ha="center", va="center", fontsize=9.5)
    axes.plot([-1.3, 18.8], [-1.15, -1.15], color="#999999", linewidth=0.8)
    heading = {"fontsize": 11, "weight": "bold", "va": "center"}
    axes.text(-1.2, 5.5, "From files to answers", **heading)
    step = "In a step of training or re-ranking: amp.model.clip.ActionAwareCLIP around a frozen open_clip model"
    axes.text(-1.2, -1.6, step, **heading)
    for place, (kind, said) in enumerate(
        {"file": "files", "program": "programs", "frozen": "frozen CLIP", "trained": "trained"}.items()
    ):
        x = 10.3 + 2.3 * place
        axes.add_patch(
            FancyBboxPatch(
                (x - 0.35, -5.9),
                0.4,
                0.35,
                boxstyle="square,pad=0",
                facecolor=COLOURS[kind],
                edgecolor="#555555",
                linewidth=1,
            )
        )
        axes.text(x + 0.2, -5.72, said, fontsize=10, va="center")
    figure.savefig(out)
    print(f"{out} written")


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(draw, as_positional=False, parser_class=CommandLine)
