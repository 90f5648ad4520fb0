"""Prints a plan: findings, steps, memory and the verdict."""

from collections.abc import Callable, Iterable

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from amp.plan.findings import Findings, counted, in_bytes
from amp.plan.memory import MARGIN
from amp.plan.plan import Plan
from amp.train.launch import precision_of

TOTAL = "total per GPU"
COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


def print_plan(plan: Plan, console: Console) -> None:
    """Prints checks, steps and memory, and the verdict last."""
    settings, findings = plan.settings, plan.findings
    simulated = [f"{counted(settings.nodes, 'node')} x {counted(settings.gpus, 'GPU')}"]
    simulated += [f"a dataset of {settings.images:,} images"] if settings.images is not None else []
    console.print(Text(f"Plan of {plan.config.out}", "bold"))
    console.print(Text(f"Simulated: {', '.join(simulated)}"))
    console.print(Text("Estimated: all figures; no GPU was used\n"))
    console.print(findings_table(findings))
    if plan.steps is not None:
        console.print(steps_table(plan))
    if plan.estimates:
        console.print(memory_table(plan))
    errors, warnings = findings.number("error"), findings.number("warning")
    verdict = "this job would fail" if errors else "found nothing that would make this job fail"
    console.print(
        Text(
            f"{counted(errors, 'error')}, {counted(warnings, 'warning')}: {verdict}",
            "bold red" if errors else "bold green",
        )
    )


def findings_table(findings: Findings) -> Table:
    table = Table(title="Checks", title_justify="left", show_header=False, box=SIMPLE)
    above = ""
    for level, text, check in findings:
        table.add_row(Text(level, COLOURS[level]), Text("" if check == above else check), Text(text))
        above = check
    return table


def steps_table(plan: Plan) -> Table:
    """Steps, images and parameters of each stage."""
    assert plan.steps is not None and plan.data is not None  # steps need data
    config, steps, world = plan.config, plan.steps, plan.settings.world
    size, accumulation = config.data.batch_size, config.gradient_accumulation
    stages = [config.stage(number) for number in config.stages]
    each = lambda value: [value] * len(stages)  # noqa: E731
    rows = [
        ("images per step", each(steps.images), f"{size} x {world} processes x {accumulation} batches"),
        ("batches per epoch", each(steps.epoch), "per process"),
        ("images per epoch", each(steps.epoch * size), f"per process; the split has {plan.data.train.images:,}"),
        ("epochs", [stage.epochs for stage in stages], ""),
        ("optimizer steps", steps.total.values(), f"{sum(steps.total.values()):,} in total"),
    ]
    if plan.parameters:
        sizes = plan.parameters.values()
        cast = plan.zero is not None and precision_of(config, gpu=True) == "fp16"  # DeepSpeed's fp16 casts all weights
        rows += [
            ("trained parameters", [part.trained for part in sizes], "in fp16" if cast else "in fp32"),
            ("frozen parameters", [part.frozen for part in sizes], f"in {'fp16' if cast else config.model.precision}"),
        ]
    return stage_table("Steps", config.stages, rows, "{:,}".format)


def memory_table(plan: Plan) -> Table:
    """Memory per GPU by purpose."""
    zero, world, found = plan.zero, plan.settings.world, list(plan.estimates.values())
    share = lambda stage: f"; / {world} processes" if zero and zero.stage >= stage and world > 1 else ""  # noqa: E731
    steps = [e.step for e in found]
    rows = [
        ("frozen parameters", [e.frozen for e in found], f"computed{share(3)}"),
        ("trained parameters", [e.trained for e in found], f"computed{share(3)}"),
        ("gathered parameters", [e.gathered_parameters for e in found], "computed; at most"),
        ("gradients", [e.gradients for e in found], f"computed{share(2)}"),
        ("exchange buffers", [e.buckets for e in found], f"computed; {'ZeRO' if zero else 'DDP'} communication"),
        ("AdamW", [e.optimizer for e in found], f"computed; moments{' and fp32 weights' if zero else ''}{share(1)}"),
        ("batches", [s.batch for s in steps], "computed"),
        ("activations", [s.kept for s in steps], "simulated; saved for the backward pass"),
        ("extra at the peak", [s.peak - s.kept for s in steps], "simulated; temporary, or recomputed"),
        ("  of all ranks", [s.gathered for s in steps], "simulated; gathered rows, included in the two lines above"),
        ("CUDA, cuDNN, NCCL", [e.overhead for e in found], "assumed, not measured"),
        ("margin", [e.margin for e in found], f"assumed; {MARGIN:.0%} for fragmentation"),
        (TOTAL, [e.total for e in found], "estimated"),
        ("host memory", [e.host for e in found], "computed; offloaded by each process"),
    ]
    return stage_table("Memory per GPU (estimated)", plan.estimates, [row for row in rows if any(row[1])], in_bytes)


def stage_table(title: str, stages: Iterable[int], rows: list[tuple], show: Callable[[int], str]) -> Table:
    """Builds a table with a column per stage; a row is a name, a number per stage and an explanation."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in ("", *(f"stage {stage}" for stage in stages), ""):
        table.add_column(heading, justify="right" if heading else "left")
    for name, numbers, what in rows:
        table.add_row(name, *map(show, numbers), what, style="bold" if name == TOTAL else "")
    return table
