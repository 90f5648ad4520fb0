"""Progress, lines and tables on a terminal, in a log file and in a narrow window."""

import contextlib
import io
import re
import time

import pytest
from rich.table import Table

from amp import terminal as module
from amp.terminal import PlainConsole, Terminal, duration


class Clock:
    """A clock that only a test advances."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log(monkeypatch):
    """A console that writes to a log file, and the file."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # some CI systems set it
    monkeypatch.delenv("COLUMNS", raising=False)
    return PlainConsole(file=io.StringIO())


def lines(console: PlainConsole) -> list[str]:
    return console.file.getvalue().splitlines()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_log_gets_a_line_now_and_then_also_during_one_long_step(log, monkeypatch):
    monkeypatch.setattr(module, "LOG_SECONDS", 0.02)
    with log.progress("encoding photos", "photos") as report:
        report(32, 100)
        wait_for(lambda: log.file.getvalue().count("32 of 100 photos") >= 3)  # repeated without new progress
    assert re.fullmatch(r"encoding photos: 32 of 100 photos, \d+ s so far", lines(log)[-2])
    assert re.fullmatch(r"encoding photos: 32 of 100 photos, took \d+ s", lines(log)[-1])
    assert not report._thread.is_alive()


def test_a_phase_that_cant_report_says_that_it_is_alive(log, monkeypatch):
    monkeypatch.setattr(module, "LOG_SECONDS", 0.02)
    with log.progress("loading ViT-L-14"):
        wait_for(lambda: lines(log))
    assert re.fullmatch(r"loading ViT-L-14: \d+ s so far", lines(log)[0])


def test_a_short_phase_says_nothing(log):
    with log.progress("encoding photos") as report:
        report(1, 1)
    with log.progress("writing", "images", keep=True) as report:
        report(7, 7)
    assert [re.sub(r"\d+ s$", "N s", line) for line in lines(log)] == ["writing: 7 of 7 images, took N s"]


def test_nothing_follows_a_phase_that_failed(log, monkeypatch):
    with pytest.raises(KeyError), log.progress("writing", keep=True) as report:
        report(1, 2)
        raise KeyError
    assert lines(log) == [] and log.phases == []


def test_time_left_comes_from_a_rate_and_not_from_the_first_item(log):
    """The first of 113 items took 38 s, because a model was loaded. The others take 0.5 s, about a minute in total."""
    clock = Clock()
    progress = log.progress("states (Q2)", "captions")
    progress._bar.get_time = progress._task._get_time = clock
    progress._task.start_time = clock.now
    clock.now += 38
    progress(1, 113, "")
    assert module.state_of(progress._task) == "1 of 113 captions, 38 s so far"
    for done in range(2, 12):
        clock.now += 0.5
        progress(done, 113, "")
    assert module.state_of(progress._task) == "11 of 113 captions, 2.0/s, 51 s left"


def test_a_rate_below_one_a_second_is_told_as_seconds_each_also_over_hours(log):
    clock = Clock()
    progress = log.progress("sweep", "runs")
    progress._bar.get_time = progress._task._get_time = clock
    for done in range(4):
        progress(done, 12, "")
        clock.now += 1800
    assert module.state_of(progress._task) == "3 of 12 runs, 1800.0 s each, 4 h 30 min left"


def test_batches_give_the_rate_of_their_replies(log):
    """32 replies arrive within 6 ms every 16 s, which makes two per second."""
    clock = Clock()
    progress = log.progress("triplets (Q1)", "captions")
    progress._bar.get_time = progress._task._get_time = clock
    progress._task.start_time = clock.now
    for batch, said in enumerate(("32 of 96 captions, 16 s so far", "64 of 96 captions, 2.0/s, 16 s left")):
        clock.now += 16
        for done in range(1, 33):
            clock.now += 0.0002
            progress(32 * batch + done, 96, "")
        assert module.state_of(progress._task) == said


def test_a_second_part_begins_its_own_rate(log):
    clock = Clock()
    progress = log.progress("re-ranking", "pairs")
    progress._bar.get_time = progress._task._get_time = clock
    for direction in (1, 10):
        for done in range(1, 11):
            clock.now += direction
            progress(done, 20, "")
    assert module.state_of(progress._task) == "10 of 20 pairs, 10.0 s each, 1 min 40 s left"


def test_of_nested_phases_the_inner_one_speaks(log, monkeypatch):
    monkeypatch.setattr(module, "LOG_SECONDS", 0.02)
    with log.progress("stage 1"), log.progress("validating"):
        wait_for(lambda: log.file.getvalue().count("validating") >= 4)
        said = [line.partition(":")[0] for line in lines(log)]
    assert "stage 1" not in said[said.index("validating") :]


def test_training_lines_keep_loss_and_rate(monkeypatch, capsys):
    monkeypatch.setattr(module, "_FIRST_SECONDS", 0.001)
    with Terminal(True).training(2, 4, 8) as show:
        for step in range(1, 5):
            time.sleep(0.01)
            show(step, 0.25, 0.07) if step % 2 == 0 else show(step)
    shown = capsys.readouterr().err.splitlines()
    assert re.match(r"stage 2: 2 of 4 steps, [\d.]+/s, \d+ s left, loss 0.250 tau 0.0700", shown[0])
    assert re.search(r"stage 2: 4 of 4 steps, .*, took \d+ s, loss 0.250 tau 0.0700 [\d,]+ images/s$", shown[-1])
    with Terminal(False).training(1, 1, 1) as show:
        show(1, 0.5, 0.07)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_goes_away():
    console = PlainConsole(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with console.progress("encoding [photos]", "photos") as report:
        report(1, 10)
        console._live_stack[-1].refresh()
        assert "encoding [photos]" in console.file.getvalue() and "1 of 10 photos" in console.file.getvalue()
        with console.progress("an inner one") as inner:
            inner(1, 2)
    assert console.file.getvalue().endswith("\x1b[2K")


TESTS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def wide_table() -> Table:
    table = Table("test", "method", "choices", "accuracy", "mean of groups", "fixed", "broken", "95 % interval")
    for test in TESTS:
        table.add_row(f"sugarcrepe_{test}", "action-aware (pairwise)", "1,234", "71.5", "70.2", "123", "45", "69 - 73")
    return table


def test_a_window_too_narrow_for_a_table_still_gets_every_cell(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    console = PlainConsole(file=io.StringIO())
    table = Table("split", "images", "captions", "MB")
    table.add_row("t", "17", "85", "3")
    console.print(table)
    assert [cell.strip() for cell in lines(console)[-2].split("│")[1:-1]] == ["t", "17", "85", "3"]


def test_tables_and_lines_in_a_log_are_whole(log):
    log.print(wide_table())
    log.print("skipped " + "a long reason " * 30 + "end")
    shown = log.file.getvalue()
    assert "…" not in shown and "\x1b" not in shown
    for test in TESTS:
        assert f"sugarcrepe_{test} " in shown
    assert "mean of groups" in lines(log)[1] and lines(log)[-1].endswith("end")
    assert max(map(len, lines(log)[:-1])) < 150  # not wider than its content


@pytest.mark.parametrize("width", [80, 60])
def test_a_narrow_terminal_folds_and_drops_nothing(width):
    console = PlainConsole(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    console.print(wide_table())
    shown = console.file.getvalue()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= width
    columns = list(zip(*(re.split("[┃│]", line)[1:-1] for line in shown.splitlines() if line[0] in "┃│"), strict=True))
    joined = ["".join(cell.strip() for cell in column) for column in columns]
    assert joined[0] == "test" + "".join(f"sugarcrepe_{test}" for test in TESTS)
    console.print("skipped /photos/" + "holiday " * 20)  # a wrapped path can't be copied
    assert console.file.getvalue().splitlines()[-1] == "skipped /photos/" + "holiday " * 20
    assert joined[3] == "accuracy" + "71.5" * len(TESTS) and joined[4].replace(" ", "").startswith("meanofgroups")


def test_a_message_on_a_full_disk_does_not_end_a_run():
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing it fails again
        PlainConsole(file=full).say("stage 1 step 5")
        full = None
    assert full is None


def test_durations():
    shown = {0.4: "0 s", 59.6: "1 min 00 s", 185: "3 min 05 s", 7640: "2 h 07 min"}
    assert {seconds: duration(seconds) for seconds in shown} == shown
