"""Every option of every command. Add new options to tests/options.yaml, so that they are deliberate."""

from importlib import import_module

import pytest
import yaml
from support.repository import ROOT

from amp.__main__ import COMMANDS

KNOWN = yaml.safe_load((ROOT / "tests/options.yaml").read_text(encoding="utf-8"))
KNOWN["prepare"] = [option for option in KNOWN["train"] if not option.startswith("plan")]  # the options of a run
OF_ALL = {"-h", "--help", "--config", "--print_config"}


def options_of(command: str) -> list[str]:
    """Options of a command, without those that all commands have."""
    parser = import_module(f"amp.commands.{command}").parser()
    found = {option for action in parser._actions for option in action.option_strings if not option.endswith("+")}
    groups = {option for option in found if any(other.startswith(f"{option}.") for other in found)}
    return sorted(option.removeprefix("--") for option in found - groups - OF_ALL)


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"clip_benchmark"}))  # has CLIP_benchmark's options
def test_no_new_options(command):
    found = options_of(command)
    new, gone = sorted(set(found) - set(KNOWN[command])), sorted(set(KNOWN[command]) - set(found))
    assert not new, f"amp {command} has new options {new}: is there a default that serves everybody instead?"
    assert not gone, f"amp {command} lost {gone}: say in CHANGELOG.md where they are now, then remove them here"
