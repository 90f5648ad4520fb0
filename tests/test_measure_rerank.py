"""tools/measure_rerank.py: its loops agree on a tiny base model, and its counts are those of the work."""

import gc
import json
import time

import pytest
import torch
from helpers import launcher

from amp.config import PromptConfig
from amp.train.config import ModelSettings

tool = launcher("tools/measure_rerank.py")


def test_gflop_by_hand():
    x, y = torch.randn(30, 20), torch.randn(20, 10)
    assert tool.gflop(lambda: x @ y) == pytest.approx(2 * 30 * 20 * 10 / 1e9)


def test_loops_agree_and_are_written(clip_folder, tmp_path, capsys):
    out = tmp_path / "rerank.json"
    tool.main(["--model.name", clip_folder, "--model.pretrained", "null", "--prompt.triplet_heads", "4", "--images",
               "12", "--top_k", "5", "--naive_queries", "2", "--galleries", "[]", "--device", "cpu", "--out",
               str(out)])  # fmt: skip
    result = json.loads(out.read_text())
    assert [row["interaction"] for row in result["speed"]] == ["aim", "readout"]
    for row in result["speed"]:
        assert set(row["pairs_a_second"]) == set(tool.LOOPS)
        assert row["gflop_a_pair"][tool.ENGINE] < row["gflop_a_pair"][tool.PER_PAIR]
    assert result["memory"] == []


def test_peak_memory_is_what_was_held():
    gc.collect()
    memory = tool.PeakMemory()
    held = torch.ones(75_000_000)  # 300 MB
    time.sleep(0.5)
    del held
    assert 250 < memory.stop() < 400


def test_memory_of_a_gallery_is_measured(clip_folder):
    found = []
    queue = type("Queue", (), {"put": staticmethod(found.append)})
    measurement = tool.Measurement(top_k=5, memory_queries=4)
    tool.memory_of_gallery(ModelSettings(clip_folder, None), PromptConfig(triplet_heads=4), measurement, 50, queue)
    ((first, rerank),) = found
    assert first < 200 and rerank < 200


def test_loops_that_disagree_are_told(clip_folder, monkeypatch, capsys):
    real = tool.rerank_scores
    monkeypatch.setattr(tool, "rerank_scores", lambda *given: real(*given) + 1e-3)
    with pytest.raises(SystemExit):
        tool.main(["--model.name", clip_folder, "--model.pretrained", "null", "--prompt.triplet_heads", "4", "--images",
                   "6", "--top_k", "2", "--naive_queries", "1", "--device", "cpu"])  # fmt: skip
    assert "differ by" in capsys.readouterr().err
