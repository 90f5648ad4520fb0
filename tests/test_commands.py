"""The command `amp`: every name leads to its command line, and wrong names are told."""

import sys

import pytest

from amp import __main__ as command
from amp.version import __version__


def call(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["amp", *words])
    command.main()


@pytest.mark.parametrize("name", command.COMMANDS)
def test_each_command_has_help(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, name, "--help")
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out


def test_the_list_and_the_version(monkeypatch, capsys):
    call(monkeypatch)
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in command.COMMANDS)
    call(monkeypatch, "--version")
    assert capsys.readouterr().out.strip() == __version__


def test_an_unknown_command(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "trian")
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("amp: error: command is 'trian', expected one of generate_knowledge")
