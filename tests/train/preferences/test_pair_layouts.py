"""Preference pairs of other tools: every layout is read back as it was written, and what is in none is named."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import png

from stllava_eval.errors import InputError
from stllava_eval.images import decode, pixel_hash
from stllava_train.cli.main import main
from stllava_train.preferences.pair_formats import write_pairs
from stllava_train.preferences.pair_layouts import pairs_to_learn, read_published
from stllava_train.preferences.pair_selection import select_pairs
from stllava_train.preferences.pairs import Pair, PairSet, read_pairs, relative_weights, weights_in_words
from stllava_train.resumable import line

RED, GREEN = png((200, 0, 0)), png((0, 200, 0))


@pytest.fixture
def images(tmp_path, home) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(RED)
    (folder / "sub" / "b.png").write_bytes(GREEN)
    return folder


def pair(id: str = "7", image: str = "a.png", weight: float | None = None, **changes) -> Pair:
    sha = pixel_hash(decode(RED if image == "a.png" else GREEN))
    return replace(Pair(id, image, sha, "Where is it?", "Left.", "Right.", None, (), weight), **changes)


PAIRS = [
    pair("a.png#0:0-2", weight=0.8),
    pair(
        "b#1", "sub/b.png", 0.25, question="What?\nIn which lobe?", chosen="l'œil \u2028 gauche", rejected="two\nlines"
    ),
    pair("7", weight=0.0),
]


def read(file: Path, images: Path, **settings) -> PairSet:
    return read_published(file, images, progress=False, **settings)


def write(file: Path, *records: dict) -> Path:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(map(line, records)), encoding="utf-8")
    else:
        file.write_text(json.dumps(list(records), indent=1))
    return file


# --- what we write is read back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("format", ["trl", "authors", "llama-factory", "ms-swift"])
def test_an_exported_file_is_read_back_as_the_same_pairs(tmp_path, images, format, weighted, caplog):
    """Ids, images, texts and weights; by `pairs --from` and by `dpo`."""
    pairs = [one if weighted else replace(one, weight=None) for one in PAIRS]
    files = write_pairs(select_pairs(PairSet(pairs, {})), tmp_path / "pairs.jsonl", {}, [format], images)
    file = next(file for file in files[1:] if file.name != "dataset_info.json")
    assert read(file, images) == PairSet(pairs, {})
    caplog.clear()
    assert pairs_to_learn(file, images, progress=False) == pairs
    assert pairs_to_learn(files[0], images, progress=False) == pairs
    assert not caplog.messages  # `dpo` compares the images with test images itself, once


def test_our_own_file_is_read_with_its_margins_and_a_changed_image_is_left_out(tmp_path, images):
    pairs = [pair("0", margin=2.5, judges=("ada",)), pair("1", "sub/b.png")]
    file, *_ = write_pairs(select_pairs(PairSet(pairs, {})), tmp_path / "pairs.jsonl", {})
    assert read(file, images).pairs == pairs
    (images / "a.png").write_bytes(png((1, 2, 3)))
    assert read(file, images) == PairSet(pairs[1:], {"image has other pixels than the one that was asked about": 1})


# --- layouts of others ----------------------------------------------------------------------------------------------

USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it?"}]}
LEFT, RIGHT = ({"role": "assistant", "content": [{"type": "text", "text": text}]} for text in ("Left.", "Right."))
SAID = {"role": "user", "content": "<image>Where is it?"}, {"role": "assistant", "content": "Left."}
HUMAN = {"from": "human", "value": "<image>\nWhere is it?"}
GPT, WRONG = {"from": "gpt", "value": "Left."}, {"from": "gpt", "value": "Right."}
TEXTS = {"chosen": "Left.", "rejected": "Right."}
LAYOUTS = {
    "trl, texts": {"images": ["a.png"], "prompt": "<image>\nWhere is it?", **TEXTS},
    "trl, one image": {"image": "a.png", "prompt": "Where is it?", **TEXTS},
    "trl, messages": {"images": ["a.png"], "prompt": [USER], "chosen": [LEFT], "rejected": [RIGHT]},
    "trl, messages of texts": {
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": "Where is it?"}],
        "chosen": [{"role": "assistant", "content": "Left."}],
        "rejected": [{"role": "assistant", "content": "Right."}],
    },
    "trl, prompt inside": {"images": ["a.png"], "chosen": [USER, LEFT], "rejected": [USER, RIGHT]},
    "trl, prompt inside and beside": {
        "images": ["a.png"],
        "prompt": "Where is it?",
        "chosen": [USER, LEFT],
        "rejected": [USER, RIGHT],
        "chosen_model": "a",
        "rejected_score": 2,
    },
    "LLaMA-Factory, ShareGPT": {"conversations": [HUMAN], "chosen": GPT, "rejected": WRONG, "images": ["a.png"]},
    "LLaMA-Factory, OpenAI": {"messages": [USER], "chosen": LEFT, "rejected": RIGHT, "images": ["a.png"]},
    "LLaMA-Factory, Alpaca": {"instruction": "<image>Where is it?", "input": "", **TEXTS, "images": ["a.png"]},
    "ms-swift": {"messages": [*SAID], "rejected_response": "Right.", "images": ["a.png"]},
    "ms-swift, image as object": {
        "messages": [USER, LEFT],
        "rejected_response": ["Right."],
        "images": [{"bytes": None, "path": "a.png"}],
    },
    "ms-swift, two conversations": {
        "messages": [USER, LEFT],
        "images": ["a.png"],
        "rejected_messages": [USER, RIGHT],
        "rejected_images": ["a.png"],
    },
    "ms-swift, older": {
        "query": "<image>Where is it?",
        "response": "Left.",
        "rejected_response": "Right.",
        "images": ["a.png"],
    },
    "RLHF-V": {
        "ds_name": "RLHF-V",
        "image": "a.png",
        "text": json.dumps({"question": "Where is it?", **TEXTS}),
        "origin_dataset": "VQAv2",
        "origin_split": '{"type": "detailed description"}',
        "idx": 7,
        "image_path": "RLHF-V/images/a.png",
    },
    "RLAIF-V": {
        "ds_name": "RLAIF-V",
        "image": "a.png",
        "question": "Where is it?",
        **TEXTS,
        "origin_dataset": "COCO",
        "origin_split": '{"model": "LLaVA 1.5", "type": "question answering"}',
        "idx": "7",
    },
    "MMedPO": {"id": 7, "image": "a.png", "conversations": [HUMAN, GPT], "rejected_conversations": [HUMAN, WRONG]},
    "trl, single turns": {"images": ["a.png"], "prompt": USER, "chosen": LEFT, "rejected": RIGHT},
    "trl, turns as JSON": {
        "images": ["a.png"],
        "prompt": json.dumps([USER]),
        "chosen": json.dumps([LEFT]),
        "rejected": json.dumps([RIGHT]),
    },
    "trl, prompt beside whole conversations": {
        "images": ["a.png"],
        "prompt": [USER],
        "chosen": [USER, LEFT],
        "rejected": [USER, RIGHT],
    },
    "UltraFeedback": {
        "image": "a.png",
        "prompt": "Where is it?",
        "prompt_id": "f00",
        "chosen": [*SAID],
        "rejected": [SAID[0], {"role": "assistant", "content": "Right."}],
        "messages": [*SAID],
        "score_chosen": 8.0,
        "score_rejected": 2.5,
    },
    "a question under two keys": {"image": "a.png", "question": "Where is it?", "prompt": "Where is it?", **TEXTS},
    "whole path": {"image": ..., "question": "Where is it?", **TEXTS},
    "beside the file": {"image": "images/a.png", "question": "Where is it?", **TEXTS},
}


@pytest.mark.parametrize("record", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_every_layout_gives_the_pair_that_it_means(tmp_path, images, record, suffix):
    record = {key: str(images / "a.png") if value is ... else value for key, value in record.items()}
    if "RLHF-V" in str(record.get("image_path")):
        (images / "RLHF-V" / "images").mkdir(parents=True)
        (images / "RLHF-V" / "images" / "a.png").write_bytes(RED)
        record["image"] = record["image_path"]
    made = read(write(tmp_path / f"file{suffix}", {"id": "7", **record} if "idx" not in record else record), images)
    assert [replace(one, image="a.png") for one in made.pairs] == [pair("7")]
    assert made.skipped == {}


HELD = {
    "struct": ("image", {"bytes": RED, "path": "x.png"}),
    "struct without a path": ("image", {"bytes": RED, "path": None}),
    "list of one struct": ("images", [{"bytes": RED, "path": "x.png"}]),
    "bytes": ("image", RED),
    "list of bytes": ("images", [RED]),
    "bytes under another name": ("image_bytes", RED),
    "data address": ("image", "data:image/png;base64," + base64.b64encode(RED).decode()),
    "base64": ("image", base64.b64encode(RED).decode()),
    "struct of base64": ("images", [{"bytes": base64.b64encode(RED).decode(), "path": "x.png"}]),
}


@pytest.mark.parametrize(("key", "value"), HELD.values(), ids=HELD)
@pytest.mark.parametrize("layout", ["trl, texts", "trl, messages", "RLHF-V", "RLAIF-V", "MMedPO"])
def test_a_picture_that_a_row_holds_is_written_byte_for_byte(tmp_path, home, key, value, layout):
    images = tmp_path / "images"
    images.mkdir()
    record = {name: one for name, one in LAYOUTS[layout].items() if name not in ("image", "images")}
    record |= {key: value, "image_path": "train2014/x.png"}  # where it once was
    made = read(write(tmp_path / "file.parquet", record), images)
    (one,) = made.pairs
    assert (one.question, one.chosen, one.rejected) == ("Where is it?", "Left.", "Right.")
    assert (images / one.image).read_bytes() == RED
    assert one.image_sha256 == pixel_hash(decode(RED))


def test_pictures_in_json_are_read_too(tmp_path, images):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(GREEN).decode()}}
    asks = {"role": "user", "content": [part, {"type": "text", "text": "Where is it?"}]}
    made = read(write(tmp_path / "file.jsonl", {"prompt": [asks], "chosen": [LEFT], "rejected": [RIGHT]}), images)
    assert [(images / one.image).read_bytes() for one in made.pairs] == [GREEN]


def test_what_only_begins_like_a_picture_in_base64_stays_text(tmp_path, images):
    """`Qk` begins a BMP, and one in 4,096 ids, hashes and words of base64."""
    like = "Qk" + 42 * "A"
    record = LAYOUTS["RLAIF-V"] | {"id": like, "chosen": like, "hash": like}
    (one,) = read(write(tmp_path / "file.json", record), images).pairs
    assert (one.id, one.chosen, one.image) == (like, like, "a.png")


def test_a_whole_float_is_an_id_and_a_dot_before_a_name_is_no_other_image(tmp_path, images):
    """pandas writes 7.0 where another row has no number."""
    made = read(write(tmp_path / "file.parquet", LAYOUTS["RLAIF-V"] | {"idx": 7.0, "image": "./a.png"}), images)
    assert made.pairs == [pair("7")]


def test_where_a_picture_came_from_is_no_second_picture(tmp_path, images):
    record = LAYOUTS["RLHF-V"] | {"image_path": "coco/train2017/1.jpg"}
    assert read(write(tmp_path / "file.json", record), images).pairs == [pair("7")]


def shards(tmp_path, *names: str) -> Path:
    (tmp_path / "shards").mkdir()
    for name, record in zip(names, ({"id": "1"}, {"id": "2", "images": ["sub/b.png"]}), strict=True):
        write(tmp_path / "shards" / name, LAYOUTS["trl, texts"] | record)
    return tmp_path / "shards"


def test_a_folder_of_shards_is_read_as_one_file(tmp_path, images):
    folder = shards(tmp_path, "train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    call = ["pairs", "--from", str(folder), "--images", str(images), "--out", str(tmp_path / "pairs.jsonl")]
    assert main(call) == 0
    assert main(call) == 0  # the manifest knows the shards
    assert read_pairs(tmp_path / "pairs.jsonl") == [pair("1"), pair("2", "sub/b.png")]
    with pytest.raises(InputError, match=r"folder of shards.*stllava-train pairs --from .*/shards\b"):
        pairs_to_learn(folder, images, progress=False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train-0.parquet", "test-0.parquet"), r"test-0\.parquet and train-0\.parquet\b.*shards.*folder of their own"),
        (
            ("data-0.arrow", "state.json"),
            r"a folder that holds data-0.arrow, state.json, .*`stllava-train pairs --from`",
        ),
    ],
)
def test_a_folder_of_something_else_is_refused_in_one_line(tmp_path, images, names, message):
    folder = shards(tmp_path, *names)
    for reader in (read, pairs_to_learn):
        with pytest.raises(InputError, match=message) as refused:
            reader(folder, images)
        assert "\n" not in str(refused.value)


def test_records_without_an_id_get_their_number_and_one_file_may_hold_several_layouts(tmp_path, images):
    records = [{**LAYOUTS["trl, messages"]}, {**LAYOUTS["ms-swift"]}, {**LAYOUTS["RLAIF-V"]}]
    assert [one.id for one in read(write(tmp_path / "f.jsonl", *records), images).pairs] == [
        "record-1",
        "record-2",
        "7",
    ]


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["weighted_score", "weight", "dpo_weight"])
@pytest.mark.parametrize(("value", "weight"), [(0.8, 0.8), (1, 1.0), (0, 0.0), ("0.2", 0.2)])
def test_a_weight_is_read_as_a_number_or_as_text(tmp_path, images, key, value, weight):
    records = [LAYOUTS["MMedPO"] | {key: value}, LAYOUTS["MMedPO"] | {"id": "8", key: 1.0}]
    file = write(tmp_path / "mmedpo.json", *records)
    assert [one.weight for one in read(file, images).pairs] == [weight, 1.0]


@pytest.mark.parametrize("value", [-0.1, "high", float("nan"), "inf", True, [1], "-1", 10**400, ""])
def test_a_weight_that_is_no_number_from_0_on_is_refused_in_one_line(tmp_path, images, value):
    file = tmp_path / "mmedpo.json"
    file.write_text(json.dumps([LAYOUTS["MMedPO"], LAYOUTS["MMedPO"] | {"weighted_score": value}], indent=None))
    with pytest.raises(InputError) as refused:
        read(file, images)
    assert "7: weighted_score is " in str(refused.value)
    assert "not a number from 0 on. Fix it" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([{"weight": 1.0}, {}], r"\b8: .*no weight.*each pair"),
        ([{"weight": 0}, {"weight": 0.0}], r"mmedpo\.json: .*weight of every pair.*\b0\b.*Raise"),
        ([{"weight": 1, "weighted_score": 1}, {}], r"mmedpo\.json:2: 7\b.*weight and weighted_score\b.*Keep"),
    ],
)
def test_weights_that_contradict_each_other_are_refused(tmp_path, images, weights, message):
    records = [LAYOUTS["MMedPO"] | {"id": str(7 + place)} | one for place, one in enumerate(weights)]
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / "mmedpo.json", *records), images)


def test_our_own_rows_hold_a_weight_where_there_is_one_and_refuse_a_wrong_one(tmp_path, images):
    file, *_ = write_pairs(select_pairs(PairSet([pair(weight=0.5)], {})), tmp_path / "pairs.jsonl", {})
    row = json.loads(file.read_text())
    assert row["weight"] == 0.5
    assert read_pairs(file) == [pair(weight=0.5)]
    with pytest.raises(InputError, match=r'pairs\.jsonl:1: weight\b.*"0\.5".*number from 0\b.*[Ff]ix'):
        read_pairs(write(file, row | {"weight": "0.5"}))


# --- what is no pair of ours ----------------------------------------------------------------------------------------


def test_what_makes_no_pair_is_counted_by_why_and_dpo_wants_it_left_out_first(tmp_path, images):
    flat = LAYOUTS["RLAIF-V"] | {"id": "7"}
    records = [
        flat,
        flat | {"chosen": "Right."},
        flat | {"chosen": " "},
        flat | {"question": "Where <image1> is it?"},
        flat | {"rejected": "<image> Right."},
        flat | {"image": "none.png"},
        LAYOUTS["MMedPO"] | {"rejected_noised": 1},
        LAYOUTS["MMedPO"] | {"rejected_noised": "true"},
        LAYOUTS["MMedPO"] | {"rejected_image": "noised/a.png"},
        LAYOUTS["ms-swift, two conversations"] | {"id": "9", "chosen_image": "sub/b.png"},
        flat | {"image": {"bytes": base64.b64encode(RED[:-30]).decode()}},
    ]
    file = write(tmp_path / "file.json", *records)
    made = read(file, images)
    assert [one.id for one in made.pairs] == ["7"]
    assert made.skipped == {
        "chosen equals rejected": 1,
        "empty chosen": 1,
        "<image1> in question": 1,
        "<image> in rejected": 1,
        "the answers are about two images that are not both named": 3,
        "image cannot be read": 3,
    }
    with pytest.raises(
        InputError, match=r"\b10 of its records.*no pair.*empty chosen: 1\b.*stllava-train pairs --from"
    ):
        pairs_to_learn(file, images, progress=False)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Where?", "answer": "Left."}, r"question, answer\b.*no known layout.*dataset_info\.json"),
        ({"image": "a.png", "chosen": "Where? Left.", "rejected": "Where? Right."}, "no known layout of pairs."),
        (LAYOUTS["RLAIF-V"] | {"rejected": None}, r"idx \(rejected is null\): no known layout of pairs"),
        (
            LAYOUTS["trl, texts"] | {"images": [base64.b64encode(one).decode() for one in (RED, GREEN)]},
            r"it names 2 pictures \(one that it holds, one that it holds\)",
        ),
        ([1, 2], r"it is \[1, 2\]: no known layout"),
        (LAYOUTS["trl, messages"] | {"images": ["a.png", "sub/b.png"]}, "prompt|chosen: it names 2 pictures"),
        (LAYOUTS["trl, texts"] | {"images": []}, "holds <image> and the record names no image"),
        (LAYOUTS["trl, messages of texts"] | {"images": []}, r"record-2\b.*names no image.*Add"),
        (LAYOUTS["trl, texts"] | {"images": ["https://x.org/a.png"]}, "is a web address"),
        (LAYOUTS["trl, messages"] | {"prompt": [USER, LEFT, USER]}, "turn 3 holds <image>"),
        (
            LAYOUTS["trl, messages of texts"] | {"prompt": [LAYOUTS["trl, messages of texts"]["prompt"][0], LEFT] * 2},
            "turn 5 is from",
        ),
        (
            LAYOUTS["ms-swift"] | {"messages": [*SAID, {"role": "user", "content": "And?"}, LEFT]},
            "2 rounds. A pair",
        ),
        (LAYOUTS["ms-swift"] | {"messages": [USER]}, "rejected_response|messages"),
        (LAYOUTS["ms-swift"] | {"system": "Be brief."}, "its system text is"),
        (
            LAYOUTS["ms-swift"] | {"messages": [USER, LEFT | {"loss": False}]},
            r"loss or weight.*\b0\b.*both answers.*[Ll]eave",
        ),
        (LAYOUTS["LLaMA-Factory, Alpaca"] | {"history": [["Hi", "Hello"]]}, "its history is"),
        (
            LAYOUTS["trl, prompt inside and beside"] | {"prompt": "Which?"},
            r'prompt\b.*"Which\?".*question.*"Where is it\?".*Keep',
        ),
        (
            LAYOUTS["RLAIF-V"] | {"prompt": "Which?"},
            r'question\b.*"Where is it\?".*read.*"Which\?".*Keep',
        ),
        (LAYOUTS["RLAIF-V"] | {"instruction": "Be brief."}, 'its instruction is "Be brief."'),
        (
            LAYOUTS["RLAIF-V"] | {"chosen": ["Left.", "On the left."]},
            r'chosen: "Left\.".*list of texts.*record of each',
        ),
        (
            LAYOUTS["ms-swift"] | {"rejected_response": ["Right.", "Up."]},
            r'rejected_response: "Right\.".*list of texts.*record of each',
        ),
        ({"image_id": 7, "chosen": ["L", "M"], "rejected": ["R", "S"]}, "no known layout of pairs"),  # HA-DPO
        (LAYOUTS["RLAIF-V"] | {"chosen_weight": 0.5}, r"chosen_weight\b.*\b0\.5\b.*one weight.*Name"),
        (LAYOUTS["RLAIF-V"] | {"chosen": 3}, "chosen: turn 2 is 3"),
        (
            LAYOUTS["ms-swift"] | {"id": "8", "rejected_images": ["sub/b.png", "sub/c.png"]},
            r"\b8: .*rejected.*\b2 images.*Keep",
        ),
        (
            LAYOUTS["RLAIF-V"] | {"image": "/etc/a.png"},
            r'image\b.*"/etc/a\.png".*relative to --images\b.*Pass',
        ),
        (LAYOUTS["RLAIF-V"] | {"image": "other/c.png"}, r'image\b.*"other/c\.png".*relative to --images\b.*Pass'),
    ],
)
def test_a_record_that_is_no_pair_of_ours_is_refused_in_one_line(tmp_path, images, record, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "c.png").write_bytes(RED)
    file = write(tmp_path / "file.json", LAYOUTS["RLAIF-V"], record)
    for reader in (read, pairs_to_learn):
        with pytest.raises(InputError, match=message) as refused:
            reader(file, images)
        assert str(refused.value).startswith(f"{file}:")
        assert "\n" not in str(refused.value)


def test_dpo_names_pairs_from_and_the_layouts_for_a_file_in_none(tmp_path, images, capsys):
    file = write(tmp_path / "file.jsonl", {"a": 1, "b": 2})
    call = ["dpo", "--recipe", "tiny", "--pairs", str(file), "--images", str(images), "--out", str(tmp_path / "run")]
    assert main([*call, "evaluate_on=[]"]) == 2
    shown = capsys.readouterr().err
    assert "file.jsonl:1: its keys are a, b: no known layout of pairs. `stllava-train pairs --from` reads trl," in shown
    assert "Traceback" not in shown
    assert len(shown.strip().splitlines()) == 1


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": 1},\n', b"PAR1 and no more", b"\xff", b"\x1f\x8b\x08"])
def test_a_file_that_holds_nothing_is_refused_in_one_line(tmp_path, images, content, suffix):
    file = tmp_path / f"file{suffix}"
    file.write_bytes(content)
    for reader in (read, pairs_to_learn):
        with pytest.raises(InputError, match=r"file.json") as refused:
            reader(file, images)
        assert "\n" not in str(refused.value)
        if not content.startswith(b"PAR1"):
            assert "`stllava-train pairs --from` reads" in str(refused.value)
            assert "conversations" not in str(refused.value)


def test_relative_weights_are_finite_however_large_or_small_the_weights_are():
    for size in (1e308, 5e-324):
        pairs = [pair(weight=size), pair(weight=size), pair(weight=0.0)]
        assert relative_weights(pairs) == pytest.approx([1.5, 1.5, 0.0])
        assert f"{size:g}" in weights_in_words(pairs)[0]
