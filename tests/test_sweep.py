"""Sweeps: the list of runs, skipped runs, and the resulting figures and tables."""

import csv
import io
import json
import stat
import sys
from pathlib import Path

import pytest
import yaml
from support.repository import ROOT

from amp.commands import sweep as sweep_command
from amp.commands import train
from amp.errors import AmpError
from amp.evaluate.results import ResultFile
from amp.locks import try_lock
from amp.retrieval import figures
from amp.retrieval.figures import DirectionResult, RetrievalRow, RowKey
from amp.sweep import runs as runs_module
from amp.sweep.config import Row, SweepConfig, Table
from amp.sweep.plot import draw
from amp.sweep.runs import RESULTS, TRAINED, execute, plan
from amp.sweep.summary import METRICS, Line, clear, collect, standard_error, to_csv, to_markdown

SWEEPS = sorted((ROOT / "launchers" / "sweeps").glob("*.yaml"))


def row(key: RowKey | str, i2t: tuple, t2i: tuple) -> RetrievalRow:
    key = RowKey(key) if isinstance(key, str) else key

    def side(values):
        values = dict(zip((1, 5, 10), values, strict=True))
        return DirectionResult(values, dict.fromkeys(values, 100.0), dict.fromkeys(values, 0.0), 10, 20, 1.0)

    return RetrievalRow(key, side(i2t), side(t2i))


BASE = row(figures.BASE, (10.0, 20.0, 30.0), (5.0, 15.0, 25.0))


@pytest.fixture
def config(tmp_path) -> SweepConfig:
    base, overlay = tmp_path / "base.yaml", tmp_path / "overlay.yaml"
    base.write_text("negatives: 1\nout: somewhere\n")
    overlay.write_text("prompt: {knowledge: states}\n")
    rows = [
        Row("base CLIP", train=False),
        Row("control"),
        Row("States, alone", [str(overlay)], paper=[1, 2, 3, 4, 5, 6]),
    ]
    again = [Row("the control once more", set={"out": "elsewhere"}), Row("big margin", set={"margin": 0.5})]
    return SweepConfig(
        [Table("One", rows), Table("Two", again)],
        [str(base)],
        seeds=[0, 7],
        out=str(tmp_path / "out"),
        results=str(tmp_path / "results"),
        control="control",
    )


def finish(run, *rows):
    run.folder.mkdir(parents=True, exist_ok=True)
    ResultFile({}, [BASE, *rows]).save_json(run.folder / RESULTS)


def test_equal_configurations_are_trained_once(config):
    runs = plan(config)
    assert list(runs) == ["control", "States, alone", "the control once more", "big margin"]
    assert runs["control"] == runs["the control once more"]
    assert len({run.folder for of_row in runs.values() for run in of_row}) == 6
    assert [run.seed for run in runs["big margin"]] == [0, 7]
    assert runs["big margin"][1].arguments[-4:] == ("--margin", "0.5", "--seed", "7")
    assert runs["States, alone"][0].folder.parent.name.startswith("states-alone-")


@pytest.mark.parametrize("change", ["base", "overlay", "evaluate"])
def test_whatever_the_result_depends_on_makes_another_run(config, tmp_path, change):
    before = plan(config)["States, alone"][0].folder
    if change == "evaluate":
        config.evaluate = {"search.top_k": 10}
    else:
        (tmp_path / f"{change}.yaml").write_text("negatives: 3\n")
    assert plan(config)["States, alone"][0].folder != before


def test_the_folder_does_not_depend_on_where_results_go(config, tmp_path):
    before = plan(config)["control"][0].folder
    (tmp_path / "base.yaml").write_text("out: another\nnegatives: 1  # a comment\n")
    assert plan(config)["control"][0].folder == before


def scripted(config, tmp_path, fails=()):
    """A substitute for `accelerate launch`: records its arguments and writes the files of amp train."""
    script = tmp_path / "launch"
    script.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "print(sys.argv[1:])\n"
        f"if any(name in str(out) for name in {list(fails)!r}): sys.exit('no luck')\n"
        "(out / 'stage2').mkdir()\n(out / 'stage2' / 'adapter.safetensors').touch()\n"
        "(out / 'config.yaml').write_text('stages: [1, 2]')\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    config.launcher = [str(script)]


@pytest.fixture
def evaluated(monkeypatch):
    """Counts evaluations instead of running them; the end-to-end test runs one."""
    commands, real = [], runs_module.call

    def call(command, log):
        if "amp.commands.evaluate" not in command:
            return real(command, log)
        commands.append(command)
        name = json.loads(command[command.index("--adapters") + 1])[0].partition("=")[0]
        ResultFile({}, [BASE, row(RowKey(name, "pairwise"), (11, 21, 31), (6, 16, 26))]).save_json(
            command[command.index("--out") + 1]
        )
        return True

    monkeypatch.setattr(runs_module, "call", call)
    return commands


def test_a_run_is_trained_and_evaluated_once(config, tmp_path, evaluated):
    scripted(config, tmp_path)
    run = plan(config)["big margin"][0]
    assert execute(config, run, print) == "done" and run.done
    log = (run.folder / "train.log").read_text()
    assert "'-m', 'amp.commands.train'" in log and "'--margin', '0.5', '--seed', '0', '--out'" in log
    assert evaluated[0][evaluated[0].index("--config") + 1] == str(run.folder / "config.yaml")
    adapters = evaluated[0][evaluated[0].index("--adapters") + 1]
    assert json.loads(adapters) == [f"big margin={run.folder / 'stage2' / 'adapter.safetensors'}"]
    assert execute(config, run, print) == "done" and len(evaluated) == 1
    (run.folder / RESULTS).unlink()  # trained but not evaluated, as after a stop in between
    (run.folder / "train.log").unlink()
    assert execute(config, run, print) == "done" and len(evaluated) == 2 and not (run.folder / "train.log").exists()


def test_a_failure_is_told_apart_and_leaves_nothing_that_looks_done(config, tmp_path, evaluated):
    scripted(config, tmp_path, fails=["big-margin"])
    run = plan(config)["big margin"][0]
    assert execute(config, run, print) == "failed"
    assert not run.done and not (run.folder / TRAINED).exists() and not evaluated
    assert "no luck" in (run.folder / "train.log").read_text()
    config.launcher = ["/no/such/launcher"]
    assert execute(config, run, print) == "failed"
    said = []
    for name, text in ((TRAINED, "{"), (TRAINED, "[]"), ("train.log", None)):
        (run.folder / TRAINED).unlink(missing_ok=True)
        (run.folder / name).unlink(missing_ok=True)
        if text is None:
            (run.folder / name).mkdir()  # can't be written
        else:
            (run.folder / name).write_text(text)
        assert execute(config, run, said.append) == "failed" and "remove trained.json" in said[-1]
    (run.folder / "train.log").rmdir()
    assert execute(config, run, print) == "failed"
    assert "Set `launcher`" in (run.folder / "train.log").read_text()


def test_a_run_that_another_process_has_is_left_to_it(config, tmp_path, evaluated):
    scripted(config, tmp_path)
    run = plan(config)["control"][0]
    run.folder.mkdir(parents=True)
    with open(run.folder / runs_module.LOCK, "wb") as lock:
        assert try_lock(lock.fileno())
        assert execute(config, run, print) == "elsewhere"
    assert execute(config, run, print) == "done"


def test_mean_and_standard_error_by_hand():
    """2, 4, 9: mean 5, variance (9 + 1 + 16) / 2 = 13, error sqrt(13 / 3)."""
    assert standard_error([2, 4, 9]) == pytest.approx((13 / 3) ** 0.5)
    assert standard_error([5.0]) is None and standard_error([]) is None
    line = Line(RowKey("a"), {0: (2.0,), 1: (4.0,), 5: (9.0,)})
    assert line.mean(0) == 5
    # Paired by seed: 2 - 1, 9 - 5; seed 1 has no partner. Mean 2.5, variance 4.5, error sqrt(4.5 / 2).
    assert line.gain(Line(RowKey("b"), {0: (1.0,), 5: (5.0,), 6: (0.0,)}), 0) == pytest.approx((2.5, 1.5))
    assert line.gain(Line(RowKey("b"), {}), 0) == (None, None)
    assert clear(2.1, 1.0) and not clear(2.0, 1.0) and not clear(9.0, None) and not clear(None, None)


@pytest.fixture
def partial(config):
    """Results of the control with both seeds, of states with one seed and a probe; all others are missing."""
    runs = plan(config)
    finish(runs["control"][0], row("control", (11, 21, 31), (6, 16, 26)))
    finish(runs["control"][1], row("control", (13, 21, 31), (6, 16, 26)))
    states = "States, alone"
    finish(
        runs[states][0],
        row(RowKey(states, "pairwise"), (12, 22, 32), (7, 17, 27)),
        row(RowKey(states, "pairwise", "grey"), (1, 2, 3), (4, 5, 6)),
    )
    return runs


def test_csv_of_partial_results(config, partial):
    lines, base, left_out = collect(config, partial)
    assert left_out == []
    table = {(r["row"], r["metric"]): r for r in csv.DictReader(io.StringIO(to_csv(lines, base, config.control)))}
    assert table["control", "i2t R@1"] == {
        "row": "control",
        "metric": "i2t R@1",
        "mean": "12.000",
        "standard_error": "1.000",
        "seeds": "2",
        "paper": "",
        "over_base": "2.000",
        "over_base_error": "1.000",
        "over_control": "0.000",
        "over_control_error": "0.000",
    }
    states = table["States, alone", "Rsum"]
    assert (states["mean"], states["standard_error"], states["seeds"]) == ("117.000", "", "1")
    assert states["paper"] == "21.000" and states["over_control"] == "6.000" and states["over_control_error"] == ""
    assert table["States, alone, grey", "t2i R@5"]["mean"] == "5.000"
    assert table["the control once more", "i2t R@1"]["mean"] == "12.000"  # in both tables, but trained once
    assert table["big margin", "Rsum"]["mean"] == "" and table["big margin", "Rsum"]["seeds"] == "0"
    assert table["base CLIP", "Rsum"]["mean"] == "105.000"


def test_markdown_has_rows_probes_paper_and_marks(config, partial):
    lines, base, _ = collect(config, partial)
    text = to_markdown(config, lines, base, "amp sweep --config x.yaml")
    assert text.startswith("Made by `amp sweep --config x.yaml`")
    one, two = text.split("## ")[1:]
    cells = {
        r.split(" | ")[0].removeprefix("| "): [c.strip(" |") for c in r.split("|")[1:-1]] for r in one.splitlines()
    }
    assert cells["row"][2:9] == list(METRICS) and cells["row"][9] == "paper i2t R@1"
    assert cells["base CLIP"][2] == "10.0"
    assert cells["control"][1:5] == ["2", "12.0 ± 1.0", "**21.0 ± 0.0**", "**31.0 ± 0.0**"]  # 2.0 isn't above 2 x 1.0
    assert cells["States, alone"][2] == "12.0" and cells["States, alone"][9:] == [
        "1.0",
        "2.0",
        "3.0",
        "4.0",
        "5.0",
        "6.0",
        "21.0",
    ]
    assert cells["States, alone, grey"][2] == "1.0" and set(cells["States, alone, grey"][9:]) == {""}
    assert "| big margin |  |  |" in two


def test_results_that_cant_be_used_are_left_out_with_the_reason(config, partial):
    expected = collect(config, partial)[:2]
    big, states = partial["big margin"], partial["States, alone"]
    finish(big[0])  # only the row of base CLIP
    big[1].folder.mkdir()
    moved, own = row("base CLIP", (10, 20, 30), (5, 15, 26)), row("big margin", (10, 20, 30), (5, 15, 26))
    ResultFile({}, [moved, own]).save_json(big[1].folder / RESULTS)
    states[1].folder.mkdir()
    (states[1].folder / RESULTS).write_text("{")
    *found, left_out = collect(config, partial)
    assert tuple(found) == expected and len(left_out) == 3
    text = to_markdown(config, *found, "x", left_out)
    for run, words in (
        (states[1], "not JSON"),
        (big[0], "has 1 rows, expected base CLIP and 'big margin'"),
        (big[1], "base CLIP has Rsum 106.00, expected 105.00 as in most runs"),
    ):
        (reason,) = (reason for reason in left_out if str(run.folder) in reason)
        assert words in reason and "remove the file and start the sweep again" in reason
        assert f"- {reason}" in text.partition("## Results left out")[2]


def test_rows_under_another_name_are_left_out(config, partial):
    """As in results of earlier versions, which only had names."""
    finish(partial["big margin"][0], row("big margin (pairwise)", (11, 21, 31), (6, 16, 26)))
    lines, _, left_out = collect(config, partial)
    assert "has the row 'big margin (pairwise)', expected rows of 'big margin' only" in left_out[0]
    assert not lines[RowKey("big margin")].values


def test_the_base_of_most_runs_counts_and_not_the_first(config, partial):
    moved, own = (row(name, (9, 20, 30), (5, 15, 25)) for name in ("base CLIP", "control"))
    ResultFile({}, [moved, own]).save_json(partial["control"][0].folder / RESULTS)
    lines, base, left_out = collect(config, partial)
    assert base.mean(len(METRICS) - 1) == 105 and set(lines[RowKey("control")].values) == {7} and len(left_out) == 1


def test_plot(config, partial):
    lines, base, _ = collect(config, partial)
    assert draw(config, lines, base).startswith(b"\x89PNG")
    assert draw(config, {key: Line(key, {}) for key in lines}, base) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ["nobody"]}, "row 'nobody' is in no table"),
        ({"control": "base CLIP"}, "row 'base CLIP' is in no table"),
        ({"shard": "2/2"}, "shard is '2/2', expected i/n"),
        ({"shard": "x"}, "shard is 'x'"),
        ({"seeds": [1, 1]}, "expected each once"),
        ({"tables": []}, "tables, base or seeds is empty"),
        ({"tables": [Table("t", [Row("control", paper=[1.0])])]}, "paper has 1 figures, expected 6"),
    ],
)
def test_wrong_settings(config, changes, message):
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(AmpError, match=message):
        config.check()


def test_one_name_for_two_configurations_is_refused(config):
    config.tables[1].rows[1].name = "control"
    with pytest.raises(AmpError, match="two rows are named 'control'"):
        plan(config)


def test_a_missing_file_is_named_with_its_row(config):
    config.tables[0].rows[1].configs = ["no.yaml"]
    with pytest.raises(AmpError, match=r"no\.yaml: can't be read.*row 'control'"):
        plan(config)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_run_of_a_shipped_sweep_is_a_valid_training(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = sweep_command.parser().instantiate(sweep_command.parser().parse_args(["--config", str(path)]))
    settings.pop("config")
    config = SweepConfig(**settings)
    config.check()
    for of_row in plan(config).values():
        options = train.parser()
        parsed = options.instantiate(options.parse_args(list(of_row[0].arguments)))
        from amp.train.config import TrainConfig

        del parsed["config"]
        TrainConfig(**parsed).check()


@pytest.fixture
def sweep(config, tmp_path, shards):
    """Runs the launcher with a table of two rows."""

    def main(arguments) -> int:
        try:
            sweep_command.main(arguments)
        except SystemExit as ended:
            if ended.code != 1:
                raise
            return 1
        return 0

    big = {"name": "big margin", "set": {"margin": 0.5}}

    def run(*arguments, rows=({"name": "control"}, big), **settings):
        file = tmp_path / "sweep.yaml"
        file.write_text(
            yaml.safe_dump(
                {
                    "base": config.base,
                    "seeds": [0],
                    "launcher": config.launcher,
                    "out": config.out,
                    "results": config.results,
                    "set": {"data.shards": str(shards)},
                    "tables": [{"title": "One", "rows": list(rows)}],
                    **settings,
                }
            )
        )
        return main(["--config", str(file), *arguments])

    return run


def test_the_launcher_reports_a_failure_and_runs_the_rest(config, sweep, tmp_path, evaluated, capfd):
    scripted(config, tmp_path, fails=["big-margin"])
    assert sweep("--dry_run", "true") == 0 and not Path(config.out).exists()
    assert sweep() == 1
    said = capfd.readouterr().err.replace("\n", " ")
    assert "2 runs, 0 done, 2 to do here" in said and "failed: big margin, seed 0" in said
    assert {p.name for p in tmp_path.glob("results.*")} == {"results.csv", "results.md", "results.png"}
    scripted(config, tmp_path)
    assert sweep("--shard", "1/2") == 0  # the missing run belongs to the other shard
    assert sweep() == 0 and len(evaluated) == 2
    (next(Path(config.out).glob("big-margin-*")) / "seed0" / RESULTS).write_text("{")
    assert sweep() == 1  # a result that can't be read
    assert "left out: " in capfd.readouterr().err and "## Results left out" in Path(f"{config.results}.md").read_text()


def test_tables_are_written_after_each_run(config, sweep, tmp_path, evaluated, monkeypatch):
    scripted(config, tmp_path)
    real, tables = runs_module.call, []

    def call(command, log):
        if "big-margin" in str(log):
            tables.append(Path(f"{config.results}.csv").read_text())
            raise KeyboardInterrupt
        return real(command, log)

    monkeypatch.setattr(runs_module, "call", call)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        sweep()
    assert "control,Rsum,111.000,,1" in tables[0]


def test_every_row_is_checked_before_one_is_trained(sweep, tmp_path, capsys):
    overlay = tmp_path / "wrong.yaml"
    overlay.write_text("stage1: {lr: much}\n")
    rows = (
        {"name": "control"},
        {"name": "typo", "set": {"marginn": 0.5}},
        {"name": "file", "configs": [str(overlay)]},
        {"name": "stages", "set": {"stages": [2]}},
        {"name": "top k", "evaluate": {"search.top_k": 0}},
        {"name": "probe", "evaluate": {"probes": ["gray"]}},
        {"name": "shards", "set": {"data.shards": "no/shards"}},
    )
    with pytest.raises(SystemExit) as error:
        sweep(rows=rows, launcher=["no-such-launcher"], results=str(tmp_path / "base.yaml" / "results"))
    assert error.value.code == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    for words in (
        "8 errors: ",
        "row 'typo': ",
        "marginn",
        "row 'file': ",
        "row 'stages': stages is [2]",
        "row 'top k': ",
        "row 'probe': ",
        "row 'shards': no/shards",
        "results.csv: can't be written",
        "'no-such-launcher' is not installed",
    ):
        assert words in said
    assert "row 'control'" not in said


def test_a_split_that_is_not_there_is_found_before_training(sweep, capsys):
    with pytest.raises(SystemExit):
        sweep(split="tset", launcher=["true"])
    assert "2 errors: (1) row 'control'" in (said := capsys.readouterr().err) and "'tset'" in said
