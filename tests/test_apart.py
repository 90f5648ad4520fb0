"""The rules in a process of their own."""

import os
import signal
from pathlib import Path

import pytest

from amp.errors import AmpError
from amp.generation.apart import RulesProcess
from amp.generation.query import KnowledgeGenerator
from amp.generation.rules import MODELS, _find

CAPTIONS = ["A red dog chases a ball", "Two men in hats ride horses", "12:30"]


@pytest.fixture
def process():
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    try:
        _find(None)
    except AmpError:
        pytest.skip(f"needs a spaCy model, one of {', '.join(MODELS)}")
    process = RulesProcess()
    yield process
    process._process.kill()


def test_it_gives_the_knowledge_of_the_rules_without_pytorch(process):
    assert process(CAPTIONS) == KnowledgeGenerator("rules")(CAPTIONS)
    maps = Path(f"/proc/{process._process.pid}/maps")
    if maps.exists():
        assert "libtorch" not in maps.read_text()


def test_it_outlives_ctrl_c_and_ends_with_the_command(process):
    os.kill(process._process.pid, signal.SIGINT)
    assert len(process(CAPTIONS)) == len(CAPTIONS)
    os.kill(process._process.pid, signal.SIGINT)
    assert len(process(CAPTIONS)) == len(CAPTIONS)
    process._pipe.close()  # as if this process had been killed
    process._process.join(10)
    assert process._process.exitcode == 0


@pytest.mark.parametrize("when", ["loading", "waiting"])
def test_a_killed_process_is_told(process, when):
    if when == "waiting":
        process.check()
    process._process.kill()
    process._process.join()
    with pytest.raises(AmpError, match=r"the process of the rules has ended, .* --knowledge none"):
        process(CAPTIONS)


def test_a_missing_package_is_told(tmp_path, monkeypatch):
    (tmp_path / "spacy.py").write_text("raise ModuleNotFoundError('No module named spacy', name='spacy')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AmpError, match=r'the rules can.t work without the package spacy .* pip install "open-clip-amp'):
        RulesProcess().check()
