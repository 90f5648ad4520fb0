"""Leak probes change only the input that they are meant to change."""

import re

import pytest
import torch
import torch.nn.functional as F
from support.equations.search import pair_score
from support.evaluation import TOP_K, ranked
from support.repository import ROOT

import amp
from amp.errors import AmpError
from amp.evaluate.probes import PROBES, check_probes, probe
from amp.evaluate.probes.knowledge import other_images, siblings
from amp.evaluate.text_only import enriched_text
from amp.plugins import load_plugins


def expected(world, query, image_of, knowledge_of):
    """t2i scores of one caption by public calls, with images from `image_of` and knowledge from `knowledge_of`."""
    first = world.retrieval().first["t2i"].candidates[query]
    caption, text, knowledge = world.captions.texts[query], world.text[query][None], knowledge_of(query)
    return torch.tensor([pair_score(world.model, image_of(int(i)), caption, knowledge, text) for i in first])


@pytest.mark.parametrize(
    ("owner", "seed"),
    [([0, 0, 1, 1], 0), ([2, 0, 1, 1, 0, 2, 2], 1), ([0, 0, 0, 1, 2, 3], 0), (list(range(9)), 1)],
)
def test_shuffled_knowledge_is_each_once_and_never_of_the_same_image(owner, seed):
    owner = torch.tensor(owner)
    source = other_images(owner, seed)
    assert sorted(source.tolist()) == list(range(len(owner)))
    assert (owner[source] != owner).all()


def test_shuffle_that_can_not_exist_is_refused():
    with pytest.raises(AmpError, match="one image has 3 of 4 captions"):
        other_images(torch.tensor([0, 0, 0, 1]))


def test_sibling_is_the_next_caption_of_the_image_and_itself_where_alone():
    assert siblings(torch.tensor([0, 1, 0, 2, 0, 1])).tolist() == [2, 5, 4, 3, 0, 1]


@pytest.mark.parametrize("name", ["shuffled", "sibling"])
def test_knowledge_of_another_caption_is_what_the_public_call_gives_with_it(world, name):
    source = {"shuffled": other_images, "sibling": siblings}[name](world.captions.image)
    scores = probe(world.retrieval(), name, world.model, world.preprocess).rank(world.model).t2i.scores
    for query in (0, len(source) - 1):
        want = expected(world, query, lambda i: world.images[i], lambda q: world.captions.knowledge[int(source[q])])
        torch.testing.assert_close(scores[query], want, rtol=0, atol=1e-5)


def test_grey_images_all_score_alike_for_one_caption_and_the_candidates_stay(world):
    clean = world.retrieval()
    spoilt = probe(clean, "grey", world.model, world.preprocess)
    scores = spoilt.rank(world.model).t2i.scores
    before, after = clean.first["t2i"], spoilt.first["t2i"]
    assert torch.equal(before.candidates.sort(dim=1).values, after.candidates.sort(dim=1).values)
    assert not torch.equal(before.candidates, after.candidates)  # ties must not keep the first stage's order
    base = dict(zip(before.candidates[1].tolist(), before.scores[1].tolist(), strict=True))
    assert base == dict(zip(after.candidates[1].tolist(), after.scores[1].tolist(), strict=True))
    assert scores.shape[1] == TOP_K and float((scores - scores[:, :1]).abs().max()) < 1e-5
    assert float((scores - clean.rank(world.model).t2i.scores).abs().max()) > 1e-3


def test_blank_knowledge_makes_the_image_deaf_to_the_caption(world):
    ranking = ranked(probe(world.retrieval(), "blank", world.model, world.preprocess), world.model)["i2t pairwise"]
    with torch.no_grad():
        feature = world.model.encode_image(world.images[:1], [amp.Knowledge()])[0]
    want = [float(F.cosine_similarity(feature, world.text[int(c)], dim=0)) for c in ranking.first.candidates[0]]
    torch.testing.assert_close(ranking.scores[0], torch.tensor(want), rtol=0, atol=1e-5)


def test_text_only_control_by_hand(world):
    retrieval = world.retrieval()
    text = enriched_text(retrieval.text, retrieval.knowledge)
    number = next(i for i, item in enumerate(world.captions.knowledge) if len(item.triplets) == 2)
    states = retrieval.knowledge.states[number][:2]
    want = F.normalize(F.normalize(retrieval.text[number], dim=0) + F.normalize(states, dim=-1).mean(0), dim=0)
    torch.testing.assert_close(text[number], want)
    scores = retrieval.rank_text(text).t2i.scores
    base = F.normalize(torch.from_numpy(world.frozen.base.copy()), dim=-1)
    torch.testing.assert_close(scores[number], base[retrieval.first["t2i"].candidates[number]] @ want)


def test_a_probe_from_outside_the_package(world, monkeypatch, tmp_path):
    """The example of docs/extending.md, loaded like a user's module."""
    page = (ROOT / "docs/extending.md").read_text()
    (code,) = re.findall(r"^```python\n# first_triplet\.py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "first_triplet.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AMP_PLUGINS", "first_triplet")
    monkeypatch.setattr("amp.evaluate.probes.PROBES", dict(PROBES))
    load_plugins.cache_clear()
    search = world.retrieval()
    spoilt = probe(search, "first_triplet", world.model, world.preprocess)
    load_plugins.cache_clear()
    assert spoilt.knowledge.mask.sum(dim=1).max() == 1 < search.knowledge.mask.sum(dim=1).max()
    mask = spoilt.knowledge.mask[:, :1]
    assert torch.equal(mask, search.knowledge.mask[:, :1])
    assert not torch.equal(spoilt.rank(world.model).t2i.scores, search.rank(world.model).t2i.scores)


def test_an_unknown_probe_lists_those_there_are():
    with pytest.raises(AmpError, match="probes contains 'gray', expected some of shuffled, blank, sibling, grey"):
        check_probes(["grey", "gray"])
