import contextlib
import csv
import gzip
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from stllava_eval.data import archives, catalog, readers, splits
from stllava_eval.data import prepare as prepare_module
from stllava_eval.data.catalog import DATASETS, Edition, Row
from stllava_eval.data.prepare import prepare, prepare_on_first_use
from stllava_eval.data.splits import read_manifest, read_rows, read_split, write_split
from stllava_eval.errors import InputError
from stllava_eval.images import decode

pytestmark = pytest.mark.usefixtures("home")


def set_limit(monkeypatch, name: str, most: int) -> None:
    """Lower a limit in every module that holds sources to it."""
    for module in (archives, readers):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, most)


def encoded(picture: PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def picture(number: int, format: str = "PNG") -> bytes:
    """A 3 x 2 picture of one colour that no other number has."""
    return encoded(PIL.Image.new("RGB", (3, 2), (number % 256, number // 256, 0)), format)


def knows(monkeypatch, name: str, split: str, *editions: Edition) -> None:
    """Let the set have only these editions of the split: small ones, checked like the real ones."""
    dataset = DATASETS[name]
    monkeypatch.setitem(DATASETS, name, replace(dataset, splits={**dataset.splits, split: editions}))


def sample(count: int, images: int = 2) -> list[Row]:
    return [
        Row(
            str(n),
            picture(n % images),
            f"{n % images}.png",
            f"Is it {n}?",
            "yes" if n % 2 else "two",
            "closed" if n % 2 else "open",
            {"organ": "CHEST"},
        )
        for n in range(count)
    ]


def write_sample(rows: list[Row], sample: bool = True, name: str = "vqarad", split: str = "test") -> catalog.Manifest:
    return write_split(
        name, split, rows, edition="sample", official=False, sample=sample, source="invented", licence="CC0 1.0"
    )


def parquet(path: Path, records: list[dict]) -> None:
    """A hub copy's file: every row carries its image, as `datasets` writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)


def records_of(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


# The real sets.


@pytest.mark.parametrize(
    ("name", "split", "closed", "open_", "images"),
    [
        ("vqarad", "test", 272, 179, 203),
        ("vqarad", "train", 1027, 770, 313),
        ("slake", "test", 416, 645, 96),
        ("slake", "train", 1943, 2976, 450),
        ("slake", "validation", 422, 631, 96),
        ("slake", "test_zh", 420, 613, 96),
        ("slake", "train_zh", 1938, 2978, 450),
        ("slake", "validation_zh", 422, 624, 96),
    ],
)
def test_the_authors_files_give_the_official_split(shared, name, split, closed, open_, images):
    manifest = prepare(name, split, shared / "data" / name)
    assert manifest.official
    assert not manifest.sample
    assert manifest.counts == {"rows": closed + open_, "closed": closed, "open": open_, "images": images}
    rows = read_rows(name, split)
    assert len({row.id for row in rows}) == closed + open_
    assert sum(row.kind == "closed" for row in rows) == closed
    assert len({row.image_id for row in rows}) == images


@pytest.mark.parametrize(
    ("name", "sha256_rows"),
    [
        ("vqarad", "ea9a552a2b1b9c2f199fd71e96c6b3d399c12d42eedafbe18ed64647c8aaa4e3"),
        ("slake", "b88a2c88f1bc1ba6385f81c7ae167f88e59d89334a63691fa601d5260d44b68f"),
    ],
)
def test_the_official_test_rows_are_these_and_no_others(shared, name, sha256_rows):
    assert prepare(name, "test", shared / "data" / name).sha256_rows == sha256_rows


def test_texts_stay_as_distributed_and_numbers_become_text(shared):
    prepare("vqarad", "train", shared / "data/vqarad")
    rows = {row.id: row for row in read_rows("vqarad", "train")}
    assert rows["369"].reference == "Heart \tlungs"
    assert rows["2156"].kind == "closed"  # "CLOSED " in the file
    numbers = [
        str(row["qid"])
        for row in records_of(shared / "data/vqarad/VQA_RAD Dataset Public.json")
        if isinstance(row["answer"], int)
    ]
    assert [rows[id].reference.isdigit() for id in numbers if id in rows] == [True] * len(set(numbers) & set(rows))


def test_a_reference_that_the_authors_left_empty_is_kept_and_noted(shared):
    manifest = prepare("slake", "train", shared / "data/slake")
    assert manifest.notes == ("no reference in 1 rows: 1622",)
    assert manifest.official


def test_test_ids_say_what_the_public_file_and_data_rad_say(shared):
    public = [
        row
        for row in records_of(shared / "data/vqarad/VQA_RAD Dataset Public.json")
        if row["phrase_type"].startswith("test_")
    ]
    images = {row["image_name"]: (shared / "data/vqarad/images" / row["image_name"]).read_bytes() for row in public}
    expected = [
        {
            "qid": str(row["qid"]),
            "data_rad_qid": str(twin["qid"]),
            "kind": row["answer_type"].strip().lower(),
            "image_name": row["image_name"],
            "text": readers._line_hash(row["question"], str(row["answer"])),
            "pixels": splits.pixel_hash_of(images[row["image_name"]])[:16],
        }
        for row, twin in zip(public, records_of(shared / "data/vqarad/testset.json"), strict=True)
    ]
    with (ROOT / "tasks/vqarad/test_ids.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == expected


def test_public_file_and_data_rad_give_the_same_test_bytes(shared, tmp_path):
    folder = tmp_path / "data_RAD"
    folder.mkdir()
    for name in ("trainset.json", "testset.json", "images"):
        (folder / name).symlink_to(shared / "data/vqarad" / name)
    assert (
        prepare("vqarad", "test", folder).sha256_file == prepare("vqarad", "test", shared / "data/vqarad").sha256_file
    )
    train = prepare("vqarad", "train", folder)
    assert (train.edition, train.counts["rows"], train.official) == (
        "data_RAD train (with frame questions)",
        3064,
        False,
    )
    assert read_rows("vqarad", "train")[0].id == "data_RAD-1"  # not public qid 1, which is another question


# Hub copies of VQA-RAD: flaviagiammarino's has image, question and answer alone, in lower case and its own order.


def hub_vqarad(shared: Path, tmp_path: Path, change=lambda image: image) -> Path:
    public = {row["qid"]: row for row in records_of(shared / "data/vqarad/VQA_RAD Dataset Public.json")}
    mirror = (shared / "data/vqarad/hf_mirror/test_answer_type.jsonl").read_text(encoding="utf-8")
    copy = [json.loads(line) for line in mirror.splitlines()]
    # rows of equal text and different images stand in the copy in reverse: order alone would swap their images
    taken: dict[int, int] = {}
    for row in reversed(copy):
        candidates = [row["qid"]] if row["qid_candidates"] is None else row["qid_candidates"]
        row["qid"] = next(qid for qid in candidates if qid not in taken)
        taken[row["qid"]] = row["hf_test_index"]
    images = {
        name: change((shared / "data/vqarad/images" / name).read_bytes())
        for name in {public[qid]["image_name"] for qid in taken}
    }
    records = [
        {
            "image": {"bytes": images[public[row["qid"]]["image_name"]], "path": None},
            "question": row["question"],
            "answer": row["answer"],
        }
        for row in copy
    ]
    parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", records)
    return tmp_path / "hub"


def test_a_copy_without_ids_gets_them_and_its_kinds_back_by_text_and_pixels(shared, tmp_path):
    prepare("vqarad", "test", shared / "data/vqarad")
    official = [(row.id, row.image_id, row.kind, row.image) for row in read_rows("vqarad", "test")]
    manifest = prepare("vqarad", "test", hub_vqarad(shared, tmp_path))
    assert [(row.id, row.image_id, row.kind, row.image) for row in read_rows("vqarad", "test")] == official
    assert manifest.official
    assert manifest.notes == ()


def test_a_copy_that_encoded_its_images_again_is_matched_by_text_and_says_so(shared, tmp_path):
    def encoded_again(image: bytes) -> bytes:
        return encoded(PIL.Image.open(io.BytesIO(image)), "JPEG", quality=30)

    prepare("vqarad", "test", shared / "data/vqarad")
    official = {row.id: encoded_again(row.image) for row in read_rows("vqarad", "test")}
    manifest = prepare("vqarad", "test", hub_vqarad(shared, tmp_path, encoded_again))
    assert manifest.counts == {"rows": 451, "closed": 272, "open": 179, "images": 203}
    changed, by_order = manifest.notes
    assert changed == "the pixels of 203 images differ from the originals"
    what, places = by_order.split(": ")
    assert what == "rows matched by question, answer and order alone, since nothing names their image"
    assert [int(place.split()[-1]) for place in places.split("; ")] == [83, 150, 151, 259, 260, 267, 269, 302, 324]
    # equal texts stand in reverse in this copy, so where order decides they get each other's image; nowhere else
    wrong = [row.question for row in read_rows("vqarad", "test") if row.image != official[row.id]]
    assert sorted(wrong) == [
        *["is the air under the diaphragm pathologic?"] * 2,
        *["is there free air under the diaphragm?"] * 2,
        *["is this a normal image?"] * 2,
    ]


def test_official_images_under_the_wrong_questions_are_refused(shared, tmp_path):
    folder = hub_vqarad(shared, tmp_path)
    path = folder / "data/test-00000-of-00001.parquet"
    records = pq.read_table(path).to_pylist()
    records[0]["image"], records[400]["image"] = records[400]["image"], records[0]["image"]
    parquet(path, records)
    with pytest.raises(InputError, match=r"2 rows.*official.* row 0;.* row 400\b.*unchanged"):
        prepare("vqarad", "test", folder)


def test_a_copy_with_data_rad_ids_and_names_is_matched_by_them(shared, tmp_path):
    records = [
        {
            **{key: str(value) for key, value in row.items()},
            "qid": row["qid"],
            "image": {"bytes": (shared / "data/vqarad/images" / row["image_name"]).read_bytes(), "path": None},
        }
        for row in records_of(shared / "data/vqarad/testset.json")
    ]
    parquet(tmp_path / "OctoMed/data/test-00000-of-00001.parquet", records)
    manifest = prepare("vqarad", "test", tmp_path / "OctoMed")
    assert manifest.sha256_file == prepare("vqarad", "test", shared / "data/vqarad").sha256_file


def test_a_changed_reference_is_refused_by_its_row(shared, tmp_path):
    rows = records_of(shared / "data/vqarad/testset.json")
    rows[7]["answer"] = "something else"
    source = vqarad_folder(shared, tmp_path, rows)
    with pytest.raises(InputError, match=rf"1 rows.*official.*qid {rows[7]['qid']}\b.*unchanged"):
        prepare("vqarad", "test", source)


def vqarad_folder(shared: Path, tmp_path: Path, rows: list[dict]) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "testset.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "images").symlink_to(shared / "data/vqarad/images")
    return folder


def test_a_test_with_a_row_missing_is_refused_with_both_counts(shared, tmp_path):
    rows = records_of(shared / "data/vqarad/testset.json")
    assert rows[0]["answer_type"] == "CLOSED"
    expected = (
        "found 450 = 271 closed + 179 open on 203 images; "
        "the official test has 451 = 272 closed + 179 open on 203 images"
    )
    with pytest.raises(InputError) as refused:
        prepare("vqarad", "test", vqarad_folder(shared, tmp_path, rows[1:]))
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="not prepared"):
        read_manifest("vqarad", "test")


def test_a_training_copy_without_kinds_takes_them_from_yes_and_no_and_says_so(tmp_path, monkeypatch):
    knows(monkeypatch, "vqarad", "train", Edition("tiny train", 2, 1, 2))
    records = [
        {"image": {"bytes": picture(0), "path": None}, "question": "is it?", "answer": "yes"},
        {"image": {"bytes": picture(1), "path": None}, "question": "left or right?", "answer": "left"},
    ]
    parquet(tmp_path / "data/train-00000-of-00001.parquet", records)
    manifest = prepare("vqarad", "train", tmp_path)
    assert [row.kind for row in read_rows("vqarad", "train")] == ["closed", "open"]
    assert "kind from the answer (closed: yes or no) in 2 rows" in manifest.notes[0]


# SLAKE's forms.


def slake_rows(count: int = 3) -> list[dict]:
    """`count` English rows on two images, and one Chinese."""
    rows = [
        {
            "img_id": n % 2,
            "img_name": f"xmlab{n % 2}/source.jpg",
            "question": f"Is there a {n}?",
            "answer": "Lung" if n % 2 else "Yes",
            "q_lang": "en",
            "location": "Lung",
            "modality": "CT",
            "answer_type": "CLOSED" if n < 2 else "OPEN",  # "Lung" closed: the options stood in the question
            "base_type": "vqa",
            "content_type": "Organ",
            "triple": ["vhead", "_", "_"],
            "qid": 100 + n,
        }
        for n in range(count)
    ]
    return [*rows, {**rows[0], "q_lang": "zh", "question": "图中有肺吗？", "qid": 200}]


def slake_folder(tmp_path: Path, zipped: bool = False, rows: list[dict] | None = None) -> Path:
    folder = tmp_path / "slake"
    folder.mkdir()
    (folder / "validate.json").write_text(json.dumps(rows or slake_rows()), encoding="utf-8")
    images = {
        f"imgs/xmlab{n}/{name}": content
        for n in range(2)
        for name, content in (("source.jpg", picture(n, "JPEG")), ("detection.json", b"[]"))
    }
    if zipped:
        with zipfile.ZipFile(folder / "imgs.zip", "w") as archive:
            for name, content in images.items():
                archive.writestr(name, content)
            archive.writestr("__MACOSX/imgs/xmlab0/._source.jpg", b"no image")
    else:
        for name, content in images.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def small_slake(monkeypatch):
    knows(monkeypatch, "slake", "validation", Edition("tiny validation", 3, 2, 2, official=True))
    knows(monkeypatch, "slake", "validation_zh", Edition("tiny Chinese validation", 1, 1, 1, official=True))


def test_each_language_of_slake_is_a_split(tmp_path, small_slake):
    folder = slake_folder(tmp_path)
    prepare("slake", "validation", folder)
    prepare("slake", "validation_zh", folder)
    first = read_rows("slake", "validation")[0]
    assert (first.id, first.image_id, first.kind) == ("100", "xmlab0/source.jpg", "closed")
    assert first.categories == {
        "modality": "CT",
        "location": "Lung",
        "content_type": "Organ",
        "base_type": "vqa",
        "language": "en",
    }
    assert [row.id for row in read_rows("slake", "validation_zh")] == ["200"]


def packed(folder: Path, ending: str) -> Path:
    path = folder.with_suffix(ending)
    if ending == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, Path("download") / file.relative_to(folder))
    else:
        with tarfile.open(path, "w:gz" if ending.endswith("gz") else "w") as archive:
            archive.add(folder, ".")
    return path


@pytest.mark.parametrize("zipped", [False, True], ids=["imgs/", "imgs.zip"])
@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz"])
def test_a_folder_and_its_archives_give_the_same_bytes(tmp_path, small_slake, ending, zipped):
    folder = slake_folder(tmp_path, zipped)
    assert (
        prepare("slake", "validation", packed(folder, ending)).sha256_file
        == prepare("slake", "validation", folder).sha256_file
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "slake", f"slake{ending}"]  # nothing unpacked


def english_copy(rows: list[dict]) -> list[dict]:
    """As mdwiratathya/SLAKE-vqa-english has them: image, question, answer."""
    return [
        {
            "image": {"bytes": picture(row["img_id"], "JPEG"), "path": None},
            "question": row["question"],
            "answer": row["answer"],
        }
        for row in rows
        if row["q_lang"] == "en"
    ]


def test_a_slake_copy_without_answer_type_is_refused_with_the_reason(tmp_path, small_slake):
    parquet(tmp_path / "data/validation-00000-of-00001.parquet", english_copy(slake_rows()))
    with pytest.raises(
        InputError, match=r"validation-00000-of-00001\.parquet.*answer_type.*closed.*validate\.json.*BoKelvin/SLAKE"
    ):
        prepare("slake", "validation", tmp_path)


def test_a_slake_copy_without_answer_type_is_joined_with_slakes_own_file(tmp_path, small_slake):
    parquet(tmp_path / "data/validation-00000-of-00001.parquet", english_copy(slake_rows()))
    (tmp_path / "validate.json").write_text(json.dumps(slake_rows()), encoding="utf-8")
    prepare("slake", "validation", tmp_path)
    rows = read_rows("slake", "validation")
    assert [(row.id, row.image_id, row.kind) for row in rows] == [
        ("100", "xmlab0/source.jpg", "closed"),
        ("101", "xmlab1/source.jpg", "closed"),
        ("102", "xmlab0/source.jpg", "open"),
    ]


def test_a_slake_copy_in_another_order_than_slakes_own_file_is_not_joined(tmp_path, small_slake):
    parquet(tmp_path / "data/validation-00000-of-00001.parquet", english_copy(slake_rows())[::-1])
    (tmp_path / "validate.json").write_text(json.dumps(slake_rows()), encoding="utf-8")
    with pytest.raises(InputError, match="with the same rows"):
        prepare("slake", "validation", tmp_path)


def test_a_slake_copy_with_numbers_for_image_names_is_an_edition_of_its_own(tmp_path, monkeypatch):
    # OctoMed/SLAKE: English, every field but img_name, train and validation in one
    official, both = Edition("tiny train", 2, 2, 2, official=True), Edition("tiny train and validation", 3, 2, 2)
    knows(monkeypatch, "slake", "train", official, both)
    records = [
        {
            **{key: value for key, value in row.items() if key != "img_name"},
            "image": {"bytes": picture(row["img_id"]), "path": None},
        }
        for row in slake_rows()
        if row["q_lang"] == "en"
    ]
    parquet(tmp_path / "data/train-00000-of-00002.parquet", records[:2])
    parquet(tmp_path / "data/train-00001-of-00002.parquet", records[2:])
    manifest = prepare("slake", "train", tmp_path)
    assert (manifest.edition, manifest.official) == ("tiny train and validation", False)
    assert [row.image_id for row in read_rows("slake", "train")] == [f"xmlab{n}/source.jpg" for n in (0, 1, 0)]


def test_right_counts_with_other_words_are_not_official(tmp_path, monkeypatch):
    knows(monkeypatch, "slake", "validation", Edition("tiny validation", 3, 2, 2, official=True, text="0" * 16))
    manifest = prepare("slake", "validation", slake_folder(tmp_path))
    assert not manifest.official
    assert manifest.notes == ("not official: counts as the tiny validation, but other questions, references or kinds",)


def test_an_answer_type_that_is_neither_open_nor_closed_is_refused(tmp_path, small_slake):
    rows = slake_rows()
    rows[1]["answer_type"] = "HALF"
    with pytest.raises(InputError, match=r"1 broken.*qid 101\b.*answer_type 'HALF'.*OPEN.*CLOSED.*unchanged"):
        prepare("slake", "validation", slake_folder(tmp_path, rows=rows))


def test_rows_of_one_id_are_refused(tmp_path, small_slake):
    rows = slake_rows()
    rows[1]["qid"] = 100
    with pytest.raises(InputError, match=r"validate\.json.*several.*\b100\b.*unique"):
        prepare("slake", "validation", slake_folder(tmp_path, rows=rows))


@pytest.mark.parametrize("content", ["[1, 2", '{"rows": []}', "[]"], ids=["cut short", "no list", "empty"])
def test_a_file_without_records_is_refused(tmp_path, small_slake, content):
    folder = slake_folder(tmp_path)
    (folder / "validate.json").write_text(content)
    with pytest.raises(InputError, match=r"validate.json"):
        prepare("slake", "validation", folder)


# PathVQA's forms.


PATHVQA = [
    {"image": "test_0002", "question": "What is present?", "answer": "Liver"},
    {"image": "test_0002", "question": "Is liver present?", "answer": "Yes"},
    {"image": "test_0001", "question": "Is it normal?", "answer": "no"},
]


def pathvqa_folder(tmp_path: Path, records: object, name: str = "test_qa.pkl", protocol: int = 4) -> Path:
    folder = tmp_path / "pathvqa"
    for file, content in (
        (f"qas/{name}", pickle.dumps(records, protocol=protocol)),
        ("images/test/test_0001.jpg", encoded(PIL.Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")),
        ("images/test/test_0002.jpg", picture(2, "JPEG")),
        ("images/test/test_0003.jpg", b"an unused image need not be one"),
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder


@pytest.fixture
def small_pathvqa(monkeypatch):
    knows(monkeypatch, "pathvqa", "test", Edition("tiny test", 3, 2, 2, official=True))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pathvqa_pickles_of_questions_and_answers(tmp_path, small_pathvqa, protocol):
    prepare("pathvqa", "test", pathvqa_folder(tmp_path, PATHVQA, protocol=protocol))
    rows = read_rows("pathvqa", "test")
    assert [(row.id, row.image_id, row.reference, row.kind) for row in rows] == [
        ("0", "test_0002", "Liver", "open"),
        ("1", "test_0002", "Yes", "closed"),
        ("2", "test_0001", "no", "closed"),
    ]


def test_pathvqa_pickles_in_the_form_of_lxmert_come_first_and_name_question_types(tmp_path, small_pathvqa):
    records = [
        {
            "answer_type": "other",
            "img_id": row["image"],
            "label": {"something else": 0.3, row["answer"].lower(): 1.0},
            "question_id": n,
            "question_type": "what",
            "sent": row["question"],
        }
        for n, row in enumerate(PATHVQA)
    ]
    folder = pathvqa_folder(tmp_path, records, "test_vqa.pkl")
    pathvqa_folder(tmp_path, [], "test_qa.pkl")
    prepare("pathvqa", "test", folder)
    first = read_rows("pathvqa", "test")[0]
    assert (first.question, first.reference, first.categories) == (
        "What is present?",
        "liver",
        {"question_type": "what"},
    )


def test_pathvqa_hub_copies_name_images_by_their_pixels(tmp_path, small_pathvqa):
    images = {"test_0001": picture(1, "JPEG"), "test_0002": picture(2, "JPEG")}
    parquet(
        tmp_path / "data/test-00000-of-00001.parquet",
        [{**row, "image": {"bytes": images[row["image"]], "path": None}} for row in PATHVQA],
    )
    prepare("pathvqa", "test", tmp_path)
    liver, again, normal = read_rows("pathvqa", "test")
    assert liver.image_id == again.image_id == splits.pixel_hash_of(images["test_0002"])[:16] != normal.image_id


@pytest.mark.parametrize(
    ("change", "what"),
    [
        pytest.param({"label": {}}, "no answer", id="no label"),
        pytest.param({"label": ["liver"]}, "no answer", id="a list for a label"),
        pytest.param({"label": {"liver": "much"}}, "no answer", id="a weight that is no number"),
        pytest.param({"sent": None}, "no question", id="no question"),
        pytest.param({"img_id": None}, "no image", id="no image"),
        pytest.param({"label": {"liver": 1.0, "lung": 1.0}}, "no answer", id="two answers of one weight"),
        pytest.param({"label": {"lung": float("nan"), "liver": 1.0}}, "no answer", id="nan for a weight"),
        pytest.param({"label": {7: 1.0}}, r"answer 7\b.*number.*text", id="a number for an answer"),
        pytest.param(
            {"img_id": ["test_0001"]},
            r"image_name.*'test_0001'.*list.*text",
            id="a list for an image",
        ),
    ],
)
def test_a_row_that_lacks_something_is_refused_by_its_number(tmp_path, small_pathvqa, change, what):
    record = {"img_id": "test_0001", "sent": "What?", "label": {"liver": 1}, "question_id": 1, **change}
    with pytest.raises(InputError, match=rf"1 broken.*test_vqa\.pkl row 0\b.*{what}.*unchanged"):
        prepare("pathvqa", "test", pathvqa_folder(tmp_path, [record], "test_vqa.pkl"))


def test_an_edition_whose_counts_nobody_published_is_taken_and_called_unverified(tmp_path, monkeypatch):
    knows(monkeypatch, "pathvqa", "test", Edition("tiny test", 3, None, None))
    manifest = prepare("pathvqa", "test", pathvqa_folder(tmp_path, PATHVQA))
    assert "unverified: the tiny test has 3, and" in manifest.notes[0]


def test_the_editions_of_pathvqa_are_told_apart_by_their_counts():
    official, deduplicated = DATASETS["pathvqa"].splits["test"]
    assert (official.rows, official.closed, official.open, official.images) == (6761, 3391, 3370, 858)
    assert (deduplicated.rows, deduplicated.closed, deduplicated.open) == (6719, 3362, 3357)
    assert [edition.official for edition in (official, deduplicated)] == [True, False]
    # the three hub splits as originally distributed: 32,795 rows in all
    assert sum(DATASETS["pathvqa"].splits[split][0].rows for split in ("train", "validation", "test")) == 32795


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["STLLAVA_HOME"]).parent / "owned",))


def test_a_pickle_that_would_run_a_program_is_refused_and_does_not_run(tmp_path, small_pathvqa):
    folder = pathvqa_folder(tmp_path, [Hostile()])
    with pytest.raises(InputError, match=r"test_qa\.pkl.*refused.*holds \S+,.*lists.*Download"):
        prepare("pathvqa", "test", folder)
    assert not (tmp_path / "owned").exists()
    with (folder / "qas/test_qa.pkl").open("rb") as file:
        pickle.load(file)  # the very file, without our guard
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("records", [{"a": 1}, ["text"], 7])
def test_a_pickle_of_something_else_is_refused(tmp_path, small_pathvqa, records):
    with pytest.raises(InputError, match=r"test_qa\.pkl.*not a list.*Download"):
        prepare("pathvqa", "test", pathvqa_folder(tmp_path, records))


def test_a_pickle_cut_short_is_refused(tmp_path, small_pathvqa):
    folder = pathvqa_folder(tmp_path, PATHVQA)
    path = folder / "qas/test_qa.pkl"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"test_qa.pkl is refused"):
        prepare("pathvqa", "test", folder)


# Fields that others wrote. What can have one meaning is read; everything else is refused with its row.

NAN = float("nan")
A_TEXT = "and not a text"


def slake_with(tmp_path: Path, **change) -> Path:
    """SLAKE's rows, of which the second (qid 101) is changed; a field that becomes `...` is left out."""
    rows = slake_rows()
    rows[1] = {key: value for key, value in {**rows[1], **change}.items() if value is not ...}
    return slake_folder(tmp_path, rows=rows)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": ["Lung", "Liver"]}, r"qid 101: answer ['Lung', 'Liver'] is a list of 2, and not a text"),
        ({"answer": [["Lung"]]}, r"qid 101: answer [['Lung']] is a list of 1, and not a text"),
        ({"answer": []}, "qid 101: answer [] is a list of 0, and not a text"),
        ({"answer": [7]}, "qid 101: answer [7] is a list of 1, and not a text"),
        ({"answer": {"text": "Lung"}}, "qid 101: answer {'text': 'Lung'} is an object, and not a text"),
        (
            {"answer": NAN},
            "qid 101: answer is nan, a missing value (pandas also reads the word None as one), and not a text",
        ),
        ({"answer": None}, "qid 101: no answer"),
        ({"answer": ...}, "qid 101: no answer"),
        ({"answer": True}, "qid 101: answer True is true or false, and not a text"),
        ({"answer": 7}, "qid 101: answer 7 is a number, and not a text"),  # SLAKE has no numbers
        ({"answer": "x" * 99 + "\ud83d"}, "contains half of a surrogate pair"),
        ({"question": ["Is there?", "Is it?"]}, "qid 101: question ['Is there?', 'Is it?'] is a list of 2"),
        ({"question": NAN}, "qid 101: question is nan, a missing value"),
        ({"question": 7}, "qid 101: question 7 is a number, and not a text"),
        ({"question": None, "answer": None}, "qid 101: no question and no answer"),
        ({"question": ""}, "qid 101: question is empty"),
        ({"question": " \t"}, "qid 101: question is empty"),
        ({"answer_type": NAN}, "qid 101: no answer_type"),
        ({"answer_type": None}, "qid 101: no answer_type"),
        ({"answer_type": ...}, "qid 101: no answer_type"),
        ({"answer_type": ""}, "qid 101: answer_type '' is neither OPEN nor CLOSED"),
        ({"answer_type": 1}, "qid 101: answer_type 1 is a number, and not a text"),
        ({"qid": NAN}, "validate.json row 1: no qid"),
        ({"qid": None}, "validate.json row 1: no qid"),
        ({"qid": " "}, "validate.json row 1: no qid"),
        ({"qid": 101.5}, "validate.json row 1: qid 101.5 is a number, and neither a whole number nor a text"),
        ({"qid": [101]}, "validate.json row 1: qid [101] is a list of 1, and neither"),
        ({"qid": True}, "validate.json row 1: qid True is true or false, and neither"),
        ({"qid": {"id": 1}}, "validate.json row 1: qid {'id': 1} is an object, and neither"),
        ({"img_name": ["xmlab1/source.jpg"]}, "qid 101: img_name ['xmlab1/source.jpg'] is a list of 1, and not a text"),
        ({"img_name": 1}, "qid 101: img_name 1 is a number, and not a text"),
        ({"img_name": "", "img_id": ...}, "qid 101: no image"),
        ({"img_name": NAN, "img_id": NAN}, "qid 101: no image"),
        ({"img_name": None, "img_id": [1]}, "qid 101: img_id [1] is a list of 1, and neither"),
        ({"img_name": "xmlab7/source.jpg"}, "qid 101: no 'xmlab7/source.jpg'"),
        ({"image": 7}, "qid 101: image 7 is a number; an image is {bytes, path}"),
        ({"image": {"bytes": "aGVsbG8="}}, "qid 101: image has str in bytes; an image is {bytes, path}"),
        ({"q_lang": None}, "validate.json row 1: q_lang None is neither en nor zh"),
        ({"q_lang": NAN}, "validate.json row 1: q_lang nan is neither en nor zh"),
        ({"q_lang": "english"}, "validate.json row 1: q_lang 'english' is neither en nor zh"),
        ({"modality": ["CT", "MRI"]}, "qid 101: modality ['CT', 'MRI'] is a list of 2, and not a text"),
        ({"location": {"organ": "Lung"}}, "qid 101: location {'organ': 'Lung'} is an object, and not a text"),
    ],
    ids=str,
)
def test_a_field_that_is_not_what_it_should_be_is_one_line_with_its_row(tmp_path, small_slake, change, told):
    with pytest.raises(InputError) as refused:
        prepare("slake", "validation", slake_with(tmp_path, **change))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "home").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("change", "has"),
    [
        ({"qid": 101.0}, {"id": "101"}),
        ({"qid": " 101 "}, {"id": "101"}),
        ({"qid": "101.0"}, {"id": "101"}),
        ({"answer_type": " closed "}, {"kind": "closed"}),
        ({"img_name": "xmlab1\\source.jpg"}, {"image_id": "xmlab1/source.jpg"}),
        ({"img_name": "imgs/xmlab1/source.jpg"}, {"image_id": "xmlab1/source.jpg"}),
        ({"img_name": "C:\\slake\\imgs\\xmlab1\\source.jpg"}, {"image_id": "xmlab1/source.jpg"}),
        ({"img_name": None, "img_id": 1.0}, {"image_id": "xmlab1/source.jpg"}),
        ({"img_name": NAN, "img_id": "1"}, {"image_id": "xmlab1/source.jpg"}),
        ({"image": None}, {"image_id": "xmlab1/source.jpg"}),
        ({"image": NAN}, {"image_id": "xmlab1/source.jpg"}),
        ({"q_lang": " EN"}, {"id": "101"}),
        ({"modality": None, "location": NAN, "base_type": ...}, {"categories": ("", "", "")}),
    ],
    ids=str,
)
def test_a_field_that_can_have_one_meaning_is_read(tmp_path, small_slake, change, has):
    assert prepare("slake", "validation", slake_with(tmp_path, **change)).notes == ()
    row = read_rows("slake", "validation")[1]
    categories = (row.categories["modality"], row.categories["location"], row.categories["base_type"])
    told = {"id": row.id, "kind": row.kind, "image_id": row.image_id, "categories": categories}
    assert {name: told[name] for name in has} == has
    assert (row.question, row.reference) == ("Is there a 1?", "Lung")


def test_a_list_of_one_text_is_that_text_and_the_manifest_says_so(tmp_path, small_slake):
    change = {"question": ["Is there a 1?"], "answer": ["Lung"], "answer_type": ["CLOSED"], "modality": ["CT"]}
    manifest = prepare("slake", "validation", slake_with(tmp_path, **change, q_lang=["en"]))
    assert manifest.notes == tuple(
        f"{field} was a list of one text in 1 rows, and that text is taken: qid 101"
        for field in ("question", "answer", "q_lang", "modality", "answer_type")
    )
    row = read_rows("slake", "validation")[1]
    assert (row.question, row.reference, row.kind, row.categories["modality"]) == (
        "Is there a 1?",
        "Lung",
        "closed",
        "CT",
    )


@pytest.mark.parametrize("name", ["validate.json", "validate.jsonl", "validation.jsonl"])
@pytest.mark.parametrize("begin", ["", "\ufeff", "\n"], ids=["", "with a byte order mark", "with an empty line"])
def test_records_in_lines_are_read_whatever_the_files_name_ends_with(tmp_path, small_slake, name, begin):
    folder = slake_folder(tmp_path)
    expected = prepare("slake", "validation", folder).sha256_file
    (folder / "validate.json").unlink()
    (folder / name).write_text(begin + "\n".join(map(json.dumps, slake_rows())) + "\n", encoding="utf-8")
    assert prepare("slake", "validation", folder).sha256_file == expected


def test_references_in_lists_of_one_text_are_the_official_split(shared, tmp_path):
    rows = [{**row, "answer": [row["answer"]]} for row in records_of(shared / "data/vqarad/testset.json")]
    manifest = prepare("vqarad", "test", vqarad_folder(shared, tmp_path, rows))
    assert manifest.official
    assert len(manifest.notes) == 1
    assert manifest.notes[0].startswith("answer was a list of one text in 451 rows, and that text is taken: qid ")
    wrapped = manifest.sha256_rows
    assert prepare("vqarad", "test", shared / "data/vqarad").sha256_rows == wrapped


def test_rows_with_one_fault_are_named_together(tmp_path, small_slake):
    rows = [{**row, "answer": NAN if row["qid"] < 102 else 7} for row in slake_rows()]
    with pytest.raises(InputError) as refused:
        prepare("slake", "validation", slake_folder(tmp_path, rows=rows))
    assert str(refused.value) == (
        f"{tmp_path}/slake: 3 broken rows. qid 100; qid 101: answer is nan, a missing value (pandas also reads the "
        "word None as one), and not a text; qid 102: answer 7 is a number, and not a text. "
        "Correct them, or pass an unchanged copy."
    )


def test_vqarads_own_file_without_kinds_gives_the_official_test_and_no_official_train(shared, tmp_path):
    public = records_of(shared / "data/vqarad/VQA_RAD Dataset Public.json")
    rows = [{key: value for key, value in row.items() if key != "answer_type"} for row in public]
    (tmp_path / "public.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "images").symlink_to(shared / "data/vqarad/images")
    manifest = prepare("vqarad", "test", tmp_path)
    assert manifest.official
    assert manifest.counts["closed"] == 272
    with pytest.raises(InputError, match=r"found 1797 = \d+ closed"):
        prepare("vqarad", "train", tmp_path)


@pytest.mark.parametrize("damage", [["yes", "no"], NAN, None, {"a": 1}, True], ids=str)
def test_a_damaged_reference_is_refused_in_vqarad_too(shared, tmp_path, damage):
    rows = records_of(shared / "data/vqarad/testset.json")
    rows[7]["answer"] = damage
    with pytest.raises(
        InputError, match=rf"1 broken.*qid {rows[7]['qid']}\b.*(no answer|answer .*text.*number).*unchanged"
    ):
        prepare("vqarad", "test", vqarad_folder(shared, tmp_path, rows))


def test_vqarads_numbers_are_read_as_its_authors_write_them_and_as_pandas_does(shared, tmp_path):
    rows = records_of(shared / "data/vqarad/trainset.json")
    assert any(isinstance(row["answer"], int) for row in rows)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "images").symlink_to(shared / "data/vqarad/images")
    hashes = set()
    for number in (int, float):
        changed = [
            {**row, "answer": number(row["answer"]) if type(row["answer"]) is int else row["answer"]} for row in rows
        ]
        changed = [{**row, "qid": number(row["qid"])} for row in changed]
        (folder / "trainset.json").write_text(json.dumps(changed), encoding="utf-8")
        hashes.add(prepare("vqarad", "train", folder).sha256_rows)
    assert len(hashes) == 1
    assert {row.reference for row in read_rows("vqarad", "train")} >= {"4", "2", "12"}


def test_official_texts_under_other_ids_are_not_official(shared, tmp_path):
    rows = [{**row, "qid": number} for number, row in enumerate(records_of(shared / "data/slake/test.json"))]
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "imgs").symlink_to(shared / "data/slake/imgs")
    manifest = prepare("slake", "test", folder)
    assert not manifest.official
    assert manifest.notes == (
        "not official: the text of the official test, but under other ids, so answers of others do not fit",
    )


@pytest.mark.parametrize("reference", ["['MRI']", "{'a': 1}", "nan", "[]", "<NA>"])
def test_what_was_a_list_or_missing_before_it_became_a_text_is_not_official(tmp_path, small_pathvqa, reference):
    records = [{**PATHVQA[0], "answer": reference}, *PATHVQA[1:]]
    manifest = prepare("pathvqa", "test", pathvqa_folder(tmp_path, records))
    assert not manifest.official
    assert manifest.notes == (
        "not official: counts as the tiny test, but the references of 1 rows are lists, objects or missing values that "
        "were written out as text: 0",
    )


def image_column(tmp_path: Path, images: list, type_: pa.DataType | None = None) -> Path:
    """A hub copy of PathVQA with these images."""
    path = tmp_path / "hub/data/test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    texts = {name: [row[name] for row in PATHVQA] for name in ("question", "answer")}
    pq.write_table(pa.table({"image": pa.array(images, type_), **texts}), path)
    return tmp_path / "hub"


FORM = "an image is {bytes, path}, with the whole file (JPEG, PNG, ...) in bytes, as on the hub"
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize(
    ("images", "type_", "told"),
    [
        (["a.jpg"] * 3, None, f"its column image is string; {FORM}. Write it so."),
        ([b"\xff\xd8"] * 3, None, f"its column image is binary; {FORM}. Write it so."),
        ([1, 2, 3], None, f"its column image is int64; {FORM}. Write it so."),
        ([[0, 1]] * 3, None, f"its column image is list<element: int64>; {FORM}. Write it so."),
        (
            [{"bytes": "aGVsbG8=", "path": None}] * 3,
            None,
            "its column image is struct<bytes: string, path: null>; an image",
        ),
        ([[{"bytes": b"1", "path": None}]] * 3, None, "its column image is list<element: struct<bytes: binary"),
        (
            [{"data": b"1"}] * 3,
            None,
            "3 broken rows. {0} row 0; {0} row 1; {0} row 2: image has the keys data; an image is",
        ),
        ([{"bytes": b"", "path": "a.jpg"}, None, None], STRUCT, f"parquet row 0: image has empty bytes; {FORM}"),
        ([{"bytes": b"", "path": None}, None, None], STRUCT, f"parquet row 0: image has empty bytes; {FORM}"),
        ([{"bytes": None, "path": None}, None, None], STRUCT, f"parquet row 0: image has no bytes; {FORM}"),
        ([{"bytes": None, "path": " "}, None, None], STRUCT, f"parquet row 0: image has no bytes; {FORM}"),
        ([None] * 3, STRUCT, "3 broken rows. {0} row 0; {0} row 1; {0} row 2: no image"),
        ([None] * 3, pa.null(), "3 broken rows. {0} row 0; {0} row 1; {0} row 2: no image"),
        (
            [{"bytes": None, "path": "/home/a/test/1.jpg"}] * 3,
            STRUCT,
            f"row 0: no '/home/a/test/1.jpg' in the source, and its image has a path and no bytes ({FORM})",
        ),
        ([{"bytes": b"no image", "path": None}] * 3, STRUCT, "row 0 (3 rows): 8 bytes are no JPEG"),
    ],
    ids=str,
)
def test_a_damaged_image_column_says_what_it_should_be(tmp_path, small_pathvqa, images, type_, told):
    with pytest.raises(InputError) as refused:
        prepare("pathvqa", "test", image_column(tmp_path, images, type_))
    assert told.replace("{0}", "data/test-00000-of-00001.parquet") in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("large", [False, True])
def test_images_are_read_by_their_bytes_or_by_their_path_in_the_source(tmp_path, small_pathvqa, large):
    content = [picture(1), picture(2), picture(2)]
    type_ = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()}) if large else STRUCT
    folder = image_column(tmp_path, [{"bytes": one, "path": "gone/a.png"} for one in content], type_)
    by_bytes = prepare("pathvqa", "test", folder)
    for number in (1, 2):
        (tmp_path / f"named/images/{number}.png").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"named/images/{number}.png").write_bytes(picture(number))
    paths = [{"bytes": None, "path": f"D:\\images\\{number}.png"} for number in (1, 2, 2)]
    image_column(tmp_path / "named", paths, type_)
    by_path = prepare("pathvqa", "test", tmp_path / "named")
    assert by_path.sha256_rows == by_bytes.sha256_rows
    assert by_path.sha256_pixels == by_bytes.sha256_pixels


@pytest.mark.parametrize("column", ["question", "answer"])
@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([b"yes", b"yes", b"yes"], "b'yes' is bytes, and not a text"),
        ([1.0, NAN, 2.0], "1.0 is a number, and not a text"),
        ([None, "yes", "yes"], "1 broken rows. data/test-0.parquet row 0: no "),
        ([["a", "b"], ["a"], ["b"]], "1 broken rows. data/test-0.parquet row 0: {} ['a', 'b'] is a list of 2"),
        ([{"a": "b"}] * 3, "{'a': 'b'} is an object, and not a text"),
    ],
    ids=str,
)
def test_parquet_columns_of_something_else_than_text_are_refused_with_the_row(
    tmp_path, small_pathvqa, column, values, told
):
    image = {"bytes": picture(1), "path": None}
    parquet(
        tmp_path / "hub/data/test-0.parquet",
        [{**row, "image": image, column: value} for row, value in zip(PATHVQA, values, strict=True)],
    )
    with pytest.raises(InputError) as refused:
        prepare("pathvqa", "test", tmp_path / "hub")
    assert told.replace("{}", column) in str(refused.value)
    assert "test-0.parquet row 0" in str(refused.value)


def test_ids_that_pandas_made_floats_are_whole_numbers_in_parquet(shared, tmp_path):
    import pandas

    table = pandas.read_json(shared / "data/vqarad/testset.json")
    table["qid"] = table["qid"].astype(float)
    images = (shared / "data/vqarad/images").absolute()
    table["image"] = [{"bytes": (images / name).read_bytes(), "path": None} for name in table["image_name"]]
    path = tmp_path / "hub/data/test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    table.to_parquet(path)
    ours = prepare("vqarad", "test", tmp_path / "hub")
    assert ours.notes == ()
    assert ours.sha256_file == prepare("vqarad", "test", shared / "data/vqarad").sha256_file


@pytest.mark.parametrize("ending", [".zip", ".tar"])
def test_an_archive_that_windows_packed_is_read(tmp_path, small_slake, ending):
    folder = slake_folder(tmp_path)
    path = tmp_path / f"windows{ending}"
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    names = ["slake\\" + str(file.relative_to(folder)).replace("/", "\\") for file in files]
    if ending == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file, name in zip(files, names, strict=True):
                archive.write(file, name)
    else:
        with tarfile.open(path, "w") as archive:
            for file, name in zip(files, names, strict=True):
                archive.add(file, name)
    assert prepare("slake", "validation", path).sha256_file == prepare("slake", "validation", folder).sha256_file


def test_an_archive_with_one_name_in_two_spellings_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("imgs/a.jpg", picture(1))
        archive.writestr("imgs\\a.jpg", picture(2))
    with pytest.raises(InputError, match=r"imgs/a\.jpg.*twice.*/.*\\.*Download"):
        prepare("slake", "test", tmp_path / "a.zip")


# Several editions of one split.


def editions_of_pathvqa(monkeypatch) -> None:
    """As the real ones: the copy lacks a row, so other rows have the numbers after it."""
    knows(
        monkeypatch,
        "pathvqa",
        "test",
        Edition("official test", 3, 2, 2, official=True),
        Edition("deduplicated test", 2, 1, None, prefix="dedup-"),
    )


@pytest.fixture
def both_pathvqa(tmp_path, monkeypatch):
    """The sources of both editions: the authors' files, and a hub copy without the second row."""
    editions_of_pathvqa(monkeypatch)
    official = pathvqa_folder(tmp_path, PATHVQA)
    images = {"test_0001": picture(1), "test_0002": picture(2)}
    rows = [{**row, "image": {"bytes": images[row["image"]], "path": None}} for row in (PATHVQA[0], PATHVQA[2])]
    parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", rows)
    return official, tmp_path / "hub"


def test_two_editions_are_prepared_side_by_side_and_the_last_named_is_in_use(home, both_pathvqa, monkeypatch):
    official, hub = both_pathvqa
    first, second = prepare("pathvqa", "test", official), prepare("pathvqa", "test", hub)
    assert (first.edition, second.edition) == ("official test", "deduplicated test")
    assert splits.prepared_editions("pathvqa", "test") == [second, first]
    assert read_manifest("pathvqa", "test") == second
    assert len(read_rows("pathvqa", "test")) == len(read_split("pathvqa", "test")) == 2
    monkeypatch.setattr(prepare_module, "open_files", None)  # neither source is read again
    for _ in range(2):
        assert prepare("pathvqa", "test", official) == first
        assert splits.prepared_editions("pathvqa", "test") == [first, second]
        assert len(read_rows("pathvqa", "test")) == len(read_split("pathvqa", "test")) == 3
        assert prepare("pathvqa", "test", hub) == second
    assert sorted(path.name for path in (home / "data/pathvqa").iterdir()) == [
        ".test.lock",
        "test.json",
        "test.parquet",
        "test@official-test.json",
        "test@official-test.parquet",
    ]


def test_every_prepared_edition_can_be_read_by_its_name(both_pathvqa):
    official, hub = (prepare("pathvqa", "test", source) for source in both_pathvqa)
    for split, manifest in (
        ("test", hub),
        ("test@deduplicated", hub),
        ("test@official", official),
        ("test@official test", official),
        ("test@official-test", official),
    ):
        assert read_manifest("pathvqa", split) == manifest
        assert len(read_rows("pathvqa", split)) == len(read_split("pathvqa", split)) == manifest.counts["rows"]
    with pytest.raises(InputError) as refused:
        read_split("pathvqa", "test@public")
    assert str(refused.value) == (
        "pathvqa test@public: 0 of the prepared editions have such a name; there is test@deduplicated-test, "
        "test@official-test. Name one of them, or run `stllava-eval prepare pathvqa --from DIR`, or "
        "`stllava-eval prepare pathvqa --sample`."
    )
    with pytest.raises(InputError, match=r"pathvqa.*no split test@official.*train, validation, test"):
        prepare("pathvqa", "test@official")


def test_no_id_of_one_edition_of_pathvqa_is_an_id_of_the_other(both_pathvqa):
    ids = {}
    for source in both_pathvqa:
        edition = prepare("pathvqa", "test", source).edition
        ids[edition] = [row.id for row in read_rows("pathvqa", "test")]
    assert ids == {"official test": ["0", "1", "2"], "deduplicated test": ["dedup-0", "dedup-1"]}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_real_editions_of_pathvqa_have_ids_of_their_own(split):
    prefixes = [edition.prefix for edition in DATASETS["pathvqa"].splits[split]]
    assert prefixes == ["", "dedup-"]


def test_the_copy_says_that_it_is_not_the_official_split(both_pathvqa):
    assert prepare("pathvqa", "test", both_pathvqa[0]).notes == ()
    unverified, other = prepare("pathvqa", "test", both_pathvqa[1]).notes
    assert unverified.startswith("unverified: the deduplicated test has 2 = 1 closed + 1 open")
    assert other == (
        "not the split as its authors published it: the official test has 3 = 2 closed + 1 open on 2 images"
    )


def test_a_copy_that_an_earlier_version_prepared_with_the_official_ids_is_refused(home, both_pathvqa, monkeypatch):
    real = DATASETS["pathvqa"].splits["test"]
    knows(monkeypatch, "pathvqa", "test", *(replace(edition, prefix="") for edition in real))
    prepare("pathvqa", "test", both_pathvqa[1])
    editions_of_pathvqa(monkeypatch)
    for read in (read_split, read_rows):
        with pytest.raises(InputError, match=r"pathvqa/test\.parquet.*ids.*deduplicated.*official.*prepare pathvqa"):
            read("pathvqa", "test")
    prepare("pathvqa", "test", both_pathvqa[1])
    assert [row.id for row in read_rows("pathvqa", "test")] == ["dedup-0", "dedup-1"]
    assert not list((home / "data/pathvqa").glob("*@*"))


def test_the_same_edition_from_another_source_replaces_the_one_that_was_kept(home, both_pathvqa, tmp_path):
    official, hub = both_pathvqa
    prepare("pathvqa", "test", official)
    prepare("pathvqa", "test", hub)
    copy = official.rename(tmp_path / "elsewhere")
    again = prepare("pathvqa", "test", copy)
    assert [one.resolved for one in splits.prepared_editions("pathvqa", "test")] == [str(copy), str(hub)]
    assert read_manifest("pathvqa", "test") == again
    assert not list((home / "data/pathvqa").glob("*@official*"))


def test_a_kill_between_two_renames_loses_no_edition(home, both_pathvqa, monkeypatch):
    official, hub = both_pathvqa
    first = prepare("pathvqa", "test", official)
    (home / "data/pathvqa/test.parquet").rename(home / "data/pathvqa/test@official-test.parquet")  # and killed
    with pytest.raises(InputError, match=r"pathvqa/test\.parquet.*not the file.*sha256.*prepare pathvqa"):
        read_rows("pathvqa", "test")
    prepare("pathvqa", "test", hub)
    monkeypatch.setattr(prepare_module, "open_files", None)
    assert prepare("pathvqa", "test", official) == first
    assert len(read_rows("pathvqa", "test")) == 3


def test_a_sample_is_not_kept_and_does_not_replace_an_edition(home, both_pathvqa):
    write_sample(sample(3), name="pathvqa")
    prepare("pathvqa", "test", both_pathvqa[1])
    assert not list((home / "data/pathvqa").glob("*@*"))
    prepare("pathvqa", "test", both_pathvqa[0])
    with pytest.raises(InputError, match=r"pathvqa/test\.parquet.*sample.*replace.*STLLAVA_HOME"):
        write_sample(sample(3), name="pathvqa")
    assert len(splits.prepared_editions("pathvqa", "test")) == 2


def test_a_source_that_has_changed_is_read_again(both_pathvqa):
    official, _ = both_pathvqa
    prepare("pathvqa", "test", official)
    records = [{**PATHVQA[0], "answer": "Spleen"}, *PATHVQA[1:]]
    file = official / "qas/test_qa.pkl"
    file.write_bytes(pickle.dumps(records))
    os.utime(file, (0, 0))  # as unpacking an archive does
    prepare("pathvqa", "test", official)
    assert read_rows("pathvqa", "test")[0].reference == "Spleen"


def test_a_run_is_not_scored_against_another_edition(both_pathvqa, tmp_path, capsys):
    from stllava_eval.cli.main import main

    official, hub = both_pathvqa
    for source, run in ((official, "a"), (hub, "b")):
        prepare("pathvqa", "test", source)
        answers = tmp_path / f"{run}.jsonl"
        rows = [json.dumps({"id": row.id, "answer": row.reference}) for row in read_rows("pathvqa", "test")]
        answers.write_text("\n".join(rows))
        assert (
            main(["score", "--task", "pathvqa", "--answers", str(answers), "--out", str(tmp_path / f"run-{run}")]) == 0
        )
    assert (
        json.loads((tmp_path / "run-a/run.json").read_text())["tasks"]["pathvqa"]["data"]["edition"] == "official test"
    )
    capsys.readouterr()
    assert main(["leaderboard", str(tmp_path / "run-a"), str(tmp_path / "run-b")]) == 2
    assert capsys.readouterr().err == (
        f"stllava-eval: {tmp_path}/run-a: its pathvqa is official test, but deduplicated test is prepared now, with "
        f"other rows or images. Run `stllava-eval prepare pathvqa --from {official}`, or run again.\n"
    )
    for run in ("a", "b"):  # nor do answers of one fit the other, whole or in part
        for source in (official, hub):
            prepare("pathvqa", "test", source)
            fits = (run == "a") == (source == official)
            found = main(["score", "--task", "pathvqa", "--answers", str(tmp_path / f"{run}.jsonl")])
            assert found == (0 if fits else 2)
            assert ("unknown ids" in capsys.readouterr().err) != fits


def test_a_run_during_which_another_edition_was_prepared_is_not_written(both_pathvqa, tmp_path):
    from stllava_eval.runs.folder import answer_row, write_run
    from stllava_eval.scoring.final_answer import final_answer

    prepare("pathvqa", "test", both_pathvqa[0])
    split = read_split("pathvqa", "test", images=False).to_list()
    rows = [answer_row("pathvqa", row, row["question"], final_answer("yes")) for row in split]
    prepare("pathvqa", "test", both_pathvqa[1])
    with pytest.raises(InputError, match=r"pathvqa.*3 questions.*deduplicated.*\(0, 1, 2\).*Prepare"):
        write_run(rows, {"checkpoint": {"name": "a", "sha256": "0"}}, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_row_numbers_of_another_edition_are_not_taken_for_ids(both_pathvqa, tmp_path, capsys):
    from stllava_eval.cli.main import main

    official, hub = both_pathvqa
    (tmp_path / "a.jsonl").write_text('{"id": 0, "answer": "Liver"}\n{"id": 1, "answer": "no"}\n')  # right, of the copy
    score = ["score", "--task", "pathvqa", "--answers", str(tmp_path / "a.jsonl")]
    prepare("pathvqa", "test", official)
    assert main(score) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "stllava-eval: pathvqa: the 2 ids are the row numbers of the deduplicated test, 0 to 1, and the official test "
        "is asked, whose numbers are other questions. Prepare that edition; its ids are dedup-0 to dedup-1."
    )
    prepare("pathvqa", "test", hub)
    assert main(score) == 0  # all of its numbers, so they are the ids of the copy that is in use
    prepare("pathvqa", "test", official)
    assert main([*score, "--split", "test@deduplicated"]) == 0
    (tmp_path / "a.jsonl").write_text('{"id": "dedup-0", "answer": "Liver"}\n{"id": "dedup-1", "answer": "no"}\n')
    assert main(score) == 2
    assert main([*score, "--split", "test@deduplicated"]) == 0


def test_the_command_prints_the_notes_and_which_editions_there_are(both_pathvqa, capsys):
    from stllava_eval.cli.main import main

    official, hub = both_pathvqa
    assert main(["prepare", "pathvqa", "--from", str(official)]) == 0
    shown = capsys.readouterr()
    assert shown.out == "pathvqa test (official test): 3 questions = 2 closed + 1 open on 2 images\n"
    assert not [line for line in shown.err.splitlines() if line.startswith("stllava-eval:")]
    assert main(["prepare", "pathvqa", "--from", str(hub)]) == 0
    shown = capsys.readouterr()
    assert shown.out == "pathvqa test (deduplicated test): 2 questions = 1 closed + 1 open on 2 images\n"
    told = [line for line in shown.err.splitlines() if line.startswith("stllava-eval:")]
    assert told == [
        "stllava-eval: pathvqa test: note: unverified: the deduplicated test has 2 = 1 closed + 1 open, and what this "
        "leaves out is documented nowhere we could check",
        "stllava-eval: pathvqa test: note: not the split as its authors published it: the official test has 3 = 2 "
        "closed + 1 open on 2 images",
        "stllava-eval: pathvqa test: the official test is kept beside it; `stllava-eval prepare pathvqa --from "
        f"{official}` takes it into use again",
    ]


def test_the_notes_are_logged_where_a_split_is_prepared_on_first_use(both_pathvqa, monkeypatch, caplog):
    folder = both_pathvqa[1].rename(both_pathvqa[1].with_name("0a1b2c"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    prepare_on_first_use("pathvqa", "test")
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "pathvqa test is not prepared yet: fetching flaviagiammarino/path-vqa from the hub"
    assert [line[:28] for line in told[1:]] == ["pathvqa test: unverified: th", "pathvqa test: not the split "]


# Archives and other sources.


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/etc/evil.txt", "imgs/../../evil.txt", "C:\\evil.txt", "..\\evil.txt"]
)
def test_a_zip_that_leads_out_of_its_folder_is_refused_by_name(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "evil")
    with pytest.raises(InputError, match=r"evil\.txt'.*leads out.*[Dd]o not use"):
        prepare("slake", "test", tmp_path / "a.zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "home"]


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("imgs/link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match=r"'imgs/link\.jpg'.*link.*[Dd]o not use"):
        prepare("slake", "test", tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("../evil.txt", tarfile.REGTYPE, ""),
        ("/etc/evil.txt", tarfile.REGTYPE, ""),
        ("imgs/evil.txt", tarfile.SYMTYPE, "/etc/passwd"),
        ("imgs/evil.txt", tarfile.LNKTYPE, "../../etc/passwd"),
        ("imgs/evil.txt", tarfile.CHRTYPE, ""),
    ],
    ids=["up", "absolute", "symbolic link", "hard link", "device"],
)
def test_a_tar_that_leads_out_of_its_folder_is_refused_by_name(tmp_path, name, kind, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(member)
    with pytest.raises(InputError, match=r"evil\.txt'.*leads out.*[Dd]o not use"):
        prepare("slake", "test", tmp_path / "a.tar.gz")


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_an_archive_cut_short_is_refused(tmp_path, small_slake, ending):
    path = packed(slake_folder(tmp_path), ending)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"archive|cannot be read"):
        prepare("slake", "validation", path)


def test_a_damaged_member_is_refused_by_name(tmp_path, small_slake):
    path = packed(slake_folder(tmp_path), ".zip")
    with zipfile.ZipFile(path) as archive:
        header = archive.getinfo("download/imgs/xmlab1/source.jpg").header_offset
    content = bytearray(path.read_bytes())
    content[header + 300] ^= 255  # well inside the image
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"xmlab1/source\.jpg.*read.*CRC.*Download"):
        prepare("slake", "validation", path)


BLANK = b" " * 2**20


def zip_of_blanks(path: Path, member: str, megabytes: int, **how) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(member, "w") as file:
        for _ in range(megabytes):
            file.write(BLANK)
    return path


@pytest.fixture
def small_limits(monkeypatch):
    """A thousandth of the real ones, about."""
    for name, most in (
        ("LISTING_BYTES", 2**17),
        ("TABLE_BYTES", 2**16),
        ("TEXTS_BYTES", 2**18),
        ("NESTED_BYTES", 2**20),
        ("PARQUET_BYTES", 2**21),
        ("IMAGES_BYTES", 2**22),
        ("UNPACKED_BYTES", 2**23),
        ("IMAGE_BYTES", 2**18),
    ):
        set_limit(monkeypatch, name, most)


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("zipped", [False, True], ids=["imgs/", "imgs.zip"])
def test_an_archive_of_a_real_kind_is_within_the_limits(tmp_path, small_slake, small_limits, ending, zipped):
    assert prepare("slake", "validation", packed(slake_folder(tmp_path, zipped), ending)).counts["rows"] == 3


def test_a_zip_of_three_gigabytes_of_blanks_is_refused_by_the_size_that_it_names(tmp_path):
    path = zip_of_blanks(tmp_path / "a.zip", "validate.json", 1)
    content = path.read_bytes()
    named, size = (2**20).to_bytes(4, "little"), (3 * 2**30).to_bytes(4, "little")
    assert content.count(named) == 2  # before the member, and in the list at the end
    path.write_bytes(content.replace(named, size))
    with pytest.raises(InputError) as refused:
        prepare("slake", "validation", path)
    assert str(refused.value) == (
        f"{path}: validate.json has 3,221,225,472 bytes, and at most 67,108,864 are read. Download it again."
    )


@pytest.mark.parametrize(
    ("member", "megabytes", "told"),
    [
        pytest.param("validate.json", 1, r"validate\.json.*1,048,576 bytes.*most 65,536\b.*Download", id="JSON"),
        pytest.param("validation.jsonl", 1, r"validation\.jsonl.*1,048,576 bytes.*most 65,536\b.*Download", id="JSONL"),
        pytest.param("imgs.zip", 2, r"imgs\.zip.*2,097,152 bytes.*most 1,048,576\b.*Download", id="nested"),
        pytest.param(
            "data/validation-0.parquet",
            3,
            r"validation-0\.parquet.*3,145,728 bytes.*most 2,097,152\b.*Download",
            id="parquet",
        ),
    ],
)
@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_a_member_that_is_too_large_is_refused_by_name(tmp_path, small_limits, member, megabytes, told, ending):
    path = tmp_path / f"a{ending}"
    if ending == ".zip":
        zip_of_blanks(path, member, megabytes)
    else:
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo(member)
            info.size = megabytes * 2**20
            archive.addfile(info, io.BytesIO(BLANK * megabytes))
    with pytest.raises(InputError, match=told) as refused:
        prepare("slake", "validation", path)
    assert "\n" not in str(refused.value)


def test_zips_in_a_zip_have_one_limit_together(tmp_path, small_limits):
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
        archive.writestr("x.bin", bytes(600_000))
    inner = (tmp_path / "inner.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one.zip", inner)
        archive.writestr("two.zip", inner)
    with pytest.raises(InputError, match=r"two\.zip.*60\d,\d+ bytes.*most 44\d,\d+.*Download"):
        prepare("slake", "validation", tmp_path / "a.zip")


def test_an_image_that_is_too_large_is_refused_and_so_are_too_many(tmp_path, small_slake, small_limits, monkeypatch):
    folder = slake_folder(tmp_path)
    (folder / "imgs/xmlab1/source.jpg").write_bytes(picture(1, "JPEG") + bytes(2**18))
    path = packed(folder, ".zip")
    with pytest.raises(InputError, match=r"xmlab1/source\.jpg.*26\d,\d+ bytes.*most 262,144\b.*Download"):
        prepare("slake", "validation", path)
    set_limit(monkeypatch, "IMAGES_BYTES", 1000)
    with pytest.raises(InputError, match=r"images.*26\d,\d+ bytes.*most 1,000\b.*Download"):
        prepare("slake", "validation", path)


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_zip_whose_sizes_are_not_true_is_refused(tmp_path, kind):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("validate.json", b"[" + BLANK + b"]")
    size = (2**20 + 2).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (10).to_bytes(4, "little")))
    with pytest.raises(InputError, match=r"validate\.json cannot be read|not a whole zip archive"):
        prepare("slake", "validation", path)


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_in_a_compression_that_cannot_be_unpacked_piece_by_piece_is_refused(tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", kind) as archive:
        archive.writestr("validate.json", BLANK)
    with pytest.raises(InputError, match=rf"'validate\.json'.*compressed.*\b{kind}\b.*zip.*unpack"):
        prepare("slake", "validation", tmp_path / "a.zip")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tar_archives_are_read_in_every_compression_and_up_to_a_size(tmp_path, small_slake, small_limits, mode):
    folder = slake_folder(tmp_path)
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        archive.add(folder, ".")
    assert prepare("slake", "validation", tmp_path / "a.tar").counts["rows"] == 3
    with tarfile.open(tmp_path / "b.tar", mode) as archive:
        for number in range(5):
            member = tarfile.TarInfo(f"{number}.bin")
            member.size = 2**21
            archive.addfile(member, io.BytesIO(BLANK * 2))
    with pytest.raises(InputError, match=r"(2,097,152 bytes|unpacks).*8,388,608\b.*Download"):
        prepare("slake", "validation", tmp_path / "b.tar")


def test_a_tar_that_says_too_much_of_its_members_is_refused(tmp_path, small_limits):
    member = tarfile.TarInfo("header")
    member.type, member.size = tarfile.XHDTYPE, 2**21
    with gzip.open(tmp_path / "long.tar.gz", "wb") as file:
        file.write(member.tobuf(tarfile.USTAR_FORMAT) + BLANK * 2)
    with tarfile.open(tmp_path / "many.tar.gz", "w:gz") as archive:
        for number in range(300):
            archive.addfile(tarfile.TarInfo(f"{number}.txt"))
    for name in ("long", "many"):
        with pytest.raises(InputError, match=rf"{name}\.tar\.gz.*more.*data set.*Download"):
            prepare("slake", "validation", tmp_path / f"{name}.tar.gz")


def test_a_tar_that_promises_a_terabyte_is_refused_at_once(tmp_path):
    member = tarfile.TarInfo("validate.json")
    member.size = 2**40
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(InputError, match=r"validate\.json.*1,099,511,627,776 bytes.*most 2,147,483,648\b.*Download"):
        prepare("slake", "validation", tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["validate.json", "imgs.zip", "imgs/xmlab1/source.jpg"])
@pytest.mark.parametrize("kind", ["device", "pipe", "nowhere", "sparse"])
def test_a_folder_with_something_else_under_a_files_name_is_refused(tmp_path, small_slake, name, kind):
    file = slake_folder(tmp_path) / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "sparse":
        with file.open("wb") as out:
            out.truncate(2**40)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    told = {"nowhere": "cannot be read", "sparse": r"1,099,511,62\d,\d+ bytes|not a whole zip"}
    with pytest.raises(InputError, match=told.get(kind, rf"{name}.*regular.*[Pp]ass a folder")) as refused:
        prepare("slake", "validation", tmp_path / "slake")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_a_source_that_need_not_end_is_refused(tmp_path, kind):
    source = Path("/dev/zero") if kind == "device" else tmp_path / "pipe"
    if kind == "pipe":
        os.mkfifo(source)
    with pytest.raises(InputError, match=rf"^{source}\b.*neither.*regular.*Pass"):
        prepare("slake", "validation", source)


@pytest.mark.parametrize("source", ["x" * 256, "a/" * 3000, "~no-such-user/slake"])
def test_a_name_that_nothing_can_have_is_refused(source):
    with pytest.raises(InputError, match=r"no such folder.*[Pp]ass.*slake"):
        prepare("slake", "validation", source)


def test_parquet_files_that_unpack_to_much_are_refused(tmp_path, small_slake, small_limits, monkeypatch):
    rows = [{**row, "qid": None} for row in english_copy(slake_rows())]
    parquet(tmp_path / "a/data/validation-0.parquet", [{**row, "question": " " * 10**5} for row in rows])
    with pytest.raises(InputError, match=r"validation-0\.parquet.*262,144 bytes.*beside.*Download"):
        prepare("slake", "validation", tmp_path / "a")
    parquet(tmp_path / "b/data/validation-0.parquet", [{**row, "more": "x" * 2**22} for row in rows])
    set_limit(monkeypatch, "UNPACKED_BYTES", 2**21)
    with pytest.raises(
        InputError, match=r"validation-0\.parquet.*unpacks.*4,\d+,\d+ bytes.*most 2,097,152\b.*Download"
    ):
        prepare("slake", "validation", tmp_path / "b")
    set_limit(monkeypatch, "IMAGES_BYTES", 100)
    parquet(tmp_path / "c/data/validation-0.parquet", rows)
    with pytest.raises(InputError, match=r"validation.*images.*more.*\b100 bytes.*Download"):
        prepare("slake", "validation", tmp_path / "c")


def test_a_key_that_appears_twice_is_refused_with_its_line(tmp_path, small_slake):
    folder = slake_folder(tmp_path)
    text = json.dumps(slake_rows(), indent=0)
    (folder / "validate.json").write_text(text.replace('"answer": "Yes"', '"answer": "Yes",\n"answer": "No"', 1))
    with pytest.raises(InputError, match=r"validate\.json.*JSON.*'answer'.*twice.*line 2\b.*Download"):
        prepare("slake", "validation", folder)
    (folder / "validate.json").unlink()
    (folder / "validation.jsonl").write_text('{"qid": 1}\n{"qid": 2, "qid": 3}\n')
    with pytest.raises(InputError, match=r"validation\.jsonl.*JSON.*line 2\b.*'qid'.*twice.*Download"):
        prepare("slake", "validation", folder)


def test_a_pickle_that_numbers_an_object_high_takes_no_memory_for_it(tmp_path, small_pathvqa):
    folder = pathvqa_folder(tmp_path, PATHVQA)
    file = folder / "qas/test_qa.pkl"
    file.write_bytes(b"]r\xff\xff\xff\x7f.")  # an empty list, kept under number 2147483647
    with pytest.raises(InputError, match=r"found 0 = 0 closed"):
        prepare("pathvqa", "test", folder)


def test_what_the_hub_says_is_told_to_its_end(monkeypatch):
    said = (
        "401 Client Error. (Request ID: Root=1-67)\n\nRepository Not Found for url: https://hub/x.\n"
        "Please make sure you specified the correct `repo_id` and `repo_type`.\nInvalid username or password."
    )

    def refuse(*_, **__):
        raise OSError(said)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError) as refused:
        prepare("slake", "test", "BoKelvin/SLAKE")
    assert f"cannot be fetched from the hub ({' '.join(said.split()).rstrip('.')}). Download" in str(refused.value)


def test_two_images_of_one_name_are_refused(tmp_path, small_slake):
    folder = slake_folder(tmp_path)
    other = folder / "other/xmlab0/source.jpg"
    other.parent.mkdir(parents=True)
    other.write_bytes((folder / "imgs/xmlab0/source.jpg").read_bytes())
    prepare("slake", "validation", folder)  # equal ones do no harm
    other.write_bytes(picture(9))
    with pytest.raises(InputError, match=r"\S+/imgs/xmlab0/source\.jpg.*\S+/other/xmlab0/source\.jpg.*differ.*Keep"):
        prepare("slake", "validation", packed(folder, ".zip"))


def test_missing_and_broken_images_are_listed_together_the_first_twenty_by_row(tmp_path, monkeypatch):
    knows(monkeypatch, "slake", "validation", Edition("tiny validation", 30, 30, 30))
    rows = [{**slake_rows()[0], "qid": n, "img_name": f"xmlab{n}/source.jpg"} for n in range(30)]
    folder = slake_folder(tmp_path, rows=rows)
    whole = encoded(PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)), "JPEG")
    (folder / "imgs/xmlab1/source.jpg").write_bytes(whole[:-1000])
    with pytest.raises(InputError) as refused:
        prepare("slake", "validation", folder)
    message = str(refused.value)
    assert message.startswith(
        "slake validation: 29 missing or unreadable images. qid 2: no 'xmlab2/source.jpg'; qid 3:"
    )
    assert message.endswith(" ... and 9 more")  # 28 missing and 1 truncated
    for n in range(2, 30):
        (folder / f"imgs/xmlab{n}").mkdir()
        (folder / f"imgs/xmlab{n}/source.jpg").write_bytes(picture(n, "JPEG"))
    with pytest.raises(InputError, match=r"1 missing.*qid 1 \(1 rows\).*truncated.*Download"):
        prepare("slake", "validation", folder)


def test_truncated_images_are_refused_where_another_package_lets_pillow_fill_them(monkeypatch):
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval does for the whole process
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8))
    cut = encoded(noise, "JPEG")[:-1000]
    with pytest.raises(InputError, match=r"1 missing.* 0 \(1 rows\).*truncated.*Download"):
        write_sample([replace(sample(1)[0], image=cut)])
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_source_without_the_split_says_what_it_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"no test split.*test\.json.*test-\*\.parquet.*[Pp]ass"):
        prepare("slake", "test", tmp_path)


def test_a_source_that_is_no_folder_and_no_archive_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InputError, match=r"a\.json.*neither.*zip.*tar.*Pass"):
        prepare("slake", "test", tmp_path / "a.json")
    with pytest.raises(InputError, match=r"no such folder.*[Pp]ass.*slake"):
        prepare("slake", "test", tmp_path / "nowhere")


def test_names_we_do_not_know_are_refused():
    with pytest.raises(InputError, match=r"omnimed.*no such data set.*vqarad, slake, pathvqa"):
        prepare("omnimed", "test")
    with pytest.raises(InputError, match=r"pathvqa.*no split dev\b.*train, validation, test"):
        prepare("pathvqa", "dev")
    with pytest.raises(InputError, match=r"VQA-RAD.*no validation.*prepare --sample"):
        prepare("vqarad", "validation")


# The hub.


def test_a_hub_id_is_fetched_and_its_commit_recorded(tmp_path, monkeypatch, small_slake):
    folder = slake_folder(tmp_path, zipped=True).rename(tmp_path / "0a1b2c")
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    manifest = prepare("slake", "validation")
    assert (manifest.source, manifest.resolved) == ("BoKelvin/SLAKE", "BoKelvin/SLAKE@0a1b2c")
    assert (asked["repo"], asked["repo_type"]) == ("BoKelvin/SLAKE", "dataset")
    asked.clear()
    assert prepare("slake", "validation") == manifest
    assert not asked  # prepared from there already


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """As under HF_HUB_OFFLINE=1 with nothing in the cache; huggingface_hub reads the variables at import."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))


def test_an_unreachable_hub_is_one_line_with_what_to_run(offline):
    with pytest.raises(InputError) as refused:
        prepare("slake", "test", "BoKelvin/SLAKE")
    assert "BoKelvin/SLAKE cannot be fetched from the hub" in str(refused.value)
    assert "`stllava-eval prepare slake --from DIR`, or `stllava-eval prepare slake --sample`" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_first_use_takes_what_is_prepared_and_else_tries_the_hub(offline, caplog):
    write_sample(sample(3))
    prepare_on_first_use("vqarad", "test")
    assert not caplog.records
    with pytest.raises(InputError, match="cannot be fetched"):
        prepare_on_first_use("slake", "test")
    assert [record.getMessage() for record in caplog.records] == [
        "slake test is not prepared yet: fetching BoKelvin/SLAKE from the hub"
    ]


# Decoding. Expected pixels can be worked out by hand.


def pixels(image: bytes) -> list:
    return np.asarray(decode(image)).tolist()


def test_cmyk_jpegs_are_converted_as_pillow_does_adobes_inverted_ones_included():
    cyan = encoded(PIL.Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in cyan  # Pillow writes the inverted form
    red, green, blue = decode(cyan).getpixel((4, 4))
    assert red <= 2
    assert min(green, blue) >= 253


def test_sixteen_bit_grey_is_stretched_from_its_minimum_to_its_maximum():
    # a 12-bit scan: read as 16 bit all of it would be black
    grey = encoded(PIL.Image.fromarray(np.array([[1000, 2000, 3000]], np.uint16)))
    assert pixels(grey) == [[[0, 0, 0], [128, 128, 128], [255, 255, 255]]]
    assert pixels(encoded(PIL.Image.fromarray(np.full((1, 1), 700, np.uint16)))) == [[[0, 0, 0]]]


def test_float_grey_is_stretched_and_what_is_no_number_is_dark():
    grey = encoded(PIL.Image.fromarray(np.array([[-1.0, 1.0, np.nan]], np.float32)), "TIFF")
    assert pixels(grey) == [[[0, 0, 0], [255, 255, 255], [0, 0, 0]]]


def test_a_palette_gives_its_colours_and_its_transparent_entry_is_black():
    drawn = PIL.Image.new("P", (2, 1))
    drawn.putpalette([10, 20, 30, 40, 50, 60])
    drawn.putpixel((1, 0), 1)
    assert pixels(encoded(drawn)) == [[[10, 20, 30], [40, 50, 60]]]
    assert pixels(encoded(drawn, transparency=1)) == [[[10, 20, 30], [0, 0, 0]]]


def test_transparency_lies_on_black():
    clear_red, half_white, solid = (255, 0, 0, 0), (255, 255, 255, 128), (1, 2, 3, 255)
    drawn = PIL.Image.new("RGBA", (3, 1))
    for x, colour in enumerate((clear_red, half_white, solid)):
        drawn.putpixel((x, 0), colour)
    assert pixels(encoded(drawn)) == [[[0, 0, 0], [128, 128, 128], [1, 2, 3]]]


def test_exif_orientation_is_applied():
    drawn = PIL.Image.new("RGB", (2, 1), "black")
    drawn.putpixel((0, 0), (255, 0, 0))
    exif = PIL.Image.Exif()
    exif[274] = 6  # stored lying on its left side: turn a quarter clockwise
    assert pixels(encoded(drawn, exif=exif)) == [[[255, 0, 0]], [[0, 0, 0]]]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_an_image_cut_short_anywhere_is_refused(format, monkeypatch):
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # other tests' imports may have set it
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    whole = encoded(noise, format)
    assert decode(whole).size == (24, 24)
    for cut in range(0, len(whole) * 9 // 10, 7):
        with pytest.raises(InputError, match=r"cannot be decoded|no JPEG"):
            decode(whole[:cut])


def test_something_else_than_an_image_is_refused_without_an_address_of_memory():
    with pytest.raises(
        InputError, match=r"^7 bytes are no JPEG, PNG, BMP, GIF, TIFF or WebP image\. Download it again\.$"
    ):
        decode(b"nothing")


def test_equal_pictures_in_two_encodings_have_one_hash_and_other_shapes_another():
    drawn = PIL.Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    turned = PIL.Image.frombytes("RGB", (2, 3), drawn.tobytes())
    hashes = [splits.pixel_hash_of(image) for image in (encoded(drawn), encoded(drawn, "BMP"), encoded(turned))]
    assert hashes[0] == hashes[1] != hashes[2]


# What is on disk.


def test_rows_come_back_as_they_were_and_share_their_images():
    rows = sample(5)
    write_sample(rows)
    assert read_rows("vqarad", "test") == rows
    again = read_rows("vqarad", "test")
    assert again[0].image is again[2].image


def test_the_split_holds_encoded_images_and_nothing_is_decoded():
    write_sample(sample(3))
    split = read_split("vqarad", "test")
    assert split.column_names == ["id", "image", "image_id", "image_sha256", "question", "reference", "kind", "organ"]
    assert split[1]["image"] == {"bytes": picture(1), "path": "1.png"}
    assert split[1]["image_sha256"] == splits.pixel_hash_of(picture(1))
    assert "image" not in read_split("vqarad", "test", images=False).column_names


def test_plain_datasets_shows_the_images(home, tmp_path):
    import datasets as hugging_face

    write_sample(sample(3))
    loaded = hugging_face.load_dataset(
        "parquet", data_files=str(home / "data/vqarad/test.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded[1]["image"].getpixel((0, 0)) == (1, 0, 0)


def test_an_image_is_stored_once_however_many_questions_it_has(shared, home):
    prepare("slake", "test", shared / "data/slake")
    images = {row.image for row in read_rows("slake", "test")}
    assert len(images) == 96
    size, once = (home / "data/slake/test.parquet").stat().st_size, sum(map(len, images))
    assert once < size < 1.01 * once  # stored with every row they would take eleven times as much


def test_a_large_split_is_read_in_pieces(monkeypatch, home):
    rows = sample(7)
    whole = write_sample(rows).sha256_rows
    monkeypatch.setattr(splits, "ROW_GROUP_BYTES", len(picture(0)) + len(picture(1)))
    assert write_sample(rows).sha256_rows == whole
    assert pq.ParquetFile(home / "data/vqarad/test.parquet").num_row_groups == 4  # of 2, 2, 2 and 1 rows
    assert read_rows("vqarad", "test") == rows
    assert [row["image"]["bytes"] for row in read_split("vqarad", "test")] == [row.image for row in rows]


def test_equal_rows_give_equal_bytes(tmp_path, monkeypatch):
    files = []
    for folder in ("one", "two"):
        monkeypatch.setenv("STLLAVA_HOME", str(tmp_path / folder))
        write_sample(sample(5))
        files.append(
            [(tmp_path / folder / "data/vqarad" / name).read_bytes() for name in ("test.parquet", "test.json")]
        )
    assert files[0] == files[1]


def test_the_manifest_counts_and_names_its_format(home):
    manifest = write_sample(sample(5))
    assert manifest.counts == {"rows": 5, "open": 3, "closed": 2, "images": 2}
    assert read_manifest("vqarad", "test") == manifest
    assert json.loads((home / "data/vqarad/test.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [], r"vqarad test.*no rows.*[Pp]ass"),
        (lambda rows: [*rows, rows[0]], r"several.*id.*\b0\b.*unique"),
        (lambda rows: [replace(rows[0], kind="OPEN")], r"kind.*open or closed.*\b0: 'OPEN'"),
        (lambda rows: [replace(rows[0], image=b"no image")], r"1 missing.* 0 \(1 rows\).*8 bytes.*Download"),
        (lambda rows: [rows[0], replace(rows[1], image_id="0.png")], r"image_id.*several.*0\.png.*one name"),
    ],
    ids=["none", "an id twice", "a kind", "an image", "an image's name"],
)
def test_broken_rows_are_not_written(change, message, home):
    with pytest.raises(InputError, match=message):
        write_sample(change(sample(2)))
    assert not list(home.rglob("*.parquet"))


def test_a_sample_never_replaces_a_real_split_and_a_real_one_replaces_a_sample(tmp_path, small_slake):
    write_sample(sample(3), name="slake", split="validation")
    assert read_manifest("slake", "validation").sample
    official = prepare("slake", "validation", slake_folder(tmp_path))
    with pytest.raises(InputError, match=r"slake/validation\.parquet.*sample.*replace.*STLLAVA_HOME"):
        write_sample(sample(3), name="slake", split="validation")
    assert read_manifest("slake", "validation") == official
    assert len(read_rows("slake", "validation")) == 3


def test_what_is_prepared_from_a_source_is_not_prepared_again(tmp_path, monkeypatch, small_slake, caplog):
    folder = slake_folder(tmp_path)
    manifest = prepare("slake", "validation", folder)
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(prepare_module, "open_files", None)
        patch.chdir(tmp_path)
        assert prepare("slake", "validation", "slake") == manifest  # the same folder
    assert "is prepared from slake already" in caplog.text
    (tmp_path / "home/data/slake/validation.parquet").write_bytes(b"damaged")
    assert prepare("slake", "validation", folder) == manifest


def test_a_changed_file_is_refused(home):
    write_sample(sample(3))
    path = home / "data/vqarad/test.parquet"
    content = bytearray(path.read_bytes())
    content[content.index(b"IHDR")] ^= 1
    path.write_bytes(content)
    for read in (read_split, read_rows):
        with pytest.raises(InputError, match=r"vqarad/test\.parquet.*not the file.*sha256.*prepare vqarad"):
            read("vqarad", "test")


def test_nothing_prepared_names_the_command():
    with pytest.raises(InputError, match=r"vqarad test.*prepare vqarad --from DIR`.*prepare vqarad --sample`"):
        read_split("vqarad", "test")
    with pytest.raises(InputError, match=r"vqarad train.*prepare vqarad --split train --from DIR`"):
        read_split("vqarad", "train")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "notes": [], "new": 1}'])
def test_a_manifest_that_is_not_ours_is_refused(home, text):
    write_sample(sample(3))
    (home / "data/vqarad/test.json").write_text(text)
    with pytest.raises(InputError, match=r"vqarad/test\.json.*Remove.*prepare vqarad"):
        read_manifest("vqarad", "test")


# Kills, full disks, several processes.

TINY = """
import os, resource, signal, sys
from dataclasses import replace
from stllava_eval.data import prepare, splits
from stllava_eval.data.catalog import DATASETS, Edition
DATASETS["slake"].splits["validation"] = (Edition("tiny validation", 3, 2, 2, official=True),)
"""


def python(code: str, folder: Path, wait: bool = True):
    process = subprocess.Popen(
        [sys.executable, "-c", f"{TINY}\n{code}\nprepare.prepare('slake', 'validation', {str(folder)!r})"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, process.communicate()[1] if wait else ""


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(
            "splits.pixel_hash_of = lambda _: os.kill(os.getpid(), signal.SIGKILL)",
            id="at the images",
        ),
        pytest.param("os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)", id="before the parquet appears"),
        pytest.param("splits.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)", id="before the manifest"),
    ],
)
def test_a_kill_leaves_nothing_half_and_the_next_run_succeeds(tmp_path, small_slake, home, moment):
    folder = slake_folder(tmp_path)
    process, _ = python(moment, folder)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="not prepared"):
        read_split("slake", "validation")
    prepare("slake", "validation", folder)
    assert len(read_split("slake", "validation")) == 3
    assert {path.name for path in (home / "data/slake").iterdir()} == {
        "validation.parquet",
        "validation.json",
        ".validation.lock",
    }


def test_a_kill_while_a_new_split_is_written_leaves_the_old_one(tmp_path, small_slake):
    folder = slake_folder(tmp_path)
    rows = sample(3)
    write_sample(rows, name="slake", split="validation")
    python("os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)", folder)
    with contextlib.suppress(InputError):  # its manifest goes first, so that it cannot describe the new file
        assert read_rows("slake", "validation") == rows
    prepare("slake", "validation", folder)
    assert read_manifest("slake", "validation").official


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, home):
    process, errors = python(
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))",
        slake_folder(tmp_path),
    )
    assert process.returncode == 1
    last = errors.splitlines()[-1]
    assert last.startswith("stllava_eval.errors.InputError: ")
    assert "validation.parquet: cannot be written" in last
    assert [path.name for path in (home / "data/slake").iterdir()] == [".validation.lock"]


def test_processes_that_start_together_prepare_once(tmp_path, home, small_slake):
    folder = slake_folder(tmp_path)
    count = """
def found(*arguments, find=prepare.find_images):
    print("prepares", file=sys.stderr)
    return find(*arguments)
prepare.find_images = found
"""
    started = [python(count, folder, wait=False)[0] for _ in range(3)]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], errors
    assert "".join(errors).count("prepares") == 1
    assert len(read_rows("slake", "validation")) == 3


def test_importing_the_module_loads_nothing_heavy():
    heavy = {"torch", "datasets", "pyarrow", "PIL", "numpy"}
    code = f"import sys, stllava_eval.data.prepare; print({heavy} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"
