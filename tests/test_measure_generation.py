"""The measurement of generation on a tiny model: all four ways say the same, and repeats are told."""

import json

from helpers import launcher
from test_transformers_engine import tiny_model


def test_four_ways(tmp_path, smollm2, capsys):
    captions = tmp_path / "captions.csv"
    rows = ["a.jpg,A dog runs", "b.jpg,A man rides a horse on the beach", "c.jpg,A dog runs", "d.jpg,Two cats"]
    captions.write_text("image,caption\n" + "\n".join(rows) + "\n")
    model = tiny_model(tmp_path / "model", smollm2, "llama")
    arguments = ["--captions", str(captions), "--model", str(model), "--count", "4", "--max_tokens", "8"]
    launcher("tools/measure_generation.py").main([*arguments, "--out", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["captions"], figures["different"], figures["same_text"]) == (4, 3, 4)
    assert list(figures["seconds"]) == ["plain call", "+ shared prefix", "+ batches", "+ each caption once"]
    assert all(seconds > 0 for seconds in figures["seconds"].values())
    assert "4 of 4 replies the same" in " ".join(capsys.readouterr().out.split())
