"""The report page: its data, attention maps compared with those of the layers, and the page in headless Chromium."""

import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.browser import chromium, press
from support.evaluation import World, write_world_adapter
from support.processes import forget_accelerate
from support.repository import launcher

from amp.data.split import ShardSplit
from amp.errors import AmpError
from amp.evaluate.per_query import QueryResults, load_queries
from amp.knowledge.tensors import Captions
from amp.model.adapter import read_adapter, write_adapter
from amp.model.interactions.readout import read_patches
from amp.report.attention import attention_maps
from amp.report.choice import OUTCOMES, choose_rows, counts, outcomes
from amp.report.plots import sweep_plot
from amp.retrieval.figures import RowKey

EVIL = "</script><img src=x onerror=\"document.title='broken in'\"><b>dog</b> & \u2028 {{7*7}} __DATA__"


def results(first, new):
    first, new = np.array(first), np.array(new)
    empty = np.zeros((len(first), 1))
    return QueryResults(np.arange(len(first)), np.arange(len(first)), empty, empty, empty, first, new)


def test_outcomes_by_the_first_place():
    found = results([3, 0, 5, 0], [0, 2, 1, 0])
    assert [OUTCOMES[i] for i in outcomes(found)] == ["fixed", "broken", "wrong", "right"]
    assert counts(found) == {"fixed": 1, "broken": 1, "wrong": 1, "right": 1}


def test_queries_are_evenly_spaced_within_an_outcome():
    found = results([1] * 100 + [0] * 10, [0] * 100 + [1] * 10)
    rows = choose_rows(found, 20)
    assert len(rows) == len(set(rows)) == 20
    assert rows == sorted(rows) and sum(row >= 100 for row in rows) == 5  # a quarter degraded, the rest improved
    assert np.ptp(np.diff(rows[:15])) <= 1
    assert len(choose_rows(found, 500)) == 110 and choose_rows(found, 0) == []


# -- attention ------------------------------------------------------------------------------------------------------


def world_of(clip_folder, shards, tmp_path, **prompt):
    world = World(clip_folder, shards, tmp_path / "cache", **prompt)
    number = next(i for i, item in enumerate(world.captions.knowledge) if len(item.triplets) >= 2)
    return world, world.model.tower.early(world.images[:1]), world.captions.knowledge[number]


def test_maps_of_aim_are_those_of_its_layers_with_one_triplet(clip_folder, shards, tmp_path):
    world, early, item = world_of(clip_folder, shards, tmp_path)
    found = attention_maps(world.model, early, world.model.prepare_knowledge([item]))
    # The triplet encoder sees all triplets of the caption; the patches attend to one only.
    with torch.no_grad():
        prompts = world.model(None, Captions(world.model.prepare_knowledge([item]))).captions.prompts
        triplets, states = (part[:, 1:2] for part in prompts.parts)
        _, of_triplet, of_state = world.model.interaction.aim(
            early[:, 1:], triplets, states, prompts.mask[:, 1:2], torch.tensor([0]), return_maps=True
        )
    for name, expected in (("triplet", of_triplet), ("state", of_state)):
        assert found[name].shape == (len(item.triplets), *world.model.backbone.visual.grid_size)
        torch.testing.assert_close(found[name][1].flatten(), expected[0].mean(dim=0), atol=1e-6, rtol=0)
        torch.testing.assert_close(found[name].sum(dim=(1, 2)), torch.ones(len(item.triplets)))
    assert not torch.allclose(found["triplet"], found["state"], atol=1e-5)


def test_maps_of_the_readout_by_a_loop_over_heads(clip_folder, shards, tmp_path):
    world, early, item = world_of(clip_folder, shards, tmp_path, interaction="readout")
    model, batch = world.model, world.model.prepare_knowledge([item])
    found = attention_maps(model, early, batch)
    with torch.no_grad():
        readout = model.interaction.readout
        _, patches = read_patches(readout, model.tower, early)
        key = readout.key(patches)[0]
        states = batch.states[0, batch.mask[0]]
        query = readout.query_text(states / states.norm(dim=-1, keepdim=True))
        width = query.shape[1] // readout.heads
        maps = [
            (query[:, h * width : (h + 1) * width] @ key[:, h * width : (h + 1) * width].T / width**0.5).softmax(dim=-1)
            for h in range(readout.heads)
        ]
    torch.testing.assert_close(found["state"].flatten(1), torch.stack(maps).mean(dim=0), atol=1e-6, rtol=1e-4)
    assert found["triplet"].shape == found["state"].shape


def test_models_without_maps_have_none(clip_folder, shards, tmp_path):
    for knowledge, prompt in (("none", {}), ("both", {"interaction": "cat"})):
        world, early, item = world_of(clip_folder, shards, tmp_path, knowledge=knowledge, **prompt)
        assert attention_maps(world.model, early, world.model.prepare_knowledge([item])) == {}


# -- the page -------------------------------------------------------------------------------------------------------


def attack_first_caption(monkeypatch):
    """Replaces the first caption of the first image by EVIL."""
    real = ShardSplit.captions

    def captions(self, record, keep=("action", "attribute")):
        found = real(self, record, keep)
        return [(EVIL, found[0][1]), *found[1:]] if record["key"] == self.record(0)["key"] else found

    monkeypatch.setattr(ShardSplit, "captions", captions)


@pytest.fixture(scope="module")
def page(clip_folder, shards, tmp_path_factory):
    """A page whose first caption is an attack, and its results file."""
    folder = tmp_path_factory.mktemp("report")
    adapter = write_world_adapter(clip_folder, shards, folder)
    patch = pytest.MonkeyPatch()
    attack_first_caption(patch)
    common = ["--shards", str(shards), "--adapters", f"ours={adapter}"]
    forget_accelerate()
    launcher("amp/commands/evaluate.py").main(
        [
            *common,
            "--cache",
            str(folder / "cache"),
            "--workers",
            "0",
            "--out",
            str(folder / "results.json"),
            "--search.top_k",
            "6",
            "--probes",
            "blank",
            "--bootstrap",
            "50",
        ]
    )
    forget_accelerate()
    sweep = folder / "sweep.csv"
    lines = [
        f"{row},{metric},{value},0.5,3"
        for row, value in (("base CLIP", 10), ("a <b>", 12))
        for metric in ("i2t R@1", "t2i R@1", "Rsum")
    ]
    sweep.write_text("\n".join(["row,metric,mean,standard_error,seeds", *lines]))
    launcher("amp/commands/report.py").main(
        [
            *common,
            "--results",
            str(folder / "results.json"),
            "--out",
            str(folder / "report.html"),
            "--captions",
            "200",
            "--images",
            "50",
            "--sweep",
            str(sweep),
            "--title",
            "A <i>title</i>",
        ]
    )
    patch.undo()
    return folder


def data_of(page):
    text = (page / "report.html").read_text(encoding="utf-8")
    return text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_the_data_are_those_of_the_results(page):
    _, data = data_of(page)
    table = load_queries(page / "results.npz")
    assert data["row"] == "ours (pooled)"  # the last row that is not a probe
    assert [row["name"] for row in data["table"]] == [
        "base CLIP",
        "ours (pairwise)",
        "ours (pooled)",
        "ours, blank (pairwise)",
        "ours, blank (pooled)",
        "ceiling of the top 6",
        "chance of the top 6",
    ]
    cards = [card for card in data["cards"] if card["direction"] == "t2i"]
    queries = table[RowKey("ours", "pooled"), "t2i"]
    assert sorted(card["query"] for card in cards) == queries.queries.tolist()
    for card in cards:
        row = card["query"]
        assert card["ranks"] == [queries.first_ranks[row] + 1, queries.ranks[row] + 1]
        best = queries.candidates[row][np.argsort(-queries.scores[row], kind="stable")][:3]
        assert [int(hit["photo"]) for hit in card["hits"][1]] == best.tolist()
        assert [int(hit["photo"]) for hit in card["hits"][0]] == queries.candidates[row][:3].tolist()
        assert [hit["right"] for hit in card["hits"][1]] == (best == queries.images[row]).tolist()
        assert card["hits"][1][0]["right"] == (card["outcome"] in ("fixed", "right"))
        for triplet in card["triplets"]:
            assert {"triplet", "state"} < set(triplet["maps"][0]) and triplet["maps"][0]["photo"] == card["image"]
    assert {verb["verb"] for verb in data["verbs"]} >= {"chase", "kick"}


def test_no_text_leaves_the_data_and_nothing_is_fetched(page):
    text, data = data_of(page)
    assert text.count("<script") == text.count("</script>") == 2 and EVIL not in text
    assert EVIL in [card.get("text") for card in data["cards"]]
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']""", re.sub(r'id="data">.*?</script>', "", text))
    assert "default-src 'none'" in text
    assert [plot["title"].split(",")[0] for plot in data["plots"]] == [
        "Rows with 95 % intervals (bootstrap over images)",
        "Ablations",
    ]
    assert "a &lt;b&gt;" in data["plots"][1]["svg"]


def test_refusals(page, shards, tmp_path, capsys):
    main = launcher("amp/commands/report.py").main
    other = tmp_path / "adapter.safetensors"
    header, weights = read_adapter(page / "run/stage1/adapter.safetensors")
    write_adapter(other, replace(header, training={"another": "run"}), weights)
    for arguments, message in (
        (["--results", str(tmp_path / "none.json")], "expected a results file"),
        (["--results", str(page / "results.json"), "--row", "other"], "no row 'other', expected one of 'base CLIP'"),
        (["--results", str(page / "results.json"), "--shards", str(shards)], "its captions differ from"),
        (["--out", str(tmp_path / "run")], "expected a .html file; add --out FILE.html"),
        (
            ["--results", str(page / "results.json"), "--images", "-1"],
            "captions is 80 and images is -1, expected at least 0",
        ),
        (
            ["--results", str(page / "results.json"), "--shards", str(shards), "--adapters", f"ours={other}"],
            "no row was made with",
        ),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(AmpError, match="no results of a sweep"):
        sweep_plot(tmp_path / "x.csv")
    (tmp_path / "empty.json").write_text(
        json.dumps({"format": "open-clip-amp retrieval results", "version": 1, "protocol": {}, "rows": []})
    )
    (tmp_path / "empty.npz").write_bytes((page / "results.npz").read_bytes())
    with pytest.raises(SystemExit):  # all errors at once, before a model is loaded
        main(
            [
                "--results",
                str(tmp_path / "empty.json"),
                "--adapters",
                "a=no/a",
                "b=no/b",
                "--sweep",
                str(tmp_path / "x.csv"),
                "--out",
                str(tmp_path / "x.csv" / "report.html"),
                "--model.name",
                "none",
            ]
        )
    said = capsys.readouterr().err
    for words in (
        "5 errors: ",
        "protocol key 'split' is missing",
        "adapter 'a=no/a'",
        "adapter 'b=no/b'",
        "no results of a sweep",
        "report.html: can't be written",
    ):
        assert words in said


def test_a_photo_that_cant_be_read_costs_its_queries_only(page, tmp_path, clip_folder, shards, monkeypatch, capsys):
    _, data = data_of(page)
    attack_first_caption(monkeypatch)
    real = ShardSplit.image

    def image(self, index):
        if index == 3:
            raise AmpError("image of sample 3 can't be decoded")
        return real(self, index)

    monkeypatch.setattr(ShardSplit, "image", image)
    launcher("amp/commands/report.py").main(
        [
            "--shards",
            str(shards),
            "--results",
            str(page / "results.json"),
            "--out",
            str(tmp_path / "report.html"),
            "--captions",
            "200",
            "--images",
            "50",
        ]
    )
    _, found = data_of(tmp_path)

    def photos(card):
        hits = [hit for side in card["hits"] for hit in side] if card["direction"] == "t2i" else []
        return {card["image"], *(hit["photo"] for hit in hits)}

    def keys(cards):
        return [(card["direction"], card["query"]) for card in cards]

    kept = [card for card in data["cards"] if "3" not in photos(card)]
    assert keys(found["cards"]) == keys(kept) and 0 < len(kept) < len(data["cards"])
    lost = len(data["cards"]) - len(kept)
    assert f"{lost} queries left out, first: image of sample 3 can't be decoded" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        found.get(f"file://{page}/report.html")
        yield found


def shown(browser):
    return browser.execute_script("return [...document.querySelectorAll('.card')].map(c => c.innerText)")


def test_the_browser_shows_everything_and_runs_no_caption(page, browser):
    _, data = data_of(page)
    assert browser.title == "A <i>title</i>"
    assert len(shown(browser)) == len(data["cards"])
    assert browser.execute_script("return document.querySelectorAll('.card b b, .card img[src=x]').length") == 0
    assert any("</script><img" in text for text in shown(browser))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    cells = browser.execute_script("return [...document.querySelectorAll('#results tbody tr')].map(r => r.innerText)")
    assert f"{data['table'][1]['values'][-1]:.1f}" in cells[1]


def test_filters_and_their_address(page, browser):
    _, data = data_of(page)
    for key, outcome in (("f", "fixed"), ("b", "broken")):
        press(browser, key)
        expected = sum(card["outcome"] == outcome for card in data["cards"])
        assert len(shown(browser)) == expected and f"outcome={outcome}" in browser.current_url
        assert f"{expected} of {len(data['cards'])}" in browser.execute_script(
            "return document.getElementById('count').textContent"
        )
    press(browser, "\ue00c")  # Escape key
    verb = data["verbs"][0]["verb"]
    browser.execute_script("document.querySelector('#verbs tbody button').click()")
    expected = [card for card in data["cards"] if verb in card["verbs"] and card["direction"] == "t2i"]
    assert len(shown(browser)) == len(expected) > 0
    address = browser.current_url
    browser.get("about:blank")
    browser.get(address)
    assert len(shown(browser)) == len(expected)
    press(browser, "\ue00c")
    press(browser, "/")
    press(browser, "house 28 on day 0")
    assert len(shown(browser)) == sum("house 28 on day 0" in json.dumps(card) for card in data["cards"]) > 0
    press(browser, "\ue00c")
    assert len(shown(browser)) == len(data["cards"])


def test_keys_move_and_open_attention(browser):
    press(browser, "\ue00c")
    press(browser, "jj")
    place = "return [...document.querySelectorAll('.card')].indexOf(document.activeElement)"
    assert browser.execute_script(place) == 1
    press(browser, "k")
    assert browser.execute_script(place) == 0
    browser.execute_script(
        "[...document.querySelectorAll('.card')].find(c => c.querySelector('.triplet')).focus({preventScroll: true})"
    )
    press(browser, "1")
    for _ in range(50):
        drawn = browser.execute_script("return document.querySelectorAll('.maps canvas[data-drawn]').length")
        if drawn >= 2:
            break
        time.sleep(0.1)
    assert drawn >= 2
    colours = browser.execute_script(
        "const c = document.querySelector('.maps canvas');"
        "return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    )
    assert colours > 50
    press(browser, "1")
    assert browser.execute_script("return document.querySelectorAll('.maps').length") == 0


def test_light_dark_and_a_phone(browser):
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = browser.execute_script(ground)
    press(browser, "t")
    assert browser.execute_script(ground) != before
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        columns = browser.execute_script(
            "return getComputedStyle(document.querySelector('.card')).gridTemplateColumns.split(' ').length"
        )
        assert columns == 1
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
