"""tools/measure_step.py: what it counts as kept memory, and its table on a tiny base model."""

import csv

import torch
from helpers import launcher
from torch import nn

tool = launcher("tools/measure_step.py")


def test_kept_bytes_by_hand():
    """y = w2 relu(w1 x): autograd keeps x, and the output of relu once though two operations want it; no parameter."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    x = torch.randn(16, 4)
    result, kept = tool.kept_bytes(model, lambda: model(x).sum())
    assert kept == 4 * (16 * 4 + 16 * 8)
    result.backward()
    assert model[0].weight.grad is not None


def test_the_table_holds_every_way_of_conditioning(clip_folder, tmp_path):
    out = tmp_path / "step.csv"
    tool.main(["--model.name", clip_folder, "--model.pretrained", "null", "--prompt.triplet_heads", "4", "--step_batch",
               "4", "--values_of_m", "[1, 2]", "--repeats", "1", "--device", "cpu", "--out", str(out)])  # fmt: skip
    rows = list(csv.DictReader(out.open()))
    pairs = [(r["conditioning"], r["interaction"], r["m"], r["conditioned_pairs"]) for r in rows]
    assert pairs == [("none", "aim", "", "0"), ("paired", "aim", "", "4"), ("contrastive", "aim", "1", "12"),
                     ("contrastive", "aim", "2", "20"), ("contrastive", "readout", "", "16")]  # fmt: skip
    kept = [float(r["kept_MB"]) for r in rows]
    assert kept[0] <= kept[1] <= kept[2] < kept[3] and all(float(r["seconds"]) > 0 for r in rows)
