"""Fixtures shared by all tests, built from the helpers in `tests/support/`."""

import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.drawn_data import draw_shards
from support.evaluation import World
from support.language_models import unpacked_smollm2
from support.models import clip_tokenizer, write_clip_folder
from support.processes import forget_accelerate
from support.repository import build_distributions, shared_folder
from support.slurm import Slurm, running_cluster

from amp.knowledge.schema import Knowledge, Triplet

# Must run before the fork server starts. Ranks are forked from it, so the imports are done only once, also those of
# packages that ranks import themselves: Accelerate imports DeepSpeed, and shards on S3 need s3fs.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "open_clip", "deepspeed", "s3fs", "amp.model.clip", "amp.retrieval.split_search", "amp.train.engine"]
)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and spinning threads slow down other tests


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> str:
    """Name of a tiny base model on disk, ``local-dir:FOLDER``. Read-only."""
    return write_clip_folder(tmp_path_factory.mktemp("base") / "tiny-clip")


@pytest.fixture(scope="session")
def tokenizer():
    """See `clip_tokenizer`."""
    return clip_tokenizer()


@pytest.fixture(scope="session")
def knowledge() -> list[Knowledge]:
    """Knowledge of four captions with 1, 3, 0 and 8 triplets, including an intransitive action and attributes."""

    def item(*triplets):
        states = tuple(f"The {t[0]} is seen while it {t[1]} {t[2]}".strip() for t in triplets)
        return Knowledge(tuple(Triplet(*t) for t in triplets), states)

    return [
        item(("dog", "jumps", "")),
        item(("girl", "is", "small", "attribute"), ("girl", "studies", "laptop"), ("boy", "throws", "a big red ball")),
        item(),
        item(*((f"man {i}", "chases", f"horse {i}", "attribute" if i % 2 else "action") for i in range(8))),
    ]


@pytest.fixture
def images() -> torch.Tensor:
    """Four random images for the tiny CLIPs (4, 3, 32, 32)."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder of shards with at most 5 samples each and the splits of `SPLIT_SIZES`. Read-only."""
    return draw_shards(tmp_path_factory.mktemp("drawn"))


@pytest.fixture
def copied_shards(shards, tmp_path) -> Path:
    """A copy of `shards` that a test may change."""
    return Path(shutil.copytree(shards, tmp_path / "copied"))


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory) -> Path:
    """Cache folder shared by the tests of a module."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def world(clip_folder, shards, cache_folder) -> World:
    """A model and everything that a search of the drawn test split needs."""
    return World(clip_folder, shards, cache_folder)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """See `build_distributions`."""
    return build_distributions(tmp_path_factory.mktemp("build"))


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Resets the state that Accelerate keeps in the process, before and after a test that runs a command line."""
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct in safetensors."""
    return unpacked_smollm2()


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The Slurm cluster of the test session. Skips without root or without the script that starts one."""
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """Folder of Flickr8k's photos, captions and knowledge. Skips if it is missing."""
    return shared_folder("data/flickr8k", "dataset_flickr8k.json")


@pytest.fixture(scope="session")
def clip_small() -> str:
    """Name of the small real CLIP, ``local-dir:FOLDER``. Skips if it is missing."""
    return f"local-dir:{shared_folder('models/clip-small', 'open_clip_config.json')}"
