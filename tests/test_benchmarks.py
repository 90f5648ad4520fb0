"""The benchmarks: timing, counted work, and that all methods of a comparison do the same work."""

import gc
import json
import multiprocessing
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.language_models import tiny_language_model
from support.repository import ROOT
from support.scripted_model import scripted_model
from torch import nn

from amp.errors import AmpError
from amp.generation.engines.base import find_engine
from amp.generation.prompts import load_template
from amp.generation.replies import parse_triplet_lines, triplet_line
from amp.generation.score import GoldCaption
from amp.knowledge.schema import Knowledge
from amp.model.adapter import save_adapter
from amp.model.config import PromptConfig
from amp.model.factory import create_model_and_transforms
from amp.train.stages import set_trainable
from benchmarks import (
    combinations,
    conversion,
    engines,
    evaluation,
    generation,
    memory,
    onnx,
    photos,
    prompts,
    rerank,
    rerankers,
    run,
    scaling,
    scores,
    search,
    startup,
    step,
    stream,
    tables,
    timing,
    writers,
)
from benchmarks.models import READ_LAST, build, drawn_captions
from benchmarks.naive import NaiveAIM, plain_prompt_tuning
from benchmarks.settings import Settings

pytestmark = pytest.mark.system


@pytest.fixture
def base(clip_folder):
    model, _, _ = create_model_and_transforms(clip_folder, None, prompt_config=PromptConfig())
    return model


def test_rates_by_hand(monkeypatch):
    """The methods take turns, in alternating order; a ratio is the median of the ratios of all rounds."""
    clock, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def way(name, seconds):
        def work():
            order.append(name)
            clock[0] += seconds.pop(0)
            return 6

        return work

    rates = timing.in_turns({"a": way("a", [9, 1, 2, 3]), "b": way("b", [9, 2, 3, 12])}, 3)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert rates == {"a": [6, 3, 2], "b": [3, 2, 0.5]}
    assert timing.ratio(rates, "a", "b") == 2
    assert timing.medians(rates)["a"] == {"median": 3, "least": 2, "most": 6}


def test_kept_bytes_by_hand():
    """y = w2 relu(w1 x): autograd keeps x and, once for two operations, the output of relu. Parameters don't count."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    x = torch.randn(16, 4)
    result, kept = memory.kept_bytes(model, lambda: model(x).sum())
    assert kept == 4 * (16 * 4 + 16 * 8)
    result.backward()
    assert model[0].weight.grad is not None


def test_peak_memory_is_what_was_held():
    def hold():
        held = torch.ones(75_000_000)  # 300 MB
        time.sleep(0.5)
        return len(held)

    gc.collect()
    count, peak = memory.peak_mb(hold)
    assert count == 75_000_000 and 250 < peak < 400


def test_gflop_by_hand():
    x, y = torch.randn(30, 20), torch.randn(20, 10)
    assert step.gflop(lambda: x @ y) == pytest.approx(2 * 30 * 20 * 10 / 1e9)


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_the_equations_are_what_the_model_computes(base, layer):
    model = build(base, layer, max_triplets=3).eval()
    images = torch.randn(2, 3, *model.backbone.visual.image_size)
    captions, items = drawn_captions(2, 3)
    naive = NaiveAIM(model)
    expected = model.encode_image(images, items)
    for n in range(2):
        torch.testing.assert_close(naive.encode_pair(images[n], items[n]), expected[n], rtol=0, atol=2e-5)
    torch.testing.assert_close(naive.encode_text(captions), model.encode_text(model.tokenizer(captions)))
    control = build(base, layer, knowledge="none").eval()
    features = control.image_features(images)
    torch.testing.assert_close(plain_prompt_tuning(control, images), features, rtol=0, atol=2e-5)


def test_a_step_of_every_way(base):
    settings = Settings(step_batch=2, model_rounds=1, device="cpu")
    found = step.at_layer(base, 1, settings, max_triplets=3)
    assert set(found["rows"]) == {
        step.FROZEN,
        step.PLAIN,
        step.CONTROL,
        step.PAIRED,
        step.AIM,
        step.READOUT,
        step.NAIVE,
    }
    work = {name: row["gflop_per_image"] for name, row in found["rows"].items()}
    assert work[step.CONTROL] < work[step.PAIRED] < work[step.AIM] < work[step.NAIVE]
    rows = found["rows"][step.CONTROL]
    assert rows["kept_MB_by_hand"] < rows["kept_MB_per_image"]
    json.dumps(found)


def test_what_a_pass_keeps_by_hand():
    """Two prompted blocks of open_clip's ViT-S-32: width 384, 50 + 4 tokens; the last block computes only one token."""
    base = create_model_and_transforms("ViT-S-32", None)[0]
    control = build(base, 10, knowledge="none")
    set_trainable(control, 1)
    images = torch.randn(2, 3, 224, 224)
    early = control.tower.early(images)
    _, kept = memory.kept_bytes(control, lambda: control.interaction.image_features(control.tower, early))
    assert step.kept_by_hand(control) == 4 * 384 * (50 + control.config.num_prompts) * 13
    assert kept / 2 == pytest.approx(step.kept_by_hand(control), rel=0.05)


def test_sizes_by_hand(base):
    model = build(base, 1)
    found, header = step.sizes(model), 0.02
    trained = 4e-6 * sum(p.numel() for name, p in model.named_parameters() if not name.startswith("backbone."))
    assert found["trained_MB"] == pytest.approx(trained, rel=1e-3)
    assert trained < found["adapter_MB"] < trained + header
    assert 3 * trained < found["checkpoint_MB"] < 3 * trained + 2 * header


def test_loops_of_reranking_agree(base, monkeypatch):
    """In fp32, and in bf16, which processors with bf16 instructions use."""
    monkeypatch.setattr(rerank, "multiplies_bf16", lambda device: True)
    settings = Settings(rerank_images=6, top_k=2, naive_queries=2, model_rounds=1, device="cpu")
    for interaction, prompt in {"aim": {}, "readout": READ_LAST}.items():
        model = build(base, 1, max_triplets=3, **prompt).eval()
        loops = rerank.Loops(model, settings)
        assert len(loops.pairs_per_second()[rerank.ENGINE]) == 1
        assert (rerank.EQUATIONS in loops.ways) == (interaction == "aim")
        assert loops.gflop_per_pair(rerank.ENGINE) < loops.gflop_per_pair(rerank.PER_PAIR)
        assert loops.gflop_per_pair(rerank.ENGINE_BF16) == pytest.approx(loops.gflop_per_pair(rerank.ENGINE), rel=0.2)
    real = rerank.rerank_scores
    monkeypatch.setattr(rerank, "rerank_scores", lambda *given: real(*given) + 1e-3)
    with pytest.raises(Exception, match="differ by"):
        loops.pairs_per_second()


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Arguments of `make_shards` for sixteen drawn photos. Read-only."""
    return photos.given_or_drawn(tmp_path_factory.mktemp("photos"), None, 16)


def test_drawn_photos_are_as_heavy_as_photos(few):
    sizes = [path.stat().st_size for path in (ROOT / few["images"]).iterdir()]
    assert len(sizes) == 16 and 100_000 < sum(sizes) / 16 < 200_000  # like COCO: 640 x 480 in 150 kB


def test_streams_read_every_photo(few, tmp_path):
    settings = Settings(images=16, stream_batch=8, rounds=1, device="cpu")
    found = stream.run(settings, tmp_path / "work", few)
    assert found["images"] == 16
    for row in found["workers"].values():
        assert set(row["images_per_second"]) == {stream.RAW, stream.OURS, stream.PILLOW, stream.NORMALIZED}
        assert row["worker_MB"][stream.OURS] > 0


def test_conversions_write_every_photo(few, tmp_path):
    (tmp_path / "work").mkdir()
    found = conversion.run(Settings(rounds=1), tmp_path / "work", few)
    assert set(found["images_per_second"]) == {
        conversion.COPY,
        conversion.WRITER,
        conversion.DECODING_WRITER,
        conversion.OURS,
        conversion.DECODED,
    }


def test_the_plan_of_many_ranks_by_hand():
    """Ten images in shards of four, two ranks with two images each: two steps read 8 of the 10 images."""
    found = scaling.plan_of(2, images=10, batch=2, window=3)
    assert (found["steps"], found["left_out"], found["read_twice"]) == (2, 2, 0)
    assert found["ranks_with_as_many_steps"] == 2


def test_every_rank_of_a_cluster_reads_its_own_part_of_coco():
    found = scaling.plan_of(64)
    assert found["read_twice"] == 0 and found["ranks_with_as_many_steps"] == 64
    assert found["left_out"] < 64 * 64 and found["shards_in_a_batch"] <= 64


@pytest.mark.slow
def test_two_ranks_take_their_steps(clip_folder):
    settings = Settings(model=clip_folder, step_batch=2, model_rounds=1, device="cpu")
    assert scaling.real_ranks(settings, 2)["images_per_second"] > 0


def test_the_roofline_counts_work():
    found = scaling.roofline()
    assert found["TFLOP_late"] > 0.5 * found["TFLOP_early"]
    assert found["ms_per_step"] == pytest.approx(
        1e3 * (found["TFLOP_early"] + found["TFLOP_late"]) / (0.4 * 989), rel=1e-3
    )


def test_generation_says_the_same_all_four_ways(tmp_path, smollm2):
    model = tiny_language_model(tmp_path / "model", smollm2, "llama")
    captions = ["A dog runs", "A man rides a horse on the beach", "A dog runs", "Two cats"]
    found = generation.run(
        Settings(language_model=str(model), max_tokens=8, naive_captions=3, model_rounds=1), captions
    )
    assert (found["captions"], found["different"], found["same_text"]) == (4, 3, 3)
    assert list(found["captions_per_second"]) == [
        generation.PLAIN,
        generation.PREFIX,
        generation.BATCHES,
        generation.ONCE,
    ]


def test_the_command_line_writes_figures_and_names_what_it_does_not_know(tmp_path, capsys):
    out = tmp_path / "figures.json"
    run.main(["--only", "[conversion]", "--images", "4", "--rounds", "1", "--out", str(out)])
    assert "make_shards" in capsys.readouterr().out  # the table of the benchmark
    found = json.loads(out.read_text())["conversion"]
    assert found["images"] == 4 and found["machine"]["torch"] == torch.__version__ and found["peak_resident_MB"] > 0
    with pytest.raises(SystemExit):
        run.main(["--only", "[speed]", "--out", str(out)])
    assert "expected some of stream" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Copies of the release's figures and page in the working folder of a run. The benchmarks themselves aren't run."""
    for path in (run.RECORD, run.PAGE):
        (tmp_path / path).parent.mkdir()
        shutil.copy(ROOT / path, tmp_path / path)
    monkeypatch.chdir(tmp_path)
    figures = json.loads(run.RECORD.read_text())

    def measure(name, arguments):
        if name == "rerank":
            raise AmpError("benchmark rerank ended with an error")
        if name == "scaling":
            raise KeyboardInterrupt
        return {**figures[name], "minutes": 77.5}

    monkeypatch.setattr(run, "in_own_process", measure)
    return {path: path.read_text() for path in (run.RECORD, run.PAGE)}


def test_measured_parts_survive_a_failure_and_an_interruption(released, capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "[step, rerank, evaluation]"])
    found = json.loads(Path("runs/benchmark.json").read_text())
    assert list(found) == ["step", "evaluation"] and found["step"]["minutes"] == 77.5
    printed = capsys.readouterr()
    assert "rerank ended with an error" in printed.err and "queries/s" in printed.out
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.main(["--only", "[conversion, scaling, stream]"])
    assert list(json.loads(Path("runs/benchmark.json").read_text())) == ["step", "evaluation", "conversion"]
    assert released == {path: path.read_text() for path in released}


def test_only_a_recorded_run_writes_the_page_and_keeps_its_other_rows(released):
    run.main(["--only", "[step]", "--record", "true"])
    page, figures = run.PAGE.read_text(), json.loads(run.RECORD.read_text())
    before = released[run.PAGE].splitlines()
    new = [(old, line) for old, line in zip(before, page.splitlines(), strict=True) if line != old]
    assert len(new) == 1 and new[0][0].startswith("| step |") and "| 77.5 |" in new[0][1]
    assert figures["step"]["minutes"] == 77.5 and list(figures) == list(json.loads(released[run.RECORD]))
    assert not Path("runs").exists()


@pytest.mark.slow
def test_an_evaluation_from_end_to_end(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "DRAWN", 4)
    found = evaluation.run(Settings(model=clip_folder, top_k=2, device="cpu"))
    assert (found["images"], found["captions"], found["pairs"]) == (4, 20, 48)
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_the_page_shows_the_figures_of_the_run():
    page, figures = ROOT / "docs/performance.md", ROOT / "results/benchmark.json"
    assert tables.fill(page.read_text(), json.loads(figures.read_text())) == page.read_text()


def test_startup_reads_the_first_batch_and_prepares(tmp_path, monkeypatch):
    forkserver = multiprocessing.get_context("forkserver")  # it has imported torch
    monkeypatch.setattr(startup.multiprocessing, "get_context", lambda method: forkserver)
    monkeypatch.setattr(startup, "SHARD", 100)
    monkeypatch.setattr(startup, "simulated", partial(startup.simulated, workers=8, items=40, seconds=0.02))
    startup.main([200], prepared=100, rounds=1, out=tmp_path / "startup.json", folder=tmp_path)
    found = json.loads((tmp_path / "startup.json").read_text())
    (row,) = found["start"]
    assert row["samples"] == 200 and 0 < row["data_seconds"] < row["seconds"] and row["MB"] > 100
    prepared = found["prepare"]
    assert {*prepared} == {"1", "2", "simulated"} and all(prepared[n]["captions_per_second"] > 0 for n in "12")
    assert prepared["simulated"]["time_over_even_division"] >= 1


def test_the_table_of_onnx_graphs_is_that_of_the_run():
    found = json.loads((ROOT / "results/onnx.json").read_text())
    assert "\n".join(onnx.lines(found)) in (ROOT / "docs/sharing.md").read_text()


@pytest.mark.slow
def test_onnx_graphs_and_pytorch_score_the_same_pairs(shards, clip_folder, tmp_path):
    from amp.data.split import ShardSplit
    from amp.retrieval.scorer import PairScorer

    model, _, preprocess = create_model_and_transforms(clip_folder, None, prompt_config=PromptConfig(num_prompts=0))
    with torch.no_grad():
        model.interaction.readout.out.weight.normal_(std=0.1)
    save_adapter(tmp_path / "adapter.safetensors", model)
    onnx.main(tmp_path / "adapter.safetensors", shards, images=6, rounds=1, out=tmp_path / "onnx.json")
    found = json.loads((tmp_path / "onnx.json").read_text())["variants"]
    assert found["PyTorch"]["recall"] == found["ONNX"]["recall"]
    assert all(rate["median"] > 0 for variant in found.values() for rate in variant["per_second"].values())
    assert sum(found["ONNX, int8"]["MB"].values()) < 0.5 * sum(found["ONNX"]["MB"].values())

    split = ShardSplit(shards, "test")
    data = onnx.read(model.eval(), preprocess, split, onnx.first_images(split, 6))
    pairs, texts = onnx.Pairs(onnx.torch_graphs(model), data), data.captions.texts
    with torch.no_grad():
        early = model(torch.from_numpy(data.pixels)).early
        text = model.encode_text(model.tokenizer(texts))
    scorer = PairScorer(model, early, model.prepare_knowledge(data.captions.knowledge), text)
    images, captions = torch.arange(6), torch.full((6,), 2)
    assert pairs(images.numpy(), captions[:1].numpy()) == pytest.approx(scorer(images, captions).numpy(), abs=1e-5)
    many = torch.arange(len(texts))
    expected = scorer(torch.full_like(many, 3), many).numpy()
    assert pairs(np.array([3]), many.numpy()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_every_way_gives_the_same_scores(shards, clip_folder, tmp_path):
    model, _, _ = create_model_and_transforms(clip_folder, None, prompt_config=PromptConfig(num_prompts=0))
    with torch.no_grad():
        model.interaction.readout.out.weight.normal_(std=0.1)
    save_adapter(tmp_path / "adapter.safetensors", model)
    scores.main(tmp_path / "adapter.safetensors", shards, 4, tmp_path / "scores.json")
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["pairs"] == 16 and found["spread"] > 1e-3 and len(found["greatest_difference"]) == 8
    for way, difference in found["greatest_difference"].items():
        assert difference <= {"ONNX, int8": 0.1, "rank, states in int8": 1e-3}.get(way, 1e-4), way


def test_searches_are_timed(shards, clip_folder, tmp_path, capsys):
    model, _, _ = create_model_and_transforms(clip_folder, None, prompt_config=PromptConfig(num_prompts=0))
    save_adapter(tmp_path / "adapter.safetensors", model)
    photos, out = shards.parent / "images", tmp_path / "search.json"
    search.main(tmp_path / "adapter.safetensors", photos, shards, 3, large=50, index=tmp_path / "index", out=out)
    found = json.loads(out.read_text())
    count = len(list(photos.iterdir()))
    assert found["index"]["photos"] == count and found["index"]["seconds"] > 0
    assert found["large"]["photos"] == 50 > count
    assert all(x["p95_ms"] >= x["median_ms"] > 0 for x in (*found["latency"].values(), found["large"]["latency"]))
    assert found["recall"]["exact"] == found["recall"]["fp16"] and 0 < found["recall"]["int8"]["t2i"]["10"] <= 100


def test_engines_are_timed_and_compared(tmp_path):
    pytest.importorskip("openai", reason='needs openai: pip install "open-clip-amp[generate]"')
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    with scripted_model() as model:
        model.delay = 0.1
        options = {"base_url": model.url, "concurrency": 1}
        engines.main("openai", "scripted", options, limit=4, out=first)
        changed = json.loads(first.read_text())
        changed["replies"]["triplets"]["2"] = "none"
        first.write_text(json.dumps(changed))
        engines.main("openai", "scripted", options, limit=4, against=first, out=second)
    found = json.loads(second.read_text())
    assert (found["triplets"]["same_replies"], found["states"]["same_replies"]) == (3, 4)
    for stage in ("triplets", "states"):
        assert found[stage]["captions"] == 4 and 0.4 <= found[stage]["seconds"] < 3
        assert (found[stage]["tokens_per_caption"], found[stage]["prompt_tokens_per_caption"]) == (7, 9)
    with pytest.raises(AmpError, match="engine is 'rules', which is no language model"):
        engines.main("rules", "")


def test_prompts_are_scored(tmp_path, capsys):
    """The model's own triplets are the labels of the first caption; the label of the second is another triplet."""
    pytest.importorskip("openai", reason='needs openai: pip install "open-clip-amp[generate]"')
    labels = tmp_path / "labels.yaml"
    found = {}
    with scripted_model() as model:
        options = {"base_url": model.url, "constrained": "none"}
        loaded = find_engine("openai")(model="scripted", **options)
        captions = [GoldCaption(f"A dog runs to house {number}", (), ()) for number in range(8)]
        for label, reply in zip(captions, prompts.triplets_of(loaded, load_template(), captions), strict=True):
            if reply.triplets:
                found[label.caption] = [triplet_line(triplet) for triplet in reply.triplets]
        first, second, *_ = found
        wrong = ["action: house | runs to | dog"]
        content = [{"caption": first, "triplets": found[first]}, {"caption": second, "triplets": wrong}]
        labels.write_text(json.dumps(content))
        prompts.main("openai", "scripted", [None], options, labels)
    row = capsys.readouterr().out.splitlines()[-1].split()
    hits, made = len(found[first]), len(found[first]) + len(found[second])
    assert row[-1] == "None" and float(row[0]) == pytest.approx(2 * hits / (made + hits + 1), abs=5e-4)
    with pytest.raises(AmpError, match="engine is 'rules', which reads no template"):
        prompts.main("rules", "", [None])


def test_combinations_by_hand(tmp_path, monkeypatch, capsys):
    """The rules find one of three labels; the model finds another one, a wrong action and a wrong attribute."""
    lines = {
        "rules": ["action: dog | jumps | -", "action: dog | sits | -"],
        "model": [
            "action: dog | jumped | -",
            "action: dog | chases | ball",
            "action: dog | lawn | -",
            "attribute: ball | is | green",
        ],
        "gold": ["action: dog | jumps | -", "action: dog | chases | ball", "attribute: ball | is | red"],
    }
    found = {name: parse_triplet_lines(own) for name, own in lines.items()}
    for name in ("rules", "model"):
        knowledge = Knowledge(tuple(found[name]), ("It is so",) * len(found[name])).to_dict()
        (tmp_path / name).write_text(json.dumps({"caption": "c", **knowledge}) + "\n")
    monkeypatch.setattr(combinations, "load_gold", lambda: [GoldCaption("c", tuple(found["gold"]), ())])
    combinations.main(tmp_path / "rules", tmp_path / "model")
    printed = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    counts = [(1, 2), (2, 4), (2, 5), (2, 4), (2, 4), (2, 3), (1, 2), (1, 2), (1, 1)]  # hits, found
    expected = [(hits / found, hits / 3, 2 * hits / (found + 3)) for hits, found in counts]
    assert printed == [[f"{value:.3f}" for value in row] for row in expected]
    monkeypatch.setattr(combinations, "load_gold", lambda: [])
    with pytest.raises(AmpError, match="share no labelled caption"):
        combinations.main(tmp_path / "rules", tmp_path / "model")


def test_rerankers_are_timed(clip_folder, tmp_path, monkeypatch, capsys):
    for name, small in {"MODEL": clip_folder, "SIZE": 32, "PATCH": 8, "WIDTH": 24, "LAYERS": 2}.items():
        monkeypatch.setattr(rerankers, name, small)
    rerankers.main([2, 3], rounds=1, out=tmp_path / "rerankers.json")
    found = json.loads((tmp_path / "rerankers.json").read_text())
    rows = [(row["reranker"], row["candidates"]) for row in found["seconds"]]
    assert rows == [(name, count) for count in (2, 3) for name in rerankers.RERANKERS]
    assert all(row["stored"] > 0 and row["not_stored"] > 0 for row in found["seconds"])
    assert found["bytes_per_image"]["BLIP, matching head"] == 4 * 24 * (1 + 16)


def test_captions_and_wrong_knowledge_for_writers(tmp_path):
    """One caption per chosen photo; shuffled knowledge keeps the places, and no record keeps its own."""
    images = [{"filename": f"{n}.jpg", "split": "train" if n < 6 else "test"} for n in range(10)]
    for number, image in enumerate(images):
        image["sentences"] = [{"raw": f"caption {number} {place}", "sentid": 2 * number + place} for place in range(2)]
    (tmp_path / "all.json").write_text(json.dumps({"dataset": "test", "images": images}))
    (tmp_path / "known.txt").write_text("0.jpg\n1.jpg\n")
    out = tmp_path / "captions.csv"
    writers.captions(str(tmp_path / "all.json"), out, tmp_path / "known.txt", train=3, test=2)
    rows = [line.split(",") for line in out.read_text().splitlines()[1:]]
    assert [row[2] for row in rows] == ["train"] * 3 + ["test"] * 2 and len({row[0] for row in rows}) == 5
    assert not {"0.jpg", "1.jpg"} & {row[0] for row in rows}
    assert all(row[1].startswith(f"caption {row[0][0]} ") for row in rows)

    records = [{"sentid": n, "image": f"{n}.jpg", "caption": f"c{n}", "triplets": [n], "states": [n]} for n in range(5)]
    (tmp_path / "knowledge.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    writers.shuffle(tmp_path / "knowledge.jsonl", tmp_path / "shuffled.jsonl")
    found = [json.loads(line) for line in (tmp_path / "shuffled.jsonl").read_text().splitlines()]
    assert [(r["sentid"], r["caption"]) for r in found] == [(r["sentid"], r["caption"]) for r in records]
    known = [record["triplets"][0] for record in found]
    assert sorted(known) == list(range(5)) and all(own != other for own, other in enumerate(known))


def test_plot_of_writers(tmp_path):
    """Means over seeds, and their standard errors worked by hand."""
    metrics = ("i2t R@1", "t2i R@1")
    rows = [
        f"{row},{metric},{10 + n},0.5" for n, row in enumerate(("base CLIP", "rules", "not run")) for metric in metrics
    ]
    (tmp_path / "results.csv").write_text("\n".join(["row,metric,mean,standard_error", *rows[:4], "not run,Rsum,,"]))
    methods = (("base CLIP", 50), ("rules 0", 60), ("rules 1", 70))
    tests = [
        f"{test},{method},{group},{right}"
        for test in writers.MEASURES[1]
        for method, right in methods
        for group in ("all", "play")
    ]
    (tmp_path / "choices.csv").write_text("\n".join(["test,method,group,accuracy", *tests]))
    points = writers.read_points(tmp_path / "results.csv", tmp_path / "choices.csv")
    assert points["rules"] == {metric: (11, 0.5) for metric in metrics} | dict.fromkeys(writers.MEASURES[1], (65, 5))
    assert points["base CLIP"]["swapped-roles"] == (50, 0) and set(points) == {"base CLIP", "rules"}
    files = (tmp_path / "results.csv", tmp_path / "choices.csv")
    writers.plot(*files, {"rules": 0.9}, tmp_path / "plot.png", ["base CLIP"])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AmpError, match=r"results.csv: has no row 'rule', expected one of base CLIP, rules; check --f1"):
        writers.plot(*files, {"rule": 0.9}, tmp_path / "plot.png")
