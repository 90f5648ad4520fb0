"""Stored outputs of the frozen image blocks: equal to a direct computation, in a folder named by their inputs."""

import errno
import os
from itertools import chain

import numpy as np
import pytest
import torch
from support.equations.image_features import early_tokens, tower_of
from support.models import make_clip

import amp
from amp.data.frozen_features import FrozenFeatures, ImageBatches, compute_frozen_features, features_folders
from amp.data.prepare import knowledge_collator, prepare_images, prepare_texts
from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.terminal import Terminal

LAYER = 2


@pytest.fixture(scope="module")
def made(clip_folder):
    """A model and its validation transform."""
    config = amp.PromptConfig(depth=LAYER / 3)
    model, _, preprocess = amp.create_model_and_transforms(clip_folder, prompt_config=config)
    return model.eval(), preprocess


@pytest.fixture
def split(shards):
    return ShardSplit(shards, "test")


def compute(split, made, workers=0, **options):
    model, preprocess = made
    return compute_frozen_features(ImageBatches(split, preprocess, 5, workers, False), model, **options)


@pytest.mark.parametrize("workers", [0, 2])
@torch.no_grad()
def test_features_equal_a_direct_computation(split, made, workers):
    features = compute(split, made, workers=workers)
    model, preprocess = made
    assert len(features) == len(split) == 12 and features.early.dtype == features.base.dtype == np.float32
    for index in range(len(split)):
        image = preprocess(split.image(index))[None]
        tokens = early_tokens(tower_of(model.backbone.clip.visual), image[0], LAYER)
        torch.testing.assert_close(torch.from_numpy(features.early[index]), tokens, rtol=0, atol=1e-5)
        base = model.backbone.clip.encode_image(image)
        torch.testing.assert_close(torch.from_numpy(features.base[index]), base[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_stored_tokens_lead_to_the_same_features_as_the_images(split, made):
    features = compute(split, made)
    model, preprocess = made
    images = torch.stack([preprocess(split.image(i)) for i in range(len(split))])
    from_images = model.image_features(images)
    from_tokens = model.interaction.image_features(model.tower, torch.from_numpy(features.early))
    torch.testing.assert_close(from_tokens, from_images, rtol=0, atol=1e-5)


def test_float16_tokens_are_rounded_and_base_features_are_not(split, made):
    whole, half = compute(split, made), compute(split, made, dtype="float16")
    assert half.early.dtype == np.float16 and half.base.dtype == np.float32
    np.testing.assert_array_equal(half.early, whole.early.astype(np.float16))
    np.testing.assert_array_equal(half.base, whole.base)


def prepared(split, made, cache, **options):
    return prepare_images(Terminal(False), split, *made, cache, "float32", 5, 0, **options)


def test_each_shard_is_written_once_and_then_read(split, made, tmp_path, monkeypatch):
    first = prepared(split, made, tmp_path)
    direct = compute(split, made)
    assert len(split.shards) > 1 and len(list(tmp_path.iterdir())) == len(split.shards)
    assert first.early.shape == direct.early.shape and first.early.dtype == np.float32
    np.testing.assert_allclose(first.early, direct.early, rtol=0, atol=1e-5)  # batches end with their shard
    np.testing.assert_allclose(first.base, direct.base, rtol=0, atol=1e-5)

    def no_image(*_):
        raise AssertionError("the second run decodes an image")

    monkeypatch.setattr(ShardSplit, "image", no_image)
    second = prepared(split, made, tmp_path)
    np.testing.assert_array_equal(second.early, first.early)
    np.testing.assert_array_equal(second.base, first.base)
    rows = np.array([11, 0, 5, 6, 0])
    np.testing.assert_array_equal(second.early[rows], np.asarray(first.early)[rows])
    np.testing.assert_array_equal(second.base[7], np.asarray(first.base)[7])


def test_a_stored_folder_is_read_only_and_says_how_far_it_is(split, made, tmp_path):
    reports = []
    first = compute(split, made, folder=tmp_path / "image-ab", progress=lambda *done: reports.append(done))
    assert reports == [(5, 12), (10, 12), (12, 12)]
    assert isinstance(first.early[0].base, np.memmap) and not first.early[0].flags.writeable
    assert [path.name for path in tmp_path.iterdir()] == ["image-ab"]


def test_an_interrupted_build_leaves_nothing_that_counts(split, made, tmp_path):
    folder = tmp_path / "image-ab"

    def interrupt(done, total):
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(split, made, folder=folder, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    again = compute(split, made, folder=folder)
    np.testing.assert_array_equal(again.early, compute(split, made).early)


def test_a_full_disk_is_found_before_anything_is_encoded(split, made, tmp_path, monkeypatch):
    """The file of tokens is memory-mapped, so a disk that fills up later would kill the process with SIGBUS."""

    def full(descriptor, start, length):
        assert length >= len(split) * made[0].backbone.num_tokens * made[0].backbone.vision_width * 2
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    reports = []
    with pytest.raises(AmpError, match=r"image-ab: can't be written \(No space left on device\); make room"):
        compute(split, made, folder=tmp_path / "image-ab", progress=lambda *done: reports.append(done))
    assert reports == [] and list(tmp_path.iterdir()) == []


def test_two_builds_at_once_end_with_one_folder(split, made, tmp_path):
    folder = tmp_path / "image-ab"

    def another(done, total):
        if done == total:
            compute(split, made, folder=folder)

    slower = compute(split, made, folder=folder, progress=another)
    np.testing.assert_array_equal(slower.early, compute(split, made).early)
    assert [path.name for path in tmp_path.iterdir()] == ["image-ab"]


@pytest.mark.parametrize(("file", "damage"), [("early.npy", "cut"), ("base.npy", "gone")])
def test_a_damaged_folder_is_refused_by_name(split, made, tmp_path, damage, file):
    folder = tmp_path / "image-ab"
    compute(split, made, folder=folder)
    path = folder / file
    path.write_bytes(path.read_bytes()[:-8]) if damage == "cut" else path.unlink()
    with pytest.raises(amp.AmpError, match=r"image-ab.*remove its folder"):
        np.asarray(getattr(FrozenFeatures.load([folder], [len(split)]), file.removesuffix(".npy")))


def test_the_folder_depends_on_all_that_the_features_depend_on(split, made, shards, clip_folder, tmp_path):
    model, preprocess = made
    name = features_folders(tmp_path, split, model, preprocess, "float32")
    assert len(set(name)) == len(split.shards)

    def build(layer=LAYER, seed=0, **transform):
        _, _, other = amp.create_model_and_transforms(clip_folder, prompt_config=model.config, **transform)
        config = amp.PromptConfig(depth=layer / 3)
        return amp.ActionAwareCLIP(make_clip(seed=seed), config), other

    same = [
        features_folders(tmp_path, ShardSplit(shards, "test"), *build(), "float32"),
        # The number of prompts and the kind of knowledge don't affect the frozen blocks.
        features_folders(
            tmp_path,
            split,
            amp.ActionAwareCLIP(
                make_clip(), amp.PromptConfig("none", interaction="aim", depth=LAYER / 3, num_prompts=2)
            ),
            preprocess,
            "float32",
        ),
    ]
    assert same == [name, name]
    others = {
        "layer": features_folders(tmp_path, split, *build(layer=1), "float32"),
        "weights": features_folders(tmp_path, split, *build(seed=1), "float32"),
        "transform": features_folders(tmp_path, split, *build(image_resize_mode="shortest"), "float32"),
        "type": features_folders(tmp_path, split, model, preprocess, "float16"),
        "shards": features_folders(tmp_path, ShardSplit(shards, "val"), model, preprocess, "float32"),
    }
    assert len({*name, *chain(*others.values())}) == sum(map(len, [name, *others.values()])), others


@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
def test_the_folder_is_the_same_in_every_process(made, mode):
    _, _, preprocess = amp.create_model_and_transforms("ViT-B-32", device="meta", image_resize_mode=mode)
    assert " at 0x" not in repr(preprocess)  # an address would give each run and rank its own folder


def test_stored_features_do_not_depend_on_mixed_precision(split, made, tmp_path, monkeypatch):
    """Folder names don't contain it, so an evaluation in fp32 reads the features of a training run in bf16."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(PartialState, "_shared_state", {})
    accelerator, terminal, (model, _) = Accelerator(mixed_precision="bf16"), Terminal(False), made
    images, expected = prepared(split, made, tmp_path), compute(split, made)
    np.testing.assert_allclose(images.early, expected.early, rtol=0, atol=1e-5)
    np.testing.assert_allclose(images.base, expected.base, rtol=0, atol=1e-5)
    store, texts = knowledge_collator(model, tmp_path, "float32").store, ["A dog runs", "A red ball"]
    prepare_texts(accelerator, terminal, store, model, texts)
    with torch.no_grad():
        direct = model.encode_text(model.tokenizer(texts))
    torch.testing.assert_close(torch.from_numpy(store.lookup(texts)), direct, rtol=0, atol=1e-5)
