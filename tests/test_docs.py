"""Scripts accept the commands in README, docs and the headers of configurations."""

import contextlib
import functools
import json
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from support.repository import ROOT, launcher

from amp.__main__ import COMMANDS
from amp.knowledge.schema import parse_knowledge

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "results/README.md",
    *sorted((ROOT / "launchers/configs").glob("**/*.yaml")),
]
TOOLS = ("make_shards", "generate_knowledge", "rewrite_knowledge", "knowledge_report", "score_knowledge")
LAUNCHERS = ("train",)
SCRIPT = re.compile(rf"(?:launchers/(?:{'|'.join(LAUNCHERS)})|tools/(?:{'|'.join(TOOLS)}))\.py")


OF_AMP = {name: f"amp/commands/{name}.py" for name in COMMANDS}
PROGRAM = re.compile(r"(?:[A-Z_]+=\$?\(?)?(?:make|pip|python|amp|accelerate|sbatch|launchers/\S+|cp) ")


def blocks(page: Path) -> list[str]:
    """Code blocks of a page, or the header of a YAML file."""
    text = page.read_text()
    if page.suffix == ".yaml":
        return ["\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))]
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Calls of this project's scripts on a page, each as (script, arguments)."""
    found = []
    for block in blocks(page):
        lines = block.replace("\\\n", " ").splitlines()
        for number, line in enumerate(lines):
            if not line.startswith(("accelerate launch ", "python ", "amp ")) or "..." in line:
                continue
            while line.count("'") % 2:  # a quoted list continues in the next line
                number += 1
                line += lines[number]
            words = shlex.split(re.sub(r"-m amp\.commands\.(\w+)", r"amp/commands/\1.py", line), comments=True)
            if words[0] == "amp":
                words = [OF_AMP[words[1]], *words[2:]]
            start = next((i for i, w in enumerate(words) if w in OF_AMP.values() or SCRIPT.fullmatch(w)), None)
            if start is not None and "--help" not in words:
                for option, file in pairwise(words[:start]):
                    assert not option.endswith("_file") or (ROOT / file).is_file(), f"{option} {file}"
                found.append(words[start:])
    return found


ALL = [(page.name, *words) for page in PAGES for words in commands(page)]


def test_commands_are_found():
    """Otherwise a change of style could make the test below pass without any command."""
    for page, count in (("README.md", 5), ("tutorial.md", 12), ("coco.md", 6)):
        assert len([words for words in ALL if words[0] == page]) >= count, page
    launchers = {f"launchers/{name}.py" for name in LAUNCHERS}
    of_amp = {path for name, path in OF_AMP.items() if name != "rewrite_knowledge"}
    assert {words[1] for words in ALL} == {*launchers, *of_amp, *(f"tools/{n}.py" for n in TOOLS)}
    for config in ("coco.yaml", "flickr30k.yaml"):
        assert {words[1] for words in ALL if words[0] == config} >= {"launchers/train.py", OF_AMP["evaluate"]}


loaded = functools.cache(launcher)


@functools.cache
def parser_of(script: str):
    return loaded(script).parser()


def refusal(script: str, arguments: list[str], empty: Path, capsys) -> str:
    """Error of a script for these arguments; empty if it accepts them."""
    if script == OF_AMP["clip_benchmark"]:
        return ""  # has its own options, tested in tests/test_hub.py
    if script.startswith("tools/") or script in (OF_AMP["generate_knowledge"], OF_AMP["make_shards"]):
        empty.mkdir()
        with contextlib.chdir(empty):  # after parsing its options, a tool doesn't find its input
            try:
                loaded(script).main(arguments)
            except SystemExit:
                said = " ".join(capsys.readouterr().err.split())
                return "" if re.search("no such folder; expected|can't be read", said) else said or "ends in silence"
        return "" if "--write_captions" in arguments else "misses no input"
    # Files that a training run would write are replaced by existing ones.
    made = re.compile(r"runs/.*\.yaml")  # `--config photos` is a recipe's name
    try:
        parser_of(script).parse_args(["launchers/configs/scenes.yaml" if made.fullmatch(a) else a for a in arguments])
    except SystemExit:
        return capsys.readouterr().err or "ends in silence"
    return ""


def test_scripts_understand_the_commands(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    refused = []
    for number, (page, script, *arguments) in enumerate(ALL):
        said = refusal(script, arguments, tmp_path / str(number), capsys)
        refused += [f"{page}: {script} {shlex.join(arguments)}: {said}"] if said else []
    assert not refused, "\n".join(refused)


def listed() -> list[tuple[list[str], list[str]]]:
    """Rows of docs/commands.md: the words of a command, and the tests listed for it."""
    rows = []
    for line in (ROOT / "docs/commands.md").read_text().splitlines():
        if line.startswith("| `"):
            words, run_by, needs = (cell.strip() for cell in line.strip("|").split("|"))
            assert run_by or needs, line
            rows.append((words.strip("`").split(), re.findall(r"tests/\w+\.py", run_by)))
    return rows


def test_every_documented_command_is_on_the_list_and_every_row_is_used():
    rows, used, found, missing = listed(), set(), 0, []
    for page in (page for page in PAGES if page.suffix == ".md" and page.name != "commands.md"):
        lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
        lines += [
            " ".join(span.split())
            for span in re.findall(
                r"`([^`]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
            )
        ]
        for line in filter(PROGRAM.match, lines):
            tokens = line.split()
            row = next(
                (
                    n
                    for n, (words, _) in enumerate(rows)
                    if all(word in tokens or (not word.isalpha() and word in line) for word in words)
                ),
                None,
            )
            missing += [] if row is not None else [f"{page.name}: {line}"]
            used.add(row)
            found += 1
    assert missing == [], "not in docs/commands.md"
    assert found > 80
    assert [" ".join(words) for n, (words, _) in enumerate(rows) if n not in used] == []
    for _, tests in rows:
        for test in tests:
            assert (ROOT / test).is_file(), test


def test_python_versions_are_named_alike():
    """Version bounds, classifiers, tool settings and docs agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    classifiers = [x.rpartition(" ")[2] for x in project["project"]["classifiers"] if ":: Python :: 3." in x]
    lowest, highest = classifiers[0], classifiers[-1]
    assert classifiers == [f"3.{n}" for n in range(int(lowest[2:]), int(highest[2:]) + 1)]
    assert project["project"]["requires-python"] == f">={lowest}"
    assert project["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    assert project["tool"]["mypy"]["python_version"] == lowest
    readme, both = (ROOT / "README.md").read_text(), f"Python {lowest} to {highest}"
    assert f"Python {lowest} or newer" in readme and both in readme
    assert f"Python {lowest}+" in (ROOT / "Makefile").read_text()
    assert both in (ROOT / "docs/installation.md").read_text()


@pytest.mark.parametrize(
    ("script", "picture"),
    [("tools/architecture.py", "docs/architecture.png"), ("tools/figures/method.py", "docs/method.png")],
)
def test_a_diagram_is_what_its_script_draws(script, picture, tmp_path):
    from PIL import Image, ImageChops

    launcher(script).draw(str(tmp_path / "drawn.png"))
    drawn, shipped = (Image.open(p).convert("RGB") for p in (tmp_path / "drawn.png", ROOT / picture))
    assert drawn.size == shipped.size
    assert sum(ImageChops.difference(drawn, shipped).convert("L").point(lambda x: x > 60).histogram()[1:]) < 3000


PYTHON_BLOCKS = ("docs/extending.md",)


@pytest.mark.parametrize("page", PYTHON_BLOCKS)
def test_python_of_the_page_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    found = [code for code in found if not re.match(r"# \w+\.py\n", code)]  # plugins are tested in test_plugins.py
    assert found
    for code in found:
        exec(compile(code, page, "exec"), {})


def test_knowledge_example_is_well_formed():
    records = [json.loads(block) for block in blocks(ROOT / "docs/data.md") if '"triplets"' in block]
    assert records
    for record in records:
        assert len(parse_knowledge(record, "data.md").triplets) == 2


def test_python_of_the_readme_runs_and_prints_clips_score_twice(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(code.split("\n\n")) == 2 and len(code.splitlines()) == 11  # ten lines and a blank line
    exec(compile(code, "README.md", "exec"), {})
    base, aware = map(float, re.findall(r"\[(-?\d\.\d+)\]", capsys.readouterr().out))
    assert base == aware > 0.3


def test_links_lead_somewhere():
    lost = []
    for page in (page for page in PAGES if page.suffix == ".md"):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            if target.startswith("http") or (file.is_file() and not anchor):
                continue
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if file.is_file() else []
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            lost += [] if anchor in slugs else [f"{page.name}: {target}"]
    assert lost == []


def test_the_table_of_engines_is_that_of_the_run():
    import csv

    with open(ROOT / "results/engines.csv", newline="") as file:
        rows = list(csv.reader(file))
    page = (ROOT / "docs/training.md").read_text()
    for row in rows:
        assert f"| {' | '.join(row)} |" in page
    assert {(row[0].split()[0], row[1]) for row in rows[1:]} >= {
        (engine, precision) for engine in ("1", "DDP", "zero1", "zero2", "zero3") for precision in ("fp32", "bf16")
    }
