"""Files of answers that others wrote: read as they are, or refused in one line; never a silent wrong number."""

import csv
import json

import pytest

from stllava_eval.answer_files import read_answers
from stllava_eval.cli import main
from stllava_eval.errors import InputError
from stllava_eval.runs import ended, score_table

ANSWERS = {"test-0-0": "yes", "test-0-1": "the left lung", "test-1-0": "no"}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("names", [("answer", "model_answer"), ("answer", "response"), ("text", "prediction")])
def test_a_line_with_two_fields_that_may_be_the_answer_is_refused_with_both_names(prepared, tmp_path, names):
    row = {"id": "test-0-0", **dict.fromkeys(names, "yes")}
    with pytest.raises(InputError, match=rf"a.jsonl:1: {names[0]} and {names[1]} could each be the model's answer"):
        read_answers(write(tmp_path / "a.jsonl", [row]), "vqarad")


def test_the_field_that_is_named_holds_the_answer(prepared, tmp_path):
    rows = [{"id": "test-0-0", "answer": "yes", "said": "no"}, {"id": "test-1-0", "answer": "yes", "said": "no"}]
    file = write(tmp_path / "a.jsonl", rows)
    assert read_answers(file, "vqarad", answer_field="said").answers == {"test-0-0": "no", "test-1-0": "no"}
    assert main(["score", "--task", "vqarad", "--answers", str(file), "--answer-field", "said", "--json"]) == 0


def test_answers_that_all_equal_their_references_are_warned_about(prepared, tmp_path, caplog):
    rows = [{"id": "test-0-0", "answer": "Yes"}, {"id": "test-0-1", "answer": "the left lung"}]
    read_answers(write(tmp_path / "a.jsonl", rows), "vqarad")
    assert "every answer equals its reference" in caplog.text


@pytest.mark.parametrize(
    ("carried", "field"),
    [
        ({"question": "What organ is shown?"}, "question"),
        ({"prompt": "<image>\nWhat organ is shown? Answer briefly."}, "prompt"),
        ({"reference": "no"}, "reference"),
        ({"gt_ans": "no"}, "gt_ans"),
        ({"image_name": "test-1.png"}, "image_name"),
        ({"image": "images/test-3.png"}, "image"),
    ],
)
def test_a_line_about_another_question_than_its_id_is_refused(prepared, tmp_path, carried, field):
    rows = [{"id": "test-1-0", "answer": "yes"}, {"id": "test-0-0", "answer": "yes", **carried}]
    with pytest.raises(InputError, match=rf"a.jsonl:2: {field} of id test-0-0 is .* and the prepared split has"):
        read_answers(write(tmp_path / "a.jsonl", rows), "vqarad")


@pytest.mark.parametrize(
    "carried",
    [
        {"question": "is there  a MASS?"},
        {"prompt": "<image>\nIs there a mass?\nAnswer with one word."},
        {"reference": "Yes "},
        {"image_name": "test-0.png"},
        {"image": "some\\folder\\test-0.png"},
        {"image": 7},
    ],
)
def test_a_line_that_carries_its_own_question_is_read(prepared, tmp_path, carried):
    rows = [{"id": "test-0-0", "answer": "no", **carried}]
    assert read_answers(write(tmp_path / "a.jsonl", rows), "vqarad").answers == {"test-0-0": "no"}


def test_the_folders_of_an_image_name_count_where_both_have_them(home, tmp_path):
    from conftest import png

    from stllava_eval.datasets import DATASETS, Row, write_split

    fields = dict.fromkeys(DATASETS["slake"].categories, "")
    rows = [Row("1", png((1, 2, 3)), "xmlab102/source.jpg", "Is it?", "yes", "closed", fields)]
    write_split("slake", "test", rows, edition="t", official=False, sample=True, source="", licence="")
    for image in ("xmlab102/source.jpg", "imgs/xmlab102/source.jpg", "source.jpg"):
        assert read_answers(write(tmp_path / "a.jsonl", [{"id": "1", "answer": "no", "image": image}]), "slake")
    with pytest.raises(InputError, match=r"image of id 1 is 'xmlab103/source\.jpg'"):
        read_answers(
            write(tmp_path / "a.jsonl", [{"id": "1", "answer": "no", "image": "xmlab103/source.jpg"}]), "slake"
        )


def test_every_layout_holds_the_same_answers(prepared, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"id": name, "answer": answer} for name, answer in ANSWERS.items()]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            table = csv.DictWriter(file, ["id", "answer"], delimiter=mark)
            table.writeheader()
            table.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"):
        assert read_answers(tmp_path / name, "vqarad").answers == ANSWERS, name


@pytest.mark.parametrize("id", [12, 12.0, "12", "12.0"])
def test_an_id_is_the_same_as_number_float_or_text(home, tmp_path, id):
    from conftest import png

    from stllava_eval.datasets import Row, write_split

    rows = [Row("12", png((1, 2, 3)), "a.png", "Is it?", "yes", "closed", {})]
    write_split("vqarad", "test", rows, edition="t", official=False, sample=True, source="", licence="")
    assert read_answers(write(tmp_path / "a.jsonl", [{"qid": id, "answer": "no"}]), "vqarad").answers == {"12": "no"}


def test_unknown_ids_are_refused_with_a_hint_or_left_out_if_asked(prepared, tmp_path, capsys):
    rows = [{"id": "train-0-0", "answer": "no"}, {"id": "test-0-0", "answer": "no"}]
    file = str(write(tmp_path / "a.jsonl", rows))
    assert main(["score", "--task", "vqarad", "--answers", file]) == 2
    assert "1 unknown ids (train-0-0)" in capsys.readouterr().err
    assert main(["score", "--task", "vqarad", "--answers", file, "--ignore-unknown"]) == 0
    assert "1 rows with ids that the split does not have are left out" in capsys.readouterr().err
    numbered = write(tmp_path / "b.jsonl", [{"id": number, "answer": "no"} for number in range(3)])
    with pytest.raises(InputError, match="They look like row numbers, 0 to n-1"):
        score_table("vqarad", read_answers(numbered, "vqarad").replies)


def test_no_field_that_is_known_names_those_that_are_and_those_that_were_seen(prepared, tmp_path):
    with pytest.raises(InputError, match=r"no answer. .* known names are answer, .* and the line has id, verdict"):
        read_answers(write(tmp_path / "a.jsonl", [{"id": "test-0-0", "verdict": "no"}]), "vqarad")
    with pytest.raises(InputError, match=r"no id. .* known names are id, question_id, qid, .*number"):
        read_answers(write(tmp_path / "a.jsonl", [{"number": "test-0-0", "answer": "no"}]), "vqarad")


def test_ids_of_data_rads_files_are_the_public_ones_all_or_nothing(shared, home, tmp_path):
    from stllava_eval.datasets import prepare

    prepare("vqarad", "test", str(shared / "data" / "vqarad"))
    theirs = json.loads((shared / "data" / "vqarad" / "testset.json").read_text(encoding="utf-8"))
    rows = [{"qid": row["qid"], "question": row["question"], "response": str(row["answer"])} for row in theirs]
    read = read_answers(write(tmp_path / "a.jsonl", rows), "vqarad")
    assert len(read.replies) == 451
    scored = {row.metric: row.value for row in score_table("vqarad", read.replies).rows if row.category == "all"}
    assert (scored["recall"], scored["f1"], scored["closed_accuracy"]) == (1, 1, 1)
    mixed = [*rows, {"qid": 10, "response": "x"}]
    mixed = [row for row in mixed if row["qid"] != 11]
    with pytest.raises(InputError, match=r"of id \d+ is "):
        read_answers(write(tmp_path / "b.jsonl", mixed), "vqarad")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"finish_reason": "length"}, False),
        ({"finish_reason": "max_output_tokens"}, False),  # the words of every server that is asked directly
        ({"finish_reason": "stop"}, True),
        ({"ended": None, "finish_reason": "length"}, False),
        ({"ended": "False"}, False),  # as a CSV has it
        ({"ended": True}, True),
        ({"ended": "perhaps"}, None),
        ({}, None),
    ],
)
def test_whether_a_reply_was_cut_at_its_limit_is_read_from_every_spelling(row, expected):
    assert ended(row) is expected
