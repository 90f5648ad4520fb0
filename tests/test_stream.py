"""Training batches compared with the shards' members, read and decoded independently."""

import io
import json
import re
import shutil
import tarfile
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from support.order import epoch_order
from support.tars import members_of, replace_shard

import amp
from amp.data.frozen_features import ImageBatches, compute_frozen_features
from amp.data.order import BatchOrder, caption_of_epoch
from amp.data.prepare import knowledge_collator
from amp.data.shards import ShardManifest
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.data.stream import TrainingSamples, stable_id, training_loader
from amp.data.text_features import encode_missing

KINDS = ("action", "attribute")
SEED = 3


@pytest.fixture(scope="module")
def world(shards, clip_folder, tmp_path_factory):
    """Model, transforms, split, a collator whose store contains all texts, and the samples read with plain tarfile."""
    config = amp.PromptConfig(depth=1 / 3, max_triplets=2)
    model, train_transform, preprocess = amp.create_model_and_transforms(clip_folder, prompt_config=config)
    split = ShardSplit(shards, "train")
    collate = knowledge_collator(model, str(tmp_path_factory.mktemp("cache")), "float32")
    texts = SplitCaptions.read(split, KINDS).all_texts(config.max_triplets)
    encode_missing(collate.store, texts, model.backbone, model.tokenizer)
    by_hand = []
    for shard in sorted(shards.glob("train-*.tar")):
        members = defaultdict(dict)
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                members[key][extension] = tar.extractfile(member).read()
        by_hand += [(sample["jpg"], json.loads(sample["json"])) for sample in members.values()]
    return model.eval(), train_transform, preprocess, split, collate, by_hand


def loader_of(world, workers=0, keep=KINDS, rank=0, size=1, batch=4, frozen=None, preprocess=None):
    split, collate = world[3], world[4]
    order = BatchOrder(split.sizes, batch, rank, size, SEED, window=2)
    samples = TrainingSamples(split, preprocess or world[2], SEED, keep, frozen)
    return order, training_loader(samples, order, collate, workers, pin_memory=False)


def assert_equal(first, second):
    """Exact equality of two batches."""
    for name in ("images", "text", "image_ids"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert (first.base is None) == (second.base is None)
    assert first.base is None or torch.equal(first.base, second.base)
    for name in ("triplet_tokens", "token_mask", "states", "mask"):
        assert torch.equal(getattr(first.knowledge, name), getattr(second.knowledge, name)), name


def test_crops_are_normalized_on_the_device_as_open_clip_does(world):
    """The loader returns uint8 crops. On the device they become equal to the output of ToTensor and Normalize."""
    _, loader = loader_of(world, preprocess=world[1])
    *_, to_tensor, normalize = world[1].transforms
    batch = next(iter(loader))
    assert batch.images.dtype == torch.uint8
    expected = torch.stack([normalize(to_tensor(x.permute(1, 2, 0).numpy())) for x in batch.images])
    torch.testing.assert_close(batch.to("cpu").images, expected)


@pytest.mark.parametrize("keep", [("action", "attribute"), ("action",)])
@torch.no_grad()
def test_batches_hold_the_shards_content(world, tokenizer, keep):
    model, _, preprocess, split, _, by_hand = world
    clip = model.backbone.clip
    order, loader = loader_of(world, keep=keep)
    captions_seen = kinds_seen = 0
    for epoch in (0, 1):
        order.set_position(epoch * order.steps)
        sequence = epoch_order(split.sizes, SEED, epoch, window=2)
        batches = list(loader)
        assert len(batches) == 5
        for step, batch in enumerate(batches):
            assert batch.base is None and batch.images.shape == (4, 3, 32, 32) and batch.text.shape == (4, 24)
            for row, index in enumerate(sequence[4 * step : 4 * step + 4]):
                content, record = by_hand[index]
                pixels = preprocess(Image.open(io.BytesIO(content)).convert("RGB"))
                assert torch.equal(batch.images[row], pixels)
                assert batch.image_ids[row] == stable_id(record["image_id"])
                caption = record["captions"][caption_of_epoch(SEED, epoch, index, len(record["captions"]))]
                expected = clip.encode_text(tokenizer([caption["text"]]))[0]
                torch.testing.assert_close(batch.text[row], expected, rtol=0, atol=5e-6)
                pairs = [p for p in zip(caption["triplets"], caption["states"], strict=True) if p[0]["kind"] in keep]
                pairs = sorted(pairs, key=lambda pair: pair[0]["kind"])[:2]  # "action" before "attribute"
                assert batch.knowledge.mask[row].tolist() == [k < len(pairs) for k in range(2)]
                assert not batch.knowledge.states[row, len(pairs) :].any()
                for k, (triplet, state) in enumerate(pairs):
                    for s, slot in enumerate(("subject", "action", "object")):
                        kept = batch.knowledge.token_mask[row, k, s]
                        ids = batch.knowledge.triplet_tokens[row, k, s][kept].tolist()
                        assert ids == tokenizer.encode(triplet[slot])[:5]
                    words = "<{subject}, {action}, {object}>".format(**triplet)
                    text = f"Fine-grained state description of action triplet {words} is {state}"
                    expected = clip.encode_text(tokenizer([text]))[0]
                    torch.testing.assert_close(batch.knowledge.states[row, k], expected, rtol=0, atol=5e-6)
                    captions_seen, kinds_seen = captions_seen + 1, kinds_seen + (triplet["kind"] == "attribute")
    assert captions_seen > 20 and (kinds_seen > 0) == ("attribute" in keep)


@pytest.mark.parametrize("images", ["pixels of Pillow", "crops", "stored tokens"])
def test_the_number_of_workers_changes_nothing(world, images):
    model, train_transform, preprocess, split, *_ = world
    given = {"preprocess": train_transform if images == "crops" else None}
    if images == "stored tokens":
        given["frozen"] = compute_frozen_features(ImageBatches(split, preprocess, 8, 0, False), model)
    order, alone = loader_of(world, **given)
    other_order, loader = loader_of(world, 2, **given)
    assert (loader.collate_fn.shared is None) == (images == "pixels of Pillow")
    for epoch in (0, 3):
        order.set_position(epoch * order.steps)
        other_order.set_position(epoch * other_order.steps)
        for expected, batch in zip(alone, loader, strict=True):
            assert_equal(batch, expected)


def test_two_ranks_read_the_batches_of_one_process(world):
    _, whole = loader_of(world, batch=4)
    parts = [loader_of(world, batch=2, rank=rank, size=2)[1] for rank in range(2)]
    for batch, *slices in zip(whole, *parts, strict=True):
        for name in ("images", "text", "image_ids"):
            assert torch.equal(torch.cat([getattr(piece, name) for piece in slices]), getattr(batch, name))
        assert torch.equal(torch.cat([piece.knowledge.states for piece in slices]), batch.knowledge.states)


def test_stored_features_replace_decoding(world, monkeypatch):
    model, _, preprocess, split, _, _ = world
    frozen = compute_frozen_features(ImageBatches(split, preprocess, 8, 0, False), model)
    _, decoded = loader_of(world)
    decoded = list(decoded)

    def no_image(*_):
        raise AssertionError("an image is decoded")

    monkeypatch.setattr(ShardSplit, "image", no_image)
    _, stored = loader_of(world, frozen=frozen)
    with torch.no_grad():
        for batch, expected in zip(stored, decoded, strict=True):
            features = model(expected.images)
            torch.testing.assert_close(batch.images, features.early, rtol=0, atol=1e-5)
            torch.testing.assert_close(batch.base, features.base, rtol=0, atol=1e-5)
            assert torch.equal(batch.text, expected.text) and torch.equal(batch.image_ids, expected.image_ids)


def test_all_captions_of_the_split_are_shown_in_turn(world):
    _, _, _, split, collate, by_hand = world
    wanted = {caption["text"] for _, record in by_hand for caption in record["captions"]}
    samples = TrainingSamples(split, lambda image: torch.zeros(1), SEED, KINDS, None)
    shown = {samples[(index, epoch)][2] for index in range(len(split)) for epoch in range(3)}
    assert shown == wanted and not collate.store.missing(wanted)


def damaged(shards, folder, key):
    """A copy of the shards in which one training image is truncated, with a matching manifest."""
    shutil.copytree(shards, folder)
    name = ShardManifest.load(folder).split("train")[0].name
    members = [(m, data[: len(data) // 2] if m == f"{key}.jpg" else data) for m, data in members_of(shards / name)]
    return replace_shard(folder, "train", members).name


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_names_its_shard_and_key(world, shards, tmp_path, workers):
    key = world[5][2][1]["key"]
    shard = damaged(shards, tmp_path / "bad", key)
    split = ShardSplit(tmp_path / "bad", "train")
    _, loader = loader_of((*world[:3], split, *world[4:]), workers=workers)
    with pytest.raises(amp.AmpError) as error:
        list(loader)
    message = str(error.value)
    assert shard in message and repr(key) in message and "amp make_shards" in message
    # The samples around it can be read.
    assert split.image(1).size == (44, 36) and split.image(3).size == (44, 36)


@pytest.mark.parametrize("mode", [None, "squash", "shortest", "longest"])
def test_no_transform_flips(clip_folder, mode):
    _, train, val = amp.create_model_and_transforms(clip_folder, image_resize_mode=mode)
    for transform in (train, val):
        assert not re.search("flip|mirror", repr(transform), re.IGNORECASE)
    # Also check pixels: a picture that is dark on the left and bright on the right stays so in random crops.
    picture = Image.fromarray(np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2))
    for transform in (train, val):
        for _ in range(20):
            pixels = transform(picture)
            assert pixels[..., -4:].mean() > pixels[..., :4].mean() + 0.5


def test_image_ids_are_numbers_that_fit_and_differ():
    ids = [stable_id(value) for value in [*range(1000), *(f"photo-{i}" for i in range(1000))]]
    assert len(set(ids)) == 2000 and all(0 <= i < 2**63 for i in ids)
    assert stable_id(7) == stable_id("7")
    assert stable_id("COCO_val2014_000000391895") == 19693450838887410  # the same in every run and on every machine
