"""Knowledge as tensors, and the texts that it is converted to."""

import pytest
import torch

from amp.knowledge.schema import Knowledge, Triplet
from amp.knowledge.tensors import KnowledgeBatch, TripletTokenizer
from amp.knowledge.text import SLOT_TOKENS, select, state_text, state_texts

DOG = Triplet("dog", "jumps", "")
SMALL = Triplet("girl", "is", "small", "attribute")
THROWS = Triplet("boy", "throws", "a big red ball")


def item(*triplets):
    return Knowledge(triplets, tuple(f"state of {t.subject}" for t in triplets))


# -- texts ------------------------------------------------------------------------------------------------------------


def test_state_text_is_the_papers_template():
    assert state_text(THROWS, "He winds up") == (
        "Fine-grained state description of action triplet <boy, throws, a big red ball> is He winds up"
    )
    assert state_text(DOG, "").startswith("Fine-grained state description of action triplet <dog, jumps, > is")


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [DOG]), (2, [DOG, THROWS]), (3, [DOG, THROWS, SMALL]), (9, [DOG, THROWS, SMALL])]
)
def test_actions_are_kept_before_attributes(most, expected):
    knowledge = item(SMALL, DOG, THROWS)
    assert [triplet for triplet, _ in select(knowledge, most)] == expected
    assert state_texts(knowledge, most) == [state_text(t, f"state of {t.subject}") for t in expected]


# -- tokens -----------------------------------------------------------------------------------------------------------


def words(tokenizer, text):
    """Ids between the start and end token of a text that CLIP's tokenizer encodes as a whole."""
    ids = tokenizer([text])[0].tolist()
    return ids[1 : ids.index(49407)]


def test_triplets_become_clips_own_tokens(tokenizer):
    tokens, token_mask, mask = TripletTokenizer(tokenizer, 2)([item(DOG, THROWS), item(SMALL), item()])
    assert tokens.shape == token_mask.shape == (3, 2, 3, 5) and mask.shape == (3, 2)
    assert tokens.dtype == torch.int64 and token_mask.dtype == mask.dtype == torch.bool
    assert mask.tolist() == [[True, True], [True, False], [False, False]]
    for c, k, triplet in [(0, 0, DOG), (0, 1, THROWS), (1, 0, SMALL)]:
        for s, text in enumerate((triplet.subject, triplet.action, triplet.object)):
            expected = words(tokenizer, text)
            assert tokens[c, k, s][token_mask[c, k, s]].tolist() == expected
            assert token_mask[c, k, s].sum() == len(expected)
    assert not token_mask[0, 0, 2].any()  # no object
    assert not token_mask[~mask].any() and not tokens[~token_mask].any()


def test_long_slots_keep_their_first_tokens(tokenizer):
    tokens, token_mask, _ = TripletTokenizer(tokenizer, 1)(
        [item(Triplet("boy", "throws", "a very big, round red ball"))]
    )
    assert tokens[0, 0, 2].tolist() == words(tokenizer, "a very big, round")
    assert token_mask[0, 0, 2].all()


def ids_of(triplets, text):
    """The tokens of `slot`; also checks that nothing follows them."""
    ids, count = triplets.slot(text)
    assert len(ids) == SLOT_TOKENS and not ids[count:].any()
    return ids[:count].tolist()


def test_case_and_spaces_do_not_matter_and_slots_are_cached(tokenizer):
    triplets = TripletTokenizer(tokenizer, 1)
    assert ids_of(triplets, "  Big   DOG ") == ids_of(triplets, "big dog") == words(tokenizer, "big dog")
    assert ids_of(triplets, "") == ids_of(triplets, "  ") == []
    assert triplets.slot("big dog") is triplets.slot("big dog")


def test_the_tokenizer_keeps_actions_first(tokenizer):
    tokens, _, _ = TripletTokenizer(tokenizer, 1)([item(SMALL, DOG)])
    assert tokens[0, 0, 0, 0] == words(tokenizer, "dog")[0]


def test_tokenizers_of_hugging_face(tokenizer):
    """open_clip's wrapper of them has no `encode`. Special tokens must be excluded."""

    class Inner:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [len(word) for word in text.split()]

        def convert_ids_to_tokens(self, ids):
            return [str(i) for i in ids]

    class Wrapper:
        tokenizer = Inner()

    assert ids_of(TripletTokenizer(Wrapper(), 1), "a big red ball") == [1, 3, 3, 4]


def test_cache_is_bounded(tokenizer):
    triplets = TripletTokenizer(tokenizer, 1)
    triplets._cache = {str(i): [] for i in range(100_001)}
    assert ids_of(triplets, "dog") == words(tokenizer, "dog")
    assert len(triplets._cache) == 1


# -- batches ----------------------------------------------------------------------------------------------------------


def batch(captions=4):
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]], dtype=torch.bool)[:captions]
    tokens = torch.arange(captions * 2 * 3 * 5).view(captions, 2, 3, 5)
    return KnowledgeBatch(tokens, tokens % 2 == 0, torch.randn(captions, 2, 24), mask)


def fields(knowledge):
    return knowledge.triplet_tokens, knowledge.token_mask, knowledge.states, knowledge.mask


@pytest.mark.parametrize(
    "index",
    [slice(1, 3), torch.tensor([3, 0, 3]), torch.tensor([True, False, False, True])],
    ids=["slice", "int64", "bool"],
)
def test_rows_are_captions(index):
    whole = batch()
    part = whole[index]
    assert len(whole) == 4 and len(part) == len(whole.mask[index])
    for found, expected in zip(fields(part), fields(whole), strict=True):
        assert torch.equal(found, expected[index])


def test_cat_undoes_slicing():
    whole = batch()
    for found, expected in zip(fields(KnowledgeBatch.cat([whole[:1], whole[1:]])), fields(whole), strict=True):
        assert torch.equal(found, expected)


def test_blank_takes_all_knowledge_away_and_leaves_the_batch():
    whole = batch()
    blank = whole.blank()
    assert len(blank) == 4 and not blank.mask.any()
    assert whole.mask.sum() == 5


def test_to_moves_every_tensor():
    assert {x.device.type for x in fields(batch().to("meta"))} == {"meta"}
