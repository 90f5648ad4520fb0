"""Generating, killing, resuming, splitting into parts and merging, with the real command line."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from support.repository import QUIET_ENVIRONMENT, ROOT, run_here
from support.scripted_model import reply_to, scripted_model

from amp.data.captions.knowledge_file import attach_knowledge
from amp.data.captions.load import load_captions
from amp.generation.prompts import TEMPLATE
from amp.generation.replies import read_triplets
from amp.knowledge.schema import parse_knowledge

pytest.importorskip("openai", reason='needs the openai package: pip install "open-clip-amp[generate]"')

SCRIPT = "tools/generate_knowledge.py"
SUBJECTS, VERBS, OBJECTS = (
    ("man", "woman", "dog", "child", "horse"),
    ("holds", "kicks", "watches", "lifts"),
    ("ball", "kite", "rope"),
)


def write_captions(path: Path, count: int) -> Path:
    """A CSV in which every fifth caption belongs to two images."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "split"])
        for number in range(count):
            place = number - (number % 5 == 4)
            words = SUBJECTS[place % 5], VERBS[place // 5 % 4], OBJECTS[place % 3]
            text = f"A {words[0]} {words[1]} the {words[2]} near house {place}x"
            rows.writerow([f"{number // 2}.jpg", text, "train" if number // 2 % 4 else "test"])
    return path


@pytest.fixture(scope="module")
def model():
    with scripted_model() as running:
        yield running


def options_of(captions: Path, out: Path, model, *options: str) -> list[str]:
    engine = ["--engine", "openai", "--model", "scripted", "--openai.base_url", model.url]
    setting = [
        "--openai.constrained",
        "none",
        "--openai.concurrency",
        "4",
        "--fallback",
        "none",
        "--max_fallback",
        "0.3",
    ]
    return ["--captions", str(captions), "--out", str(out), *engine, *setting, *options]


def command(*arguments) -> list[str]:
    """Command line of a separate process."""
    return [sys.executable, str(ROOT / SCRIPT), *options_of(*arguments)]


def run(*arguments) -> subprocess.CompletedProcess:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "secret-of-the-test")
        return run_here(SCRIPT, *options_of(*arguments))


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "knowledge.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """One undisturbed run: (captions file, output folder, process)."""
    root = tmp_path_factory.mktemp("whole")
    captions = write_captions(root / "captions.csv", 120)
    model.asked.clear()
    process = run(captions, root / "out", model)
    assert process.returncode == 0, process.stderr
    return captions, root / "out", process, Counter(model.asked)


def test_every_caption_has_its_record(whole):
    captions, out, process, _ = whole
    images = load_captions(captions).images
    report = attach_knowledge(images, out / "knowledge.jsonl")
    assert (report.records, report.attached, report.unused) == (120, 120, 0)
    for record in read(out):
        knowledge = parse_knowledge(record, "record")
        assert bool(knowledge.triplets) != ("empty" in record)
        assert len(record.get("sources", [])) == len(knowledge.triplets)
    assert "secret-of-the-test" not in process.stderr + "".join(path.read_text() for path in out.rglob("*.json*"))


def test_records_say_what_the_model_said(whole):
    """The expected reply follows from the model's rule: the first reply if it is good, else one of the retries."""
    _, out, _, _ = whole
    first = 0
    for record in read(out):
        turn = {"messages": [{"content": f"Caption: {record['caption']}"}]}
        expected = read_triplets(reply_to(turn), record["caption"])
        if expected.strict:
            first += 1
            kept = [tuple(t.values()) for t in record["triplets"]]
            wanted = [(t.subject, t.action, t.object, t.kind) for t in expected.triplets]
            assert kept == wanted or (
                set(kept) < set(wanted) or record.get("empty")
            )  # triplets without a state are excluded
            assert all(source["triplet"] == "strict" for source in record.get("sources", []))
        else:
            assert all(source["triplet"] in ("retry1", "retry2") for source in record.get("sources", []))
    assert first > 50


def test_each_distinct_caption_is_asked_once(whole):
    captions, _, _, asked = whole
    texts = [caption.text for image in load_captions(captions).images for caption in image.captions]
    first_requests = {turn: times for turn, times in asked.items() if "\n" not in turn}
    assert len(set(texts)) < len(texts)
    assert first_requests == {f"Caption: {text}": 1 for text in texts}


def test_provenance(whole):
    _, out, _, _ = whole
    provenance = json.loads((out / "knowledge_provenance.json").read_text())
    records = read(out)
    assert provenance["captions"] == 120 and provenance["distinct_captions"] == len({r["caption"] for r in records})
    assert provenance["engine"]["model"] == "scripted" and "http" not in json.dumps(provenance["engine"])
    distinct = {record["caption"]: record for record in records}.values()
    counted = Counter(source["triplet"] for record in distinct for source in record.get("sources", []))
    assert provenance["triplets_by_source"] == dict(counted)
    assert provenance["captions_failed"] > 0 and provenance["captions_with_fallback"] == 0
    assert provenance["template"]["name"] == "default" and len(provenance["template"]["sha256"]) == 64


def test_the_same_command_again_asks_nothing(whole, model):
    captions, out, _, _ = whole
    before = (out / "knowledge.jsonl").read_bytes()
    model.asked.clear()
    process = run(captions, out, model)
    assert process.returncode == 0 and not model.asked
    assert (out / "knowledge.jsonl").read_bytes() == before


@pytest.mark.slow
def test_killed_twenty_times(whole, tmp_path, model):
    """SIGKILL at random points: no reply is lost or changed, and no caption is requested again without need."""
    captions, reference, _, asked_once = whole
    random.seed(5)
    out, kills, starts = tmp_path / "out", 0, 0
    model.asked.clear()
    model.delay = 0.08  # with 4 at a time, the 120 captions take some seconds
    environment = {**QUIET_ENVIRONMENT, "OPENAI_API_KEY": "x"}
    try:
        while kills < 20:
            starts += 1
            assert starts < 60
            process = subprocess.Popen(
                command(captions, out, model), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            )
            cache = out / "cache"
            size = sum(file.stat().st_size for file in cache.glob("*")) if cache.exists() else 0
            wanted = size + random.randint(1, 1500)  # bytes: stop at any byte after some replies
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if cache.exists() and sum(file.stat().st_size for file in cache.glob("*")) >= wanted:
                    break
                time.sleep(0.002)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                # Simulates a kill during a write, which is rare on a local disk.
                if kills % 3 == 0:
                    path = next(cache.glob("*.jsonl"))
                    os.truncate(path, max(0, path.stat().st_size - random.randint(1, 60)))
            else:
                break
    finally:
        model.delay = 0.0
    assert kills == 20
    process = run(captions, out, model)
    assert process.returncode == 0, process.stderr
    assert (out / "knowledge.jsonl").read_bytes() == (reference / "knowledge.jsonl").read_bytes()
    lines = [
        json.loads(line)["key"] for file in (out / "cache").glob("*.jsonl") for line in file.read_text().splitlines()
    ]
    assert len(lines) == len(set(lines))
    # Only requests that were running at a kill are repeated: at most four per kill, and lines that were cut.
    assert set(model.asked) == set(asked_once)
    assert sum(model.asked.values()) <= sum(asked_once.values()) + 20 * 4 + 6


def test_two_tasks_of_an_array_merge_to_the_same(whole, tmp_path, model):
    captions, reference, _, asked_once = whole
    model.asked.clear()
    environment = {**QUIET_ENVIRONMENT, "OPENAI_API_KEY": "x"}
    tasks = [
        subprocess.Popen(
            command(captions, tmp_path / "out", model, "--part", f"{index}/2"),
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in (1, 0)
    ]
    for task in tasks:
        _, errors = task.communicate(timeout=240)
        assert task.returncode == 0, errors
    assert not (tmp_path / "out" / "knowledge.jsonl").exists()
    assert model.asked == asked_once  # no caption in both parts
    sizes = [len(file.read_text().splitlines()) for file in (tmp_path / "out" / "cache").glob("*.jsonl")]
    assert len(sizes) == 2 and min(sizes) > 0.3 * sum(sizes)
    process = run(captions, tmp_path / "out", model, "--merge", "true")
    assert process.returncode == 0, process.stderr
    assert model.asked == asked_once
    assert (tmp_path / "out" / "knowledge.jsonl").read_bytes() == (reference / "knowledge.jsonl").read_bytes()


def test_merge_refuses_what_is_missing(whole, tmp_path, model):
    captions, _, _, _ = whole
    assert run(captions, tmp_path / "out", model, "--part", "0/2").returncode == 0
    process = run(captions, tmp_path / "out", model, "--merge", "true")
    assert process.returncode == 2
    assert "distinct captions aren't done" in process.stderr and "triplets missing in the cache" in process.stderr
    assert [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith("knowledge")] == []
    process = run(captions, tmp_path / "out", model)  # without --part it generates the rest
    assert process.returncode == 0 and (tmp_path / "out" / "knowledge.jsonl").exists()


def test_too_many_fallbacks_fail_the_merge(whole, tmp_path, model):
    captions, reference, _, _ = whole
    out = tmp_path / "out"
    process = run(captions, out, model, "--max_fallback", "0.01", "--cache", str(reference / "cache"))
    assert process.returncode == 2 and "fell back to rules (0) or failed" in process.stderr
    assert "expected at most 1.0%" in process.stderr and not (out / "knowledge.jsonl").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seed", "1"], "'ladder.seed' was 0 and is now 1"),
        (["--retries", "1"], "'ladder.retries' was 2 and is now 1"),
        (["--template", "prompts.yaml"], "'ladder.template."),
        (["--model", "other"], "'options.model' was 'scripted' and is now 'other'"),
        (["--fallback", "rules"], "'options.fallback' was 'none' and is now 'rules'"),
    ],
)
def test_one_folder_has_one_origin(whole, model, options, message, tmp_path):
    captions, out, _, _ = whole
    before = (out / "knowledge.jsonl").read_bytes()
    if "prompts.yaml" in options:
        options = ["--template", str(tmp_path / "prompts.yaml")]
        (tmp_path / "prompts.yaml").write_text(TEMPLATE.read_text().replace("version: 2", "version: 3"))
    process = run(captions, out, model, *options)
    assert process.returncode == 2 and message in process.stderr and "another --out" in process.stderr
    assert (out / "knowledge.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["--part", "2/2"], "part is '2/2'; expected I/N"),
        (["--part", "0/2", "--merge", "true"], "part and merge are both given"),
        (["--merge", "true"], "out: has no settings.json; expected a folder in which knowledge was generated"),
        (["--template", "nowhere.yaml"], "nowhere.yaml: no such file; expected a YAML file of prompts"),
        (["--splits", "dev"], "no split 'dev'; splits seen: test, train"),
        (["--retries", "9"], "retries is 9"),
        (["--limit", "0"], "limit is 0"),
        (["--engine", "rules"], "--model is 'scripted' with --engine rules"),
    ],
)
def test_wrong_options(whole, tmp_path, model, options, message):
    process = run(whole[0], tmp_path / "out", model, *options)
    assert process.returncode == 2 and message in process.stderr


def test_captions_of_a_pipe_are_refused_before_anything_is_asked(whole, tmp_path, model):
    pipe = tmp_path / "captions.csv"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(whole[0].read_bytes()), daemon=True)
    writer.start()
    model.asked.clear()
    process = run(pipe, tmp_path / "out", model)
    assert process.returncode == 2 and "a pipe, which can be read only once" in process.stderr
    assert not model.asked and not (tmp_path / "out").exists()


def test_a_server_that_is_gone_is_told_and_nothing_is_lost(whole, tmp_path):
    captions, _, _, _ = whole
    with scripted_model() as model:
        assert run(captions, tmp_path / "out", model, "--part", "0/3").returncode == 0
    process = run(captions, tmp_path / "out", model, "--openai.tries", "1")
    assert process.returncode == 2 and "127.0.0.1" in process.stderr
    with scripted_model() as model:
        process = run(captions, tmp_path / "out", model)
        assert process.returncode == 0, process.stderr
        asked = sum(model.asked.values())
    assert 0 < asked < sum(whole[3].values())


def test_requests_that_get_no_answer_are_asked_by_the_next_run(whole, tmp_path):
    captions, reference, _, _ = whole
    with scripted_model() as model:
        model.fails_on = "house 7x"
        process = run(captions, tmp_path / "out", model, "--openai.tries", "1")
        assert process.returncode == 2
        assert "1 of 96 captions have no reply" in process.stderr and "no reply: http" in process.stderr
        assert not (tmp_path / "out" / "knowledge.jsonl").exists()
        model.fails_on = ""
        model.asked.clear()
        process = run(captions, tmp_path / "out", model)
        assert process.returncode == 0, process.stderr
        assert 1 <= sum(model.asked.values()) <= 2 and all("house 7x" in turn for turn in model.asked)
    assert (tmp_path / "out" / "knowledge.jsonl").read_bytes() == (reference / "knowledge.jsonl").read_bytes()


def test_limit_and_splits(whole, tmp_path, model):
    captions, _, _, _ = whole
    process = run(captions, tmp_path / "out", model, "--limit", "7", "--splits", "test", "--max_fallback", "1")
    assert process.returncode == 0, process.stderr
    records = read(tmp_path / "out")
    assert len({record["caption"] for record in records}) == 7
    splits = {str(c.id): i.split for i in load_captions(captions).images for c in i.captions}
    assert {splits[str(record["sentid"])] for record in records} == {"test"}


def test_processes_of_a_launcher_divide_the_captions(whole, tmp_path, model):
    """Processes as started by `accelerate launch`, one per GPU."""
    captions, reference, _, asked_once = whole
    model.asked.clear()
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = command(captions, tmp_path / "out", model)[1:]
    environment = {**QUIET_ENVIRONMENT, "OPENAI_API_KEY": "x"}
    process = subprocess.run([*launched, *script], capture_output=True, text=True, timeout=240, env=environment)
    assert process.returncode == 0, process.stderr
    assert model.asked == asked_once and not (tmp_path / "out" / "knowledge.jsonl").exists()
    assert sorted(path.name for path in (tmp_path / "out" / "cache").glob("*")) == [
        "replies-00000-of-00002.jsonl",
        "replies-00001-of-00002.jsonl",
    ]
    process = run(captions, tmp_path / "out", model, "--merge", "true")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "knowledge.jsonl").read_bytes() == (reference / "knowledge.jsonl").read_bytes()


def test_triplets_by_rules_with_states_by_a_model(tmp_path, model):
    """The model is asked only for states, and the rules' triplets are no fallback."""
    pytest.importorskip("spacy")
    captions = tmp_path / "captions.csv"
    captions.write_text("image,caption\na.jpg,A brown dog jumps over a fence .\n")
    model.asked.clear()
    options = ["--triplets", "rules", "--fallback", "rules", "--max_fallback", "0"]
    process = run(captions, tmp_path / "out", model, *options)
    assert process.returncode == 0, process.stderr
    (record,) = read(tmp_path / "out")
    assert {source["triplet"] for source in record["sources"]} == {"rules"}
    assert "rules" not in {source["state"] for source in record["sources"]} and record["triplets"]
    assert all("jumps" in prompt and "1. " in prompt for prompt in map(str, model.asked)), model.asked
    process = run(captions, tmp_path / "other", model, "--triplets", "rules")  # with --fallback none
    assert process.returncode == 2 and "expected fallback rules" in process.stderr


def test_captions_in_other_languages_are_no_warning_to_a_model(tmp_path, model):
    """Only rules need English captions, so a language model gets no warning."""
    captions = tmp_path / "captions.csv"
    captions.write_text("image,caption\na.jpg,Un chien brun saute par-dessus une clôture\n", encoding="utf-8")
    done = run(captions, tmp_path / "out", model, "--max_fallback", "1")
    assert done.returncode == 0, done.stderr
    assert "not in English" not in done.stdout + done.stderr
