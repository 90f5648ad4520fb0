"""Runs the commands and Python code of docs/tutorial.md in order and unchanged, but with fewer scenes."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from support.repository import QUIET_ENVIRONMENT, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PAGE = (ROOT / "docs/tutorial.md").read_text().split("## Your own photos")[0]
SCENES = {"4000": "256", "400": "300"}  # one batch; the Python block uses scenes below 300
LINKS = ("tools", "launchers")  # folders of the clone that the commands read


def blocks() -> list[tuple[str, str]]:
    """Language and text of each code block, without those for the reader's own photos."""
    return re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def steps() -> list[list[str]]:
    """Arguments of the Python interpreter, one list per command or Python block."""
    found = []
    for language, text in blocks():
        if language == "python":
            found.append(["-c", text])
        elif not language:
            for line in text.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(line)
                found.append([*({"python": [], "amp": ["-m", "amp"]}[program]), *(SCENES.get(w, w) for w in words)])
    return found


def test_the_tutorial_runs(tmp_path):
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    for name in LINKS:
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**QUIET_ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    printed = []
    for words in steps():
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        printed.append(done.stdout)
    folder = tmp_path / "runs/tutorial"
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (folder / "report.html").read_text()[:200]
    assert len(re.findall(r"^-?\d\.\d{3} runs/tutorial/scenes/images/test_\d+\.jpg$", printed[-1], re.MULTILINE)) == 5
    assert [words[2] for words in steps() if words[0] == "-m"] == [
        *("generate_knowledge", "make_shards", "train", "search", "train", "evaluate", "compare", "report")
    ]
