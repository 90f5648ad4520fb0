"""Output folders of others: links planted in them, folders that can't be written, permissions; and secrets in files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import QUIET_ENVIRONMENT, ROOT, draw_dataset, launcher
from hostile_helpers import one_error, training_arguments

import amp
from amp.checkpoint import read_adapter, save_adapter
from amp.data.shards import ShardManifest
from amp.data.writer import make_shards
from amp.errors import public_command, without_secrets
from amp.files import open_log, whole_file, write_json
from amp.generation.cache import CacheError, Reply, ReplyCache
from amp.retrieval.results import write_atomically

MINE = b"what is nobody else's business, without a newline"


@pytest.fixture
def mine(tmp_path):
    """A file outside the output folder, at which the planted links point."""
    path = tmp_path / "mine.txt"
    path.write_bytes(MINE)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "shared"
    path.mkdir()
    return path


def guessable(name: str) -> list[str]:
    """Temporary names that could be foreseen."""
    pid = os.getpid()
    return [f".{name}.tmp", f"{name}.tmp", f".{name}.{pid}.tmp", f"{name}.{pid}.tmp", f"{name}~", f".{name}.swp"]


@pytest.fixture(scope="module")
def model(clip_folder):
    settings = amp.PromptConfig(num_prompts=2, triplet_heads=4, interaction_layer=1)
    return amp.create_model_and_transforms(clip_folder, prompt_config=settings)[0]


def _write_with_file(path, _):
    with whole_file(path) as file:
        file.write(b"new")


WRITERS = {
    "a whole file": ("x.bin", _write_with_file),
    "a result": ("x.csv", lambda path, _: write_atomically(path, b"new")),
    "JSON": ("x.json", lambda path, _: write_json(path, {"a": 1})),
    "a manifest": ("manifest.json", lambda path, _: ShardManifest(path.parent, {}).save()),
    "an adapter": ("adapter.safetensors", lambda path, model: save_adapter(path, model)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_is_replaced_and_never_followed(folder, mine, model, name):
    """Neither one at the file's own name nor one at a temporary name that could be foreseen."""
    file, write = WRITERS[name]
    for link in (file, *guessable(file)):
        (folder / link).symlink_to(mine)
    before = os.umask(0o027)
    try:
        write(folder / file, model)
    finally:
        os.umask(before)
    assert mine.read_bytes() == MINE
    assert not (folder / file).is_symlink() and (folder / file).stat().st_size > 2
    assert (folder / file).stat().st_mode & 0o777 == 0o640  # as the umask says
    if name == "an adapter":
        read_adapter(folder / file)
    left = {path.name for path in folder.iterdir() if not path.is_symlink()}
    assert left == {file}


def test_files_that_grow_refuse_a_link(folder, mine):
    """Replies, logs: a cache would cut what has no newline at its end from the file that the link points at."""
    (folder / "replies.jsonl").symlink_to(mine)
    with pytest.raises(CacheError, match="Too many levels of symbolic links"):
        ReplyCache(folder, "replies")
    for flags in (os.O_TRUNC, os.O_APPEND):
        with pytest.raises(OSError, match="symbolic links"):
            open_log(folder / "replies.jsonl", flags)
    assert mine.read_bytes() == MINE


def test_shards_and_knowledge_replace_links(tmp_path, folder, mine):
    """The command lines that write most: a link at each name that they write."""
    given = draw_dataset(tmp_path / "drawn", {"train": 3})
    names = ["manifest.json", "train-000000.tar", *guessable("manifest.json"), *guessable("train-000000.tar")]
    (folder / ".plan").mkdir()
    for name in names:
        (folder / name).symlink_to(mine)
    (folder / ".plan" / "train-000000.tar.json").symlink_to(mine)
    make_shards(**given, out=str(folder), workers=1)
    assert mine.read_bytes() == MINE and ShardManifest.load(folder).samples("train") == 3
    assert not any((folder / name).is_symlink() for name in names[:2])

    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[rules]"')
    out = tmp_path / "knowledge"
    out.mkdir()
    names = ["knowledge.jsonl", "knowledge_provenance.json", "settings.json"]
    for name in (*names, *(x for name in names for x in guessable(name))):
        (out / name).symlink_to(mine if name != "settings.json" else tmp_path / "nowhere")
    launcher("tools/generate_knowledge.py").main(["--captions", given["captions"], "--out", str(out)])
    assert mine.read_bytes() == MINE and not any((out / name).is_symlink() for name in names)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_replaces_links(shards, clip_folder, tmp_path, mine):
    out = tmp_path / "run"
    (out / "stage1").mkdir(parents=True)
    for name in ("config.yaml", "stage1/adapter.safetensors", "stage1/.adapter.safetensors.tmp"):
        (out / name).symlink_to(mine)
    launcher("launchers/train.py").main(training_arguments(shards, clip_folder, tmp_path, out=out))
    assert mine.read_bytes() == MINE and "stages:" in (out / "config.yaml").read_text()
    assert read_adapter(out / "stage1" / "adapter.safetensors")[0].training["step"] == 2


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_folder_that_cant_be_written_is_one_error(shards, clip_folder, tmp_path, capsys):
    """/proc takes no file from anybody, not even from root; a file is no folder."""
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[rules]"')
    given = draw_dataset(tmp_path / "drawn", {"train": 3})
    (tmp_path / "photos").symlink_to(given["images"])
    (tmp_path / "file").write_text("no folder")
    for closed in ("/proc/nowhere", str(tmp_path / "file")):
        training = training_arguments(shards, clip_folder, tmp_path, out=f"{closed}/x.json")
        cached = training_arguments(shards, clip_folder, tmp_path, data__cache=f"{closed}/x", out=tmp_path / "r.json")
        calls = [
            (launcher("launchers/train.py").main, training),
            (launcher("launchers/evaluate.py").main, training),
            (launcher("launchers/train.py").main, cached),
            (launcher("tools/make_shards.py").main,
             ["--captions", given["captions"], "--images", given["images"], "--out", f"{closed}/x"]),
            (launcher("tools/generate_knowledge.py").main, ["--captions", given["captions"], "--out", f"{closed}/x"]),
            (amp.search.main, ["--index", f"{closed}/x", "--photos", str(tmp_path / "photos"), "--model", clip_folder,
                               "--workers", "0"]),
        ]  # fmt: skip
        for main, arguments in calls:
            assert closed in one_error(lambda run=main, given=arguments: run(given), capsys)


# -- secrets ----------------------------------------------------------------------------------------------------------

KEY, PASSWORD, TOKEN = "sk-canary-0123456789abcdef", "canary-password", "hf_canary0123456789"
CANARIES = re.compile(f"{KEY}|{PASSWORD}|{TOKEN}|canary-wandb")
SECRET_ENVIRONMENT = {"OPENAI_API_KEY": KEY, "HF_TOKEN": TOKEN, "WANDB_API_KEY": "canary-wandb"}


def test_secrets_are_replaced_and_nothing_else():
    for text, expected in (
        (f"http://me:{PASSWORD}@host/v1", "http://***@host/v1"),
        (f"--openai.api_key {KEY} --seed 3", "--openai.api_key *** --seed 3"),
        (f"--openai.api_key={KEY}", "--openai.api_key=***"),
        (f'{{"api_key": "{PASSWORD}", "a": 1}}', '{"api_key": "***", "a": 1}'),
        (f"password: {PASSWORD}", "password: ***"),
        (f"bearer {KEY}.", "bearer ***."),
        (f"token {TOKEN}", "token ***"),
        ("--openai.api_key_variable MY_KEY", "--openai.api_key_variable MY_KEY"),
        ("the file's key 'a' is missing; tokens: 3", "the file's key 'a' is missing; tokens: 3"),
        ("a@b.c, http://host/a@b", "a@b.c, http://host/a@b"),
        ("x.json: keys seen: images, captions", "x.json: keys seen: images, captions"),
    ):
        assert without_secrets(text) == expected
    assert public_command(["x.py", "--key", "plain", "--openai.token", "t", "--url", "http://a:b@c"]) == [
        "x.py", "--key", "plain", "--openai.token", "***", "--url", "http://***@c"]  # fmt: skip
    assert public_command(None) is None


def files_with_canaries(*folders: Path) -> list[str]:
    return [str(path) for folder in folders for path in folder.rglob("*") if path.is_file()
            and CANARIES.search(path.read_bytes().decode("utf-8", "replace"))]  # fmt: skip


def test_generation_keeps_no_secret(tmp_path, capsys, monkeypatch):
    """A server that refuses and repeats the key; its address holds a password, which the command line is kept with."""
    pytest.importorskip("openai", reason='needs the openai package: pip install "open-clip-amp[generate]"')
    from test_openai_engine import Faulty, good, status

    for name, value in SECRET_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    captions = tmp_path / "c.jsonl"
    captions.write_text("".join(json.dumps({"image": f"{i}.jpg", "caption": f"A man {i} runs"}) + "\n" for i in "ab"))
    main = launcher("tools/generate_knowledge.py").main

    def echo(handler):
        handler.reply(json.dumps({"error": {"message": f"no: {handler.headers['Authorization']} {KEY}"}}).encode(), 400)

    def arguments(url, out):
        return ["--captions", str(captions), "--out", str(tmp_path / out), "--engine", "openai", "--model", "m",
                "--openai.base_url", url.replace("http://", f"http://me:{PASSWORD}@"), "--openai.constrained", "none",
                "--fallback", "none", "--max_fallback", "1", "--openai.first_wait", "0.01", "--openai.tries", "1"]  # fmt: skip

    for number, answer in enumerate((good(), echo)):
        with Faulty(answer).serve() as url:
            main(arguments(url, f"out{number}"))
    shown = capsys.readouterr()
    provenance = json.loads((tmp_path / "out0" / "knowledge_provenance.json").read_text())
    assert any("***@127.0.0.1" in part for part in provenance["command"])
    assert "no: Bearer ***" in "".join(p.read_text() for p in (tmp_path / "out1" / "cache").iterdir())
    for answer in (status(401), status(404), status(500), b"not JSON"):
        with Faulty(answer).serve() as url, pytest.raises(SystemExit):
            main(arguments(url, "out2"))
    with pytest.raises(SystemExit):
        main(["--captions", str(captions), "--out", str(tmp_path / "out3"), "--openai.api_key", KEY])
    more = capsys.readouterr()
    assert "***" in more.err and not CANARIES.search(shown.out + shown.err + more.out + more.err)
    assert not files_with_canaries(tmp_path)


def test_conversion_training_and_search_keep_no_secret(tmp_path, clip_folder):
    """With keys in the environment and one on a command line, in processes of their own: output and files."""
    given = draw_dataset(tmp_path / "drawn", {"train": 8, "val": 4})
    url = f"http://me:{PASSWORD}@host/x"
    (tmp_path / "provenance.json").write_text("{}")
    steps = [
        ["tools/make_shards.py", "--captions", given["captions"], "--images", given["images"], "--knowledge",
         given["knowledge"], "--out", str(tmp_path / "shards"), "--workers", "1"],
        ["launchers/train.py", *training_arguments(tmp_path / "shards", clip_folder, tmp_path, out=tmp_path / "run",
                                                   trackers="[tensorboard]")],
        ["launchers/train.py", "--out", str(tmp_path / "no"), "--model.name", url, "--wandb.api_key", KEY],
    ]  # fmt: skip
    for number, step in enumerate(steps):
        done = subprocess.run([sys.executable, *step], cwd=ROOT, capture_output=True, text=True,
                              env={**QUIET_ENVIRONMENT, **SECRET_ENVIRONMENT, "PYTHONPATH": str(ROOT)})  # fmt: skip
        assert (done.returncode == 0) == (number < 2), done.stderr
        assert not CANARIES.search(done.stdout + done.stderr), done.stderr
    assert (tmp_path / "run" / "config.yaml").is_file() and list((tmp_path / "run").rglob("events.out.*"))
    assert not files_with_canaries(tmp_path)


def test_the_cache_holds_what_was_said_and_no_more(tmp_path):
    with ReplyCache(tmp_path, "a") as replies:
        replies.put("k", Reply("text"), caption="c")
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"key": "k", "caption": "c", "reply": "text"}
    shutil.rmtree(tmp_path)
