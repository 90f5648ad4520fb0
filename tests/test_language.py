"""Captions that aren't English are detected without false alarms, and reported if rules would read them."""

import importlib.util
import io
import json
import runpy
from pathlib import Path

import pytest
import yaml
from support.repository import ROOT

from amp.generation import rules
from amp.generation.language import is_english, language_note
from amp.generation.query import KnowledgeGenerator
from amp.generation.run import generate_knowledge
from amp.terminal import PlainConsole

OTHERS = {
    "German": ("Zwei Kinder spielen Fußball auf der Straße", "Hund springt über Zaun", "Mann in rotem Hemd"),
    "French": ("Un chien brun saute par-dessus une clôture", "Des gens marchent dans la rue", "Chien noir dans l'eau"),
    "Spanish": ("una niña come una manzana roja", "Un perro corre por la playa", "Surfista en una ola"),
    "Italian": ("Due bambini giocano a calcio", "Un uomo va in bicicletta"),
    "Portuguese": ("Um cachorro corre na praia", "Duas crianças jogam futebol"),
    "Dutch": ("Een hond rent door het water", "Twee kinderen spelen voetbal op straat"),
    "Swedish": ("Två barn leker i snön", "En man cyklar på gatan"),
    "Polish": ("Pies biegnie po plaży", "Kobieta czyta książkę"),
    "Turkish": ("Bir köpek plajda koşuyor",),
    "Indonesian": ("Seorang wanita sedang membaca buku",),
    "Russian": ("Собака бежит по пляжу", "собака"),
    "Arabic": ("كلب يركض على الشاطئ",),
    "Hindi": ("एक कुत्ता समुद्र तट पर दौड़ रहा है",),
    "Chinese": ("一只狗在草地上奔跑", "狗"),
    "Japanese": ("犬が浜辺を走っている", "サーフィン"),
    "Korean": ("개가 해변을 달리고 있다",),
}

ENGLISH = """
dog|two dogs|man surfing|surfer|red car|cows graze|sushi|dog & cat|IN THE SNOW|IMG_1234|123|😀|dgo runing on beech|
a mna wlaks teh dog|José surfing|Müller celebrates|Zlatan Ibrahimović|Rio de Janeiro beach|Tour de France|La Jolla|
Los Angeles skyline|Las Vegas at night|Arc de Triomphe|El Capitan climber|Playa del Carmen|Champs-Élysées|café terrace|
jalapeño pizza|piñata party|Pokémon cards|Die Hard poster|Beyoncé on stage|people in São Paulo|
a sign that says 你好|A child in a Das Auto shirt|pizza and a glass of vin rouge|
""".replace("\n", "").split("|")


@pytest.mark.parametrize("language", OTHERS)
def test_captions_in_another_language_are_found(language):
    assert [caption for caption in OTHERS[language] if is_english(caption)] == []


def test_english_captions_raise_no_alarm():
    """Short captions, typos, names of people and places, loanwords, and the hand-labelled captions of gold.yaml."""
    gold = yaml.safe_load((ROOT / "amp/generation/gold.yaml").read_text(encoding="utf-8"))
    captions = [entry["caption"] for entry in gold]
    assert len(captions) > 100
    assert [caption for caption in (*ENGLISH, *captions) if not is_english(caption)] == []


def test_sentences_of_others_are_told_apart():
    """spaCy's example sentences, which are headlines and questions, and were not written for this test."""
    spacy = importlib.util.find_spec("spacy")
    if spacy is None:
        pytest.skip('needs spaCy: pip install "open-clip-amp[generate]"')
    found = {}
    for name in ("de", "fr", "es", "it", "pt", "nl", "sv", "pl", "ru", "zh", "ja", "ar"):
        # Loads only this file, because importing the package takes seconds.
        examples = runpy.run_path(str(Path(spacy.origin).parent / "lang" / name / "examples.py"))["sentences"]
        found[name] = sum(not is_english(sentence) for sentence in examples) / len(examples)
    assert min(found.values()) > 0.6 and sum(found.values()) / len(found) > 0.85, found


def test_the_note_counts_and_a_few_are_no_reason_to_warn():
    english = [f"A man with {number} dogs" for number in range(198)]
    assert language_note([*english, OTHERS["French"][0]], "--x") is None
    assert language_note([], "--x") is None
    note = language_note([*english, *OTHERS["French"][:2]], "--x")
    assert (
        note.startswith("2 of 200 captions are not in English, such as 'Un chien brun") and "--x transformers" in note
    )


class NoRules:
    """Replaces the rules, which need spaCy and take seconds to load."""

    def __init__(self, model=None):
        pass

    def describe(self):
        return {"version": 0}

    def triplets(self, captions):
        return (() for _ in captions)


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setattr(rules, "RuleTriplets", NoRules)
    return io.StringIO()


def test_generation_by_rules_warns(tmp_path, shown):
    path = tmp_path / "captions.jsonl"
    rows = [{"image": "a.jpg", "caption": text} for text in (*OTHERS["German"], "A dog runs across the grass", None)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate_knowledge(str(path), str(tmp_path / "out"), console=PlainConsole(file=shown, width=80))
    assert shown.getvalue().count("warning: 3 of 4 captions are not in English, such as 'Zwei Kinder") == 1
    assert f"1 skipped: empty_caption, first: {path} line 5: 'caption' is empty\n" in shown.getvalue()


def test_a_query_warns_once(shown):
    generate = KnowledgeGenerator(console=PlainConsole(file=shown, width=80))
    generate(["a dog jumps", "man surfing"])
    assert shown.getvalue() == ""
    generate(["un chien saute dans l'eau"])
    generate(["un chien saute dans la neige"])
    assert shown.getvalue().startswith(
        'warning: 1 of 1 captions are not in English, such as "un chien saute dans l\'eau"'
    )
    assert shown.getvalue().count("warning") == 1 and "--knowledge transformers" in shown.getvalue()
