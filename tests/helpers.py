"""What the tests of the stream, of several processes and of the command lines share."""

import importlib.util
import io
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
# Tiny models gain nothing from OpenMP's threads, and where cores are few, threads that spin stop everything else.
QUIET_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
SPLIT_SIZES = {"train": 22, "val": 6, "test": 12}

_COLOURS = ("red", "green", "blue", "yellow", "white", "purple", "orange")
_ACTORS = ("dog", "girl", "horse", "boy")
_ACTIONS = ("chases", "kicks", "carries", "throws", "watches")
_THINGS = ("ball", "kite", "stick")


def aim_settings(block: int = 0, options: dict | None = None, **settings) -> dict:
    """`PromptConfig`'s arguments for the paper's AIM, with captions' features as they are, in CLIPs of 3 blocks.

    Args:
        block: The first that sees prompts.
        options: Of the interaction, beside a bottleneck of 4 (40 / 16 hidden units would often all be off).
        **settings: Further arguments.
    """
    options = {"bottleneck": 4, **(options or {})}
    return {
        "interaction": "aim",
        "interaction_options": options,
        "depth": block / 3,
        "num_prompts": 4,
        "enrich": False,
        **settings,
    }


def draw_dataset(root: Path, sizes: dict[str, int] = SPLIT_SIZES) -> dict:
    """Draws pictures and writes captions in the Karpathy format and their knowledge.

    Images have one to three captions and these none to three triplets of both kinds; captions of the test split are
    distinct, in the training split one occurs at several images.

    Returns:
        The arguments of `amp.data.conversion.make.make_shards` but `out`.
    """
    (root / "images").mkdir(parents=True)
    images, knowledge = [], []
    for split, count in sizes.items():
        for index in range(count):
            number = len(images)
            name = f"{split}_{index:03d}.jpg"
            _draw(number).save(root / "images" / name, quality=95)
            sentences = []
            for turn in range(1 + number % 3):
                actor, action, thing = (
                    words[(number + 2 * turn) % len(words)] for words in (_ACTORS, _ACTIONS, _THINGS)
                )
                colour = _COLOURS[(number + turn) % len(_COLOURS)]
                text = f"A {colour} {actor} {action} a {thing} beside house {number} on day {turn}"
                if split == "train" and number % 5 == 4 and turn == 0:
                    text = "A dog sleeps"
                triplets = [
                    {"subject": actor, "action": action, "object": thing, "kind": "action"},
                    {"subject": actor, "action": "is", "object": colour, "kind": "attribute"},
                    {"subject": actor, "action": "stands", "object": "", "kind": "action"},
                ][: (number + turn) % 4]
                states = [f"The {t['subject']} {t['action']} with care {(number + turn) % 6}" for t in triplets]
                sentid = len(knowledge)
                sentences.append({"raw": text, "tokens": text.lower().split(), "imgid": number, "sentid": sentid})
                knowledge.append({"sentid": sentid, "image": name, "triplets": triplets, "states": states})
            sentids = [s["sentid"] for s in sentences]
            images.append(
                {"filename": name, "split": split, "imgid": number, "sentids": sentids, "sentences": sentences}
            )
    (root / "dataset.json").write_text(json.dumps({"images": images, "dataset": "drawn"}))
    (root / "knowledge.jsonl").write_text("".join(json.dumps(line) + "\n" for line in knowledge))
    return {
        "captions": str(root / "dataset.json"),
        "images": str(root / "images"),
        "knowledge": str(root / "knowledge.jsonl"),
    }


def _draw(number: int) -> Image.Image:
    """Two shapes whose colours and places depend on the number, on a canvas that isn't square."""
    image = Image.new("RGB", (44, 36), (20 + 9 * number % 200, 90, 160))
    canvas = ImageDraw.Draw(image)
    left = 2 + 5 * number % 20
    canvas.ellipse((left, 6, left + 14, 22), fill=_COLOURS[number % 7])
    canvas.rectangle((40 - left, 14 + number % 9, 43, 33), fill=_COLOURS[(3 * number + 1) % 7])
    return image


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder of small shards, of 5 samples at most, with the splits of `SPLIT_SIZES`; read only."""
    from amp.data.conversion.make import make_shards

    root = tmp_path_factory.mktemp("drawn")
    make_shards(**draw_dataset(root), out=str(root / "shards"), samples_per_shard=5, workers=1)
    return root / "shards"


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """Wheel and source archive, built without network from a copy, so that no build folder is left behind."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if files.returncode != 0:
        pytest.skip("needs git and a checkout to know which files belong to the source")
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", folder, source],
        env=QUIET_ENVIRONMENT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def launcher(path: str) -> ModuleType:
    """A script of the repository as a module, whose `main` a test calls without paying for another process."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_here(path: str, *arguments) -> subprocess.CompletedProcess:
    """What a script of the repository prints and its exit status, run in this process: its imports alone take one of
    its own ten seconds of a core. What would end in a traceback fails the test."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    arguments = [str(argument) for argument in arguments]
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            launcher(path).main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess([path, *arguments], status, output.getvalue(), errors.getvalue())


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its state in the process: forgotten before and after a command line runs in here."""
    from accelerate.state import AcceleratorState, PartialState

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()

    forget()
    yield
    forget()


def run_ranks(function: Callable, folder: Path, *arguments, world: int = 2) -> list:
    """Calls function(*arguments) in `world` processes joined over gloo; returns their results in rank order.

    The processes are forked from a server that has imported torch and open_clip once for all tests.
    """
    context = multiprocessing.get_context("forkserver")
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [context.Process(target=_rank, args=(function, rank, world, folder, arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
    codes = [process.exitcode for process in ranks]
    assert not hung and codes == [0] * world, f"ranks ended with {codes}, {len(hung)} of them hung"
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(function, rank, world, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(function(*arguments), folder / f"result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
