"""Plot of a sweep: R@1 of both directions and Rsum, one point per row with its standard error, base CLIP as a line."""

import io

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from amp.report.fonts import clean, plot_fonts
from amp.retrieval.figures import RowKey
from amp.sweep.config import SweepConfig
from amp.sweep.summary import METRICS, Line

PANELS = ("i2t R@1", "t2i R@1", "Rsum")
COLOUR, BASE_COLOUR = "#0072b2", "#d55e00"  # from Okabe and Ito's palette, distinguishable by colour-blind readers


def draw(config: SweepConfig, lines: dict[RowKey, Line], base: Line) -> bytes | None:
    """The plot as PNG; None if no row has a result."""
    rows = list(dict.fromkeys(row.name for table in config.tables for row in table.rows if row.train))
    rows = [name for name in rows if lines[RowKey(name)].values]
    if not rows:
        return None
    labels, out = [clean(name) for name in rows], io.BytesIO()
    with rc_context({"font.family": plot_fonts("".join(labels)), "text.parse_math": False}):
        figure = Figure(figsize=(10, 1.6 + 0.38 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, metric in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
            i = METRICS.index(metric)
            axes.axvline(base.mean(i), color=BASE_COLOUR, linestyle="--", label="base CLIP")
            for y, name in enumerate(rows):
                error = lines[RowKey(name)].error(i)
                axes.errorbar(lines[RowKey(name)].mean(i), y, xerr=error, color=COLOUR, marker="o", capsize=3)
            axes.set_title(metric)
            axes.set_xlabel("percent" if metric != "Rsum" else "sum of six recalls")
            axes.grid(axis="x", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.15)
        first = figure.axes[0]
        first.set_yticks(range(len(rows)), labels)
        first.set_ylim(len(rows) - 0.5, -0.5)
        figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside upper right", frameon=False)
        figure.suptitle(
            f"{config.split} split, mean and standard error over up to {len(config.seeds)} seeds", fontsize=10
        )
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
