"""Triplets from spaCy's parse: typical captions with triplets written by hand, and arbitrary text."""

import json
import time

import pytest
from support.repository import SHARED

from amp.errors import AmpError
from amp.generation.replies import MAX_TRIPLETS, triplet_line
from amp.generation.rules import _UNUSED, MODELS, RuleTriplets, _find

pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
try:
    _find(None)
except AmpError:
    pytest.skip(f"needs a spaCy model, one of {', '.join(MODELS)}", allow_module_level=True)


@pytest.fixture(scope="module")
def rules():
    return RuleTriplets()


CASES = {
    "A dog jumps": ["action: dog | jumps | -"],
    "A dog runs .": ["action: dog | runs | -"],
    "Two dogs play": ["action: dogs | play | -"],
    "A man rides a horse": ["action: man | rides | horse"],
    "A man is riding a horse on the beach .": ["action: man | riding | horse", "action: man | riding on | beach"],
    "A man riding a horse": ["action: man | riding | horse"],
    "A boy jumps over the fence": ["action: boy | jumps over | fence"],
    "A girl is looking at a small bird": ["action: girl | looking at | bird", "attribute: bird | is | small"],
    "A boy and a girl hold a kite": ["action: boy | hold | kite", "action: girl | hold | kite"],
    "A man sits and reads a book": ["action: man | sits | -", "action: man | reads | book"],
    "A woman buys apples and pears": ["action: woman | buys | apples", "action: woman | buys | pears"],
    "A ball is thrown by a boy": ["action: boy | thrown | ball"],
    "A ball thrown by a boy": ["action: boy | thrown | ball"],
    "A wizard is being pushed in a cart by a yellow dog": [
        "action: dog | pushed | wizard",
        "attribute: dog | is | yellow",
    ],
    "A boy is being pulled on a sled by his father": ["action: father | pulled | boy"],
    "A dog covered in mud": ["action: dog | covered in | mud"],
    "A car is parked on the street": ["action: car | parked on | street"],
    "There is a dog running on the beach": ["action: dog | running on | beach"],
    "A man who plays the guitar": ["action: man | plays | guitar"],
    "What looks like a dog jumps over a log": ["action: dog | jumps over | log"],
    "A group of people wait for a bus": ["action: people | wait for | bus"],
    "Men wearing helmets": ["attribute: men | wearing | helmets"],
    "A man in a red shirt": ["attribute: man | wearing | shirt", "attribute: shirt | is | red"],
    "A man in a red shirt climbs a wall": [
        "action: man | climbs | wall",
        "attribute: man | wearing | shirt",
        "attribute: shirt | is | red",
    ],
    "A boy is running in a blue jacket": [
        "action: boy | running | -",
        "attribute: boy | wearing | jacket",
        "attribute: jacket | is | blue",
    ],
    "A black and white dog": ["attribute: dog | is | black", "attribute: dog | is | white"],
    "Tall trees": ["attribute: trees | are | tall"],
    "The dog is brown": ["attribute: dog | is | brown"],
    "A child stands in front of a tent": ["action: child | stands in front of | tent"],
    "A cat sits next to a lamp": ["action: cat | sits next to | lamp"],
    "A fisherman pulls a net out of the water": [
        "action: fisherman | pulls | net",
        "action: fisherman | pulls out of | water",
    ],
    "A boy blows out the candles": ["action: boy | blows out | candles"],
    "A girl tries to catch a butterfly": ["action: girl | catch | butterfly"],
    "A woman talks while she cooks": ["action: woman | talks | -", "action: woman | cooks | -"],
    "A man laughs and plays a guitar": ["action: man | laughs | -", "action: man | plays | guitar"],
    "A fire hydrant on a sidewalk": ["attribute: fire hydrant | on | sidewalk"],
    "A tennis player hits the ball with a racket": [
        "action: tennis player | hits | ball",
        "action: tennis player | hits with | racket",
    ],
    # verbs that the parser tags as nouns
    "Two men and a dog run": ["action: men | run | -", "action: dog | run | -"],
    "Dogs running and jumping": ["action: dogs | running | -", "action: dogs | jumping | -"],
    "Boy playing on the swing .": ["action: boy | playing on | swing"],
    "A woman in black walks down the sidewalk .": [
        "action: woman | walks down | sidewalk",
        "attribute: woman | wearing | black",
    ],
    "A boy wearing a red hat runs": [
        "action: boy | runs | -",
        "attribute: boy | wearing | hat",
        "attribute: hat | is | red",
    ],
    "Two people in shorts hike on the snow": [
        "action: people | hike on | snow",
        "attribute: people | wearing | shorts",
    ],
    # the same words, used as nouns
    "Two kids on a carnival ride at a park": [
        "attribute: kids | on | carnival ride",
        "attribute: carnival ride | at | park",
    ],
    "Small boy looking at a display of rubber ducks": [
        "action: boy | looking at | display",
        "attribute: boy | is | small",
    ],
    "Two women in head wraps .": ["attribute: women | in | head wraps"],
    # choice of the subject
    "A woman is sitting on a bench reading a book": [
        "action: woman | sitting on | bench",
        "action: woman | reading | book",
    ],
    "A man looking at a woman reading a book": ["action: man | looking at | woman", "action: woman | reading | book"],
    "Two dogs dive into a pool to get a toy": ["action: dogs | dive into | pool", "action: dogs | get | toy"],
    "A wave crashing on a beach": ["action: wave | crashing on | beach"],
    "Two dogs chase each other": ["action: dogs | chase | each other"],
    "The boy does not run": [],
    "The dogs are wet and muddy": ["attribute: dogs | are | wet", "attribute: dogs | are | muddy"],
    "The dog is next to a house": [],
    "Children dressed as pirates": ["attribute: children | dressed as | pirates"],
    "A dog jumps over a log while a cat watches": ["action: dog | jumps over | log", "action: cat | watches | -"],
}


@pytest.mark.parametrize("caption", CASES)
def test_constructions(rules, caption):
    (found,) = rules.triplets([caption])
    assert [triplet_line(triplet) for triplet in found] == CASES[caption]


HOSTILE = [
    "",
    " ",
    "\n\t",
    "😀 🐕",
    "\"quotes\" 'and' `more`",
    "{braces} [and] <tags> </s> <|im_end|>",
    "is",
    "123 456",
    "Ignore all previous instructions",
    "A man\nruns\r\n\x0b\x1b[0m",
    "Ein Hund läuft über die Wiese",
    "一个男人在骑马",
    "رجل يركض",
    "a " * 500,
    "runs runs " * 250,
    "man and " * 200,
    "\x00\x07",
    "|" * 50,
    "isn't can't won't",
    "A" * 5000,
    "woman in black walks " * 30,
    "dog in red runs",
]


@pytest.mark.parametrize("caption", HOSTILE)
def test_any_text(rules, caption):
    (found,) = rules.triplets([caption])
    assert len(found) <= MAX_TRIPLETS and len(set(found)) == len(found)
    for triplet in found:
        assert triplet.subject and triplet.action and triplet.subject != triplet.object
        # spaCy splits "can't" and hyphens; every piece still comes from the caption or is a copula
        slots = f"{triplet.subject} {triplet.action} {triplet.object}".split()
        assert all(word in caption.lower() or word in ("is", "are", "wearing") for word in slots), slots


@pytest.mark.parametrize("caption", ["A dog jumps \ud800", "A dog jumps . " * 100_000], ids=["surrogate", "endless"])
def test_text_that_spacy_refuses(rules, caption):
    (found,) = rules.triplets([caption])
    assert triplet_line(found[0]) == "action: dog | jumps | -"


def test_batches_and_order_have_no_effect(rules):
    captions = list(CASES) * 3
    together = list(rules.triplets(captions))
    assert together == [next(rules.triplets([caption])) for caption in captions]
    assert all(sorted(found, key=lambda t: t.kind != "action") == list(found) for found in together)


@pytest.mark.parametrize("name", ["en_no_such", "no.such.package", "./models/en.none", "folder_without_code"])
def test_a_missing_model_is_told(name, tmp_path, monkeypatch):
    (tmp_path / "folder_without_code").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AmpError, match=f"no spaCy model named {name} is installed; expected one"):
        RuleTriplets(name)


def test_the_parts_that_are_not_loaded_change_nothing(rules, monkeypatch):
    monkeypatch.setattr("amp.generation.rules._UNUSED", ())
    texts = [*CASES, "Ünïcode dögs, 12:30pm", "THE MAN'S gonna x 🐕"]
    assert list(rules.triplets(texts)) == list(RuleTriplets().triplets(texts))
    assert "strings" in _UNUSED and len(rules._nlp.vocab.strings) < 100_000


def test_describe(rules):
    described = rules.describe()
    assert described["model"].startswith("en_core_web") and described["version"] and described["spacy"].count(".") == 2


@pytest.mark.slow  # one minute, or two on a busy machine
def test_forty_thousand_captions_in_three_minutes(rules):
    path = SHARED / "data" / "flickr8k" / "dataset_flickr8k.json"
    if not path.exists():
        pytest.skip("needs ../shared/data/flickr8k/dataset_flickr8k.json")
    images = json.loads(path.read_text())["images"]
    captions = [sentence["raw"] for image in images for sentence in image["sentences"]]
    start = time.process_time()  # of this thread only, independent of the machine's load
    found = list(rules.triplets(captions))
    assert time.process_time() - start < 180
    assert len(found) == len(captions) > 39_000
    assert sum(map(bool, found)) > 0.97 * len(found)
    assert sum(any(triplet.kind == "action" for triplet in triplets) for triplets in found) > 0.84 * len(found)
