"""Re-ranked retrieval compared with a naive loop: one query, one candidate and one forward pass at a time."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from support.equations.search import search_split
from support.evaluation import TOP_K, World, ranked
from support.processes import forget_accelerate, run_ranks

import amp
from amp.commands.evaluate import main, parser
from amp.commands.measuring import read_command_line
from amp.data.split_captions import SplitCaptions
from amp.errors import AmpError
from amp.evaluate.adapters import (
    Adapter,
    base_of,
    cache_dtype_of,
    kinds_of,
    load_adapters,
    read_adapters,
    shards_of,
)
from amp.evaluate.per_query import load_queries
from amp.evaluate.results import ResultFile
from amp.evaluate.results_table import protocol_lines
from amp.evaluate.settings import BaseSettings, EvaluationSettings
from amp.model.adapter import AdapterHeader, read_adapter
from amp.retrieval.metrics import recalls
from amp.retrieval.split_search import SplitSearch, spaced
from amp.terminal import Terminal


@pytest.fixture(scope="module")
def aware(clip_folder, shards, cache_folder):
    return World(clip_folder, shards, cache_folder)


@pytest.fixture(scope="module")
def control(clip_folder, shards, cache_folder):
    return World(clip_folder, shards, cache_folder, knowledge="none")


def assert_same(ranking, expected):
    scores, ranks = expected
    torch.testing.assert_close(ranking.scores, scores, rtol=0, atol=1e-5)
    assert ranking.ranks.tolist() == ranks.tolist()
    assert ranking.result.recall == recalls(ranks)
    assert ranking.result.queries == len(ranks)


def test_knowledge_aware_ranking_equals_the_naive_loop(aware):
    rankings = ranked(aware.retrieval(batch_size=7), aware.model)
    assert list(rankings) == ["t2i", "i2t pairwise", "i2t pooled"]
    for name, ranking in rankings.items():
        assert_same(ranking, search_split(aware, name, top_k=TOP_K))
        # Re-ranking moved positives, and conditioning spreads the scores; otherwise the comparison would be trivial.
        assert (ranking.ranks != ranking.first.ranks).sum() > 2, name
        assert ranking.scores.std() > 1e-2, name


def test_autocast_changes_scores_by_its_rounding_alone(aware):
    """On processors with bf16 instructions, evaluation uses autocast (`mixed_precision: auto`)."""
    rankings = ranked(aware.retrieval(batch_size=7), aware.model, partial(torch.autocast, "cpu", torch.bfloat16))
    for name, expected in ranked(aware.retrieval(batch_size=7), aware.model).items():
        assert rankings[name].scores.dtype == torch.float32
        difference = (rankings[name].scores - expected.scores).abs()
        assert 0 < difference.max() < 3e-2 and difference.mean() < 5e-3


def test_pooled_and_pairwise_conditioning_differ(aware):
    rankings = ranked(aware.retrieval(), aware.model)
    assert (rankings["i2t pooled"].scores - rankings["i2t pairwise"].scores).abs().max() > 1e-3


def test_the_control_ranks_with_one_feature_an_image(control):
    rankings = ranked(control.retrieval(batch_size=5), control.model)
    assert list(rankings) == ["t2i", "i2t"]
    for name, ranking in rankings.items():
        assert_same(ranking, search_split(control, name, top_k=TOP_K))


def test_fewer_candidates_than_top_k(aware):
    world, top_k = aware, 500  # the whole gallery is re-ranked
    rankings = ranked(world.retrieval(top_k=top_k, i2t=["pooled"]), world.model)
    for name, size in (("t2i", 12), ("i2t pooled", len(world.captions.texts))):
        scores, ranks = search_split(world, name, top_k)
        assert rankings[name].scores.shape == (len(ranks), size)
        assert_same(rankings[name], (scores, ranks))


def test_fusion_adds_the_first_stages_score(aware):
    ranking = ranked(aware.retrieval(fusion_weight=5.0), aware.model)["t2i"]
    assert_same(ranking, search_split(aware, "t2i", top_k=TOP_K, fusion_weight=5.0))
    assert ranking.ranks.tolist() != ranked(aware.retrieval(), aware.model)["t2i"].ranks.tolist()


@pytest.mark.parametrize("batch_size", [1, 1000])
def test_the_batch_size_changes_nothing(aware, batch_size):
    expected = ranked(aware.retrieval(), aware.model)
    rankings = ranked(aware.retrieval(batch_size=batch_size), aware.model)
    for name, ranking in rankings.items():
        torch.testing.assert_close(ranking.scores, expected[name].scores, rtol=0, atol=1e-5)
        assert torch.equal(ranking.ranks, expected[name].ranks)


def test_decided_queries_can_be_skipped(aware):
    whole = ranked(aware.retrieval(top_k=3), aware.model)
    totals = []
    retrieval = aware.retrieval(top_k=3, skip_decided=True)
    some = ranked(retrieval, aware.model, progress=lambda done, total: totals.append(total) if done == total else None)
    pairs = dict(zip(some, totals, strict=True))
    assert list(some) == list(whole)
    for name, ranking in some.items():
        decided = ranking.first.ranks >= 3  # no positive among the candidates
        assert 0 < decided.sum() < len(decided)
        assert torch.equal(ranking.ranks, whole[name].ranks) and ranking.result.recall == whole[name].result.recall
        torch.testing.assert_close(ranking.scores[~decided], whole[name].scores[~decided], rtol=0, atol=1e-5)
        assert not ranking.scores[decided].any()
        assert pairs[name] == int((~decided).sum()) * (1 if name == "i2t pooled" else 3)


def test_no_query_may_be_left_to_score(aware):
    """The only query has no positive among its candidates."""
    captions = aware.captions
    lost = int((aware.retrieval().first["t2i"].ranks > 0).nonzero()[0])
    order = [lost, *(i for i in range(len(captions.texts)) if i != lost)]
    captions = SplitCaptions(
        [captions.texts[i] for i in order], [captions.knowledge[i] for i in order], captions.image[order], 12
    )
    ranking = ranked(aware.retrieval(captions, top_k=1, max_queries=1, skip_decided=True), aware.model)["t2i"]
    assert ranking.ranks.tolist() == ranking.first.ranks.tolist() != [0]
    assert ranking.scores.tolist() == [[0.0]]


@pytest.mark.parametrize("chosen", [["pairwise"], ["pooled"]])
def test_only_the_asked_ways_of_conditioning_run(aware, chosen):
    retrieval = aware.retrieval(i2t=chosen)
    rankings = ranked(retrieval, aware.model)
    assert list(rankings) == ["t2i", f"i2t {chosen[0]}"]
    (row,) = retrieval.rows("ours", retrieval.rank(aware.model))
    assert row.key == ("ours", chosen[0], "") and row.name == f"ours ({chosen[0]})"
    assert row.t2i.recall == rankings["t2i"].result.recall
    assert row.i2t.recall == rankings[f"i2t {chosen[0]}"].result.recall


def test_rows_of_the_control_bear_its_name(control):
    retrieval = control.retrieval()
    assert [row.name for row in retrieval.rows("control", retrieval.rank(control.model))] == ["control"]


def test_the_base_row_equals_clip_benchmark(aware):
    by_image = [[] for _ in range(len(aware.split))]
    for text, image in zip(aware.captions.texts, aware.captions.image.tolist(), strict=True):
        by_image[image].append(text)
    loader = [(aware.images[low : low + 4], by_image[low : low + 4]) for low in range(0, 12, 4)]
    clip = aware.model.backbone.clip
    expected = zeroshot_retrieval.evaluate(
        clip, loader, aware.model.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    row = aware.retrieval().base_row()
    for k in (1, 5, 10):
        assert row.t2i.recall[k] == pytest.approx(100 * expected[f"image_retrieval_recall@{k}"], abs=1e-4)
        assert row.i2t.recall[k] == pytest.approx(100 * expected[f"text_retrieval_recall@{k}"], abs=1e-4)
    assert 0 < row.t2i.recall[5] < 100 and 0 < row.i2t.recall[5] < 100


def test_max_queries_search_the_whole_gallery_for_some(aware):
    count = 5
    whole = ranked(aware.retrieval(), aware.model)
    retrieval = aware.retrieval(max_queries=count)
    some = ranked(retrieval, aware.model)
    for name, ranking in some.items():
        total = len(whole[name].queries)
        chosen = torch.tensor([i * total // count for i in range(count)])
        assert torch.equal(ranking.queries, chosen)
        torch.testing.assert_close(ranking.scores, whole[name].scores[chosen], rtol=0, atol=1e-5)
        assert torch.equal(ranking.ranks, whole[name].ranks[chosen])
        assert torch.equal(ranking.first.candidates, whole[name].first.candidates[chosen])
    assert retrieval.base_row().t2i.queries == count


def test_spaced_indices():
    assert spaced(10, 0).tolist() == spaced(10, 10).tolist() == spaced(10, 99).tolist() == list(range(10))
    assert spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert spaced(25_010, 500).unique().numel() == 500


def test_captions_are_read_in_order_and_can_be_limited(aware):
    records = list(aware.split.records())
    assert aware.captions.images == len(records) == 12
    texts = [(c["text"], i) for i, record in enumerate(records) for c in record["captions"]]
    assert list(zip(aware.captions.texts, aware.captions.image.tolist(), strict=True)) == texts
    first = SplitCaptions.read(aware.split, ("action",), captions_per_image=1)
    assert first.texts == [record["captions"][0]["text"] for record in records]
    assert first.image.tolist() == list(range(12))
    assert {t.kind for item in first.knowledge for t in item.triplets} == {"action"}
    result = ranked(aware.retrieval(captions=first), aware.model)["t2i"].result
    assert result.queries == 12


def test_captions_without_knowledge_are_counted(aware, capsys):
    known = amp.Knowledge((amp.Triplet("dog", "runs", ""),), ("The dog runs",))
    replace(aware.captions, knowledge=[known]).say_without_knowledge(Terminal(True))
    assert capsys.readouterr().err == ""
    captions = replace(aware.captions, texts=["a", "b"], knowledge=[known, amp.Knowledge()])
    captions.say_without_knowledge(Terminal(True))
    assert capsys.readouterr().err == "1 of 2 captions without knowledge\n"


def test_progress_counts_every_direction_to_its_end(aware):
    seen = [[]]

    def report(done, total):
        assert (seen[-1] or [0])[-1] < done <= total
        seen[-1].append(done)
        if done == total:
            seen.append([])

    aware.retrieval(batch_size=10).rank(aware.model, progress=report)
    assert [done[-1] for done in seen[:-1]] == [len(aware.captions.texts) * TOP_K, 12 * TOP_K, 12] and not seen[-1]


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(aware, clip_folder, shards, cache_folder, tmp_path, fresh_accelerate):
    """Runs the command with two adapters of one model, named one and two; the base model is read from their file."""
    amp.save_adapter(tmp_path / "adapter.safetensors", aware.model)
    adapters = [f"{name}={tmp_path}/adapter.safetensors" for name in ("one", "two")]

    def run(*more):
        main(
            [
                *("--shards", str(shards), "--cache", str(cache_folder), "--workers", "0", "--bootstrap", "0"),
                *("--search.i2t", "pairwise", "--search.top_k", "10", "--out", str(tmp_path / "out.json")),
                *("--adapters", *adapters, *more),
            ]
        )

    return run


def test_rows_are_saved_as_they_come_and_the_file_says_what_is_missing(command, tmp_path, monkeypatch, capsys):
    real, seen, out = SplitSearch.rank, [], tmp_path / "out.json"

    def rank(self, *arguments):
        seen.append([row.name for row in ResultFile.load_json(out).rows])
        if len(seen) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments)

    monkeypatch.setattr(SplitSearch, "rank", rank)
    arguments = ("--probes", "grey", "--text_only", "true")
    with pytest.raises(SystemExit):
        command(*arguments)
    one, two = ([f"{name}{mode} (pairwise)" for mode in ("", ", grey")] for name in ("one", "two"))
    first = ["base CLIP", "captions with states"]
    assert seen == [first, [*first, *one[:1]], [*first, *one]]
    result = ResultFile.load_json(out)
    assert [row.name for row in result.rows] == seen[2] and result.protocol["missing_rows"] == two
    assert protocol_lines(result.protocol)[-1] == f"incomplete, 2 rows are missing: {', '.join(two)}"
    keys = [row.key for row in result.rows]
    assert set(load_queries(out.with_suffix(".npz"))) == {(key, side) for key in keys for side in ("i2t", "t2i")}
    assert out.with_suffix(".csv").read_text().count("\n") == 1 + len(seen[2])
    said = capsys.readouterr().err
    assert "out.json contains the finished rows and lists the 2 missing rows" in said
    assert "the GPU is out of memory; reduce --search.batch_size and --batch_size" in said

    monkeypatch.undo()
    forget_accelerate()
    command(*arguments)
    result = ResultFile.load_json(out)
    assert [row.name for row in result.rows] == [*first, *one, *two]
    assert "missing_rows" not in result.protocol and len(protocol_lines(result.protocol)) == 2


def test_everything_given_is_checked_before_a_model_is_loaded(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("amp.evaluate.run.load_base", None)
    with pytest.raises(SystemExit):
        command(
            "--adapters",
            "one=no/a",
            "two=no/b",
            "--split",
            "tset",
            "--bootstrap",
            "-1",
            "--out",
            str(tmp_path / "adapter.safetensors" / "out.json"),
        )
    said = capsys.readouterr().err
    for words in (
        "5 errors: ",
        "adapter 'one=no/a'",
        "adapter 'two=no/b'",
        "'tset'",
        "bootstrap is -1",
        "out.json: can't be written",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        ([0, 0, 2], [], "1 of 3 images have no caption"),
        ([0, 0, 0, 1, 2], ["--probes", "[shuffled]"], "one image has 3 of 5 captions"),
        ([0, 1, 2], ["--search.folds", "4"], "folds is 4, expected at most 3"),
    ],
)
def test_a_split_that_cant_be_searched_is_refused_first(command, monkeypatch, capsys, image, arguments, message):
    captions = SplitCaptions(["x"] * len(image), [amp.Knowledge()] * len(image), torch.tensor(image), 3)
    monkeypatch.setattr(SplitCaptions, "read", lambda *_: captions)
    monkeypatch.setattr("amp.evaluate.run.load_base", None)
    with pytest.raises(SystemExit):
        command(*arguments)
    assert message in capsys.readouterr().err


def test_no_two_rows_and_no_two_adapters_have_one_name(command, clip_folder, tmp_path, capsys):
    file = f"{tmp_path}/adapter.safetensors"
    for arguments, message in (
        (["--adapters", f"one={file}", f"one={file}"], "adapters has two named 'one'"),
        (["--adapters", json.dumps([f"a\tb={file}"])], r"the name is 'a\tb'"),
        (["--adapters", json.dumps([f"  ={file}"])], "the name is '  '"),
        (["--probes", "grey", "grey"], "two rows would be named 'one, grey (pairwise)'"),
        (["--adapters", f"one={file}", f"one, grey={file}", "--probes", "grey"], "would be named 'one, grey (p"),
    ):
        with pytest.raises(SystemExit):
            command(*arguments)
        assert message in capsys.readouterr().err
        forget_accelerate()
    assert not (tmp_path / "out.json").exists()


def test_every_adapter_that_does_not_fit_is_named(clip_folder, aware, tmp_path):
    header, weights = read_adapter(save(tmp_path / "good", aware.model))
    name = next(iter(weights))
    adapters = {
        "other": Adapter("other", replace(header, base_hash="0" * 64), weights),
        "good": Adapter("good", header, weights),
        "nan": Adapter("nan", header, weights | {name: torch.full_like(weights[name], float("nan"))}),
    }
    with pytest.raises(AmpError) as error:
        load_adapters(aware.model, clip_folder, adapters)
    assert len(error.value.messages) == 2
    for message, words in zip(error.value.messages, ("was trained on base", "1 weights contain NaN"), strict=True):
        assert words in message
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:99])
    with pytest.raises(AmpError, match="not a complete safetensors file"):
        read_adapters([f"cut={tmp_path}/cut", f"good={tmp_path}/good"])


def adapter_of(aware, **config) -> Adapter:
    """An adapter whose record contains this configuration."""
    header = AdapterHeader("local-dir:tiny", None, "a" * 64, False, aware.model.config, {"config": config})
    return Adapter("file", header, {})


def test_the_records_say_what_the_options_leave_out(aware):
    data = {"kinds": ["action"], "shards": "data/x", "cache_dtype": "float16"}
    adapters = {"one": adapter_of(aware, model={"resize_mode": "squash"}, data=data)}
    assert base_of(BaseSettings(), adapters) == BaseSettings("local-dir:tiny", None, "fp32", "squash")
    assert base_of(BaseSettings("elsewhere", "tag"), adapters) == BaseSettings("elsewhere", "tag", "fp32", "squash")
    assert base_of(BaseSettings(resize_mode="longest"), adapters).resize_mode == "longest"
    assert kinds_of(None, adapters) == ["action"] and kinds_of(["attribute"], adapters) == ["attribute"]
    assert shards_of(None, adapters) == "data/x" and shards_of("data/y", adapters) == "data/y"
    assert cache_dtype_of(EvaluationSettings(), adapters) == "float16"
    bare = {"one": adapter_of(aware)}  # an adapter saved without a record
    assert kinds_of(None, bare) == ["action", "attribute"] and base_of(BaseSettings(), bare).resize_mode is None
    with pytest.raises(AmpError, match="shards is missing, expected a folder"):
        shards_of(None, bare)
    with pytest.raises(AmpError, match=r"adapters and model\.name are both missing"):
        base_of(BaseSettings(), {})


def test_adapters_that_disagree_are_refused(aware):
    one = adapter_of(aware, model={"resize_mode": "squash"}, data={"kinds": ["action"]})
    two = adapter_of(aware, model={"resize_mode": None}, data={"kinds": ["attribute"]})
    with pytest.raises(AmpError, match=r"different image transforms: 'one' .*squash.*set one for all with --model\.re"):
        base_of(BaseSettings(), {"one": one, "two": two})
    with pytest.raises(AmpError, match="different kinds of triplets: 'one'"):
        kinds_of(None, {"one": one, "two": two})
    other = replace(one, header=replace(one.header, base_hash="b" * 64))
    with pytest.raises(AmpError, match=r"different base models: .* weights a{12}, .* weights b{12}"):
        base_of(BaseSettings("given"), {"one": one, "two": other})


def test_a_training_file_gives_what_evaluation_reads_and_no_more(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "out: runs/train\nmodel: {name: x, resize_mode: squash}\nseed: 3\nstages: [1]\nstage1: {lr: 1.0}\n"
        "data: {shards: data/x, workers: 0, augment: none}\nprompt: {depth: 0.5}\n"
    )
    found = read_command_line(parser(), ["--config", str(file), "--workers", "2"], EvaluationSettings)
    assert (found.shards, found.workers, found.seed) == ("data/x", 2, 3)
    assert found.model == BaseSettings("x", None, "fp32", "squash") and str(found.out) == "runs/results.json"
    for text, words in (
        ("stage: 1", "stage"),
        ("data: {shard: x}", "shard"),
        ("data: 3", "expected its settings below"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit):
            parser().parse_args(["--config", str(file)])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser().parse_args(["--stage1.lr", "1.0"])
    assert "stage1.lr" in capsys.readouterr().err


def test_lists_are_several_words_or_one_list():
    for words in (["a=b", "c=d"], ['["a=b", "c=d"]'], ["[a=b, c=d]"]):
        found = parser().parse_args(["--adapters", *words, "--kinds", "action", "--split", "val"])
        assert found.adapters == ["a=b", "c=d"] and found.kinds == ["action"] and found.split == "val"
    assert parser().parse_args(["--adapters=a=b", "c=d"]).adapters == ["a=b", "c=d"]
    assert parser().parse_args(["--kinds", "null", "--adapters", "[]"]).adapters == []


def save(path, model):
    amp.save_adapter(path, model)
    return path


def _rank_both(clip_folder, shards, cache_folder):
    out = {}
    for knowledge in ("both", "none"):
        world = World(clip_folder, shards, cache_folder, knowledge)
        for skip in (False, True):
            retrieval = world.retrieval(batch_size=6, max_queries=11, skip_decided=skip)
            for name, ranking in ranked(retrieval, world.model).items():
                out[knowledge, skip, name] = ranking.scores.numpy(), ranking.ranks.numpy()
    return out


def test_two_ranks_give_the_scores_of_one(aware, control, clip_folder, shards, cache_folder, tmp_path):
    # The store is already filled; both ranks read it.
    expected = _rank_both(clip_folder, shards, cache_folder)
    for result in run_ranks(_rank_both, tmp_path, clip_folder, shards, cache_folder):
        assert result.keys() == expected.keys()
        for key, (scores, ranks) in result.items():
            np.testing.assert_allclose(scores, expected[key][0], rtol=0, atol=1e-5)
            np.testing.assert_array_equal(ranks, expected[key][1])
