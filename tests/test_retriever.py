"""Search in a folder of photos, against the naive loop: one query, one photo and one forward pass at a time."""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import _draw
from PIL import Image

import amp
from amp import search as command
from amp.checkpoint import save_adapter
from amp.errors import AmpError
from amp.retrieval.photo_index import PhotoIndex

PHOTOS = 14
KNOWLEDGE = amp.Knowledge((amp.Triplet("dog", "chases", "ball"),), ("The dog runs with its legs stretched out",))
QUERY = "A red dog chases a ball"


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    (root / "below").mkdir(parents=True)
    for number in range(PHOTOS):
        folder = root / "below" if number % 3 == 0 else root
        _draw(number).save(folder / f"photo {number:02d}.png")
    (root / ".hidden.png").write_bytes(b"")
    (root / "notes.txt").write_text("no photo")
    return root


def build(clip_folder, **prompt):
    torch.manual_seed(3)
    settings = {"interaction_layer": 1, "num_prompts": 2, "max_triplets": 3, "triplet_heads": 4, **prompt}
    model, _, preprocess = amp.create_model_and_transforms(clip_folder, prompt_config=amp.PromptConfig(**settings))
    if hasattr(model, "interaction"):
        model.interaction.gate.data.normal_(std=2.0)
    return model.eval(), preprocess


@torch.no_grad()
def naive(model, preprocess, root, top_k, fusion_weight=0.0):
    """Names in order with (score, base score)."""
    text = model.encode_text(model.tokenizer([QUERY]))
    scored = []
    for path in sorted(root.rglob("photo *.png")):
        image = preprocess(Image.open(path).convert("RGB"))[None]
        base = float(F.cosine_similarity(model.encode_image(image), text))
        if model.knowledge_aware:
            feature = model.encode_image(image, [KNOWLEDGE], text=text)
        else:
            feature = model(image, prompted=True).prompted
        target = model(None, model.prepare_knowledge([KNOWLEDGE]), text=text).text
        new = float(F.cosine_similarity(feature, target)) + fusion_weight * base
        scored.append((path.name, new, base))
    scored.sort(key=lambda item: -item[2])
    return sorted(scored[:top_k], key=lambda item: -item[1]) + [(n, b, b) for n, _, b in scored[top_k:]]


@pytest.mark.parametrize(
    "prompt",
    [{}, {"knowledge": "none"}, {"interaction": "readout", "text_enrichment": True, "text_triplets": True}],
    ids=["aim", "control", "readout"],
)
@pytest.mark.parametrize("fusion_weight", [0.0, 2.0])
def test_a_search_equals_the_naive_loop(clip_folder, photos, tmp_path, prompt, fusion_weight):
    model, preprocess = build(clip_folder, **prompt)
    if prompt.get("interaction") == "readout":
        model.readout.out.weight.data.normal_(std=0.3)
    search = amp.Retriever(model, preprocess, tmp_path / "index", top_k=6, fusion_weight=fusion_weight, batch_size=4)
    update = search.update(photos, workers=0)
    assert (update.photos, update.encoded, update.removed, update.skipped) == (PHOTOS, PHOTOS, 0, {})
    found = search.search(QUERY, count=9, knowledge=KNOWLEDGE)
    expected = naive(model, preprocess, photos, 6, fusion_weight)[:9]
    assert [hit.path.name for hit in found.hits] == [name for name, _, _ in expected]
    np.testing.assert_allclose([h.score for h in found.hits], [score for _, score, _ in expected], atol=1e-5)
    np.testing.assert_allclose([h.base_score for h in found.hits], [base for _, _, base in expected], atol=1e-5)
    assert sorted(h.base_rank for h in found.hits[:6]) == list(range(6))
    assert [h.base_rank for h in found.hits[6:]] == [6, 7, 8]


def test_the_generator_gives_the_querys_knowledge(clip_folder, photos, tmp_path):
    model, preprocess = build(clip_folder)
    asked = []

    def generator(captions):
        asked.extend(captions)
        return [KNOWLEDGE] * len(captions)

    search = amp.Retriever(model, preprocess, tmp_path / "index", knowledge=generator, top_k=5)
    search.update(photos, workers=0)
    found, given = search.search(QUERY), search.search(QUERY, knowledge=KNOWLEDGE)
    assert asked == [QUERY] and found.knowledge == KNOWLEDGE and found.hits == given.hits
    none = amp.Retriever(model, preprocess, tmp_path / "index", top_k=5).search(QUERY)
    assert none.knowledge == amp.Knowledge() and [h.score for h in none.hits] != [h.score for h in found.hits]


def test_an_update_encodes_what_changed(clip_folder, photos, tmp_path):
    model, preprocess = build(clip_folder)
    search = amp.Retriever(model, preprocess, tmp_path / "index")
    search.update(photos, workers=0)
    before = dict(zip(search.index.names, search.index.features.copy(), strict=True))
    (photos / "photo 01.png").unlink()
    _draw(50).save(photos / "photo 02.png")
    os.utime(photos / "photo 02.png", ns=(1, 1))
    _draw(51).save(photos / "new.jpg")
    (photos / "cut.jpg").write_bytes((photos / "new.jpg").read_bytes()[:200])
    (photos / "text.png").write_text("no image")
    update = search.update(photos, workers=0)
    assert (update.photos, update.encoded, update.removed) == (PHOTOS, 2, 1)
    assert set(update.skipped) == {"cut.jpg", "text.png"} == set(PhotoIndex(tmp_path / "index").skipped)
    after = dict(zip(search.index.names, search.index.features, strict=True))
    assert set(after) == set(before) - {"photo 01.png"} | {"new.jpg"}
    for name in set(after) & set(before):
        assert np.array_equal(after[name], before[name]) == (name != "photo 02.png")
    assert len(list((tmp_path / "index").glob("features-*.npy"))) == 1
    again = search.update(photos, workers=0)
    assert (again.photos, again.encoded) == (PHOTOS, 0)


def test_photos_lie_as_their_camera_noted(clip_folder, photos, tmp_path):
    model, preprocess = build(clip_folder)
    image = _draw(5)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(photos / "turned.png", exif=exif)
    image.save(photos / "upright.png")
    search = amp.Retriever(model, preprocess, tmp_path / "index")
    search.update(photos, workers=0)
    rows = [search.index.features[search.index.names.index(name)] for name in ("turned.png", "upright.png")]
    assert np.array_equal(*rows)


def test_a_photo_that_went_is_skipped_and_told(clip_folder, photos, tmp_path):
    model, preprocess = build(clip_folder)
    search = amp.Retriever(model, preprocess, tmp_path / "index", top_k=PHOTOS)
    search.update(photos, workers=0)
    (photos / "photo 04.png").unlink()
    found = search.search(QUERY, count=50)
    assert len(found.hits) == PHOTOS - 1 and [path.name for path in found.skipped] == ["photo 04.png"]


def test_refusals(clip_folder, photos, tmp_path):
    model, preprocess = build(clip_folder)
    index = tmp_path / "index"
    search = amp.Retriever(model, preprocess, index)
    with pytest.raises(AmpError, match=r"index.json: can't be read .*, expected an index; make it with amp search"):
        search.search(QUERY)
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "empty", "no photo that can be read"),
    ):
        with pytest.raises(AmpError, match=message):
            search.update(folder, workers=0)
    assert not index.exists()
    search.update(photos, workers=0)
    with pytest.raises(AmpError, match="the query is empty"):
        search.search("  ")
    with pytest.raises(AmpError, match="count is 0"):
        search.search(QUERY, count=0)
    with pytest.raises(AmpError, match="as another model or transform sees it"):
        search.update(tmp_path, workers=0)
    model.backbone.clip.visual.proj.data += 1
    with pytest.raises(AmpError, match="was made by a model of weights"):
        amp.Retriever(model, preprocess, index).search(QUERY)
    content = json.loads((index / "index.json").read_text())
    for change in ({"photos": content["photos"][:-1]}, {"features": 3}, {"version": 9}):
        (index / "index.json").write_text(json.dumps(content | change))
        with pytest.raises(AmpError, match=r"index\.json"):
            PhotoIndex(index)


def test_features_that_are_not_finite_are_refused(clip_folder, photos, tmp_path):
    model, preprocess = build(clip_folder)
    search = amp.Retriever(model, preprocess, tmp_path / "index")
    search.update(photos, workers=0)
    (file,) = (tmp_path / "index").glob("features-*.npy")
    features = np.load(file)
    features[2, 0] = np.nan
    np.save(file, features)
    with pytest.raises(AmpError, match="1 scores are not finite"):
        amp.Retriever(model, preprocess, tmp_path / "index").search(QUERY)


def test_the_command_finds_with_rules_and_draws(clip_folder, photos, tmp_path, capsys):
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[rules]"')
    model, _ = build(clip_folder)
    save_adapter(tmp_path / "adapter.safetensors", model)
    options = ["--index", str(tmp_path / "index"), "--adapter", str(tmp_path / "adapter.safetensors"), "--workers", "0"]
    with pytest.MonkeyPatch.context() as without:
        without.setattr("amp.generation.query.KnowledgeGenerator", None)  # an index needs none
        command.main([*options, "--photos", str(photos)])
    assert f"{PHOTOS} photos in" in capsys.readouterr().err
    command.main([*options, "--sheet", str(tmp_path / "found.png"), "--count", "7", "A dog chases a red ball"])
    out = capsys.readouterr().out
    assert "<dog, chases, ball>" in out and "CLIP's rank" in out
    assert len([line for line in out.splitlines() if line.endswith(".png") and str(photos) in line]) == 7
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.format == "PNG" and len(sheet.convert("RGB").getcolors(1 << 24)) > 100
    assert list((tmp_path / "index" / "replies").glob("*.jsonl"))
    # Without an adapter the base model alone.
    command.main(["--index", str(tmp_path / "index"), "--model", clip_folder, "--count", "3", QUERY])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) >= 3 and lines[0].split()[:1] == ["1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a dog"], "index is empty"),
        (["--index", "x"], "neither query nor photos"),
        (["--index", "x", "a dog"], "adapter and model are both missing"),
    ],
)
def test_the_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err
