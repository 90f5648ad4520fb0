"""Comparison of two rows of result files, and the intervals and protocols in these files."""

import csv
import json

import numpy as np
import pytest
import torch
from support.evaluation import write_world_adapter
from support.processes import forget_accelerate

from amp.commands import compare as compare_command
from amp.commands import evaluate, report
from amp.errors import AmpError
from amp.evaluate.compare import compare
from amp.evaluate.per_query import load_queries
from amp.evaluate.results import ResultFile
from amp.evaluate.results_table import print_table
from amp.retrieval.figures import BASE, RowKey
from amp.retrieval.metrics import recalls
from amp.retrieval.settings import RetrievalSettings


@pytest.fixture(scope="module")
def files(clip_folder, shards, tmp_path_factory):
    """Results of the base model and one adapter: in one gallery, in three folds, and with score fusion."""
    folder = tmp_path_factory.mktemp("compare")
    adapter = write_world_adapter(clip_folder, shards, folder)
    for name, extra in (
        ("whole", []),
        ("folds", ["--search.folds", "3", "--bootstrap", "0"]),
        ("fused", ["--search.fusion_weight", "3.0", "--bootstrap", "0"]),
    ):
        forget_accelerate()
        evaluate.main(
            [
                *("--shards", str(shards), "--cache", str(folder / "cache"), "--workers", "0"),
                *("--out", str(folder / f"{name}.json"), "--search.top_k", "6", "--adapters", f"mine={adapter}"),
                *extra,
            ]
        )
    forget_accelerate()
    return folder


ROWS = ["base CLIP", "mine (pairwise)", "mine (pooled)"]
MINE = RowKey("mine", "pairwise")


def test_each_row_has_results_per_query(files):
    result, table = ResultFile.load_json(files / "whole.json"), load_queries(files / "whole.npz")
    assert [row.name for row in result.rows] == ROWS
    assert list(table) == [(row.key, d) for row in result.rows for d in ("i2t", "t2i")]
    for row in result.rows:
        for direction in ("i2t", "t2i"):
            queries, figures = table[row.key, direction], getattr(row, direction)
            assert recalls(torch.from_numpy(queries.ranks)) == figures.recall
            assert np.take_along_axis(queries.scores, queries.order(), 1)[0].tolist() == sorted(
                queries.scores[0].tolist(), reverse=True
            )
            for k, (low, high) in figures.interval.items():
                assert low <= figures.recall[k] <= high and (high > low or figures.recall[k] in (0, 100))
        assert row.rsum_interval[0] < row.rsum < row.rsum_interval[1]
    plain, fused = (load_queries(files / name)[MINE, "t2i"] for name in ("whole.npz", "fused.npz"))
    np.testing.assert_allclose(fused.scores, plain.scores + 3 * plain.first_scores, atol=1e-6)
    assert (fused.ranks != plain.ranks).any()
    assert not list(files.glob("*.partial"))


def test_intervals_are_in_the_csv_file_and_on_the_screen(files, capsys):
    with open(files / "whole.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    row = ResultFile.load_json(files / "whole.json").rows[1]
    assert float(lines[1]["t2i_low_R@5"]) == pytest.approx(row.t2i.interval[5][0], abs=0.005)
    assert float(lines[1]["Rsum_high"]) == pytest.approx(row.rsum_interval[1], abs=0.005)
    print_table(ResultFile.load_json(files / "whole.json"))
    out = capsys.readouterr().out
    assert "95 % interval" in out and f"±{(row.rsum_interval[1] - row.rsum_interval[0]) / 2:.1f}" in out


def test_figures_of_folds_are_means_of_their_galleries(files):
    result, table = ResultFile.load_json(files / "folds.json"), load_queries(files / "folds.npz")
    assert result.protocol["folds"] == 3
    whole = load_queries(files / "whole.npz")
    for row in result.rows:
        for direction in ("i2t", "t2i"):
            queries = table[row.key, direction]
            fold = queries.images * 3 // 12
            expected = [100 * (queries.ranks[fold == f] < 1).mean() for f in range(3)]
            assert getattr(row, direction).recall[1] == pytest.approx(np.mean(expected))
    images = table[BASE, "t2i"]
    assert (images.candidates * 3 // 12 == (images.images * 3 // 12)[:, None]).all()
    assert (images.first_ranks <= whole[BASE, "t2i"].first_ranks).all()


def test_differences_are_those_of_the_rows(files):
    path = files / "whole.json"
    found = compare(path, "base CLIP", path, "mine (pairwise)", bootstrap=500)
    rows = {row.name: row for row in ResultFile.load_json(path).rows}
    table = load_queries(files / "whole.npz")
    by_figure = {d.figure: d for d in found.differences}
    assert len(by_figure) == 7
    for direction in ("i2t", "t2i"):
        for k in (1, 5, 10):
            d = by_figure[f"{direction} R@{k}"]
            before, after = (table[row, direction].ranks < k for row in (BASE, MINE))
            assert (d.a, d.b) == tuple(getattr(rows[row], direction).recall[k] for row in ROWS[:2])
            assert (d.fixed, d.broken) == (sum(after > before), sum(before > after))
            assert d.b - d.a == pytest.approx(100 * (d.fixed - d.broken) / len(before))
            assert d.low <= d.b - d.a <= d.high and 0 <= d.p <= 1
    assert by_figure["Rsum"].b == rows["mine (pairwise)"].rsum
    assert any(d.fixed for d in found.differences) and any(d.broken for d in found.differences)


def test_a_row_equals_itself(files):
    path = files / "whole.json"
    for d in compare(path, ROWS[1], path, ROWS[1], bootstrap=50).differences:
        assert d.low == d.high == 0 and d.p == 1 and not d.fixed and not d.broken


def test_the_command_prints_and_writes(files, tmp_path, capsys):
    compare_command.main(
        ["--a", str(files / "whole.json"), "--b_row", ROWS[1], "--bootstrap", "100", "--out", str(tmp_path / "c.json")]
    )
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["a"] == "base CLIP" and len(content["differences"]) == 7
    for d in content["differences"]:
        assert f"{d['b'] - d['a']:+.1f}" in out


def test_other_queries_are_refused(files, tmp_path):
    with pytest.raises(AmpError, match="folds is 1 and 3, expected equal values"):
        compare(files / "whole.json", ROWS[0], files / "folds.json", ROWS[0])
    with pytest.raises(AmpError, match=r"several rows 'mine', expected one of 'base CLIP', 'mine \(pairwise\)'"):
        compare(files / "whole.json", ROWS[0], files / "whole.json", "mine")
    with pytest.raises(AmpError, match="expected per-query results"):
        (tmp_path / "alone.json").write_bytes((files / "whole.json").read_bytes())
        compare(tmp_path / "alone.json", ROWS[0], tmp_path / "alone.json", ROWS[1])


def test_both_sides_are_checked_before_a_sample_is_drawn(files, tmp_path, capsys):
    with pytest.raises(AmpError) as error:
        compare(tmp_path / "a.json", ROWS[0], tmp_path / "b.json", ROWS[0])
    assert [message.split(":")[0] for message in error.value.messages] == [f"{tmp_path}/a.json", f"{tmp_path}/b.json"]
    with pytest.raises(AmpError) as error:
        compare(files / "whole.json", "one", files / "whole.json", "two")
    assert ["no row 'one'" in error.value.messages[0], "no row 'two'" in error.value.messages[1]] == [True, True]
    with pytest.raises(SystemExit):
        compare_command.main(["--a", "none.json", "--b_row", "x", "--out", str(files / "whole.json" / "c.json")])
    assert "c.json: can't be written" in capsys.readouterr().err
    (tmp_path / "alone.json").write_bytes((files / "whole.json").read_bytes())
    with pytest.raises(AmpError) as error:  # the message names once what both files lack
        compare(tmp_path / "alone.json", ROWS[0], tmp_path / "alone.json", ROWS[1])
    assert str(error.value).count("alone.npz: can't be read") == 1


@pytest.mark.parametrize(("command", "key"), [(compare_command, "a"), (report, "results")])
def test_a_results_file_that_is_not_given(command, key, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([])
    assert ended.value.code == 2
    assert f"error: {key} is empty, expected a path; add --{key} PATH" in capsys.readouterr().err


def test_the_protocol_is_complete(files):
    protocol = ResultFile.load_json(files / "whole.json").protocol
    for key in (
        "split",
        "images",
        "captions",
        "captions_sha256",
        "top_k",
        "i2t",
        "prompt_prefix",
        "resize",
        "precision",
        "weights_sha256",
        "adapters",
        "knowledge",
        "versions",
        "tie_rule",
        "folds",
        "bootstrap",
        "fusion_weight",
        "skip_decided",
        "quick_gelu",
        "image_size",
    ):
        assert key in protocol, key


def test_settings():
    assert RetrievalSettings(folds=5).folds == 5
    with pytest.raises(AmpError, match="folds is 0"):
        RetrievalSettings(folds=0)
