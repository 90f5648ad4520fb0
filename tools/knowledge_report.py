"""Reports statistics of a version of knowledge, and its agreement with another version.

Each version is a JSONL file or a folder of shards::

    python tools/knowledge_report.py --knowledge knowledge/qwen/knowledge.jsonl
    python tools/knowledge_report.py --knowledge data/coco --against knowledge/rules/knowledge.jsonl --out report.md
"""

from __future__ import annotations

import json
from pathlib import Path

from amp.errors import Problems, exit_on_error, printable

with exit_on_error():
    from amp.errors import AmpError
    from amp.files import check_writable, write_atomically
    from amp.generation.describe import Entry, agreement, describe, load_entries, sample
    from amp.generation.replies import triplet_line


@exit_on_error()
def main(arguments: list[str] | None = None) -> None:
    from amp.command_line import CommandLine

    parser = CommandLine(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--knowledge", type=str, required=True, help="knowledge.jsonl, the folder that holds it, or a folder of shards"
    )
    parser.add_argument("--against", type=str | None, help="another version to compare with, in any of these forms")
    parser.add_argument("--sample", type=int, default=10, help="number of captions to show")
    parser.add_argument("--seed", type=int, default=0, help="random seed for the choice of these captions")
    parser.add_argument("--out", type=str | None, help="file for the report, .md or .json; null only prints it")
    options = parser.parse_args(arguments)
    from amp.terminal import PlainConsole, load_open_clip

    load_open_clip()
    from open_clip import SimpleTokenizer
    from rich.markdown import Markdown

    if options.out and Path(options.out).suffix not in (".md", ".json"):
        raise AmpError(f"--out is {options.out!r}; expected a name that ends in .md or .json")
    paths = [Path(options.knowledge), *([Path(options.against)] if options.against else [])]
    problems, versions = Problems(), []
    with PlainConsole(stderr=True).progress("reading knowledge"):
        for path in paths:
            with problems.collect():
                versions.append(load_entries(path))
        with problems.collect():
            if options.out:
                check_writable(options.out)
        problems.check()
        tokenizer = SimpleTokenizer()
        report = {
            "versions": {
                str(path): describe(list(entries.values()), tokenizer.encode)
                for path, entries in zip(paths, versions, strict=True)
            },
            "agreement": agreement(*versions) if len(versions) == 2 else {},
        }
    names = [name for name in versions[0] if all(name in entries for entries in versions)]
    chosen = sample(names, options.sample, options.seed)
    text = markdown(report, [[entries[name] for entries in versions] for name in chosen])
    if options.out:
        content = json.dumps(report, indent=1, ensure_ascii=False) if options.out.endswith(".json") else text
        write_atomically(options.out, f"{content}\n".encode())
    console = PlainConsole()
    console.print(Markdown(text) if console.is_terminal else text)


def markdown(report: dict, samples: list[list[Entry]]) -> str:
    """The report as Markdown."""
    figures = list(report["versions"].values())
    lines = [_row(["", *report["versions"]]), _row(["---", *["---:"] * len(figures)])]
    for key in figures[0]:
        if not isinstance(figures[0][key], dict):
            lines.append(_row([key, *(_number(version[key]) for version in figures)]))
    for key in figures[0]:
        if isinstance(figures[0][key], dict) and any(version[key] for version in figures):
            lines.append(_row([key, *(_counts(version[key]) for version in figures)]))
    if report["agreement"]:
        lines += ["", _row(["agreement", ""]), _row(["---", "---:"])]
        for key, value in report["agreement"].items():
            lines.append(_row([key, _counts(value) if isinstance(value, dict) else _number(value)]))
    for entries in samples:
        lines += ["", f"**{_plain(entries[0].caption or 'caption')}**", ""]
        for number, entry in enumerate(entries, start=1):
            mark = f"({number}) " if len(entries) > 1 else ""
            pairs = zip(entry.knowledge.triplets, entry.knowledge.states, strict=True)
            shown = [f"- {mark}{_plain(triplet_line(triplet))}: {_plain(state)}" for triplet, state in pairs]
            lines += shown or [f"- {mark}nothing {_plain(entry.origin.get('empty', ''))}"]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _counts(counts: dict) -> str:
    return ", ".join(f"{_plain(str(key))} {count:,}" for key, count in counts.items())


def _plain(text: str) -> str:
    """Escapes the special characters of Markdown."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>|#" else letter for letter in printable(text))


if __name__ == "__main__":
    main()
