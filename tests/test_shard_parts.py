"""Shards written in parts, as by a job array: in any order, repeated, at the same time, and killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.drawn_data import draw_dataset
from support.repository import QUIET_ENVIRONMENT, ROOT, run_here

from amp.data.conversion import write
from amp.data.conversion.folder import lock_folder
from amp.data.conversion.make import make_shards
from amp.data.images.file import read_limited
from amp.data.shards import ShardManifest, ShardReader
from amp.errors import AmpError

SIZES = {"train": 14, "test": 5}
# Three images per shard: train-000000 to train-000004, then test-000000 and test-000001, over three parts in turn.
OF_PART = {
    "0/3": {"train-000000.tar", "train-000003.tar", "test-000001.tar"},
    "1/3": {"train-000001.tar", "train-000004.tar"},
    "2/3": {"train-000002.tar", "test-000000.tar"},
}


class Conversion:
    """Drawn pictures and the folder for their shards; `plain` contains the shards of one run without parts."""

    def __init__(self, root: Path):
        self.dataset = draw_dataset(root, SIZES)
        self.images = root / "images"
        self.out = root / "out"
        self.plain = root / "plain"

    def make(self, part: str | None = None, out: Path | None = None, **options):
        return make_shards(
            **self.dataset, out=str(out or self.out), part=part, **{"samples_per_shard": 3, "workers": 1, **options}
        )

    def command(self, *options: str) -> list[str]:
        given = [f"--{key}={value}" for key, value in self.dataset.items()]
        fixed = [f"--out={self.out}", "--samples_per_shard=3", "--workers=1"]
        return [sys.executable, str(ROOT / "tools/make_shards.py"), *given, *fixed, *options]

    def tars(self) -> dict[str, tuple[int, bytes]]:
        """Name -> (mtime, content); a shard that is written again has a new mtime."""
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in self.out.glob("*.tar")}

    def image_of(self, shard: str) -> Path:
        """The file of the first image of a shard of the plain run."""
        with ShardReader(self.plain / shard) as reader:
            return self.images / reader.read(0)[1]["filename"]

    def has_what_the_plain_run_has(self) -> bool:
        shards = {path.name: path.read_bytes() for path in self.plain.glob("*.tar")}
        contents = [ShardManifest.load(folder).to_dict() for folder in (self.out, self.plain)]
        for content in contents:
            del content["provenance"]["command"]
        assert len(shards) == 7 and not list(self.out.rglob("*.tmp"))
        return contents[0] == contents[1] and {name: tar for name, (_, tar) in self.tars().items()} == shards


@pytest.fixture
def drawn(tmp_path) -> Conversion:
    conversion = Conversion(tmp_path)
    conversion.make(out=conversion.plain)
    return conversion


def count_reads(monkeypatch) -> list[Path]:
    real, read = write.read_image, []

    def counted(path, resize, check):
        read.append(path)
        return real(path, resize, check)

    monkeypatch.setattr(write, "read_image", counted)
    return read


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_in_any_order_and_again_equal_one_run(drawn, monkeypatch, workers):
    skipped = drawn.image_of("train-000004.tar")
    skipped.write_bytes(b"not an image")
    drawn.make(out=drawn.plain, max_skipped=0.06)  # 1 of 19 is 0.053
    written = set()
    for part in ("2/3", "0/3", "1/3", "0/3"):
        assert drawn.make(part, max_skipped=0.06, workers=workers) is None
        written |= OF_PART[part]
        assert set(drawn.tars()) == written
        assert not (drawn.out / "manifest.json").exists()
    before, read = drawn.tars(), count_reads(monkeypatch)
    manifest = drawn.make(max_skipped=0.06)
    assert (drawn.tars(), read) == (before, [])
    assert drawn.has_what_the_plain_run_has()
    assert [entry["file"] for entry in manifest.skipped["unreadable_image"]] == [skipped.name]


def test_the_final_run_completes_a_missing_part(drawn, monkeypatch):
    for part in ("0/3", "2/3"):
        drawn.make(part)
    before, read = drawn.tars(), count_reads(monkeypatch)
    drawn.make()
    assert len(read) == 3 + 2  # train-000001 and train-000004, the last of its split
    assert before.items() <= drawn.tars().items()
    assert drawn.has_what_the_plain_run_has()


def test_a_killed_part_loses_nothing_but_itself(drawn):
    drawn.make("2/3")
    code = (
        "import os, runpy, sys\n"
        "from amp.data.conversion import write\n"
        "real, calls = write.read_image, []\n"
        "def dies(path, resize, check):\n"
        "    calls.append(path)\n"
        "    if len(calls) == 5: os.kill(os.getpid(), 9)\n"
        "    return real(path, resize, check)\n"
        "write.read_image = dies\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script, *options = drawn.command("--part=0/3")[1:]
    assert subprocess.run([sys.executable, "-c", code, script, *options], env=QUIET_ENVIRONMENT).returncode == -9
    assert set(drawn.tars()) == OF_PART["2/3"] | {"train-000000.tar"}
    assert len(list(drawn.out.glob("train-000003.tar.*.tmp"))) == 1
    drawn.make("1/3")
    before = drawn.tars()
    drawn.make()
    assert before.items() <= drawn.tars().items()
    assert drawn.has_what_the_plain_run_has()


def test_tasks_at_once(drawn):
    """The first two processes are the same task, as if a node that was thought dead continues."""
    tasks = [
        subprocess.Popen(drawn.command(f"--part={part}"), env=QUIET_ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for part in ("0/2", "0/2", "1/2")
    ]
    errors = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], errors
    before = drawn.tars()
    drawn.make()
    assert drawn.tars() == before
    assert drawn.has_what_the_plain_run_has()


@pytest.mark.parametrize("moment", range(3))
def test_a_task_between_the_steps_of_its_double(drawn, monkeypatch, moment):
    """A complete task runs just before one of the three renames that finish a shard in a second process."""
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == moment + 1:
            drawn.make("0/3")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    drawn.make("0/3")
    monkeypatch.undo()
    assert set(drawn.tars()) == OF_PART["0/3"]
    before = drawn.tars()
    drawn.make()
    assert before.items() <= drawn.tars().items()
    assert drawn.has_what_the_plain_run_has()


def test_a_failing_part_is_named_and_the_others_stay(drawn):
    image = drawn.image_of("train-000001.tar")
    content = image.read_bytes()
    image.write_bytes(content[:100])
    with pytest.raises(
        AmpError, match=rf"images \(part 1/3\): 1 of 19 images .* 1 unreadable_image; first: {image.name}"
    ):
        drawn.make("1/3")
    for part in ("0/3", "2/3"):
        drawn.make(part)
    with pytest.raises(AmpError, match=f"1 of 19 images .* first: {image.name}"):
        drawn.make()
    assert not (drawn.out / "manifest.json").exists()
    before = drawn.tars()
    image.write_bytes(content)
    drawn.make("1/3")
    after = drawn.tars()
    assert {name for name in after if after[name] != before[name]} == {"train-000001.tar"}
    drawn.make()
    assert drawn.tars() == after
    assert drawn.has_what_the_plain_run_has()


def test_a_part_leaves_out_a_shard_whose_image_could_be_read_later(drawn, monkeypatch):
    """Otherwise two tasks would write different bytes for a shard if one of them had a temporary read error."""
    image = drawn.image_of("train-000003.tar")
    real = read_limited

    def failing(path):
        if path == image:
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr("amp.data.images.file.read_limited", failing)
    with pytest.raises(AmpError, match=f"first: {image.name}: can't be read .Input/output error"):
        drawn.make("0/3")
    drawn.make("0/3", max_skipped=0.06)
    assert set(drawn.tars()) == OF_PART["0/3"] - {"train-000003.tar"}
    monkeypatch.undo()
    before, read = drawn.tars(), count_reads(monkeypatch)
    drawn.make("0/3")
    assert len(read) == 3
    drawn.make()
    assert before.items() <= drawn.tars().items()
    assert drawn.has_what_the_plain_run_has()


def test_the_old_manifest_goes_with_the_first_part_that_writes(drawn):
    drawn.make()
    drawn.make("1/3")
    assert ShardManifest.load(drawn.out)
    (drawn.out / "train-000001.tar").unlink()
    drawn.make("0/3")
    assert ShardManifest.load(drawn.out)
    drawn.make("1/3")
    assert not (drawn.out / "manifest.json").exists()


def test_a_surplus_shard_is_left_to_the_final_run(drawn):
    drawn.make(samples_per_shard=2)
    for part in OF_PART:
        drawn.make(part)
    assert (drawn.out / "train-000006.tar").exists()
    drawn.make()
    assert drawn.has_what_the_plain_run_has()


def test_more_parts_than_shards(drawn):
    for number in range(9):
        drawn.make(f"{number}/9")
        assert len(drawn.tars()) == min(number + 1, 7)
    before = drawn.tars()
    drawn.make()
    assert drawn.tars() == before
    assert drawn.has_what_the_plain_run_has()


def test_parts_share_a_folder_and_a_run_without_parts_does_not(drawn):
    drawn.make("0/3")
    with lock_folder(drawn.out, shared=True):
        drawn.make("1/3")
        with pytest.raises(AmpError, match="another run is writing shards here"):
            drawn.make()
    with lock_folder(drawn.out), pytest.raises(AmpError, match="another run is writing shards here"):
        drawn.make("2/3")
    drawn.make()


def test_a_part_refuses_a_folder_that_the_final_run_would_refuse(drawn):
    drawn.make()
    before = drawn.tars()
    with pytest.raises(AmpError, match="contains shards of split 'train'"):
        drawn.make("0/3", splits=["test"])
    assert drawn.tars() == before
    assert drawn.has_what_the_plain_run_has()


@pytest.mark.parametrize("part", ["16/16", "a/b", "-1/4", "0/0", "1", "", "0/2/4", " 0/2", "0.0/2", "٠/٢"])
def test_wrong_parts(drawn, part):
    with pytest.raises(AmpError, match=f"^part is '{part}'; expected I/N with I from 0 to N-1") as error:
        drawn.make(part)
    assert "--array=0-15" in str(error.value)
    assert not drawn.out.exists()


def test_command_line(drawn):
    def run(*options):
        return run_here("tools/make_shards.py", *drawn.command(*options)[2:])

    done = run("--part", "1/3")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "part 1/3: 2 of its 2 shards are complete, 0 images are unreadable" in done.stderr
    assert set(drawn.tars()) == OF_PART["1/3"]
    done = run("--part", "3/3")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert ": error: part is '3/3'; expected I/N" in done.stderr
