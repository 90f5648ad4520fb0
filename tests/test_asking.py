"""Queries on standard input: piped, typed on a terminal, and answered by one process."""

import io
import os
import pty
import subprocess
import sys

import pytest
from support.drawn_data import draw
from support.evaluation import make_far_model
from support.repository import QUIET_ENVIRONMENT, ROOT

import amp
from amp.commands import asking
from amp.commands import search as command
from amp.commands.asking import read_queries
from amp.errors import AmpError

READ = "from amp.commands.asking import read_queries; print(list(read_queries('x')))"


def test_lines_of_a_pipe_are_queries():
    done = subprocess.run(
        [sys.executable, "-c", READ],
        input=b"a dog\n\n  a cat \n\xff\nno newline",
        cwd=ROOT,
        env=QUIET_ENVIRONMENT,
        capture_output=True,
    )
    assert done.stdout == rb"['a dog', 'a cat', '\\xff', 'no newline']" + b"\n", done.stderr


@pytest.mark.parametrize("stdin", [None, io.StringIO(""), io.StringIO("\n \n")], ids=["closed", "empty", "blank"])
def test_no_query_is_refused(monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(AmpError, match="standard input contains none, expected one query per line; for example x"):
        read_queries("x")


@pytest.mark.parametrize("end", [b"\n", b"\x04"], ids=["empty line", "Ctrl-D"])
def test_queries_are_typed_with_a_history(end):
    """Types a query, then the up arrow, which shows it again, and adds a word."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", READ], cwd=ROOT, env=QUIET_ENVIRONMENT | {"TERM": "xterm"}, stdin=theirs, stdout=theirs
    )
    os.close(theirs)
    shown = ""
    for keys in (b"a dog\n", b"\x1b[A runs\n", end):
        while not shown.endswith(asking.PROMPT):
            shown += os.read(ours, 1000).decode()
        os.write(ours, keys)
        shown += " "
    while "]" not in shown.rpartition("[")[2]:
        shown += os.read(ours, 1000).decode()
    assert "['a dog', 'a dog runs']" in shown and process.wait(10) == 0
    os.close(ours)


@pytest.fixture
def options(clip_folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        draw(number).save(photos / f"{number}.png")
    model, preprocess = make_far_model(clip_folder)
    amp.Retriever(amp.Reranker(model, preprocess), tmp_path / "index").update(photos, workers=0, states=None)
    return ["--index", str(tmp_path / "index"), "--model", clip_folder, "--count", "2"]


@pytest.fixture
def loaded(monkeypatch):
    """Lists the model's loadings, and makes one query fail."""
    calls, load, find = [], command.retriever, amp.Retriever.search
    monkeypatch.setattr(command, "retriever", lambda *settings: calls.append(settings) or load(*settings))

    def search(self, query, *arguments):
        if query == "bad":
            raise AmpError("the server is gone")
        return find(self, query, *arguments)

    monkeypatch.setattr(amp.Retriever, "search", search)
    return calls


def test_piped_queries_are_answered_after_one_loading(options, loaded, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red dog\nbad\na cat\n"))
    with pytest.raises(SystemExit) as ended:
        command.main(options)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and err.count("error: the server is gone") == 1 and len(loaded) == 1
    answers = out.split("\n\n")
    assert [answer.strip().split("\n")[0] for answer in answers] == ["a red dog", "bad", "a cat"]
    assert [answer.count(".png") for answer in answers] == [2, 0, 2]


def test_typed_queries_are_answered_after_one_loading(options, loaded, monkeypatch, capsys):
    typed = iter(["a red dog", "bad", "a cat", ""])
    monkeypatch.setattr(asking, "on_terminal", lambda: True)
    monkeypatch.setattr(command, "on_terminal", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    command.main(options)
    out, err = capsys.readouterr()
    assert out.count("CLIP's rank") == 2 and out.count(".png") == 4 and len(loaded) == 1
    assert "4 photos; an empty line or Ctrl-D ends" in err and "error: the server is gone" in err


def test_one_query_that_fails_ends_the_command(options, loaded, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([*options, "bad"])
    assert ended.value.code == 2 and "error: the server is gone" in capsys.readouterr().err
