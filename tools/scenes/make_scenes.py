"""Draws the demo data set: pictures, captions in the Karpathy format of COCO and Flickr30K, and knowledge.

    python tools/scenes/make_scenes.py --out data/scenes
    python tools/scenes/make_scenes.py --sheet docs/scenes.png          # only a contact sheet

Writes OUT/images/*.jpg, OUT/dataset.json, OUT/knowledge.jsonl (one line per caption) and OUT/knowledge_provenance.json,
the usual input of tools/make_shards.py. dataset.json marks twins: "twin" is the filename of the scene from which an
image was derived, and "change" is what differs ("roles" or "action").
"""

import hashlib
import json
import re
from pathlib import Path

from amp.errors import AmpError, exit_on_error

with exit_on_error():
    import scene_actions
    import scene_figures
    import scene_language
    import scenes as world
    from jsonargparse import auto_cli

    from amp.command_line import CommandLine
    from amp.files import whole_file, write_atomically
    from amp.report.drawing import save_picture
    from amp.terminal import Terminal


def filename(split: str, index: int) -> str:
    """Name of a picture in OUT/images."""
    return f"{split}_{index:05d}.jpg"


def make_scenes(
    out: Path | None = None,
    train: int = 12_000,
    val: int = 200,
    test: int = 800,
    captions: int = 3,
    size: int = 144,
    quality: int = 95,
    seed: int = 0,
    sheet: Path | None = None,
    sheet_scenes: int = 16,
) -> None:
    """Writes the data set and, optionally, a contact sheet of the test split with captions.

    Args:
        out: Folder of the data set; null writes none.
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images.
        captions: Number of captions per image.
        size: Width and height of a picture in pixels.
        quality: JPEG quality.
        seed: Random seed. Every picture and caption depends only on (seed, split, index).
        sheet: File for a contact sheet, such as scenes.png; null draws none.
        sheet_scenes: Number of pictures on the contact sheet.
    """
    if out is None and sheet is None:
        raise AmpError(
            "nothing to do: give --out FOLDER for the data set, --sheet FILE.png for a picture of it, or both"
        )
    counts = {"train": train, "val": val, "test": test}
    for name, value in {**counts, "captions": captions, "size": size}.items():
        low = 0 if name in counts else 1
        if value < low:
            raise AmpError(f"--{name} is {value}, expected {low} or more")
    if sheet is not None:
        save_picture(sheet, world.contact_sheet([world.make_scene(seed, "test", n) for n in range(sheet_scenes)]))
        print(f"{sheet}: {sheet_scenes} scenes")
    if out is None:
        return

    (out / "images").mkdir(parents=True, exist_ok=True)
    images, knowledge = [], []
    for split, count in counts.items():
        with Terminal(True).progress(f"drawing {split}", "pictures") as report:
            for index in range(count):
                scene, name, imgid = world.make_scene(seed, split, index), filename(split, index), len(images)
                with whole_file(out / "images" / name) as file:
                    world.draw(scene, size).save(file, "JPEG", quality=quality, subsampling=0)
                sentences = []
                for said in world.captions(scene, captions):
                    tokens = re.findall(r"[a-z]+", said.text.lower())
                    sentences.append({"raw": said.text, "tokens": tokens, "imgid": imgid, "sentid": len(knowledge)})
                    line = {"sentid": len(knowledge), "image": name, "triplets": said.triplets, "states": said.states}
                    knowledge.append(json.dumps(line))
                sentids = [sentence["sentid"] for sentence in sentences]
                image = {"filename": name, "split": split, "imgid": imgid, "sentids": sentids, "sentences": sentences}
                if scene.twin is not None:
                    image |= {"twin": filename(split, scene.twin), "change": scene.change}
                images.append(image)
                report(index + 1, count)

    modules = (scene_figures, scene_actions, scene_language, world)
    source = hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in modules)).hexdigest()
    provenance = {
        "triplets": "known by construction (tools/scenes)",
        "states": "templates of tools/scenes/scene_language.py, an action's or attribute's look",
        "world_sha256": source,
        "seed": seed,
        "images": counts,
        "captions": len(knowledge),
        "picture": {"size": size, "format": "JPEG", "quality": quality},
    }
    for name, text in {
        "dataset.json": json.dumps({"images": images, "dataset": "scenes"}) + "\n",
        "knowledge.jsonl": "".join(line + "\n" for line in knowledge),
        "knowledge_provenance.json": json.dumps(provenance, indent=2) + "\n",
    }.items():
        write_atomically(out / name, text.encode())
    print(f"{out}: dataset.json and images/ of {len(images)} scenes, knowledge.jsonl of {len(knowledge)} captions")


if __name__ == "__main__":
    with exit_on_error():
        auto_cli(make_scenes, as_positional=False, parser_class=CommandLine)
