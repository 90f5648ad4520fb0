"""Text features per shard: equal to a direct computation, for any process that computed them and any use in a run."""

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.training_run import small_run

import amp
from amp.data.order import BatchOrder
from amp.data.prepare import knowledge_collator, prepare_shard_texts
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.data.stream import TrainingSamples, training_loader
from amp.data.text_features import encode_missing
from amp.errors import AmpError
from amp.terminal import Terminal
from amp.train.engine import train

KINDS = ("action", "attribute")


@pytest.fixture(scope="module")
def world(shards, clip_folder):
    config = amp.PromptConfig(depth=1 / 3, max_triplets=2)
    model, _, preprocess = amp.create_model_and_transforms(clip_folder, prompt_config=config)
    return model.eval(), preprocess, ShardSplit(shards, "train")


def prepared(world, cache, setting="both", first=0.0):
    model, _, split = world
    changed = replace(model.config, knowledge=setting)
    model, before = model, model.config
    try:
        model.config = changed
        return prepare_shard_texts(Terminal(False), split, model, str(cache), "float32", first)
    finally:
        model.config = before


def batches(world, cache, texts, workers=0):
    model, preprocess, split = world
    collate = knowledge_collator(model, str(cache), "float32")
    if texts is None:
        encode_missing(collate.store, SplitCaptions.read(split, KINDS).all_texts(2), model.backbone, model.tokenizer)
        collate.store.refresh()
    samples = TrainingSamples(split, preprocess, 3, KINDS, None)
    return list(training_loader(samples, BatchOrder(split.sizes, 4, 0, 1, 3), collate, workers, False, None, texts))


@pytest.mark.parametrize("workers", [0, 2])
@torch.no_grad()
def test_batches_equal_those_of_one_store_of_all_texts(world, tmp_path, workers):
    expected = batches(world, tmp_path / "whole", None)
    stored = batches(world, tmp_path, prepared(world, tmp_path), workers)
    in_step = [batch.encoded(world[0].backbone.encode_text) for batch in batches(world, tmp_path, world[0].tokenizer)]
    for found in (stored, in_step):
        assert len(found) == len(expected) > 3
        for batch, whole in zip(found, expected, strict=True):
            assert batch.tokens is None and torch.equal(batch.image_ids, whole.image_ids)
            torch.testing.assert_close(batch.text, whole.text, rtol=0, atol=5e-6)
            torch.testing.assert_close(batch.knowledge.states, whole.knowledge.states, rtol=0, atol=5e-6)
            assert torch.equal(batch.knowledge.mask, whole.knowledge.mask) and whole.knowledge.mask.any()
    assert any(batch.knowledge.states.any() for batch in stored)


def test_settings_share_the_captions_and_add_their_own_texts(world, tmp_path):
    counts = {}
    for setting in ("none", "both", "template", "states"):
        texts = prepared(world, tmp_path, setting)
        counts[setting] = len(list(texts.folder.iterdir()))
    shards = len(world[2].shards)
    assert counts == {"none": shards, "both": 2 * shards, "template": 3 * shards, "states": 3 * shards}


def test_a_shard_of_another_text_has_other_names(world):
    shard = world[2].shards[0]
    texts = amp.data.shard_texts.ShardTexts("cache", "ab", 6, "float32", "both")
    hostile = replace(shard, sha256="../" * 20)
    names = {name for item in (shard, hostile) for name in texts.names(item)}
    assert len(names) == 4 and not any("/" in name for name in names)


def test_a_text_without_feature_and_a_damaged_segment_are_named(world, tmp_path):
    texts = prepared(world, tmp_path, "none")
    shard = world[2].shards[0]
    with pytest.raises(AmpError, match=r"no feature for 'a text of no shard'"):
        texts.lookup(["a text of no shard"], [shard.texts])
    (texts.folder / texts.names(shard)[0] / "features.npy").write_bytes(b"cut")
    with pytest.raises(AmpError, match=r"shard-.*can't be read .*remove the folder"):
        amp.data.shard_texts.ShardTexts(tmp_path, *texts._arguments[1:]).lookup(["a"], [shard.texts])


def _prepare(world, cache, first):
    torch.set_num_threads(1)
    prepared(world, cache, "both", first)


def test_two_processes_give_the_bits_of_one(world, tmp_path):
    alone = prepared(world, tmp_path / "alone")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_prepare, args=(world, tmp_path / "two", i / 2)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    two = tmp_path / "two" / alone.folder.name
    names = sorted(path.name for path in alone.folder.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        for file in ("keys.npy", "features.npy"):
            np.testing.assert_array_equal(np.load(alone.folder / name / file), np.load(two / name / file))


@pytest.mark.usefixtures("fresh_accelerate")
def test_texts_in_the_step_train_like_stored_ones(shards, clip_folder, tmp_path):
    found = []
    for stored in (True, False):
        config = small_run(
            shards,
            clip_folder,
            tmp_path / str(stored),
            {"batch_size": 4, "cache_texts": stored},
            stages=[1],
        )
        config.stage1.max_steps = 3
        found.append(load_file(train(config)))
        assert bool(list((tmp_path / str(stored) / "cache").glob("text-*/shard-*"))) == stored
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=2e-4, msg=name)


def test_mining_needs_stored_texts(shards, clip_folder, tmp_path):
    config = small_run(shards, clip_folder, tmp_path, {"cache_texts": False}, mined_group=2)
    with pytest.raises(AmpError, match=r"mined_group is 2 and data.cache_texts is false, expected 1 or true"):
        config.check()
