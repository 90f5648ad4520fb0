"""Two gloo processes compared with one process that has the whole batch: exchanged values, gradients, training."""

import pytest
import torch
from support.models import aim_settings, make_clip
from support.processes import run_ranks
from torch.nn.parallel import DistributedDataParallel

import amp
from amp.data.stream import Batch
from amp.distributed import all_gather, all_gather_with_grad, all_reduce_sum, rank, world_size
from amp.train.objective import Objective
from amp.train.schedule import adamw
from amp.train.stages import set_trainable

BATCH, STEPS = 8, 3
# conditioning, stage, whether the batch has stored tokens instead of images
CASES = [
    ("none", 2, False),
    ("paired", 1, False),
    ("paired", 2, True),
    ("contrastive", 1, True),
    ("contrastive", 2, False),
    ("readout", 1, False),
    ("readout", 2, False),
]


def tensors(seed):
    """Two tensors of 6 rows, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator)


def whole_loss(first, second):
    """A loss in which every row interacts with all others, so that wrong gradients of other ranks' rows are noticed."""
    return ((first @ second.T).softmax(dim=1) * torch.arange(36.0).view(6, 6)).sum()


def exchange():
    """Results of every exchange on one rank, and the gradients after DDP's mean over ranks."""
    rows = slice(3 * rank(), 3 * rank() + 3)
    first, second = (x[rows].clone().requires_grad_() for x in tensors(0))
    gathered = all_gather_with_grad(first), all_gather_with_grad(second)
    weight = torch.ones(3, requires_grad=True)
    whole_loss(gathered[0] * weight, gathered[1]).backward()
    # The gradient of a row comes from one rank only, and the mean divides it by the number of ranks.
    mean = all_reduce_sum(weight.grad.clone()) / world_size()
    plain = all_gather(first)
    return {
        "world": (rank(), world_size()),
        "values": torch.stack([x.detach() for x in gathered]),
        "gradients": torch.stack([first.grad, second.grad]) / world_size(),
        "weight": mean,
        "plain": plain,
        "plain needs grad": plain.requires_grad,
        "bool": all_gather(torch.arange(4).view(2, 2) % 3 == rank()),
        "int": all_gather(torch.tensor([[rank(), 2**62 + rank()]])),
        "not contiguous": all_gather((torch.arange(6.0).view(2, 3) + 10 * rank()).T),
        "empty": all_gather(torch.zeros(0, 5)),
        "sum": all_reduce_sum(torch.tensor([1.0, rank()])),
    }


def make_model(conditioning):
    torch.manual_seed(5)
    settings = {
        "none": aim_settings(block=1, knowledge="none"),
        "readout": {"depth": 1 / 3},
    }.get(conditioning, aim_settings(block=1))
    model = amp.ActionAwareCLIP(make_clip(), amp.PromptConfig(**{**settings, "num_prompts": 2, "max_triplets": 3}))
    # Most gradients are zero if these weights have their initial value zero.
    if conditioning == "readout":
        model.interaction.readout.out.weight.data.normal_()
        model.text_enrichment.triplets.weight.data.normal_()
    elif model.interaction.conditioned:
        model.interaction.aim.gate.data.normal_()
    return model


def global_batch(step, model, stored):
    """The same batch in every process. Some images occur twice, one of them on both ranks; one row has no knowledge."""
    generator = torch.Generator().manual_seed(100 + step)
    mask = torch.rand(BATCH, 3, generator=generator) < 0.7
    mask[0] = False
    knowledge = amp.KnowledgeBatch(
        torch.randint(49000, (BATCH, 3, 3, 2), generator=generator),
        torch.rand(BATCH, 3, 3, 2, generator=generator) < 0.8,
        torch.randn(BATCH, 3, 24, generator=generator),
        mask,
    )
    ids = torch.tensor([10, 11, 12, 11, 13, 10, 14, 15])
    images = torch.randn(16, 3, 32, 32, generator=generator)[ids]
    base = None
    if stored:
        frozen = model(images)
        images, base = frozen.early, frozen.base
    return Batch(images, base, torch.randn(BATCH, 24, generator=generator), knowledge, ids)


def part_of(batch):
    """This rank's rows."""
    size = BATCH // world_size()
    rows = slice(rank() * size, (rank() + 1) * size)
    base = None if batch.base is None else batch.base[rows]
    return Batch(batch.images[rows], base, batch.text[rows], batch.knowledge[rows], batch.image_ids[rows])


def train(conditioning, stage, stored):
    """Takes some optimizer steps; returns their losses, averaged over ranks, and the final adapter weights."""
    model = make_model(conditioning)
    set_trainable(model, stage)
    optimizer = adamw(model, lr=3e-3, weight_decay=0.01)
    objective = Objective(
        stage,
        model.interaction,
        "paired" if conditioning == "paired" else "contrastive",
        negatives=2,
        margin=0.2,
        sampling_scale=5.0,
        seed=1,
        knowledge_dropout=0.3,
    )
    engine = DistributedDataParallel(model) if world_size() > 1 else model
    engine.train()
    mean_losses = []
    for step in range(STEPS):
        loss, _ = objective(engine, part_of(global_batch(step, model, stored)), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean_losses.append(float(all_reduce_sum(loss.detach().clone())) / world_size())
    return mean_losses, {name: value.clone() for name, value in model.adapter_state().items()}


# With more ranks than candidates per pair, a rank keeps only the rows of the global batch that it needs.
FOUR_RANK_CASES = [case for case in CASES if case[0] == "contrastive"]


def train_all(cases):
    return {case: train(*case) for case in cases}


def exchange_and_train_all():
    return exchange(), train_all(CASES)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Results of both ranks. The processes are started only once."""
    return run_ranks(exchange_and_train_all, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run_ranks(train_all, tmp_path_factory.mktemp("four"), FOUR_RANK_CASES, world=4)


@pytest.fixture(scope="module")
def exchanged(two_ranks):
    return [result[0] for result in two_ranks]


def test_ranks_know_themselves(exchanged):
    assert [result["world"] for result in exchanged] == [(0, 2), (1, 2)]
    assert (rank(), world_size()) == (0, 1)


def test_gathered_rows_stand_in_rank_order(exchanged):
    for result in exchanged:
        assert torch.equal(result["values"], torch.stack(tensors(0)))
        assert torch.equal(result["plain"], tensors(0)[0]) and not result["plain needs grad"]


def test_gradients_are_those_of_one_process(exchanged):
    first, second = (x.clone().requires_grad_() for x in tensors(0))
    weight = torch.ones(3, requires_grad=True)
    whole_loss(first * weight, second).backward()
    gradients = torch.cat([result["gradients"] for result in exchanged], dim=1)
    torch.testing.assert_close(gradients, torch.stack([first.grad, second.grad]), rtol=1e-5, atol=1e-5)
    for result in exchanged:
        torch.testing.assert_close(result["weight"], weight.grad, rtol=1e-5, atol=1e-5)


def test_every_type_of_a_batch_can_be_gathered(exchanged):
    for result in exchanged:
        assert result["bool"].dtype == torch.bool
        assert result["bool"].tolist() == [[True, False], [False, True], [False, True], [False, False]]
        assert result["int"].tolist() == [[0, 2**62], [1, 2**62 + 1]]
        rows = torch.arange(6.0).view(2, 3).T
        assert torch.equal(result["not contiguous"], torch.cat([rows, rows + 10]))
        assert result["empty"].shape == (0, 5)
        assert result["sum"].tolist() == [2.0, 1.0]


def test_one_process_exchanges_with_nobody():
    x = torch.randn(3, 2, requires_grad=True)
    assert all_gather(x) is x and all_gather_with_grad(x) is x and all_reduce_sum(x) is x


def name_of(case):
    return f"{case[0]}-stage{case[1]}{'-stored' if case[2] else ''}"


def assert_trained_alike(case, results):
    expected_losses, expected = train(*case)
    start = make_model(case[0]).adapter_state()
    moved = {name for name in start if (expected[name] - start[name]).abs().max() > 1e-3}
    assert len(moved) >= {"none": 1, "readout": 5}.get(case[0], 20), (
        "training hardly moved anything: the test can't fail"
    )
    assert len(set(expected_losses)) == STEPS
    for losses, weights in results:
        assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1e-6)
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_two_processes_train_as_one_on_the_same_global_batch(two_ranks, case):
    assert_trained_alike(case, [result[1][case] for result in two_ranks])


@pytest.mark.parametrize("case", FOUR_RANK_CASES, ids=name_of)
def test_four_processes_train_as_one_on_the_same_global_batch(four_ranks, case):
    assert_trained_alike(case, [result[case] for result in four_ranks])


def test_both_ranks_end_with_the_same_weights(two_ranks):
    for case in CASES:
        first, second = (result[1][case][1] for result in two_ranks)
        assert all(torch.equal(first[name], second[name]) for name in first), case
