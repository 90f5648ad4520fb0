"""Parameters that an optimizer step changes in each stage and conditioning, and the loss of a step."""

from dataclasses import replace

import pytest
import torch
from support.equations import losses as naive
from support.models import make_aim

from amp.data.stream import Batch
from amp.model.similarity import similarity
from amp.train import objective
from amp.train.negatives import draw_negatives, gumbel_noise
from amp.train.objective import Objective
from amp.train.schedule import adamw
from amp.train.stages import set_trainable, trainable_names

NEW = {"logit_scale", "visual_prompts", "triplet_encoder", "interaction"}
CONTROL = {"knowledge": "none"}
IDS = torch.tensor([4, 8, 4, 6])  # images 0 and 2 are the same


@pytest.fixture
def batch(images, knowledge, tokenizer):
    model = make_aim()
    text = model.encode_text(tokenizer(["a dog jumps", "a small girl", "nothing", "men chase horses"]))
    return Batch(images, None, text, model.prepare_knowledge(knowledge), IDS)


def objective_of(model, stage, conditioning="contrastive", negatives=2, **settings):
    """The objective of a stage. Controls have no conditioning, so ``control`` is replaced by any valid value."""
    conditioning = "contrastive" if conditioning == "control" else conditioning
    return Objective(stage, model.interaction, conditioning, negatives, **settings)


def parts(names):
    return {name.partition(".")[0] for name in names}


def test_stage_1_trains_all_that_is_new():
    model = make_aim()
    names = trainable_names(model, 1)
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    assert parts(names) == NEW


@pytest.mark.parametrize(("stage", "expected"), [(1, {"logit_scale", "visual_prompts"}), (2, {"visual_prompts"})])
def test_the_control_trains_what_it_has(stage, expected):
    assert parts(trainable_names(make_aim(**CONTROL), stage)) == expected


def test_set_trainable_goes_back_and_forth():
    model = make_aim()
    for stage in (1, 2, 1):
        names = trainable_names(model, stage)
        chosen = set_trainable(model, stage)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == names
        assert {id(p) for p in chosen} == {id(model.get_parameter(name)) for name in names}


@pytest.mark.parametrize(("stage", "conditioning"), [(1, "control"), (2, "control"), (1, "paired"), (2, "contrastive")])
def test_one_step_moves_exactly_the_stages_parameters(stage, conditioning, batch):
    model = make_aim(trained=True, **(CONTROL if conditioning == "control" else {})).train()
    set_trainable(model, stage)
    optimizer = adamw(model, lr=1e-2, weight_decay=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # A margin of 2 keeps every hinge of eq. 11 open.
    step_loss = objective_of(model, stage, conditioning, margin=2.0, sampling_scale=10.0)
    loss, scale = step_loss(model, batch, step=0)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and scale.shape == (1,)
    assert not model.backbone.training
    assert not [name for name, p in model.backbone.named_parameters() if p.grad is not None or p.requires_grad]
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trainable_names(model, stage)


def test_stage_1_moves_only_what_the_gate_lets_through_at_first(batch):
    """The gate is zero at step 0, so only the gate and the visual prompts learn; the rest learns from step 1 on."""
    model = make_aim()
    set_trainable(model, 1)
    loss, _ = objective_of(model, 1, "paired")(model, batch, step=0)
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"interaction.aim.gate", "visual_prompts.prompts", "logit_scale"}


# -- the loss of a step -----------------------------------------------------------------------------------------------


def cosine_of(model, batch, image, caption):
    """Cosine of a caption and one image conditioned on the caption's knowledge."""
    feature = model.encode_image(batch.images[image : image + 1], batch.knowledge[caption : caption + 1])
    return similarity(feature, batch.text[caption : caption + 1]).item()


@pytest.mark.parametrize(("stage", "conditioning"), [(2, "control"), (1, "paired"), (2, "paired")])
@torch.no_grad()
def test_one_feature_an_image_is_scored_against_all_texts(stage, conditioning, batch):
    model = make_aim(trained=True, **(CONTROL if conditioning == "control" else {}))
    if conditioning == "control":
        features = model.image_features(batch.images)
    else:
        features = model.encode_image(batch.images, batch.knowledge)
    cosines = similarity(features, batch.text).double().tolist()
    loss, scale = objective_of(model, stage, conditioning, margin=0.3)(model, batch, step=3)
    expected = naive.contrastive(cosines, scale.item(), IDS) if stage == 1 else naive.triplet(cosines, 0.3, IDS)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_knowledge_dropout_leaves_out_its_share_of_the_triplets(batch):
    model = make_aim(trained=True, block=1)
    everything = Batch(batch.images, None, batch.text, replace(batch.knowledge, mask=torch.ones(4, 6).bool()), IDS)
    drop = objective_of(model, 1, "paired", knowledge_dropout=0.3)
    kept = [drop._without_some_knowledge([everything], s)[0] for s in range(50)]
    assert sum(k.knowledge.mask.double().mean().item() for k in kept) / 50 == pytest.approx(0.7, abs=0.05)
    given = drop._without_some_knowledge([batch], 0)[0]
    assert not (given.knowledge.mask & ~batch.knowledge.mask).any(), "a triplet that doesn't exist came back"
    blank = Batch(batch.images, None, batch.text, batch.knowledge.blank(), IDS)

    def loss(rate, given=batch):
        return objective_of(model, 1, "paired", knowledge_dropout=rate)(model, given, 0)[0].item()

    assert loss(1 - 1e-12) == pytest.approx(loss(0.0, blank), rel=1e-5)
    assert loss(1 - 1e-12) != pytest.approx(loss(0.0), rel=1e-5)


@pytest.mark.parametrize(("stage", "cached"), [(1, False), (2, True)], ids=["images", "early tokens"])
@torch.no_grad()
def test_contrastive_conditioning_scores_each_text_with_its_own_knowledge(stage, cached, batch):
    """Compared with pairs that are encoded one at a time, and weighted sums written out."""
    m, margin, sampling, step = 2, 0.3, 10.0, 5
    model = make_aim(trained=True, block=1)
    frozen = model(batch.images)
    given = Batch(frozen.early, frozen.base, batch.text, batch.knowledge, IDS) if cached else batch
    step_loss = objective_of(model, stage, negatives=m, margin=margin, sampling_scale=sampling, seed=11)
    loss, scale = step_loss(model, given, step)

    base, same = similarity(frozen.base, batch.text), IDS[:, None] == IDS[None, :]
    total = 0.0
    for direction, scores in enumerate((base, base.T)):
        noise = gumbel_noise(4, 4, 11, step, direction)
        drawn = draw_negatives(scores, same, noise, m, sampling)
        for i in range(4):
            own = cosine_of(model, batch, i, i)
            pairs = [(i, j) if direction == 0 else (j, i) for j in drawn.columns[i].tolist()]
            others = [cosine_of(model, batch, image, caption) for image, caption in pairs]
            row = own, others, drawn.log_weight[i].tolist()
            if stage == 1:
                total += naive.sampled_contrastive(*row, scale.item()) / 8
            else:
                total += naive.sampled_triplet(*row, margin) / 8
    if stage == 1:  # and eq. 10 over the whole batch without knowledge
        plain = similarity(model.image_features(batch.images), batch.text)
        total += naive.contrastive(plain.double().tolist(), scale.item(), IDS)
    assert loss.item() == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(("stage", "negatives"), [(1, 1), (2, 3)], ids=["only rows needed", "all rows"])
@torch.no_grad()
def test_four_ranks_of_one_make_the_loss_of_one_rank_of_four(stage, negatives, batch, monkeypatch):
    """Simulated in one process: gathered tensors are looked up."""
    model = make_aim(trained=True, block=1)
    frozen = model(batch.images)
    whole = Batch(frozen.early, frozen.base, batch.text, batch.knowledge, IDS)
    score = objective_of(model, stage, negatives=negatives, sampling_scale=10.0)
    # The part without knowledge gathers features, not inputs: tests/test_distributed.py runs it in real processes.
    monkeypatch.setattr(objective.losses, "contrastive_loss", lambda *_: 0.0)
    expected, _ = score(model, whole, 2)
    shares = []
    for rank in range(4):
        gathered = {}

        def share(tensor, rank=rank, gathered=gathered):
            part = tensor[rank : rank + 1].clone()
            gathered[id(part)] = tensor
            return part

        local = Batch(
            *(share(x) for x in (whole.images, whole.base, whole.text)), whole.knowledge.map(share), share(IDS)
        )
        monkeypatch.setattr(objective, "all_gather", lambda x, gathered=gathered: gathered[id(x)])
        monkeypatch.setattr(objective, "rank", lambda rank=rank: rank)
        shares.append(score(model, local, 2)[0].item())
    assert sum(shares) / 4 == pytest.approx(expected.item(), rel=1e-4)
    assert max(shares) - min(shares) > 1e-3


def test_the_draw_depends_on_the_step(batch):
    model = make_aim(trained=True)
    with torch.no_grad():
        step_loss = objective_of(model, 1, negatives=1)
        same = [step_loss(model, batch, 0)[0].item() for _ in range(2)]
        steps = {round(step_loss(model, batch, step)[0].item(), 5) for step in range(8)}
    assert same[0] == same[1] and len(steps) > 1


@torch.no_grad()
def test_more_negatives_than_the_batch_has(batch):
    model = make_aim(trained=True)
    for stage in (1, 2):
        loss, _ = objective_of(model, stage, negatives=50, sampling_scale=10.0)(model, batch, 0)
        assert loss.isfinite()
