"""A sweep at a glance: R@1 of both directions and Rsum, a point a row with its standard error, base CLIP as a line."""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from amp.sweep.config import SweepConfig
from amp.sweep.summary import METRICS, Summary

PANELS = {"i2t R@1": "percent", "t2i R@1": "percent", "Rsum": "sum of six recalls"}
# Of Okabe and Ito's palette, told apart by colour-blind readers; the marks differ too.
COLOUR, CONTROL_COLOUR, BASE_COLOUR = "#0072b2", "#000000", "#d55e00"


def draw(config: SweepConfig, summary: Summary) -> bytes | None:
    """The picture as PNG; None where no trained row has a result."""
    lines = [line for line in summary.rows.values() if line.values]
    if not lines:
        return None
    figure = Figure(figsize=(11, 2.0 + 0.36 * len(lines)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (metric, unit) in zip(panels, PANELS.items(), strict=True):
        i = METRICS.index(metric)
        handles = [axes.axvline(summary.base.mean(i), color=BASE_COLOUR, linestyle="--", label="base CLIP")]
        for y, line in enumerate(lines):
            control = line.name == config.control
            colour, marker = (CONTROL_COLOUR, "s") if control else (COLOUR, "o")
            bar = axes.errorbar(
                line.mean(i), y, xerr=line.error(i), color=colour, marker=marker, capsize=4, markersize=7
            )
            bar.set_label("control" if control else "row")
            handles.append(bar)
        axes.set_title(metric)
        axes.set_xlabel(unit)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    panels[0].set_yticks(range(len(lines)), [f"{line.name} (n = {len(line.seeds)})" for line in lines])
    panels[0].set_ylim(len(lines) - 0.5, -0.5)
    named = {handle.get_label(): handle for handle in handles}
    figure.legend(named.values(), named, loc="outside lower center", ncols=len(named), frameon=False)
    figure.suptitle(f"{config.name}: {config.split} split, mean ± standard error over n seeds", fontsize=11)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
