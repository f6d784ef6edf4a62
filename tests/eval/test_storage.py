"""Files appear whole and together or not at all; others' files are measured and read strictly."""

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from stllava_eval import storage as homes
from stllava_eval.errors import InputError, disk_error_line, one_line
from stllava_eval.storage import (
    alone,
    expanded,
    hold,
    loads,
    local_path,
    read_bytes,
    read_text,
    refuse_file,
    write_text,
)
from stllava_eval.storage import write_together as together


def everything(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


OLD = {"board.md": "old", "board.csv": "old", "images/a.jpg": "old", "mine.txt": "mine"}
NEW = {"board.md": "new", "board.csv": "new", "images/b.jpg": b"new", "index.html": "new"}


@pytest.fixture
def board(tmp_path):
    for name, text in OLD.items():
        write_text(tmp_path / "board" / name, text)
    return tmp_path / "board"


def test_files_that_belong_together_appear_together(board):
    together(board, NEW, stale=[board / "images/a.jpg"])
    assert everything(board) == {
        **{"board.md": "new", "board.csv": "new", "images/b.jpg": "new", "index.html": "new", "mine.txt": "mine"}
    }
    assert sorted(path.name for path in board.iterdir()) == [
        "board.csv",
        "board.md",
        "images",
        "index.html",
        "mine.txt",
    ]


@pytest.mark.parametrize("there", [True, False], ids=["over old files", "in a new folder"])
@pytest.mark.parametrize("call", range(12))
@pytest.mark.parametrize("what", ["fsync", "rename"])
def test_a_disk_that_is_full_at_any_point_leaves_the_old_files_as_they_were(
    board, tmp_path, monkeypatch, what, call, there
):
    folder = board if there else tmp_path / "none" / "board"
    calls = iter(range(10**6))

    def full(function):
        def called(*arguments):
            if next(calls) == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments)

        return called

    if what == "fsync":
        monkeypatch.setattr(os, "fsync", full(os.fsync))
    else:
        monkeypatch.setattr(Path, "rename", full(Path.rename))
    told = ""
    try:
        together(folder, NEW, stale=[board / "images/a.jpg"] if there else [])
    except InputError as error:
        told = str(error)
    if told:
        assert told == (
            f"{folder}: cannot be written (No space left on device). Free some space or choose another folder."
        )
        assert everything(folder) == (OLD if there else {})
        assert there or not folder.exists()
        assert not list(folder.glob(".*"))
    else:
        assert next(calls) <= call  # it was not called that often
        assert everything(folder)["index.html"] == "new"


def test_a_folder_in_a_files_place_is_refused_and_stays(board):
    (board / "index.html").mkdir()
    (board / "index.html" / "kept.txt").write_text("kept")
    with pytest.raises(InputError, match=r"board: cannot be written \(index.html in it is a folder\)"):
        together(board, NEW)
    assert everything(board) == {**OLD, "index.html/kept.txt": "kept"}


def test_what_a_killed_process_left_is_cleared_away(board):
    (board / ".123.unfinished" / "new").mkdir(parents=True)
    together(board, NEW)
    assert not list(board.glob(".*"))


def test_half_a_character_is_written_as_an_escape(tmp_path):
    together(tmp_path, {"a.txt": "\ud83d"})
    assert (tmp_path / "a.txt").read_bytes() == rb"\ud83d"


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 255, "ö" * 127, "x" * 230 + ".json"])
def test_a_name_as_long_as_the_disk_takes_can_be_written(tmp_path, name):
    write_text(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x" * 256, "ö" * 128])
def test_a_longer_name_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match=r"cannot be written \(File name too long\)\. Choose a shorter name\.$"):
        write_text(tmp_path / name, "text")
    with pytest.raises(InputError, match=r"cannot be made or read \(File name too long\)"):
        together(tmp_path / name, NEW)
    with pytest.raises(InputError, match=r"^--out .*no folder can be made there \(File name too long\)"):
        refuse_file(tmp_path / name / "board", "--out")
    assert local_path(str(tmp_path / name)) is None


def test_a_file_where_a_folder_is_to_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(InputError, match=rf"^--out {out}: {tmp_path}/file is a file. Choose another folder.$"):
            refuse_file(out, "--out")
    refuse_file(tmp_path / "new" / "folder", "--out")
    assert not (tmp_path / "new").exists()


def test_a_user_that_there_is_not_is_one_line(monkeypatch):
    monkeypatch.setenv("STLLAVA_HOME", "~no-such-user/x")
    with pytest.raises(InputError, match=r"STLLAVA_HOME=~no-such-user/x: no such user"):
        homes.home()
    assert expanded("STLLAVA_HOME", "~") == Path.home()
    assert local_path("~no-such-user/x") is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "{file}", "--images", "{long}"],
        ["check", "{long}"],
        ["check", "{file}", "--write", "{long}"],
        ["sft", "--recipe", "tiny", "--data", "{long}", "--out", "{out}", "start={long}"],
        ["sft", "--recipe", "tiny", "--data", "{file}", "--out", "{long}", "start=none"],
        ["sft", "--recipe", "{long}", "--data", "{file}", "--out", "{out}"],
        ["candidates", "--checkpoint", "none", "--images", "{long}", "--out", "{out}.jsonl"],
        ["judge", "{long}", "--judge", "exact", "--out", "{out}.jsonl"],
        ["pairs", "{long}", "{long}", "--out", "{out}"],
        ["dpo", "--recipe", "tiny", "--pairs", "{long}", "--images", "{folder}", "--out", "{out}"],
        ["audit", "{long}", "{long}", "--out", "{out}"],
        ["card", "{long}"],
        ["data", "med-im", "--from", "{long}", "--out", "{out}"],
        ["all", "--recipe", "tiny", "--data", "{long}", "--images", "{folder}", "--out", "{out}"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_name_that_is_too_long_is_one_line_of_every_command_of_training(home, tmp_path, capsys, arguments):
    from stllava_train.cli.main import main

    (tmp_path / "file.json").write_text('[{"id": "a"}]')
    places = {"file": tmp_path / "file.json", "long": tmp_path / ("x" * 256), "out": tmp_path / "out"}
    assert main([one.format(**places, folder=tmp_path) for one in arguments]) == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("stllava-train: ")
    assert "Traceback" not in last


def test_an_error_that_names_no_file_of_the_users_keeps_its_traceback():
    assert disk_error_line(FileNotFoundError(errno.ENOENT, "No such file", "ours.json")) is None
    assert disk_error_line(OSError(errno.ENOSPC, "No space left on device")) is None
    told = disk_error_line(PermissionError(errno.EACCES, "Permission denied", "a/b.json"))
    assert told == "a/b.json: Permission denied. Choose another file or folder."


def test_a_disk_without_locks_can_be_written(board, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    together(board, NEW)
    assert everything(board)["index.html"] == "new"


# --- one process at a time --------------------------------------------------------------------------------------------


def test_a_process_that_is_refused_does_not_take_the_folder_away(tmp_path):
    with alone(tmp_path / "a"):
        with pytest.raises(InputError, match="another process is writing it"), alone(tmp_path / "a"):
            pass
        assert (tmp_path / "a").is_dir()  # it is empty, and held
    assert not (tmp_path / "a").exists()


def _try(folder: Path, answer) -> None:
    try:
        hold(folder)
        hold(folder)  # its own
        answer.put("held")
    except InputError as error:
        answer.put(str(error))


def test_a_held_folder_is_refused_to_other_processes_until_this_one_ends(tmp_path):
    started = multiprocessing.get_context("spawn")
    answer = started.Queue()
    with alone(tmp_path / "a"):
        process = started.Process(target=_try, args=(tmp_path / "a", answer))
        process.start()
        assert "another process is writing it" in answer.get(timeout=60)
        process.join(60)
    process = started.Process(target=_try, args=(tmp_path / "a", answer))
    process.start()
    assert answer.get(timeout=60) == "held"
    process.join(60)
    assert process.exitcode == 0
    assert not (tmp_path / "a").exists()  # nothing was written there


# --- others' files ----------------------------------------------------------------------------------------------------


def test_a_file_of_others_is_read_up_to_a_size(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfyes")
    assert read_bytes(file, 6) == b"\xef\xbb\xbfyes"
    assert read_text(file) == "yes"
    with pytest.raises(InputError, match=r"a\.txt: 6 bytes, and at most 5 are read"):
        read_bytes(file, 5)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "a\0b")
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)


def test_what_need_not_end_is_not_begun(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(InputError, match=r"no regular file, and a device or a pipe need not end"):
            read_bytes(file)


def test_a_file_that_says_it_is_empty_and_is_not_is_read_up_to_the_limit():
    with pytest.raises(InputError, match=r"/proc/self/status: more than 10 bytes"):
        read_bytes(Path("/proc/self/status"), 10)


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param('{"a": 1, "a": 1}', r"key 'a' appears twice: line 1 column 1 \(char 0\)", id="equal values too"),
        pytest.param('[{"b": 1},\n {"a": 1,\n "a": 2}]', r"key 'a' appears twice: line 2 column 2", id="in a list"),
        pytest.param('{"a": {"b": 1, "c": {"b": 1, "b": 2}}}', "key 'b' appears twice: line 1 column 21", id="deep"),
        pytest.param('{"a": 1, "\\u0061": 2}', "key 'a' appears twice", id="one of them written as an escape"),
        pytest.param(b'{"a": 1, "a": 2}', "key 'a' appears twice: line 1", id="bytes"),
        pytest.param('{"a": 1, "a": 2}'.encode("utf-16"), "key 'a' appears twice: line 1", id="UTF-16"),
        pytest.param('{"a": ' + "[" * 900 + "]" * 900 + ', "a": 2}', "key 'a' appears twice", id="and nested deeply"),
        pytest.param('{"' + "k" * 999 + '": 1, "' + "k" * 999 + '": 2}', r"key 'k{60}' appears twice", id="a long key"),
    ],
)
def test_a_key_that_appears_twice_is_refused_with_its_place(text, told):
    with pytest.raises(ValueError, match=told):
        loads(text)


def test_other_json_is_read_as_ever():
    for text in ('{"a": {"b": 1}, "c": {"b": 1}}', "[1, 2.5, null]", '"a"', '{"a": {"a": 1}}', b'\xef\xbb\xbf{"a": 1}'):
        assert loads(text) == json.loads(text)
    with pytest.raises(json.JSONDecodeError):
        loads("{")


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_short_reason_is_kept_whole_on_one_line():
    assert one_line(ValueError("401 Client Error.\n\nInvalid username.\n  Log in.\n")) == (
        "401 Client Error. Invalid username. Log in"
    )
    assert one_line(KeyError()) == "KeyError"


def test_a_long_reason_ends_at_a_sentence_or_at_a_word():
    sentences = one_line(ValueError("This is a sentence of some words. " * 30))
    assert sentences.endswith("of some words")
    assert 150 < len(sentences) <= 300
    words = one_line(ValueError("word " * 300))
    assert words.endswith(" word ...")
    assert len(words) <= 304
    assert one_line(ValueError("x" * 999)) == "x" * 300 + " ..."
