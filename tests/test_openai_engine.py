"""The openai engine with real servers (transformers serve, llama-server) and one that fails by a script."""

import json
import re
import shutil
import socket
import sys
import threading
import time

import pytest
from support.faulty_server import Faulty, cut, engine_for, good, late, status
from support.language_models import smollm2_gguf
from support.model_servers import started
from support.scripted_model import scripted_model

from amp.generation.engines.base import EngineError, Sampling
from amp.generation.grammar import StateGrammar, TripletGrammar
from amp.generation.prompts import ask_states, ask_triplets, load_template
from amp.generation.replies import read_triplets
from amp.generation.words import slot_words
from amp.knowledge.schema import Triplet

pytest.importorskip("openai", reason='needs the openai package: pip install "open-clip-amp[generate]"')
from amp.generation.engines.openai_engine import OpenAIEngine

TEMPLATE = load_template()
GREEDY = Sampling(48)


def ask(engine, count: int = 1, sampling: Sampling = GREEDY) -> dict:
    return dict(engine.generate(TEMPLATE.triplets, [f"Caption: a dog {n}" for n in range(count)], None, sampling))


FAULTS = {
    "429": status(429),
    "500": status(500),
    "503": status(503),
    "late": late,
    "cut": cut,
    "half a JSON": good()[:60],
    "no JSON": b"<html>Bad gateway</html>",
    "not UTF-8": good("x").replace(b'"x"', b'"\xff\xfe\xc3"'),
    "no choices": b'{"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}',
    "no text": good().replace(b'"none"', b"null"),
    "empty": b"",
    "another object": b"[1, 2]",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_tried_again(fault):
    server = Faulty(FAULTS[fault], FAULTS[fault], good("action: dog | runs | -"))
    with server.serve() as url:
        found = ask(engine_for(url, timeout=0.3))
    assert found[0].text == "action: dog | runs | -" and not found[0].error
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", ["429", "late", "no choices"])  # refused, unreachable, unreadable
def test_faults_that_stay_are_an_error_of_that_request(fault):
    server = Faulty(FAULTS[fault])
    with server.serve() as url:
        found = ask(engine_for(url, timeout=0.2, tries=2))
    assert found[0].text == "" and found[0].error and not found[0].refused
    assert len(server.requests) == 2


def test_text_is_always_unicode():
    with Faulty(good("caf\\u00e9 \\ud800 x")).serve() as url:  # JSON may contain half a surrogate pair
        text = ask(engine_for(url))[0].text
    assert text.encode("utf-8") and text.startswith("caf")


def test_what_the_server_asks_to_wait_is_waited():
    server = Faulty(status(429, Retry_After="1"), good())
    with server.serve() as url:
        assert not ask(engine_for(url))[0].error
    assert server.times[1] - server.times[0] >= 1.0


def test_waits_grow():
    server = Faulty(status(500))
    with server.serve() as url:
        ask(engine_for(url, tries=5, first_wait=0.1))
    assert server.times[-1] - server.times[0] < 0.1 * (1 + 2 + 4 + 8) + 1.0
    assert len(server.requests) == 5


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_refused_request_isn_t_tried_again(code):
    server = Faulty(status(code), good())
    with server.serve() as url:
        found = ask(engine_for(url, concurrency=1), 2)
    assert found[0].refused and str(code) in found[0].error and "because" in found[0].error
    assert found[1].text == "none" and len(server.requests) == 2


@pytest.mark.parametrize(
    "code, message",
    [
        (401, "the key is refused (status 401); expected a valid one in the environment variable OPENAI_API_KEY"),
        (403, "the key is refused"),
        (404, "the server doesn't know the model 'm' or the address"),
    ],
)
def test_what_concerns_every_request_stops_the_run(code, message):
    server = Faulty(status(code))
    with server.serve() as url, pytest.raises(EngineError, match=re.escape(message)):
        ask(engine_for(url, concurrency=2), 50)
    assert len(server.requests) <= 4


def test_a_server_that_dies_stops_the_run_and_keeps_what_came():
    server = Faulty(*[good()] * 20, status(500))
    found = {}
    with server.serve() as url, pytest.raises(EngineError, match="no answer to 8 requests in a row"):
        for number, completion in engine_for(url, concurrency=2, tries=2).generate(
            TEMPLATE.triplets, [f"Caption: {n}" for n in range(200)], None, GREEDY
        ):
            found[number] = completion
    assert sum(not completion.error for completion in found.values()) == 20
    assert len(server.requests) < 60


def test_no_server_at_all():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EngineError, match=rf"http://127\.0\.0\.1:{port}/v1: no server answers .* start it"):
        OpenAIEngine(f"http://user:secret@127.0.0.1:{port}/v1", "m")
    try:
        OpenAIEngine(f"http://user:secret@127.0.0.1:{port}/v1", "m")
    except EngineError as error:
        assert "secret" not in str(error)


def test_so_many_at_once_and_each_once():
    def slow(handler):
        time.sleep(0.05)
        handler.reply(good())

    server = Faulty(slow)
    with server.serve() as url:
        found = list(engine_for(url, concurrency=5).generate(TEMPLATE.triplets, ["Caption: x"] * 40, None, GREEDY))
    assert sorted(number for number, _ in found) == list(range(40))
    assert 3 <= server.most <= 5


def test_rate_limit():
    server = Faulty(good())
    with server.serve() as url:
        engine = engine_for(url, requests_per_minute=1200, concurrency=10)
        begin = time.monotonic()
        ask(engine, 20)
    assert max(server.times) - begin >= 0.9 * 19 * 0.05


def test_stopping_in_the_middle_leaves_nothing_running():
    server = Faulty(good(), good(), late)
    threads = threading.active_count()
    with server.serve() as url:
        replies = engine_for(url, concurrency=2).generate(TEMPLATE.triplets, ["Caption: x"] * 100, None, GREEDY)
        next(replies)
        replies.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("openai")]
        asked = len(server.requests)
        time.sleep(0.2)
        assert len(server.requests) == asked <= 5
    assert threading.active_count() <= threads + 5


@pytest.mark.slow
def test_stopping_doesn_t_wait_for_further_tries():
    server = Faulty(good(), status(429, Retry_After="30"))
    with server.serve() as url:
        replies = engine_for(url, concurrency=3).generate(TEMPLATE.triplets, ["Caption: x"] * 10, None, GREEDY)
        next(replies)
        while len(server.requests) < 4:
            time.sleep(0.01)
        start = time.monotonic()
        replies.close()
        assert time.monotonic() - start < 5


def test_the_request():
    server = Faulty(good("<think>\nhm\n</think>\n\nnone"))
    with server.serve() as url:
        engine = engine_for(url)
        assert ask(engine)[0].text == "none"  # thinking isn't part of the reply
        list(engine.generate(TEMPLATE.triplets, ["Caption: x"], None, Sampling(48, 0.7), [2**40 + 5]))
    first, second = server.requests
    assert first["messages"][0] == {"role": "system", "content": TEMPLATE.triplets[0].content}
    assert first["messages"][-1] == {"role": "user", "content": "Caption: a dog 0"}
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("m", 48, 0.0)
    assert "seed" not in first and "stop" not in first and second["seed"] == 5 and second["temperature"] == 0.7


@pytest.mark.parametrize(
    "owner, field", [("llamacpp", "grammar"), ("vllm", "structured_outputs"), ("someone", None)], ids=str
)
def test_grammars_as_each_server_takes_them(owner, field):
    server = Faulty(good())
    models = {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": owner}]}
    server.models = json.dumps(models).encode()
    grammar = TripletGrammar(("dog", "runs"), 6)
    with server.serve() as url:
        engine = engine_for(url, constrained="auto")
        list(engine.generate(TEMPLATE.triplets, ["Caption: dog runs"], [grammar], GREEDY))
    assert engine.constrained == (field is not None) and engine.describe()["constrained"] == engine.constrained
    (request,) = server.requests
    expected = {"grammar": grammar.gbnf(), "structured_outputs": {"regex": grammar.regex()}}
    sent = {name: request[name] for name in expected if name in request}
    assert sent == ({field: expected[field]} if field else {})
    assert ("chat_template_kwargs" in request) == (owner == "vllm")


def test_neither_key_nor_address_is_told(monkeypatch):
    monkeypatch.setenv("MY_KEY", "top-secret")
    with scripted_model() as model:
        engine = engine_for(model.url, api_key_variable="MY_KEY")
        assert not ask(engine)[0].error
    assert "top-secret" not in json.dumps(engine.describe()) and "127" not in json.dumps(engine.describe())


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"tries": 0}, {"timeout": 0.0}, {"requests_per_minute": 0.0}])
def test_options_out_of_range(options):
    with pytest.raises(EngineError, match=f"openai.{next(iter(options))} is 0"):
        engine_for("http://127.0.0.1:1/v1", **options)


# --- real servers ---


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_transformers_serve(smollm2, tmp_path):
    """A real server with real weights gives the same replies as the transformers engine."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="needs transformers[serving]: the Makefile installs it")
    from amp.generation.engines.transformers_engine import TransformersEngine

    port = free_port()
    script = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-c", script, "serve", str(smollm2), *where]
    captions = ["A girl kicks a ball", "A man rides a bike"]
    suffixes = [ask_triplets(caption) for caption in captions]
    with started(command, port, tmp_path / "log") as url:
        engine = OpenAIEngine(url, str(smollm2), concurrency=2, timeout=120)
        assert not engine.constrained
        found = dict(engine.generate(TEMPLATE.triplets, suffixes, None, Sampling(24)))
        unknown = OpenAIEngine(url, "no/such-model", tries=1)
        assert all(c.error for _, c in unknown.generate(TEMPLATE.triplets, suffixes, None, Sampling(4)))
    alone = TransformersEngine(model=str(smollm2), constrained=False)
    expected = dict(alone.generate(TEMPLATE.triplets, suffixes, None, Sampling(24)))
    assert {n: c.text.strip() for n, c in found.items()} == {n: c.text for n, c in expected.items()}
    assert all(completion.tokens > 0 and completion.prompt_tokens > 100 for completion in found.values())


def test_llama_server(tmp_path):
    """llama.cpp's server follows our grammar in GBNF notation."""
    program = shutil.which("llama-server")
    if program is None:
        pytest.skip("needs llama-server on PATH (llama.cpp)")
    port = free_port()
    command = [program, "-m", str(smollm2_gguf()), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", "1", "-c", "4096", "-np", "2"]
    captions = ["A girl kicks a ball", 'Two men "play" {chess}, isn\'t it?', "Ein Mädchen läuft über die Straße"]
    grammars = [TripletGrammar(slot_words(caption), 6) for caption in captions]
    with started(command, port, tmp_path / "log") as url:
        engine = OpenAIEngine(url, "smollm2", concurrency=2)
        assert engine.describe()["grammar"] == "llama.cpp"
        suffixes = [ask_triplets(caption) for caption in captions]
        found = dict(engine.generate(TEMPLATE.triplets, suffixes, grammars, Sampling(192)))
        asked = ask_states(captions[0], (Triplet("girl", "kicks", "ball"),))
        ((_, state),) = engine.generate(TEMPLATE.states, [asked], [StateGrammar(1)], Sampling(384))
    for number, completion in found.items():
        assert re.fullmatch(grammars[number].regex(), completion.text), completion
        assert read_triplets(completion.text, captions[number]).usable or completion.tokens == 192
    assert re.fullmatch(StateGrammar(1).regex(), state.text)
