"""The common interface of all registered interactions, on a tiny model."""

import pytest
import torch
from support.models import EMBED_DIM, make_model
from torch.testing import assert_close

from amp.errors import AmpError
from amp.knowledge.tensors import Captions
from amp.model.config import PromptConfig
from amp.model.interactions import INTERACTIONS, interaction_class, register_interaction
from amp.model.interactions.base import Interaction
from amp.model.interactions.controls import LearnedQuery, VisualPromptsOnly
from amp.retrieval.scorer import PairScorer
from amp.train.stages import trainable_names

TEXTS = ["a dog jumps", "a small girl", "nothing", "men chase horses"]
NAMES = sorted(INTERACTIONS)


@pytest.fixture(params=NAMES)
def model(request):
    return make_model(trained=True, interaction=request.param, depth=1 / 3, num_prompts=2)


@pytest.fixture
def captions(model, knowledge, tokenizer):
    with torch.no_grad():
        return Captions(model.prepare_knowledge(knowledge), model.encode_text(tokenizer(TEXTS)))


@torch.no_grad()
def test_all_pairs_are_the_pairs_of_the_product(model, images, captions):
    image_index, caption_index = torch.cartesian_prod(torch.arange(3), torch.arange(4)).T
    together = model(images[:3], captions, "all").conditioned
    one_by_one = model(images[:3], captions, (image_index, caption_index)).conditioned
    assert together.shape == (3, 4, EMBED_DIM)
    assert_close(together.flatten(0, 1), one_by_one, atol=1e-5, rtol=1e-5)
    depends = (together[:, 0] - together[:, 1]).abs().max() > 1e-3
    assert depends == model.interaction.conditioned


@torch.no_grad()
def test_what_is_encoded_once_gives_the_same_bits(model, images, captions):
    index = torch.tensor([0, 0, 2, 1]), torch.tensor([1, 2, 2, 3])
    raw = model(images, captions, index)
    frozen, encoded = model(images), model(None, captions).captions
    stored = model(frozen.early).images
    assert all(len(part) == 4 for part in stored)
    for given in (frozen.early, stored):
        assert torch.equal(model(given, encoded, index).conditioned, raw.conditioned)
    assert torch.equal(raw.captions.text, encoded.text)
    taken = [x[torch.tensor([0, 2, 1])] for x in stored]
    again = model(tuple(taken), encoded, (torch.tensor([0, 0, 1, 2]), index[1])).conditioned
    assert torch.equal(again, raw.conditioned)


@torch.no_grad()
def test_only_a_control_ignores_the_knowledge(model, images, captions):
    turned = Captions(captions.knowledge[torch.tensor([1, 2, 3, 0])], captions.text)
    found, other = (model(images, x).conditioned for x in (captions, turned))
    if model.interaction.conditioned:
        assert ((found - other).abs().amax(dim=1) > 1e-3).all()
    else:
        assert torch.equal(found, other)
        assert_close(found, model.image_features(images), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_images_see_no_padding(model, images, captions):
    """Masked values may be arbitrary."""
    there = captions.knowledge.mask
    tokens, states = captions.knowledge.triplet_tokens.clone(), captions.knowledge.states.clone()
    tokens[~there], states[~there] = 777, 1e3
    dirty = type(captions.knowledge)(tokens, captions.knowledge.token_mask, states, there)
    found, expected = (model(images, Captions(x, captions.text)).conditioned for x in (dirty, captions.knowledge))
    assert_close(found, expected, atol=1e-6, rtol=0)


def test_stage_2_trains_what_the_interaction_names(model):
    second = trainable_names(model, 2)
    assert second and second < trainable_names(model, 1)
    assert all(name.startswith(model.interaction.stage2) for name in second)
    expected = {
        "readout": "interaction.readout.",
        "learned_query": "interaction.",
        "aim": "interaction.aim.",
        "cat": "interaction.adapter.",
        "visual_prompts": "visual_prompts.",
    }[model.config.interaction]
    assert {n for n, _ in model.named_parameters() if n.startswith(expected)} == second


# -- choice of the class ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_without_knowledge_a_control_is_built(name):
    found = interaction_class(PromptConfig("none", interaction=name))
    assert found is (LearnedQuery if name in ("readout", "learned_query") else VisualPromptsOnly)


def test_a_control_takes_the_options_it_has_from_the_interaction_it_stands_for():
    control = make_model(knowledge="none", interaction_options={"blocks": 2})
    assert len(control.interaction.readout.blocks) == 4  # two blocks between two norms
    make_model(knowledge="none", interaction="aim", interaction_options={"lam": 0.5})  # has no effect


def test_a_text_only_control_enriches_captions_and_shows_images_nothing(images, knowledge, tokenizer):
    model = make_model(trained=True, interaction="visual_prompts")
    assert not model.interaction.conditioned
    assert {n.partition(".")[0] for n in model.adapter_state()} == {
        "logit_scale",
        "visual_prompts",
        "triplet_encoder",
        "text_enrichment",
        "image_projection",
    }
    tokens = tokenizer(TEXTS)
    with torch.no_grad():
        plain, rich = model.encode_text(tokens, True), model.encode_text(tokens, True, knowledge)
        seen = [model.encode_image(images, x) for x in (knowledge, knowledge[::-1])]
    assert (plain - rich).abs().amax(dim=1).min() > 1e-3
    assert torch.equal(*seen)


def test_an_interaction_of_another_package(monkeypatch):
    class Mine(Interaction):
        def __init__(self, backbone, triplets, states, power: int = 2):
            super().__init__()

    monkeypatch.setattr("amp.model.interactions.INTERACTIONS", dict(INTERACTIONS))
    register_interaction("mine", Mine)
    assert interaction_class(PromptConfig(interaction="mine", interaction_options={"power": 3})) is Mine


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"interaction": "some"}, r"prompt setting interaction is 'some', expected one of readout, aim, .*AMP_PLUGINS"),
        (
            {"interaction_options": {"lam": 0.5, "depth": 1}},
            r"interaction_options holds depth, lam, expected options of the interaction 'readout': blocks",
        ),
        ({"interaction": "visual_prompts", "interaction_options": {"blocks": 1}}, "it has none"),
        ({"interaction_options": {"blocks": -1}}, r"interaction_options\.blocks is -1, expected at least 0"),
        ({"interaction": "aim", "interaction_options": {"lam": 1.5}}, r"lam is 1\.5, expected a number from 0 to 1"),
        ({"interaction": "aim", "interaction_options": {"lam": float("nan")}}, "lam is nan, expected a number"),
        ({"interaction": "cat", "interaction_options": {"bottleneck": 0}}, "bottleneck is 0, expected at least 1"),
        ({"knowledge": "caption", "interaction": "aim"}, "knowledge is 'caption' and interaction is 'aim', expected"),
        ({"interaction": "learned_query", "enrich": False}, "expected enrich true: otherwise no knowledge is used"),
        (
            {"knowledge": "none", "interaction": "aim", "num_prompts": 0, "enrich": False},
            "leaves nothing to train; give at least 1 visual prompt",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(settings, said):
    with pytest.raises(AmpError, match=said):
        make_model(**settings)


@pytest.mark.parametrize("interaction", ["readout", "learned_query"])
def test_a_readout_asks_for_a_class_token(interaction):
    with pytest.raises(AmpError, match=r"readout.*class token"):
        make_model("average_pooled", interaction=interaction)


def test_a_readout_asks_for_the_captions_features(images, knowledge):
    with pytest.raises(AmpError, match=r"text is None.*encode_text"):
        make_model().encode_image(images, knowledge)


def test_an_interaction_gets_only_what_it_reads():
    """Otherwise parameters could be unused, or an interaction could read knowledge that it doesn't have."""

    class OfStates(VisualPromptsOnly):
        conditioned, reads_triplets, reads_states = True, False, True

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(INTERACTIONS, "of_states", OfStates)
        assert make_model(interaction="of_states", enrich=False).triplet_encoder is None
        assert make_model(interaction="of_states", enrich=True).triplet_encoder is not None
        with pytest.raises(AmpError, match="interaction is 'of_states', which doesn't read"):
            make_model(interaction="of_states", knowledge="triplets")


@pytest.mark.parametrize("name", ["visual_prompts", "aim"])
def test_the_scorer_keeps_what_is_small(name, knowledge, tokenizer, monkeypatch):
    """A control's features are computed once for all pairs; the prompts of `aim` are computed for each batch."""
    model = make_model(trained=True, interaction=name, depth=1 / 3, num_prompts=2)
    with torch.no_grad():
        captions = Captions(model.prepare_knowledge(knowledge), model.encode_text(tokenizer(TEXTS)))
    early = torch.randn(5, model.backbone.num_tokens, model.backbone.vision_width)
    scorer = PairScorer(model, early, captions.knowledge, captions.text, batch_size=2)
    asked, encode = [], model.interaction.encode_images
    monkeypatch.setattr(model.interaction, "encode_images", lambda *given: asked.append(1) or encode(*given))
    images, texts = torch.tensor([4, 0, 4]), torch.tensor([1, 2, 0])
    scores = scorer(images, texts)
    assert len(asked) == (name == "aim")
    with torch.no_grad():
        found = model(early[images], Captions(captions.knowledge[texts], captions.text[texts]))
        expected = torch.nn.functional.cosine_similarity(found.conditioned, found.captions.text, dim=-1)
    assert_close(scores, expected)
