"""Checking training data: what is reported, what is written, and the exit code."""

import contextlib
import json
import os
import re
from pathlib import Path

import pytest
from conftest import png
from PIL import Image
from scans import COPIES, scan

from stllava_eval.data.catalog import DATASETS, Row
from stllava_eval.data.splits import write_split
from stllava_eval.images import decode, pixel_hash
from stllava_train.cli.main import main
from stllava_train.data import leaks
from stllava_train.data.check import problems
from stllava_train.data.conversations import read_conversations
from stllava_train.data.leaks import screen_images
from stllava_train.preferences.check_pairs import pair_problems


def record(id: str, image: str | None = None, question: str = "Where?", answer: str = "Left.") -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": id, "conversations": turns} | ({"image": image} if image else {})


def write(folder: Path, *records: dict, name: str = "data.json") -> Path:
    file = folder / name
    file.write_text("[\n" + ",\n".join(json.dumps(one) for one in records) + "\n]\n")
    return file


@pytest.fixture
def folder(tmp_path, home) -> Path:
    """With three scans, of which the last is a test image of VQA-RAD, under an empty $STLLAVA_HOME."""
    for number in range(3):
        scan(number).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def tested(folder) -> Path:
    fields = dict.fromkeys(DATASETS["vqarad"].categories, "")
    image = (folder / "2.png").read_bytes()
    row = Row("1", image, "synpic2.jpg", "Where?", "left", "open", fields)
    write_split("vqarad", "test", [row], edition="t", official=False, sample=True, source="t", licence="CC0-1.0")
    return folder


def told(file: Path, **settings) -> list[str]:
    return [str(problem).removeprefix(f"{file}:") for problem in problems([file], progress=False, **settings)]


def test_sound_data_has_no_problem(tested):
    file = write(tested, record("a", "0.png"), record("b", "1.png"), record("c"))
    assert told(file) == []


def test_an_image_that_cannot_be_decoded_is_reported_for_every_record(folder):
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no image")
    file = write(folder, record("a", "cut.png"), record("b", "0.png"), record("c", "cut.png"), record("d", "text.jpg"))
    found = told(file)
    assert [one[:2] for one in found] == ["2:", "4:", "5:"]
    assert re.search(r"a: its image .*cut.png: an image of \d+ bytes cannot be decoded \(.*truncated", found[0])
    assert "text.jpg: 8 bytes are no JPEG, PNG, BMP, GIF, TIFF or WebP image" in found[2]


def test_the_same_image_and_rounds_under_two_ids_are_a_duplicate(folder):
    Image.open(folder / "0.png").save(folder / "copy.bmp")  # other bytes, the same pixels
    file = write(
        folder,
        record("a", "0.png"),
        record("b", "copy.bmp"),
        record("c", "0.png", answer="Right."),
        record("d", "1.png"),
        record("e"),
        record("f", question=" Where?\n"),
    )
    assert told(file) == [
        f"3: b: its image and rounds are those of a at {file}:2. Keep one of the two.",
        f"7: f: its image and rounds are those of e at {file}:6. Keep one of the two.",
    ]


def test_records_on_one_line_are_told_apart_by_column(tested, capsys):
    file, out = tested / "data.json", tested / "sound.json"
    file.write_text(json.dumps([record("a"), record("b", "2.png"), record("a"), record("d", "1.png")]))
    starts = [match.start() + 1 for match in re.finditer(r'\{"id"', file.read_text())]
    assert main(["check", str(file), "--write", str(out)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{file}:1:{starts[1]}: b: its image is test image vqarad/synpic2.jpg, pixel for pixel. Leave it out.",
        f"{file}:1:{starts[2]}: a: its id, image and rounds are those of {file}:1. Keep one of the two.",
        "2 problems in 2 records: 1 form, 1 test image",
        f"{out}: 2 records",
    ]
    assert [one["id"] for one in json.loads(out.read_text())] == ["a", "d"]


def test_two_files_are_checked_as_one(folder):
    records = record("a"), record("a", answer="No.")
    one, other = write(folder, records[0], name="x.json"), write(folder, *records, name="b.json")
    assert [str(problem) for problem in problems([one, other], progress=False)] == [
        f"{other}:2: a: its id, image and rounds are those of {one}:2. Keep one of the two."
    ]


def test_a_test_image_is_reported_pixel_for_pixel(tested):
    Image.open(tested / "2.png").save(tested / "copy.bmp")
    file = write(tested, record("a", "0.png"), record("b", "copy.bmp"))
    assert told(file) == ["3: b: its image is test image vqarad/synpic2.jpg, pixel for pixel. Leave it out."]


def test_a_copy_of_a_test_image_is_reported_with_its_distance(tested):
    COPIES["224 px and JPEG"](scan(2)).save(tested / "copy.png")
    (found,) = told(write(tested, record("a", "copy.png")))
    assert re.search(r"^2: a: its image looks like test image vqarad/synpic2.jpg \(distance 0.0\d\d of at most", found)


@pytest.mark.parametrize("key", ["image", "image_path", "images"])
def test_the_image_of_a_record_with_another_problem_is_looked_at_too(tested, key):
    file = write(tested, record("a", answer="") | {key: "2.png"})
    assert [problem.kind for problem in problems([file], progress=False)] == ["form", "test image"]


def test_what_is_not_prepared_is_named(tested, caplog):
    told(write(tested, record("a", "0.png")))
    assert caplog.messages == [
        "images were not compared with: vqarad test (only its sample is prepared; run `stllava-eval prepare vqarad`), "
        "slake test (not prepared; run `stllava-eval prepare slake`), "
        "pathvqa test (not prepared; run `stllava-eval prepare pathvqa`)"
    ]


def test_leaks_are_of_conversations_alone(tested):
    sound, _ = read_conversations(write(tested, record("a", "2.png"), record("b", "0.png"), record("c")))
    assert [problem.id for problem in screen_images(sound, progress=False).leaks] == ["a"]


def test_each_image_is_decoded_once(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr(leaks, "decode", lambda data: decoded.append(data) or scan(0))
    told(write(folder, *(record(str(number), "0.png") for number in range(5))))
    assert len(decoded) == 1


# the command --------------------------------------------------------------------------------------------------------


def test_the_command_prints_problems_by_line_and_counts_them(tested, capsys):
    file = write(tested, record("a", "2.png"), record("\x1b[31m", answer=""), record("c"), record("d"))
    assert main(["check", str(file)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"{file}:2: a: its image is test image vqarad/synpic2.jpg, pixel for pixel. Leave it out.",
        f"{file}:3: \\x1b[31m: turn 2 is empty. Write the answer, or drop its round.",
        f"{file}:5: d: its image and rounds are those of c at {file}:4. Keep one of the two.",
        "3 problems in 3 records: 1 form, 1 duplicate, 1 test image",
    ]
    assert "lengths are not checked: pass --checkpoint" in printed.err
    assert "read: 3 conversations about 1 image (2 about none)\n" in printed.err


@pytest.mark.parametrize(
    "pair",
    [
        {"prompt": "Where?", "chosen": "Left.", "rejected": "Right.", "images": ["0.png"]},
        {"image": "0.png", "text": {"question": "Where?", "chosen": "Left.", "rejected": "Right."}},
    ],
    ids=["trl", "RLHF-V"],
)
@pytest.mark.parametrize("written", [lambda pair: json.dumps(pair), lambda pair: json.dumps([pair, pair], indent=1)])
def test_pairs_of_another_tool_are_refused_once_and_not_read_as_conversations(folder, capsys, pair, written):
    file = folder / "pairs.json"
    file.write_text(written(pair))
    assert main(["check", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"it holds pairs in another tool's layout. `stllava-train pairs --from {file} --images DIR" in printed.err


def test_a_reader_that_leaves_does_not_stop_a_command(folder):
    file = write(folder, *(record(str(number), "none.png") for number in range(3)))
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "w") as stream, contextlib.redirect_stdout(stream):
        assert main(["check", str(file)]) == 1


def test_write_keeps_the_sound_records_unchanged(tested, capsys):
    good = record("a", "0.png") | {"domain": {"xray": True}, "note": "\ud800 \u4e2d"}
    file, out = write(tested, good, record("b", answer=""), record("c")), tested / "sound.json"
    assert main(["check", str(file), "--write", str(out)]) == 1
    assert json.loads(out.read_text()) == [good, record("c")]
    assert len(out.read_text().splitlines()) == 4
    assert capsys.readouterr().out.endswith(f"{out}: 2 records\n")
    assert main(["check", str(out)]) == 0
    assert capsys.readouterr().out == ""


def test_records_that_are_too_long_are_reported_with_the_images_tokens(folder, checkpoint, capsys, processor, tmp_path):
    from stllava_train.data.encoding import Encoder

    file = write(folder, record("a", "0.png"), record("b", "1.png", answer="word " * 50), record("c"))
    encoder = Encoder(processor, "v1", image_tokens=4)
    ((image, *_), _) = read_conversations(file)
    short = len(encoder(image, (False,)).ids)
    assert told(file, encoder=encoder, max_tokens=short)[0].startswith("3: b: it has ")
    (found,) = told(file, encoder=encoder, max_tokens=short)
    assert f", 4 of them its image's, and at most {short} are read. Drop rounds" in found
    assert len(told(file, encoder=encoder, max_tokens=short - 1)) == 2


def test_the_command_counts_with_the_checkpoints_tokenizer(folder, checkpoint, capsys):
    file = write(folder, record("a", "0.png"), record("b", answer="word " * 50))
    assert main(["check", str(file), "--checkpoint", str(checkpoint), "--max-tokens", "500"]) == 1
    printed = capsys.readouterr()
    assert re.search(r":3: b: it has \d+ tokens, and at most 500 are read", printed.out)
    assert printed.out.endswith("\n1 problem in 1 record: 1 length\n")
    assert "not counted" not in printed.err


def test_an_image_name_that_is_no_name_is_a_problem_of_its_record(folder, capsys):
    file = write(folder, record("a", "0.png"), record("b", "x" * 300), record("c", "x\0", answer="Right."))
    assert main(["check", str(file)]) == 1
    assert re.search(r":3: b: its image .*\n.*:4: c: its image .*\n2 problems in 2", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["{tmp}/none.json"], "none.json: cannot be read", id="no file"),
        pytest.param(["{tmp}/data.json", "{tmp}/data.json"], "a data file comes twice", id="a file twice"),
        pytest.param(["{tmp}/data.json", "--images", "{tmp}/none"], "no such folder", id="no folder"),
        pytest.param(["{tmp}/data.json", "--write", "{tmp}/data.json"], "it is a DATA file", id="onto itself"),
        pytest.param(["{tmp}/data.json", "--write", "{tmp}/x/y.json"], "Pass --images, or write into", id="elsewhere"),
        pytest.param(["{tmp}/data.json", "--max-tokens", "9"], "with --checkpoint to count", id="no tokenizer"),
        pytest.param(["{tmp}/data.json", "--checkpoint", "{tmp}"], "it has no config.json", id="no checkpoint"),
    ],
)
def test_a_wrong_call_is_one_line(folder, arguments, message, capsys):
    write(folder, record("a"))
    assert main(["check", *(argument.format(tmp=folder) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_real_leaks_are_found(shared, home):
    """SLAKE's Chinese training rows show 84 of its 96 English test images; see the README of the shared data."""
    slake = shared / "data" / "slake"
    rows = {part: json.loads((slake / f"{part}.json").read_text()) for part in ("train", "validate", "test")}
    names = sorted({row["img_name"] for row in rows["test"] if row["q_lang"] == "en"})
    fields = dict.fromkeys(DATASETS["slake"].categories, "")
    kept = [Row(name, (slake / "imgs" / name).read_bytes(), name, "Q?", "A", "open", fields) for name in names]
    write_split("slake", "test", kept, edition="t", official=False, sample=True, source="t", licence="CC-BY-4.0")
    chinese = {row["img_name"] for part in ("train", "validate") for row in rows[part] if row["q_lang"] == "zh"}
    file = write(home.parent, *(record(name, name) for name in sorted(chinese)[:60]))
    found = problems([file], slake / "imgs", progress=False)
    assert {problem.id for problem in found} == set(sorted(chinese)[:60]) & set(names)
    assert all("pixel for pixel" in problem.what for problem in found)


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_that_repeat_or_contradict_another_are_found_under_whatever_id(tmp_path, home):
    for name, shade in (("a.png", 1), ("copy.bmp", 1), ("b.png", 2)):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / name)
    sha256 = {name: pixel_hash(decode((tmp_path / name).read_bytes())) for name in ("a.png", "copy.bmp", "b.png")}
    rows = [
        ("0", "a.png", "Left.", "Right."),
        ("1", "copy.bmp", "right.", "LEFT."),  # the opposite, in other letters about a copy
        ("2", "a.png", "Left. ", "Right."),
        ("3", "b.png", "Right.", "Left."),  # another image
        ("4", "a.png", "Left.", "Below."),  # other answers
        ("5", "a.png", "Right.", "Left."),  # the opposite, and what 1 says
    ]
    file = tmp_path / "pairs.jsonl"
    known = {"question": "Where?", "margin": None, "judges": []}
    file.write_text(
        "".join(
            json.dumps(
                {"id": id, "image": image, "image_sha256": sha256[image], "chosen": one, "rejected": two, **known}
            )
            + "\n"
            for id, image, one, two in rows
        )
    )
    read: list[str] = []
    found = pair_problems(file, progress=False, report=read.append)
    opposite, again = "the other way round. Keep the one that is right, or neither.", "Keep one of the two."
    assert [(str(one), one.kind) for one in found] == [
        (f"{file}:2: 1: its chosen and rejected answers are those of 0 at {file}:1 {opposite}", "contradiction"),
        (f"{file}:3: 2: its image, question and answers are those of 0 at {file}:1. {again}", "duplicate"),
        (f"{file}:6: 5: its image, question and answers are those of 1 at {file}:2. {again}", "duplicate"),
    ]
    assert read == ["read: 6 pairs about 2 images"]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (
            [0.5, 0.25],
            {2: ("at FILE:1, and its weight is 0.25, not 0.5. Keep the one that is right.", "contradiction")},
        ),
        ([0.5, 0.5], {2: ("at FILE:1. Keep one of the two.", "duplicate")}),
        (
            [0.5, None],
            {2: ("it has no weight, and 1 of the file's pairs have one. Give each a weight, or none.", "form")},
        ),
        ([0, 0], {1: ("its weight is 0 as every other one is, so nothing would be learnt. Raise some.", "form")}),
        ([None, None], {2: ("at FILE:1. Keep one of the two.", "duplicate")}),
    ],
)
def test_weights_that_contradict_each_other_or_lack_are_found(tmp_path, home, weights, expected):
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    sha256 = pixel_hash(decode((tmp_path / "a.png").read_bytes()))
    known = {"image": "a.png", "image_sha256": sha256, "question": "Where?", "margin": None, "judges": []}
    rows = [
        {"id": str(number), "chosen": chosen, "rejected": "Right.", **known}
        | ({} if weight is None else {"weight": weight})
        for number, (chosen, weight) in enumerate(zip(["Left.", "left."], weights, strict=True))
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {(str(one), one.kind) for one in pair_problems(file, progress=False)}
    for line, (what, kind) in expected.items():
        what = what.replace("FILE", str(file))
        assert any(text.startswith(f"{file}:{line}: ") and text.endswith(what) and of == kind for text, of in found)
    assert len(found) == len(expected) + (weights in ([0.5, None], [0, 0]))  # the pair twice is found beside


def test_every_problem_of_a_file_of_pairs_is_told_by_line(tmp_path, prepared, checkpoint, capsys):
    from stllava_eval.data.splits import read_rows
    from stllava_train.cli.main import main

    for name, content in (("a.png", png((1, 2, 3))), ("leak.png", read_rows("slake", "test")[0].image)):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "cut.png").write_bytes(png((9, 9, 9))[:50])
    sha256 = {name: pixel_hash(decode((tmp_path / name).read_bytes())) for name in ("a.png", "leak.png")}
    good = {"id": "0", "image": "a.png", "image_sha256": sha256["a.png"], "question": "Where?", "chosen": "Left."}
    good |= {"rejected": "Right.", "margin": 1.0, "judges": []}
    changes = [
        {},
        {"chosen": "</s>"},
        {"image": "none.png"},
        {"image_sha256": "0" * 64},
        {"image": "cut.png"},
        {"image": "leak.png", "image_sha256": sha256["leak.png"]},
        {"rejected": "word " * 500},
        {"id": "0"},
        {"img": "a.png"},
    ]
    rows = [
        good | {"id": str(number), "question": f"Where is {number}?"} | change for number, change in enumerate(changes)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + b'{"id": "cut\n\xff\n[1]\n')
    assert main(["check", str(file), "--checkpoint", str(checkpoint), "--max-tokens", "600"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    told = [
        ":2: 1: </s> in chosen",
        ":3: 2: its image none.png is not in",
        ":4: 3: its image a.png has other pixels",
        ":5: 4: its image ",
        ":6: 5: its image is test image",
        ":7: 6: it has ",
        ":8: 0: its id is that of ",
        ":9: 8: img is no key of a pair",
        *(f":{line}: a record: it is " for line in (10, 11, 12)),
    ]
    assert len(lines) == len(told)
    assert all(f"{file}{start}" in line for start, line in zip(told, lines, strict=True)), lines
    assert last == "11 problems in 11 records: 6 form, 3 image, 1 length, 1 test image"
    assert main(["check", str(file), "--write", str(tmp_path / "sound.jsonl")]) == 2
    assert "it holds pairs. Check it by itself" in capsys.readouterr().err
