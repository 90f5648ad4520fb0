"""Ten thousand damaged files, always the same ones: each is accepted, skipped or refused (benchmarks/fuzz.py)."""

import pytest
from helpers import ROOT

from benchmarks import fuzz_targets
from benchmarks.fuzz import fuzz
from benchmarks.mutate import KINDS

SEED = 7
CASES = {
    "jpeg": 4000,
    "png": 2400,
    "webp": 300,
    "gif": 250,
    "bmp": 150,
    "tiff": 300,
    "avif": 300,
    "tar": 1600,
    "json": 1200,
    "reply": 600,
}
ADAPTERS = 400


@pytest.mark.parametrize("kind", CASES)
def test_every_case_ends_as_documented(kind):
    """In a process of its own, so that a crash, a hang or too much memory is a failure with the number of its case."""
    found = fuzz(kind, CASES[kind], SEED, seconds=60.0, memory_gb=3.0)
    assert not found.failures, "\n".join(f"{kind} {number}: {what}" for number, what in found.failures[:3])
    assert found.outcomes.total() == CASES[kind] and found.outcomes["failed"] == 0
    assert found.outcomes["accepted"] and found.outcomes["skipped"] + found.outcomes["refused"]
    assert found.peak_mb < 2000  # two images of the most pixels that are taken


def test_adapters_end_as_documented(tmp_path):
    """In this process, which has torch already: importing it would take longer than all cases."""
    files = fuzz_targets.corpus("adapter")
    outcomes = {
        fuzz_targets.run("adapter", fuzz_targets.case("adapter", SEED, number, files), tmp_path)
        for number in range(ADAPTERS)
    }
    assert outcomes == {"accepted", "refused"}


def test_there_are_ten_thousand():
    assert sum(CASES.values()) + ADAPTERS >= 10_000 and {*CASES, "adapter"} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_cases_are_the_same_everywhere_and_differ(kind):
    files = fuzz_targets.corpus(kind)
    cases = [fuzz_targets.case(kind, SEED, number, files) for number in range(40)]
    assert cases == [fuzz_targets.case(kind, SEED, number, files) for number in range(40)]
    assert len(set(cases)) > 30 and sum(case in files for case in cases) < 8


@pytest.mark.parametrize(
    ("how", "said"),
    [("raises", "ZeroDivisionError"), ("dies", "ended with -11"), ("hangs", "hung"), ("eats", "MemoryError")],
)
def test_failures_are_seen(monkeypatch, tmp_path, how, said):
    """A case that fails is counted with its number, and those behind it are run."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN.replace("HOW", how))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    found = fuzz("reply", 12, SEED, first=100, seconds=8.0, memory_gb=0.5)
    assert found.outcomes.total() == 12 and found.outcomes["failed"] == 1
    assert found.failures[0][0] == 105 and said in found.failures[0][1]


# Loaded when the child starts: its sixth case breaks.
BROKEN = """
import sys

if any("--child" in part for part in sys.orig_argv):
    import os, signal, time
    from benchmarks import fuzz_targets

    case, run = fuzz_targets.case, fuzz_targets.run

    def broken(kind, seed, number, files):
        return b"BREAK" if number == 105 else case(kind, seed, number, files)

    def target(kind, content, folder):
        if content == b"BREAK":
            {"raises": lambda: 1 / 0, "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
             "hangs": lambda: time.sleep(60), "eats": lambda: bytearray(2**30)}["HOW"]()
        return run(kind, content, folder)

    fuzz_targets.case, fuzz_targets.run = broken, target
"""
