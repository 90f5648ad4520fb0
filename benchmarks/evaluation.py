"""An evaluation from end to end: `amp evaluate` as a user starts it, without and then with stored features.

The first run decodes and encodes all photos, encodes all texts, and re-ranks both directions. The second run reads the
features of photos and texts from the disk.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from amp.data.conversion.make import make_shards
from amp.data.shards import ShardManifest
from amp.errors import AmpError
from amp.model.adapter import save_adapter
from amp.model.config import PromptConfig
from amp.model.factory import create_model_and_transforms
from benchmarks import photos
from benchmarks.models import PLAIN, READ_LAST, base_model
from benchmarks.settings import Settings
from benchmarks.tables import table
from benchmarks.timing import rounded

DRAWN = 128  # number of drawn photos if no shards are given
COLD, STORED = "nothing stored", "features stored"


def run(settings: Settings) -> dict:
    """Times both runs, each in its own process, with `readout` from the middle block on."""
    with tempfile.TemporaryDirectory() as name:
        return both_runs(settings, Path(name))


def both_runs(settings: Settings, folder: Path) -> dict:
    shards = settings.shards
    if shards is None:
        given, shards = photos.given_or_drawn(folder, settings.photos, DRAWN, "test"), folder / "shards"
        make_shards(**given, out=str(shards))
    weights, adapter = folder / "clip.pt", folder / "adapter.safetensors"
    base = base_model(settings)
    torch.save(base.backbone.clip.state_dict(), weights)  # so that random weights are the same in each process
    prompt = PromptConfig(**{**PLAIN, **READ_LAST, "depth": 0.5})
    save_adapter(adapter, create_model_and_transforms(settings.model, str(weights), prompt_config=prompt)[0])
    command = [
        sys.executable,
        "-m",
        "amp.commands.evaluate",
        "--model.name",
        settings.model,
        "--model.pretrained",
        str(weights),
        "--shards",
        str(shards),
        "--cache",
        str(folder / "cache"),
        "--search.top_k",
        str(settings.top_k),
        "--adapters",
        f"action-aware={adapter}",
        "--out",
    ]
    seconds = {}
    for number, name in enumerate((COLD, STORED)):
        start = time.perf_counter()
        if subprocess.run([*command, str(folder / f"result{number}.json")]).returncode:
            raise AmpError("amp evaluate ended with an error; see its output above")
        seconds[name] = rounded(time.perf_counter() - start)
    manifest = ShardManifest.load(shards)
    images, captions = manifest.samples("test"), manifest.captions("test")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    return {
        "images": images,
        "captions": captions,
        "pairs": settings.top_k * (images + captions),
        "seconds": seconds,
        "largest_process_MB": round(peak),
    }


def evaluations(figures: dict) -> list[str]:
    work = figures["images"] + figures["captions"]
    return table(["", "seconds", "queries/s"], ([name, x, work / x] for name, x in figures["seconds"].items()))


TABLES = {"evaluation": evaluations}
