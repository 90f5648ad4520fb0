"""Every captions format of the shared cases is converted with knowledge, and trains one step."""

import json

import pytest
from support.repository import SHARED, shared_folder
from support.training_run import small_run

from amp.commands import index_shards, make_shards
from amp.data.captions.load import load_captions
from amp.data.foreign.captions import CaptionChoice
from amp.data.foreign.scan import scan_tar
from amp.data.split import ShardSplit
from amp.train.engine import train

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("fresh_accelerate")]

FILES = sorted(path.name for path in (SHARED / "cases/captions").glob("*")) or ["capitals.csv"]
CASES = [(name, "converted") for name in FILES] + [(name, "indexed") for name in FILES if name.endswith(".tar")]


def captions_of(path) -> list[tuple[str, str]]:
    """Image and text of each caption of a file."""
    if path.suffix == ".tar":
        samples = scan_tar(path, CaptionChoice(None), {})
        return [(sample.name, text) for sample in samples for text in sample.texts]
    images = load_captions(path, default_split="train").images
    return [(image.name, caption.text) for image in images for caption in image.captions]


@pytest.mark.parametrize(("name", "road"), CASES)
def test_converts_with_knowledge_and_trains(name, road, clip_folder, tmp_path):
    folder = shared_folder("cases/captions", "capitals.csv")
    path = folder / name
    knowledge = tmp_path / "knowledge.jsonl"
    captions = captions_of(path)
    with open(knowledge, "w") as file:
        for image, text in captions:
            triplets = [{"subject": text.split()[0], "action": "is in", "object": "the photo"}]
            record = {"image": image, "caption": text, "triplets": triplets, "states": [f"{text[:30]} is there"]}
            file.write(json.dumps(record) + "\n")
    out = tmp_path / "shards"
    if road == "indexed":
        arguments = ["--shards", path, "--out", out, "--knowledge", knowledge]
        index_shards.main([*map(str, arguments)])
    else:
        arguments = ["--captions", path, "--out", out, "--knowledge", knowledge]
        images = [] if path.suffix == ".tar" else ["--images", SHARED / "cases/photos/plain"]
        make_shards.main([*map(str, (*arguments, *images))])
    split = "val" if name == "captions_val2017.json" else "train"
    found = ShardSplit(out, split)
    read = [(record["filename"], text, item) for record in found.records() for text, item in found.captions(record)]
    assert sorted((image, text) for image, text, _ in read) == sorted(captions) and len(read) >= len(found) > 0
    assert all(item.states == (f"{text[:30]} is there",) for _, text, item in read)
    config = small_run(out, clip_folder, tmp_path, {"train_split": split, "batch_size": 2}, stages=[1])
    config.stage1.max_steps = 1
    assert train(config).is_file()
