"""Shared output folders: planted links, folders that can't be written, permissions; and secrets in output files."""

import io
import json
import os
import re
import socket
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from support.commands import evaluation_arguments, one_error, training_arguments
from support.drawn_data import draw_dataset
from support.processes import forget_accelerate
from support.repository import launcher

import amp
from amp.data.conversion.make import make_shards
from amp.data.shards import ShardManifest
from amp.errors import AmpError, exit_on_error, public_command, without_secrets
from amp.files import open_log, whole_file, write_atomically, write_json
from amp.generation.cache import CacheError, ReplyCache
from amp.model.adapter import read_adapter, save_adapter

MINE = b"what is nobody else's business, without a newline"


@pytest.fixture
def mine(tmp_path):
    """A file outside the output folder that the planted links point to."""
    path = tmp_path / "mine.txt"
    path.write_bytes(MINE)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "shared"
    path.mkdir()
    return path


def guessable(name: str) -> list[str]:
    """Temporary names that an attacker could guess."""
    pid = os.getpid()
    return [f".{name}.tmp", f"{name}.tmp", f".{name}.{pid}.tmp", f"{name}.{pid}.tmp", f"{name}~", f".{name}.swp"]


@pytest.fixture(scope="module")
def model(clip_folder):
    settings = amp.PromptConfig(num_prompts=2, depth=0.5)
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
    """Neither a link at the file's own name nor one at a temporary name that could be guessed."""
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
    assert (folder / file).stat().st_mode & 0o777 == 0o640  # permissions follow the umask
    if name == "an adapter":
        read_adapter(folder / file)
    left = {path.name for path in folder.iterdir() if not path.is_symlink()}
    assert left == {file}


def test_files_that_grow_refuse_a_link(folder, mine):
    """Replies and logs. A cache would truncate an incomplete last line in the file that the link points to."""
    (folder / "replies.jsonl").symlink_to(mine)
    with pytest.raises(CacheError, match="Too many levels of symbolic links"):
        ReplyCache(folder, "replies")
    for flags in (os.O_TRUNC, os.O_APPEND):
        with pytest.raises(OSError, match="symbolic links"):
            open_log(folder / "replies.jsonl", flags)
    assert mine.read_bytes() == MINE


def test_shards_and_knowledge_replace_links(tmp_path, folder, mine):
    """Runs the commands that write the most files, with a link at each output name."""
    given = draw_dataset(tmp_path / "drawn", {"train": 3})
    names = ["manifest.json", "train-000000.tar", *guessable("manifest.json"), *guessable("train-000000.tar")]
    (folder / ".plan").mkdir()
    for name in names:
        (folder / name).symlink_to(mine)
    (folder / ".plan" / "train-000000.tar.json").symlink_to(mine)
    make_shards(**given, out=str(folder), workers=1)
    assert mine.read_bytes() == MINE and ShardManifest.load(folder).samples("train") == 3
    assert not any((folder / name).is_symlink() for name in names[:2])

    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    out = tmp_path / "knowledge"
    out.mkdir()
    names = ["knowledge.jsonl", "knowledge_provenance.json", "settings.json"]
    for name in (*names, *(x for known in names for x in guessable(known))):
        (out / name).symlink_to(mine if name != "settings.json" else tmp_path / "nowhere")
    launcher("tools/generate_knowledge.py").main(["--captions", given["captions"], "--out", str(out)])
    assert mine.read_bytes() == MINE and not any((out / name).is_symlink() for name in names)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_folder_that_cant_be_written_is_one_error(shards, clip_folder, tmp_path, capsys):
    """Nobody can create a file in /proc, not even root, and a file can't be used as a folder."""
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    given = draw_dataset(tmp_path / "drawn", {"train": 3})
    (tmp_path / "file").write_text("no folder")
    here, there = str(tmp_path / "file"), "/proc/nowhere"
    calls = {
        "launchers/train.py": training_arguments(shards, clip_folder, tmp_path, out=f"{there}/x.json"),
        "amp/commands/evaluate.py": evaluation_arguments(shards, clip_folder, tmp_path, out=f"{there}/x.json"),
        "launchers/train.py cache": training_arguments(shards, clip_folder, tmp_path, data__cache=f"{there}/x"),
        "tools/make_shards.py": ["--captions", given["captions"], "--images", given["images"], "--out", f"{here}/x"],
        "tools/generate_knowledge.py": ["--captions", given["captions"], "--out", f"{here}/x"],
        "amp/commands/search.py": [
            "--index",
            f"{there}/x",
            "--photos",
            given["images"],
            "--model",
            clip_folder,
            "--workers",
            "0",
        ],
    }
    for name, arguments in calls.items():
        main = launcher(name.split()[0]).main
        line = one_error(lambda run=main, given=arguments: run(given), capsys)
        assert here in line or there in line, name


# -- secrets ----------------------------------------------------------------------------------------------------------

KEY, PASSWORD, TOKEN = "sk-canary-0123456789abcdef", "canary-password", "hf_canary0123456789"
CANARIES = re.compile(f"{KEY}|{PASSWORD}|{TOKEN}|canary-wandb")
SECRET_ENVIRONMENT = {"OPENAI_API_KEY": KEY, "HF_TOKEN": TOKEN, "WANDB_API_KEY": "canary-wandb"}


@pytest.fixture(scope="module")
def job(tmp_path_factory, clip_folder):
    """Runs conversion, training, evaluation and search in a folder with planted links and an environment with keys.

    Returns the folder, the output, and the addresses of all connections.
    """
    pytest.importorskip("spacy", reason='needs spaCy: pip install "open-clip-amp[generate]"')
    root = tmp_path_factory.mktemp("job")
    (root / "mine.txt").write_bytes(MINE)
    run = root / "run"
    (run / "stage1").mkdir(parents=True)
    for name in ("config.yaml", "stage1/adapter.safetensors", "stage1/.adapter.safetensors.tmp"):
        (run / name).symlink_to(root / "mine.txt")
    given = draw_dataset(root / "drawn", {"train": 8, "test": 4})
    adapter = run / "stage1" / "adapter.safetensors"
    common = training_arguments(root / "shards", clip_folder, root, out=run)
    results = evaluation_arguments(root / "shards", clip_folder, root, adapters=f"[mine={adapter}]")
    steps = [
        (
            "tools/make_shards.py",
            [
                "--captions",
                given["captions"],
                "--images",
                given["images"],
                "--knowledge",
                given["knowledge"],
                "--out",
                str(root / "shards"),
                "--workers",
                "1",
            ],
        ),
        ("launchers/train.py", [*common, "--trackers", "[tensorboard]"]),
        ("amp/commands/evaluate.py", results),
        (
            "amp/commands/search.py",
            [
                "--index",
                str(root / "index"),
                "--adapter",
                str(adapter),
                "--photos",
                given["images"],
                "--workers",
                "0",
                "a dog chases a ball",
            ],
        ),
    ]
    connected, out = [], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
        for name, value in SECRET_ENVIRONMENT.items():
            patch.setenv(name, value)
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, _noting(getattr(socket.socket, name), connected), raising=False)
        patch.setattr(socket, "getaddrinfo", lambda host, *_, **__: connected.append(("asked for", host)) or [])
        for script, arguments in steps:
            forget_accelerate()
            launcher(script).main(arguments)
    forget_accelerate()
    return root, out.getvalue(), connected


def _noting(function, connected: list):
    def call(self, *arguments):
        connected.append(arguments[-1])
        return function(self, *arguments)

    return call


def test_a_job_on_local_data_uses_no_network(job):
    """Conversion, training, evaluation and search look up no host name and connect only to this machine."""
    _, _, connected = job
    outside = [to for to in connected if not isinstance(to, str | bytes) and to[0] not in ("127.0.0.1", "::1")]
    assert not outside


def test_a_run_replaces_links(job):
    root, _, _ = job
    assert (root / "mine.txt").read_bytes() == MINE and "stages:" in (root / "run" / "config.yaml").read_text()
    assert read_adapter(root / "run" / "stage1" / "adapter.safetensors")[0].training["step"] == 2


def test_a_job_keeps_no_secret(job):
    root, shown, _ = job
    assert list((root / "run").rglob("events.out.*")) and "photos in" in shown
    assert not CANARIES.search(shown) and not files_with_canaries(root)


def test_a_wrong_command_line_shows_no_secret(capsys, tmp_path):
    url = f"http://me:{PASSWORD}@host/x"
    with pytest.raises(SystemExit):
        launcher("launchers/train.py").main(["--out", str(tmp_path), "--model.name", url, "--wandb.api_key", KEY])
    shown = capsys.readouterr().err
    assert "--wandb.api_key ***" in shown and not CANARIES.search(shown)


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
        "x.py",
        "--key",
        "plain",
        "--openai.token",
        "***",
        "--url",
        "http://***@c",
    ]


def test_words_that_name_secrets_are_kept_in_messages_of_our_own(capsys):
    """A captions file named results.token and "password:" in a caption are shown; keys in the same line are not."""
    kept = (
        "/data/results_20130124.token line 1: the header has one column",
        "model '/data/results.token': no file",
        "x.csv line 2: 3 fields, ['a.jpg', 'A sign: the password: a key', 'Token: 5 cents']",
        "the caption is 'Basic training, secret: none'; hf_captions_2014.jsonl: no such file",
    )
    for text in kept:
        for key in (
            "",
            f" (http://me:{PASSWORD}@host)",
            f" --wandb.token {PASSWORD}",
            f" {{token: {PASSWORD}}}",
            f" ?token={PASSWORD}",
            f" HF_TOKEN={PASSWORD}",
            f" 'password': '{PASSWORD}'",
            f" {KEY}",
            f" X-Api-Key: {PASSWORD}",
            f" Authorization: Bearer {PASSWORD}",
            f" hf_token: {TOKEN}",
        ):
            with pytest.raises(SystemExit), exit_on_error():
                raise AmpError(text + key)
            shown = capsys.readouterr().err
            assert text in shown and not CANARIES.search(shown) and ("***" in shown) == bool(key)
    assert public_command(["x", "--captions", "results_20130124.token", "--engine_options", f"{{token: {KEY}}}"]) == [
        "x",
        "--captions",
        "results_20130124.token",
        "--engine_options",
        "{token: ***}",
    ]


def files_with_canaries(*folders: Path) -> list[str]:
    return [
        str(path)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and CANARIES.search(path.read_bytes().decode("utf-8", "replace"))
    ]


def test_generation_keeps_no_secret(tmp_path, capsys, monkeypatch):
    """The server refuses and repeats the key. Its URL, part of the stored command line, contains a password."""
    pytest.importorskip("openai", reason='needs the openai package: pip install "open-clip-amp[generate]"')
    from support.faulty_server import Faulty, good, status

    for name, value in SECRET_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    captions = tmp_path / "c.jsonl"
    captions.write_text("".join(json.dumps({"image": f"{i}.jpg", "caption": f"A man {i} runs"}) + "\n" for i in "ab"))
    main = launcher("tools/generate_knowledge.py").main

    def echo(handler):
        handler.reply(json.dumps({"error": {"message": f"no: {handler.headers['Authorization']} {KEY}"}}).encode(), 400)

    def arguments(url, out):
        return [
            "--captions",
            str(captions),
            "--out",
            str(tmp_path / out),
            "--engine",
            "openai",
            "--model",
            "m",
            "--openai.base_url",
            url.replace("http://", f"http://me:{PASSWORD}@"),
            "--openai.constrained",
            "none",
            "--fallback",
            "none",
            "--max_fallback",
            "1",
            "--openai.first_wait",
            "0.01",
            "--openai.tries",
            "1",
        ]

    for number, answer in enumerate((good(), echo)):
        with Faulty(answer).serve() as url:
            main(arguments(url, f"out{number}"))
    shown = capsys.readouterr()
    provenance = json.loads((tmp_path / "out0" / "knowledge_provenance.json").read_text())
    assert any("***@127.0.0.1" in part for part in provenance["command"])
    assert "no: Basic ***" in "".join(p.read_text() for p in (tmp_path / "out1" / "cache").iterdir())
    for answer in (status(401), status(404), status(500), b"not JSON"):
        with Faulty(answer).serve() as url, pytest.raises(SystemExit):
            main(arguments(url, "out2"))
    with pytest.raises(SystemExit):
        main(["--captions", str(captions), "--out", str(tmp_path / "out3"), "--openai.api_key", KEY])
    with pytest.raises(SystemExit):
        main([*arguments("http://host", "out4"), "--openai.api_key_variable", KEY])
    more = capsys.readouterr()
    assert "***" in more.err and not CANARIES.search(shown.out + shown.err + more.out + more.err)
    assert not files_with_canaries(tmp_path)
