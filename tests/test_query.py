"""The knowledge of single captions: which replies are kept, and how long a caption takes."""

import statistics
import time

import pytest
from support.scripted_model import scripted_model

from amp.errors import AmpError
from amp.generation.cache import ReplyCache
from amp.generation.query import KnowledgeGenerator
from amp.generation.rules import MODELS, _find

CAPTIONS = [f"A {colour} dog jumps over a fence in the snow" for colour in ("red", "black", "white", "brown", "small")]


@pytest.fixture
def spacy_model():
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    try:
        return _find(None)
    except AmpError:
        pytest.skip(f"needs a spaCy model, one of {', '.join(MODELS)}")


def test_rules_are_quick_and_keep_no_replies(spacy_model, tmp_path):
    generate = KnowledgeGenerator("rules", cache=tmp_path / "replies")
    seconds = []
    for caption in CAPTIONS:
        start = time.process_time()
        (knowledge,) = generate([caption])
        seconds.append(time.process_time() - start)
        assert knowledge.triplets[0].action == "jumps over"
    assert statistics.median(seconds) < 0.015
    assert list(tmp_path.iterdir()) == []


def test_replies_of_a_model_are_kept_in_memory_or_in_the_cache(tmp_path):
    pytest.importorskip("openai", reason='needs openai: pip install "open-clip-amp[generate]"')
    with scripted_model() as model:
        options = {"model": "scripted", "base_url": model.url}
        for cache in (None, tmp_path / "replies"):
            asked = sum(model.asked.values())
            generate = KnowledgeGenerator("openai", fallback="none", engine_options=options, cache=cache)
            first = generate(CAPTIONS)
            after = sum(model.asked.values())
            assert after > asked and generate(CAPTIONS) == first
            assert sum(model.asked.values()) == after
        with ReplyCache(tmp_path / "replies", None) as kept:
            assert len(kept) > 0
