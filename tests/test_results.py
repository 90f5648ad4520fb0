"""Result rows: consistent figures, files that are read back equal, and the table."""

import csv
import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from amp.errors import AmpError
from amp.evaluate.per_query import QueryResults, load_queries, save_queries
from amp.evaluate.results import ResultFile
from amp.evaluate.results_table import print_table
from amp.files import write_atomically
from amp.report.page import table_of
from amp.report.plots import results_plot
from amp.retrieval.figures import BASE, DirectionResult, RetrievalRow, RowKey


def direction(r1: float, r5: float, r10: float, ceiling: float = 90.0, top_k: int = 20, seconds: float = 12.5):
    flat = dict.fromkeys((1, 5, 10), ceiling)
    return DirectionResult({1: r1, 5: r5, 10: r10}, flat, {1: 5.0, 5: 25.0, 10: 50.0}, 1000, top_k, seconds)


@pytest.fixture
def results():
    protocol = {
        "dataset": "flickr8k",
        "split": "test",
        "images": 1000,
        "captions": 5000,
        "model": "ViT-B-32",
        "top_k": 20,
        "fusion_weight": 0.0,
        "seed": None,
        "command": ["evaluate.py", "--naïve"],
    }
    rows = [
        RetrievalRow(BASE, direction(10.04, 30.0, 50.0), direction(11.123456789, 31.0, 51.0, seconds=400.0)),
        RetrievalRow(
            RowKey("action-aware [pairwise]", "ä"),
            direction(10.01, 33.0, 49.0),
            direction(12.0, 30.0, 55.0, seconds=400.0),
        ),
    ]
    return ResultFile(protocol, rows)


def printed(results: ResultFile, width: int = 100, colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    print_table(results, console)
    return console.file.getvalue()


def test_measure_by_hand():
    """Four queries, three candidates: found at rank 1, at rank 3, at rank 7 (no candidate), and two positives."""
    mask = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 1]]).bool()
    first = torch.tensor([0, 2, 7, 1])
    found = DirectionResult.measure(torch.tensor([1, 0, 7, 0]), first, mask, seconds=0.5)
    assert found.recall == {1: 50.0, 5: 75.0, 10: 100.0}
    assert found.ceiling == {1: 75.0, 5: 75.0, 10: 100.0}
    assert found.chance == {1: pytest.approx(100 / 4 * (1 / 3 + 1 / 3 + 0 + 2 / 3)), 5: 75.0, 10: 100.0}
    assert (found.queries, found.top_k, found.queries_per_second) == (4, 3, 8.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recall": {1: 95.0, 5: 95.0, 10: 95.0}}, r"recall@1 is 95.0, expected 0 <= recall <= ceiling \(90.0\)"),
        ({"recall": {1: float("nan"), 5: 1.0, 10: 2.0}}, "recall@1 is nan"),
        ({"ceiling": {1: 101.0, 5: 101.0, 10: 101.0}}, "<= 100"),
        ({"chance": {1: -0.1, 5: 1.0, 10: 2.0}}, "chance@1 is -0.1"),
        ({"recall": {1: 10.0, 5: 20.0}}, r"recall holds K = \[1, 5\], expected \[1, 5, 10\]"),
        ({"queries": 0}, "queries 0"),
        ({"seconds": 0.0}, "seconds is 0.0"),
    ],
)
def test_impossible_figures_are_refused(change, message):
    good = direction(10.0, 30.0, 50.0)
    with pytest.raises(AmpError, match=message):
        DirectionResult(**({name: getattr(good, name) for name in good.__dataclass_fields__} | change))


def test_json_comes_back_unrounded(results, tmp_path):
    path = results.save_json(tmp_path / "runs" / "demo" / "results.json")
    again = ResultFile.load_json(path)
    assert again == results
    assert [row.rsum for row in again.rows] == [pytest.approx(183.163456789), pytest.approx(189.01)]
    entry = json.loads(path.read_text(encoding="utf-8"))["rows"][0]
    assert entry["t2i"]["recall"] == {"R@1": 11.123456789, "R@5": 31.0, "R@10": 51.0}
    assert (entry["i2t"]["queries_per_second"], entry["rsum"]) == (80.0, results.rows[0].rsum)


def test_a_row_is_found_by_its_words_or_by_its_method(results):
    base, ours = results.rows
    grey = replace(ours, key=RowKey("ours", "pairwise", "grey"))
    result = ResultFile({}, [base, replace(ours, key=RowKey("ours", "pairwise")), grey])
    assert [result.find(words, "x").key for words in ("base CLIP", "ours (pairwise)", "ours, grey (pairwise)")] == [
        row.key for row in result.rows
    ]
    assert result.find("ours", "x").key == RowKey("ours", "pairwise")  # the only row that is not a probe
    result.rows.append(replace(ours, key=RowKey("ours", "pooled")))
    names = r"expected one of 'base CLIP', 'ours \(pairwise\)', 'ours, grey \(pairwise\)', 'ours \(pooled\)'"
    for words, problem in (("ours", "several rows"), ("theirs", "no row"), ("ours, grey", "no row")):
        with pytest.raises(AmpError, match=f"results: {problem} '{words}', {names}"):
            result.find(words, "results")


def test_rows_of_earlier_versions_have_a_name_only(results, tmp_path):
    path = results.save_json(tmp_path / "results.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    for row in content["rows"]:
        del row["method"], row["mode"], row["probe"]
    path.write_text(json.dumps(content), encoding="utf-8")
    old = ResultFile.load_json(path)
    assert old.rows[0].key == BASE and old.find(results.rows[1].name, path).key == RowKey(results.rows[1].name)
    empty = np.zeros((1, 1))
    query = QueryResults(np.zeros(1), np.zeros(1), empty, empty, empty, np.zeros(1), np.zeros(1))
    file = save_queries(tmp_path / "new.npz", {(results.rows[1].key, "t2i"): query})
    assert list(load_queries(file)) == [(results.rows[1].key, "t2i")]
    with np.load(file) as arrays:
        names = ["\t".join(["a (b)", *name.split("\t")[-2:]]) for name in arrays["names"]]
        np.savez(tmp_path / "old.npz", **{**arrays, "names": np.array(names)})
    assert list(load_queries(tmp_path / "old.npz")) == [(RowKey("a (b)"), "t2i")]


def test_csv_holds_one_line_per_row(results, tmp_path):
    path = results.save_csv(tmp_path / "results.csv")
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["base CLIP", "action-aware [pairwise] (ä)"]
    assert lines[0]["t2i_R@1"] == "11.12" and lines[1]["i2t_R@10"] == "49.00" and lines[0]["Rsum"] == "183.16"
    assert lines[0]["i2t_ceiling_R@1"] == "90.00" and lines[0]["t2i_chance_R@5"] == "25.00"
    assert (lines[0]["i2t_queries"], lines[0]["i2t_top_k"], lines[0]["i2t_queries_per_second"]) == ("1000", "20", "80")


def test_table_shows_rows_references_and_protocol(results):
    lines = [line.rstrip() for line in printed(results, width=80).splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["method", *["R@1", "R@5", "R@10"] * 2, "Rsum", "q/s", "q/s"]
    rows = [line.rsplit(maxsplit=9) for line in lines[2:4]] + [line.rsplit(maxsplit=7) for line in lines[4:]]
    table = {name.strip(): cells for name, *cells in rows}
    assert table["base CLIP"] == ["10.0", "30.0", "50.0", "11.1", "31.0", "51.0", "183.2", "80", "2.5"]
    # A name in brackets is not parsed as rich markup.
    assert table["action-aware [pairwise] (ä)"] == [
        "10.0",
        "33.0",
        "49.0",
        "12.0",
        "30.0",
        "55.0",
        "189.0",
        "80",
        "2.5",
    ]
    assert table["ceiling (top 20)"] == ["90.0"] * 6 + ["540.0"]
    assert table["chance (top 20)"] == ["5.0", "25.0", "50.0"] * 2 + ["160.0"]
    assert lines[-2:] == [
        "flickr8k · test · 1,000 images · 5,000 captions",
        "ViT-B-32 · top k 20 · fusion weight 0.0",
    ]


def bold_figures(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if name in line)
    return [part.split("\x1b")[0].strip() for part in line.split("\x1b[1m")[1:]]


def test_best_of_each_column_is_bold(results):
    text = printed(results, colour=True)
    assert bold_figures(text, "base CLIP") == ["10.0", "50.0", "31.0"]
    assert bold_figures(text, "action-aware") == ["10.0", "33.0", "12.0", "55.0", "189.0"]  # both rounded to 10.0
    assert bold_figures(text, "ceiling") == []
    assert bold_figures(printed(ResultFile({}, results.rows[:1]), colour=True), "base CLIP") == []


def test_each_preselection_has_its_references(results):
    results.rows.append(
        RetrievalRow(RowKey("larger CLIP"), direction(1.0, 2.0, 3.0, 99.0, 16), direction(1.0, 2.0, 3.0, 99.0))
    )
    text = printed(results, width=120)
    assert "ceiling (top 20, base CLIP)" in text and "ceiling (top 16/20, larger CLIP)" in text
    assert text.count("ceiling") == 2


def test_an_interval_of_rsum_alone_is_left_out(results, tmp_path):
    results.rows = [replace(row, rsum_interval=(200.0, 210.0)) for row in results.rows]
    found = ResultFile.load_json(results.save_json(tmp_path / "results.json"))
    assert "±" not in printed(found)
    assert results_plot(found) is None
    assert all(row["bounds"] is None for row in table_of(found))


def test_empty_results_print_and_save(tmp_path):
    empty = ResultFile({})
    assert "Rsum" in printed(empty)
    assert ResultFile.load_json(empty.save_json(tmp_path / "empty.json")) == empty
    assert empty.save_csv(tmp_path / "empty.csv").read_text() == "method\n"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, "can't be read"),
        (lambda content: "{", "not JSON"),
        (lambda content: "[]", "format and version are list"),
        (lambda content: json.dumps(content | {"version": 9}), r"\('open-clip-amp retrieval results', 9\), expected"),
        (lambda content: json.dumps(content | {"rows": [{"name": "x"}]}), r"rows\[0\]: key 'i2t' is missing"),
        (lambda content: json.dumps(content).replace('"R@1": 10.04', '"R@1": 98'), r"rows\[0\]: recall@1 is 98"),
        (lambda content: json.dumps(content).replace('"R@1": 10.04', '"R@1": "much"'), r"rows\[0\]: .*much"),
        (lambda content: json.dumps(content | {"rows": 3}), "rows: "),
        (lambda content: json.dumps(content | {"protocol": 3}), "protocol: "),
    ],
)
def test_bad_files_are_named(results, tmp_path, spoil, message):
    path = tmp_path / "results.json"
    if spoil:
        path.write_text(spoil(json.loads(results.save_json(path).read_text(encoding="utf-8"))), encoding="utf-8")
    with pytest.raises(AmpError, match=message) as error:
        ResultFile.load_json(path)
    assert str(path) in str(error.value) and "amp evaluate" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_protocol_must_be_json(results, tmp_path, value):
    results.protocol["precision"] = value
    with pytest.raises(AmpError, match=r"results\.json: the protocol contains a value that can't be stored as JSON"):
        results.save_json(tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "file", b"old")

    def cut(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_unwritable_path_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AmpError, match=r"file/results\.csv: can't be written"):
        write_atomically(tmp_path / "file" / "results.csv", b"")
