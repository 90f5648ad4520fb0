"""New knowledge in existing shards: the same bytes as from make_shards, also after an interruption."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import pytest
from support.drawn_data import draw_dataset
from support.repository import QUIET_ENVIRONMENT, ROOT, run_here

from amp.data.captions.load import load_captions
from amp.data.conversion import rewrite
from amp.data.conversion.make import make_shards
from amp.data.conversion.rewrite import rewrite_knowledge
from amp.data.shards import ShardManifest, ShardReader
from amp.errors import AmpError
from amp.terminal import PlainConsole

QUIET = PlainConsole(quiet=True)


def new_knowledge(dataset: dict, path: Path, leave_out: int = 0, word: str = "new") -> Path:
    """Other triplets and states for every caption, with their sources."""
    lines = []
    for image in load_captions(dataset["captions"]).images:
        for caption in image.captions:
            triplets = [{"subject": "thing", "action": word, "object": str(caption.id), "kind": "action"}][
                : caption.id % 3
            ]
            origin = {"sources": [{"triplet": "strict", "state": "retry1"}]} if triplets else {"empty": "nothing found"}
            record = {
                "sentid": caption.id,
                "image": image.path,
                "caption": caption.text,
                "triplets": triplets,
                "states": [f"It is {word} and looks so."] * len(triplets),
                **origin,
            }
            lines.append(json.dumps(record))
    path.write_text("\n".join(lines[leave_out:]) + "\n")
    return path


@pytest.fixture
def shards(tmp_path):
    """(arguments of make_shards, folder with several shards per split)."""
    dataset = draw_dataset(tmp_path / "drawn")
    arguments = {**dataset, "samples_per_shard": 5, "workers": 1, "console": QUIET}
    make_shards(**arguments, out=str(tmp_path / "shards"))
    return arguments, tmp_path / "shards"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def from_scratch(arguments: dict, knowledge: Path, out: Path) -> dict[str, str]:
    make_shards(**{**arguments, "knowledge": str(knowledge)}, out=str(out))
    return digests(out)


@pytest.mark.parametrize("in_place", [True, False])
def test_equals_shards_made_anew(shards, tmp_path, in_place):
    arguments, folder = shards
    before, manifest_before = digests(folder), (folder / "manifest.json").read_bytes()
    knowledge = new_knowledge(arguments, tmp_path / "new.jsonl")
    out = None if in_place else str(tmp_path / "out")
    manifest = rewrite_knowledge(str(folder), str(knowledge), out=out, console=QUIET)
    target = folder if in_place else tmp_path / "out"
    expected = from_scratch(arguments, knowledge, tmp_path / "scratch")
    assert digests(target) == expected != before
    manifest.verify()
    ShardManifest.load(target).verify()
    scratch = json.loads((tmp_path / "scratch" / "manifest.json").read_text())
    made = json.loads((target / "manifest.json").read_text())
    assert made["splits"] == scratch["splits"] and made["skipped"] == scratch["skipped"]
    if not in_place:
        assert digests(folder) == before and (folder / "manifest.json").read_bytes() == manifest_before
    assert not list(target.rglob("*.tmp"))


def test_images_are_untouched_and_origins_arrive(shards, tmp_path):
    arguments, folder = shards

    def images():
        found = {}
        for path in folder.glob("*.tar"):
            with tarfile.open(path) as tar:
                found |= {m.name: tar.extractfile(m).read() for m in tar if not m.name.endswith(".json")}
        return found

    before = images()
    rewrite_knowledge(str(folder), str(new_knowledge(arguments, tmp_path / "new.jsonl")), console=QUIET)
    assert images() == before
    with ShardReader(folder / "train-000000.tar") as reader:
        captions = [caption for index in range(len(reader)) for caption in reader.record(index)["captions"]]
    assert {bool(caption["triplets"]) for caption in captions} == {True, False}
    for caption in captions:
        assert ("sources" in caption) == bool(caption["triplets"]) == ("empty" not in caption)


def test_provenance_keeps_what_was_before(shards, tmp_path):
    arguments, folder = shards
    first = ShardManifest.load(folder).provenance["knowledge"]
    provenance = tmp_path / "provenance.json"
    provenance.write_text('{"engine": "one"}')
    one, two = (new_knowledge(arguments, tmp_path / f"{word}.jsonl", word=word) for word in ("one", "two"))
    rewrite_knowledge(str(folder), str(one), str(provenance), command=["x"], console=QUIET)
    rewrite_knowledge(str(folder), str(two), console=QUIET)
    last = rewrite_knowledge(str(folder), str(two), console=QUIET).provenance  # the second call has nothing to do
    assert (
        last["knowledge"]["file"] == "two.jsonl"
        and last["knowledge"]["captions_with_knowledge"] == last["knowledge"]["records"]
    )
    assert [entry["file"] for entry in last["previous_knowledge"]] == [first["file"], "one.jsonl"]
    assert last["previous_knowledge"][1]["provenance"] == {"engine": "one"}
    assert last["captions"] and last["seed"] == 0  # the rest of the provenance stays


def test_knowledge_may_be_the_folder_that_holds_it_and_its_provenance(shards, tmp_path):
    arguments, folder = shards
    file = new_knowledge(arguments, tmp_path / "knowledge.jsonl")
    (tmp_path / "knowledge_provenance.json").write_text('{"engine": "mine"}')
    manifest = rewrite_knowledge(str(folder), str(tmp_path), console=QUIET)
    assert manifest.provenance["knowledge"]["file"] == file.name
    assert manifest.provenance["knowledge"]["provenance"] == {"engine": "mine"}


def test_make_shards_rewrites_what_was_rewritten(shards, tmp_path):
    """Records of the old conversion must not be accepted for the new shards."""
    arguments, folder = shards
    before = digests(folder)
    rewrite_knowledge(str(folder), str(new_knowledge(arguments, tmp_path / "new.jsonl")), console=QUIET)
    make_shards(**arguments, out=str(folder))
    assert digests(folder) == before
    ShardManifest.load(folder).verify()


KILLED = """
import sys
from pathlib import Path
from amp.terminal import PlainConsole
from amp.data.conversion import rewrite
rewrite_one = rewrite._rewrite
def slow(job):
    import time
    time.sleep(0.03)
    return rewrite_one(job)
rewrite._rewrite = slow
rewrite.rewrite_knowledge(*sys.argv[1:3], console=PlainConsole(quiet=True))
"""


def test_killed_and_finished(shards, tmp_path):
    """SIGKILL at random moments, with other knowledge in between. The result equals that of an undisturbed run."""
    arguments, folder = shards
    one, two = (new_knowledge(arguments, tmp_path / f"{word}.jsonl", word=word) for word in ("one", "two"))
    expected = from_scratch(arguments, two, tmp_path / "scratch")
    random.seed(3)
    unfinished = 0
    for turn in range(12):
        script = [sys.executable, "-c", KILLED, str(folder), str((one, two)[turn % 3 == 2])]
        process = subprocess.Popen(script, env=QUIET_ENVIRONMENT, cwd=ROOT)
        manifest, wanted = folder / "manifest.json", random.uniform(0, 0.25)
        deadline = time.monotonic() + 30
        while process.poll() is None and manifest.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(wanted)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        unfinished += not manifest.exists()
    assert unfinished >= 4
    rewrite_knowledge(str(folder), str(two), console=QUIET).verify()
    assert digests(folder) == expected


def interrupted(folder: Path, knowledge: Path, monkeypatch, step: str, shard: int) -> None:
    """A rewrite that stops at a given step of its n-th shard (from 1)."""
    replace, seen = os.replace, []

    def stop(source, target):
        name = str(target)
        if name.endswith(".tar.json"):
            seen.append(name)
        if len(seen) == shard and name.endswith(".tar.json") and step == "before the sidecar":
            raise KeyboardInterrupt
        if len(seen) == shard and name.endswith(".tar") and step == "between sidecar and shard":
            raise KeyboardInterrupt
        replace(source, target)
        if len(seen) == shard and name.endswith(".tar") and step == "behind the shard":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            rewrite_knowledge(str(folder), str(knowledge), console=QUIET)
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize(
    ("step", "shard"), [("before the sidecar", 2), ("between sidecar and shard", 1), ("behind the shard", 1)]
)
def test_every_moment_of_one_shard(shards, tmp_path, monkeypatch, step, shard):
    arguments, folder = shards
    one, two = (new_knowledge(arguments, tmp_path / f"{word}.jsonl", word=word) for word in ("one", "two"))
    interrupted(folder, one, monkeypatch, "behind the shard", 2)
    interrupted(folder, two, monkeypatch, step, shard)  # some shards are already rewritten
    rewrite_knowledge(str(folder), str(two), console=QUIET).verify()
    assert digests(folder) == from_scratch(arguments, two, tmp_path / "scratch")


def test_finished_shards_are_not_written_again(shards, tmp_path, monkeypatch):
    arguments, folder = shards
    knowledge = new_knowledge(arguments, tmp_path / "new.jsonl")
    rewrite_knowledge(str(folder), str(knowledge), console=QUIET)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    rewrite_knowledge(str(folder), str(knowledge), console=QUIET)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")} == times


def test_captions_without_a_record(shards, tmp_path):
    arguments, folder = shards
    before = digests(folder)
    knowledge = new_knowledge(arguments, tmp_path / "new.jsonl", leave_out=3)
    with pytest.raises(AmpError, match=r"new\.jsonl: no record for 3 of \d+ captions .* nothing was changed"):
        rewrite_knowledge(str(folder), str(knowledge), console=QUIET)
    assert digests(folder) == before and (folder / "manifest.json").exists()
    manifest = rewrite_knowledge(str(folder), str(knowledge), max_missing=0.2, console=QUIET)
    assert sum(manifest.captions_without_knowledge.values()) == 3
    with ShardReader(folder / "train-000000.tar") as reader:
        states = [s for i in range(len(reader)) for c in reader.record(i)["captions"] for s in c["states"]]
    assert all(state == "It is new and looks so." for state in states)  # the old knowledge is gone


def test_refusals(shards, tmp_path):
    arguments, folder = shards
    knowledge = new_knowledge(arguments, tmp_path / "new.jsonl")
    with pytest.raises(AmpError, match="no such folder; expected a folder of shards"):
        rewrite_knowledge(str(tmp_path / "nowhere"), str(knowledge), console=QUIET)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(AmpError, match="is the folder of the shards"):
        rewrite_knowledge(str(folder), str(knowledge), out=f"{folder}/", console=QUIET)
    with pytest.raises(AmpError, match="max_missing is 2"):
        rewrite_knowledge(str(folder), str(knowledge), max_missing=2, console=QUIET)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"sentid": 0, "caption": "another data set", "triplets": [], "states": []}) + "\n")
    with pytest.raises(AmpError, match=r"'caption' is 'another data set'; expected .* which sentid 0 has"):
        rewrite_knowledge(str(folder), str(other), console=QUIET)
    shard = folder / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(AmpError, match=r"train-000001\.tar: sha256 is [0-9a-f]+; expected"):
        rewrite_knowledge(str(folder), str(knowledge), console=QUIET)
    assert (folder / "manifest.json").exists()


def test_a_full_disk(shards, tmp_path, monkeypatch):
    arguments, folder = shards
    knowledge = new_knowledge(arguments, tmp_path / "new.jsonl")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rewrite, "add_member", full)
    with pytest.raises(AmpError, match=r"\.tar: can't be written \(No space left on device\); make room"):
        rewrite_knowledge(str(folder), str(knowledge), console=QUIET)
    monkeypatch.undo()
    assert not list(folder.rglob("*.tmp"))
    rewrite_knowledge(str(folder), str(knowledge), console=QUIET).verify()


def test_command_line(shards, tmp_path):
    arguments, folder = shards
    knowledge = new_knowledge(arguments, tmp_path / "new.jsonl")
    run = partial(run_here, "tools/rewrite_knowledge.py", "--shards", folder, "--knowledge")
    process = run(knowledge)
    assert process.returncode == 0 and "manifest.json written" in process.stdout, process.stderr
    process = run(tmp_path / "none.jsonl")
    assert process.returncode == 2
    assert ": error: " in process.stderr and "none.jsonl: can't be read" in process.stderr
