"""The cache of replies: incomplete lines, several parts, two processes on one part, a full disk."""

import errno
import json
import multiprocessing
import os

import pytest

from amp.generation.cache import CacheError, Reply, ReplyCache, key_of


def fill(folder, part, keys):
    with ReplyCache(folder, part) as cache:
        for key in keys:
            cache.put(key, Reply(f"reply to {key}"), stage="triplets")


def test_keeps_and_finds(tmp_path):
    fill(tmp_path, "a", ["x", "y"])
    with ReplyCache(tmp_path, "a") as cache:
        assert cache.get("x") == Reply("reply to x") and cache.get("z") is None and len(cache) == 2
        cache.put("r", Reply("", refused=True))
    with ReplyCache(tmp_path, None) as cache:
        assert cache.get("r") == Reply("", refused=True)


def test_the_first_reply_stays(tmp_path):
    with ReplyCache(tmp_path, "a") as cache:
        cache.put("x", Reply("first"))
        cache.put("x", Reply("second"))
    (tmp_path / "b.jsonl").write_text('{"key": "x", "reply": "third"}\n')
    with ReplyCache(tmp_path, "a") as cache:
        assert cache.get("x") == Reply("first")
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path, cut):
    fill(tmp_path, "a", ["x", "y"])
    path = tmp_path / "a.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with ReplyCache(tmp_path, "a") as cache:
        assert (cache.get("x"), cache.get("y"), cache.damaged) == (Reply("reply to x"), None, 0)
        cache.put("y", Reply("reply to y"), stage="triplets")
    assert path.read_bytes() == whole


def test_a_torn_line_longer_than_a_read(tmp_path):
    fill(tmp_path, "a", ["x"])
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(whole + b"{" * 200_000)
    with ReplyCache(tmp_path, "a"):
        pass
    assert (tmp_path / "a.jsonl").read_bytes() == whole


def test_other_parts_are_read_and_never_changed(tmp_path):
    fill(tmp_path, "a", ["x"])
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b'{"key": "half')
    before = (tmp_path / "a.jsonl").read_bytes()
    with ReplyCache(tmp_path, "b") as cache:
        assert cache.get("x") == Reply("reply to x") and cache.damaged == 0
    assert (tmp_path / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "line", ["[]", "{}", "no json", '{"key": 1, "reply": "x"}', '{"key": "k", "reply": null}', "\udcff"]
)
def test_damaged_lines_are_counted(tmp_path, line):
    content = f'{{"key": "x", "reply": "good"}}\n{line}\n{{"key": "z", "reply": "too"}}\n'
    (tmp_path / "a.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    with ReplyCache(tmp_path, "a") as cache:
        assert cache.damaged == 1 and cache.get("x") and cache.get("z")


def test_text_of_any_kind_survives(tmp_path):
    text = 'quote " backslash \\ newline \n separator \u2028 emoji 😀 null \x00'
    with ReplyCache(tmp_path, "a") as cache:
        cache.put("x", Reply(text))
    with ReplyCache(tmp_path, None) as cache:
        assert cache.get("x").text == text


def test_two_processes_at_one_part_are_refused(tmp_path):
    with ReplyCache(tmp_path, "a"), pytest.raises(CacheError, match=r"a\.jsonl: another process is writing this part"):
        ReplyCache(tmp_path, "a")
    ReplyCache(tmp_path, "a").close()  # the part is free again


def test_parts_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    keys = [[f"{part}-{number}" for number in range(200)] for part in range(4)]
    processes = [context.Process(target=fill, args=(tmp_path, str(part), keys[part])) for part in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with ReplyCache(tmp_path, None) as cache:
        assert len(cache) == 800 and cache.damaged == 0


def test_a_full_disk_is_told_and_loses_nothing(tmp_path, monkeypatch):
    cache = ReplyCache(tmp_path, "a")
    cache.put("x", Reply("kept"))
    write = os.write

    def full(file, data):
        monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        return write(file, data[:10])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CacheError, match=r"a\.jsonl: can't be written \(No space left\); make room"):
        cache.put("y", Reply("lost"))
    monkeypatch.undo()
    cache.close()
    with ReplyCache(tmp_path, "a") as cache:
        assert cache.get("x") == Reply("kept") and cache.get("y") is None
        cache.put("y", Reply("now"))
    assert [json.loads(line)["key"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == ["x", "y"]


def test_unusable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="file: can't be used"):
        ReplyCache(tmp_path / "file", "a")


def test_keys_depend_on_all_of_their_content():
    base = {"stage": "triplets", "engine": {"model": "a", "dtype": "float32"}, "suffix": "x", "seed": None}
    changes = (
        {},
        {"stage": "states"},
        {"suffix": "y"},
        {"engine": {"model": "a", "dtype": "bfloat16"}},
        {"seed": [0, 1]},
    )
    assert len({key_of(**{**base, **change}) for change in changes}) == 5
    assert key_of(**dict(reversed(base.items()))) == key_of(**base)
    assert len(key_of(text="\ud800")) == 32
