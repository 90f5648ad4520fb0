"""Counts the work of a step, a re-ranking and an epoch of reading, so that added work is noticed.

Nothing is timed. Bounds are calculated by hand, or are the work of the plain implementations in `benchmarks.naive`. A
change that fails here makes every training run slower.
"""

import os
from collections import Counter

import open_clip
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from amp.data.order import BatchOrder
from amp.data.prepare import knowledge_collator
from amp.data.split import ShardSplit
from amp.data.split_captions import SplitCaptions
from amp.data.stream import TrainingSamples, training_loader
from amp.data.text_features import encode_missing
from amp.model.clip import ActionAwareCLIP
from amp.model.config import PromptConfig
from amp.model.factory import create_model_and_transforms
from amp.model.similarity import similarity
from amp.retrieval.rerank import score_candidates
from amp.retrieval.scorer import PairScorer
from amp.train.losses import contrastive_loss, same_image_mask
from amp.train.objective import Objective
from amp.train.stages import set_trainable
from benchmarks.models import PLAIN, READ_LAST, build, drawn_captions, random_batch
from benchmarks.naive import NaiveAIM, plain_prompt_tuning

IMAGES = 64


@pytest.fixture(scope="module", params=["ViT-B-32", "ViT-L-14-336"])
def large(request) -> ActionAwareCLIP:
    """A real architecture on the meta device."""
    with torch.device("meta"):
        clip = open_clip.create_model(request.param, None, load_weights=False, device="meta")
        return ActionAwareCLIP(clip, PromptConfig())


def built(base: ActionAwareCLIP, **prompt) -> ActionAwareCLIP:
    with torch.device("meta"):
        model = ActionAwareCLIP(base.backbone.clip, PromptConfig(**{**PLAIN, "depth": 0.75, **prompt}))
    set_trainable(model, 1)
    return model


def work_of(step) -> float:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def step_work(model: ActionAwareCLIP, conditioning: str = "contrastive") -> float:
    """FLOP of the forward and backward pass of a step on stored tokens."""
    with torch.device("meta"):
        batch = random_batch(model, IMAGES)
        objective = MetaObjective(1, model.interaction, conditioning, 2)
        return work_of(lambda: objective(model, batch, 0)[0].backward())


class MetaObjective(Objective):
    """Draws negatives without their scores, which don't exist on the meta device."""

    def _draw(self, cosines, forbidden, own, m, step, direction):
        from amp.train.negatives import Negatives

        return Negatives(torch.zeros(len(own), m, dtype=torch.int64), torch.zeros(len(own), m))


def plain_work(model: ActionAwareCLIP) -> float:
    with torch.device("meta"):
        batch = random_batch(model, IMAGES)

        def step():
            cosines = similarity(plain_prompt_tuning(model, None, batch.images), batch.text)
            contrastive_loss(cosines, model.logit_scale.exp(), same_image_mask(batch.image_ids)).backward()

        return work_of(step)


def test_a_contrastive_step_over_all_pairs_is_little_more_than_plain_prompt_tuning(large):
    plain = plain_work(built(large, knowledge="none"))
    assert step_work(built(large, knowledge="none")) < 0.9 * plain  # its last block computes one token only
    assert step_work(built(large, **READ_LAST)) < 1.5 * plain


def test_a_contrastive_step_with_aim_costs_its_pairs_and_no_more(large):
    control = step_work(built(large, knowledge="none"))
    paired = step_work(built(large), "paired")
    contrastive = step_work(built(large))
    # 1 + 2m = 5 pairs per image; everything else (prompts, text) once per caption.
    assert contrastive < control + 5.05 * paired


@pytest.fixture
def base(clip_folder):
    model, _, _ = create_model_and_transforms(clip_folder, None, prompt_config=PromptConfig())
    return model


class Calls:
    """Counts the rows that pass through each image block and the text tower."""

    def __init__(self, model: ActionAwareCLIP):
        self.rows = Counter()
        for number, block in enumerate(model.backbone.visual.transformer.resblocks):
            # The last block may run in parts, but its first norm always runs.
            block.ln_1.register_forward_pre_hook(lambda _, given, n=number: self.add(n, given[0]))
        model.backbone._text.transformer.register_forward_pre_hook(lambda _, given: self.add("text", given[0]))

    def add(self, what, tokens):
        self.rows[what] += len(tokens)


def test_no_text_is_encoded_in_a_step_and_early_blocks_see_each_image_once(base):
    model = build(base, 1)
    set_trainable(model, 1)
    batch = random_batch(model, 6)
    batch.images = torch.randn(6, 3, *model.backbone.visual.image_size)
    batch.base, last = None, model.backbone.num_layers - 1
    calls = Calls(model)
    loss, _ = Objective(1, model.interaction, negatives=2)(model, batch, 0)
    loss.backward()
    # Once without gradients for frozen features, once with visual prompts only, and 1 + 2m = 5 pairs.
    assert calls.rows == {0: 6, **dict.fromkeys(range(1, last + 1), 6 + 6 + 5 * 6)}


@pytest.mark.parametrize("prompt", [{}, READ_LAST], ids=["aim", "readout"])
def test_reranking_runs_late_blocks_once_a_pair_or_once_an_image_of_a_batch(base, prompt):
    model = build(base, 1, **prompt).eval()
    queries, k, gallery = 8, 3, 6
    captions, items = drawn_captions(queries, 3)
    knowledge, text = model.prepare_knowledge(items), model.encode_text(model.tokenizer(captions))
    early = model.tower.early(torch.randn(gallery, 3, *model.backbone.visual.image_size)).numpy()
    candidates = torch.stack([torch.arange(q, q + k) % gallery for q in range(queries)])
    scorer = PairScorer(model, early, knowledge, text)
    calls = Calls(model)
    score_candidates(
        candidates,
        lambda q, c: scorer(c, q),
        batch_size=4,
        group_by="candidate",
        prepare=lambda q, c: scorer.prepare(q),
    )
    # Pairs are sorted by image, four per batch. With the readout each batch encodes each of its images once.
    images = candidates.flatten().sort().values
    touched = sum(len(batch.unique()) for batch in images.split(4))
    late = range(1, model.backbone.num_layers)
    assert calls.rows == dict.fromkeys(late, queries * k if not prompt else touched)


def test_the_equations_cost_more_than_the_step(base):
    """The reference of the benchmarks runs each candidate through all blocks and the text tower."""
    model = build(base, 1)
    images = torch.randn(3, 3, *model.backbone.visual.image_size)
    captions, items = drawn_captions(3, 2)
    calls = Calls(model)
    NaiveAIM(model).contrastive_step(images, captions, items, [[1, 2], [2, 0], [0, 1]], 1.0)
    pairs = 3 * 5
    assert calls.rows[0] == pairs + 3 and calls.rows["text"] == pairs * (2 + 1) + 3


def test_an_epoch_reads_each_photo_and_record_once_and_a_resumed_one_only_its_rest(
    shards, clip_folder, tmp_path, monkeypatch
):
    config = PromptConfig(depth=1 / 3)
    model, transform, _ = create_model_and_transforms(clip_folder, None, prompt_config=config)
    split = ShardSplit(shards, "train")
    collate = knowledge_collator(model, str(tmp_path / "cache"), "float32")
    texts = SplitCaptions.read(split, ("action",)).all_texts(config.max_triplets)
    encode_missing(collate.store, texts, model.backbone, model.tokenizer)
    order = BatchOrder(split.sizes, 4, 0, 1, 0, window=2)
    loader = training_loader(TrainingSamples(split, transform, 0, ("action",), None), order, collate, 0, False)
    for index in range(len(split)):
        split.record(index)  # opens all shards; each process reads their headers once
    sizes = {
        index: tuple(int(x) for x in reader._spans[row, :, 1])
        for index in range(len(split))
        for reader, row in [split._locate(index)]
    }
    real, read = os.pread, []

    def counted(file, size, offset):
        read.append(size)
        return real(file, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    seen = [int(i) for batch in loader for i in batch.samples]
    assert Counter(read) == Counter(size for index in seen for size in sizes[index])
    read.clear()
    order.set_position(order.steps - 1)
    (last,) = loader
    assert Counter(read) == Counter(size for index in last.samples.tolist() for size in sizes[index])
