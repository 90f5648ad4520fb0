"""The knowledge of single captions: which replies are kept, and how long a caption takes."""

import io
import statistics
import threading
import time
from concurrent.futures import Future

import pytest
from support.scripted_model import scripted_model

from amp.errors import AmpError
from amp.generation.cache import ReplyCache
from amp.generation.query import KnowledgeGenerator
from amp.generation.rules import MODELS, _find
from amp.terminal import PlainConsole

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


@pytest.fixture
def generate(spacy_model):
    """A generator with a time limit and a server that is slow or fails on demand."""
    pytest.importorskip("openai", reason='needs openai: pip install "open-clip-amp[generate]"')
    with scripted_model() as model:
        said = io.StringIO()
        options = {"model": "scripted", "base_url": model.url, "tries": 1}
        console = PlainConsole(file=said, width=200)
        yield KnowledgeGenerator("openai", engine_options=options, console=console, timeout=0.5), model, said


def test_rules_answer_after_the_time_limit_and_the_late_reply_is_kept(generate):
    generate, model, said = generate
    by_rules = KnowledgeGenerator("rules")
    assert generate(CAPTIONS[1:2]) != by_rules(CAPTIONS[1:2]) and not said.getvalue()  # in time
    model.delay = 1.0
    start = time.monotonic()
    assert generate(CAPTIONS[:1]) == by_rules(CAPTIONS[:1])
    assert generate(CAPTIONS[2:3]) == by_rules(CAPTIONS[2:3])  # doesn't wait for the first one
    assert time.monotonic() - start < 0.9
    first, second = said.getvalue().splitlines()
    assert "rules answer in place of the model: no answer within 0.5 s" in first and "an earlier text" in second
    while generate._busy.locked():
        time.sleep(0.05)
    model.delay, asked = 0.0, sum(model.asked.values())
    assert generate(CAPTIONS[:1]) != by_rules(CAPTIONS[:1]) and sum(model.asked.values()) == asked


def test_rules_answer_if_the_server_fails(generate):
    generate, model, said = generate
    model.fails_on = "dog"
    assert generate(CAPTIONS) == KnowledgeGenerator("rules")(CAPTIONS)
    assert "5 of 5 captions got no reply" in said.getvalue()
    model.fails_on = ""
    assert generate(CAPTIONS) != KnowledgeGenerator("rules")(CAPTIONS)


def test_the_model_is_free_before_its_answer_is_given(generate, monkeypatch):
    """Otherwise a text that follows at once finds the model busy, and the rules answer it."""
    generate, model, _ = generate
    busy = []
    for name in ("set_result", "set_exception"):
        plain = getattr(Future, name)

        def give(future, value, plain=plain):
            if threading.current_thread().name == "knowledge":  # and not one of the engine's
                busy.append(generate._busy.locked())
            plain(future, value)

        monkeypatch.setattr(Future, name, give)
    for caption, model.fails_on in zip(CAPTIONS[:2], ("", "dog"), strict=True):
        generate([caption])
    assert busy == [False, False]


@pytest.mark.parametrize("timeout, fallback", [(0, "rules"), (1, "none")])
def test_time_limits_that_make_no_sense_are_refused(timeout, fallback):
    with pytest.raises(AmpError, match=rf"knowledge_timeout is {timeout}"):
        KnowledgeGenerator("rules", fallback=fallback, timeout=timeout)
