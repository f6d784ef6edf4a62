"""Files of answers that others wrote: read as they are, or refused in one line; never a silent wrong number."""

import csv
import json

import pytest

from stllava_eval.cli.main import main
from stllava_eval.errors import InputError
from stllava_eval.reports.board_rows import board
from stllava_eval.runs.answer_fields import Reading
from stllava_eval.runs.answer_files import read_answers, write_answers
from stllava_eval.runs.folder import ended_by_itself, open_run
from stllava_eval.runs.scores import score_table, split_rows

ANSWERS = {"test-0-0": "yes", "test-0-1": "the left lung", "test-1-0": "no"}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("names", [("answer", "model_answer"), ("answer", "response"), ("text", "prediction")])
def test_a_line_with_two_fields_that_may_be_the_answer_is_refused_with_both_names(prepared, tmp_path, names):
    row = {"id": "test-0-0", **dict.fromkeys(names, "yes")}
    with pytest.raises(InputError, match=rf"a\.jsonl:1\b.*{names[0]} and {names[1]}\b.*answer.*--answer-field"):
        read_answers(write(tmp_path / "a.jsonl", [row]), "vqarad")


def test_the_field_that_is_named_holds_the_answer(prepared, tmp_path):
    rows = [{"id": "test-0-0", "answer": "yes", "said": "no"}, {"id": "test-1-0", "answer": "yes", "said": "no"}]
    file = write(tmp_path / "a.jsonl", rows)
    assert read_answers(file, "vqarad", Reading(answer_field="said")).answers == {"test-0-0": "no", "test-1-0": "no"}
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
        ({"Question": "What organ is shown?"}, "question"),
        ({"conversations": [{"from": "human", "value": "<image>\nWhat organ is shown?"}]}, "prompt"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "What organ is shown?"}]}]}, "prompt"),
        ({"doc": {"question": "What organ is shown?"}}, "question"),
        ({"reference": "no"}, "reference"),
        ({"target": ["no"]}, "target"),
        ({"correct_answer": "no"}, "correct_answer"),
        ({"Q": "What organ is shown?"}, "Q"),
        ({"file": "C:\\images\\test-1.png"}, "file"),
        ({"images": ["test-1.png"]}, "images"),
        ({"gt_ans": "no"}, "gt_ans"),
        ({"image_name": "test-1.png"}, "image_name"),
        ({"image": "images/test-3.png"}, "image"),
    ],
)
def test_a_line_about_another_question_than_its_id_is_refused(prepared, tmp_path, carried, field):
    rows = [{"id": "test-1-0", "answer": "yes"}, {"id": "test-0-0", "answer": "yes", **carried}]
    with pytest.raises(InputError, match=rf"a\.jsonl:2: {field}\b.*test-0-0\b.*prepared.*leave"):
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

    from stllava_eval.data.catalog import DATASETS, Row
    from stllava_eval.data.splits import write_split

    fields = dict.fromkeys(DATASETS["slake"].categories, "")
    rows = [Row("1", png((1, 2, 3)), "xmlab102/source.jpg", "Is it?", "yes", "closed", fields)]
    write_split("slake", "test", rows, edition="t", official=False, sample=True, source="", licence="")
    for image in ("xmlab102/source.jpg", "imgs/xmlab102/source.jpg", "source.jpg"):
        assert read_answers(write(tmp_path / "a.jsonl", [{"id": "1", "answer": "no", "image": image}]), "slake")
    with pytest.raises(InputError, match=r"image.*id 1\b.*'xmlab103/source\.jpg'.*'xmlab102/source\.jpg'.*leave"):
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

    from stllava_eval.data.catalog import Row
    from stllava_eval.data.splits import write_split

    rows = [Row("12", png((1, 2, 3)), "a.png", "Is it?", "yes", "closed", {})]
    write_split("vqarad", "test", rows, edition="t", official=False, sample=True, source="", licence="")
    assert read_answers(write(tmp_path / "a.jsonl", [{"qid": id, "answer": "no"}]), "vqarad").answers == {"12": "no"}


def test_unknown_ids_are_refused_with_a_hint_or_left_out_if_asked(prepared, tmp_path, capsys):
    rows = [{"id": "train-0-0", "answer": "no"}, {"id": "test-0-0", "answer": "no"}]
    file = str(write(tmp_path / "a.jsonl", rows))
    assert main(["score", "--task", "vqarad", "--answers", file]) == 2
    assert "1 unknown ids (train-0-0)" in capsys.readouterr().err
    assert main(["score", "--task", "vqarad", "--answers", file, "--ignore-unknown"]) == 0
    assert "1 rows whose questions the split does not have are left out" in capsys.readouterr().err
    numbered = write(tmp_path / "b.jsonl", [{"id": number, "answer": "no"} for number in range(3)])
    with pytest.raises(InputError, match=r"3 unknown.*row numbers.*test-0-0\b.*--ignore-unknown"):
        score_table("vqarad", read_answers(numbered, "vqarad").replies)


def test_no_field_that_is_known_names_those_that_are_and_those_that_were_seen(prepared, tmp_path):
    with pytest.raises(InputError, match=r"a\.jsonl:1\b.*no answer.*fields answer,.*id, verdict\b.*--answer-field"):
        read_answers(write(tmp_path / "a.jsonl", [{"id": "test-0-0", "verdict": "no"}]), "vqarad")
    with pytest.raises(
        InputError, match=r"a\.jsonl:1\b.*no id\b.*id, question_id, qid\b.*number, answer\b.*--id-field"
    ):
        read_answers(write(tmp_path / "a.jsonl", [{"number": "test-0-0", "answer": "no"}]), "vqarad")


def test_ids_of_data_rads_files_are_the_public_ones_all_or_nothing(shared, home, tmp_path):
    from stllava_eval.data.prepare import prepare

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
    assert ended_by_itself(row) is expected


def official(shared, name):
    """The English test rows of the authors' file, as MedEvalKit's results hold them, without answers."""
    if name == "slake":
        every = json.loads((shared / "data" / "slake" / "test.json").read_text(encoding="utf-8"))
        return [{"lang": row["q_lang"], "question": row["question"], "answer": row["answer"]} for row in every]
    lines = (shared / "data" / "vqarad" / "hf_mirror" / "test_answer_type.jsonl").read_text(encoding="utf-8")
    return [{"question": row["question"], "answer": row["answer"]} for row in map(json.loads, lines.splitlines())]


@pytest.mark.parametrize("name", ["vqarad", "slake"])
def test_medevalkits_results_have_no_ids_and_score_the_same(shared, home, tmp_path, name, caplog):
    from stllava_eval.data.prepare import prepare

    prepare(name, "test", str(shared / "data" / name))
    rows = [
        {**row, "response": f"{row['answer']} {place % 3}", "correct": True}
        for place, row in enumerate(official(shared, name))
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    read = read_answers(tmp_path / "results.json", name)
    assert len(read.replies) == {"vqarad": 451, "slake": 1061}[name]
    assert {
        "vqarad": "26 of 451 rows share both with a row about another image",
        "slake": "1033 rows in languages other than English are left out",
    }[name] in caplog.text
    kept = [row for row in rows if row.get("lang", "en") == "en"]
    means = {row.metric: row.value for row in score_table(name, read.replies).rows if row.category == "all"}
    from stllava_eval.scoring.metrics import score

    split = {row["id"]: row for row in split_rows(name)}
    own = [
        score(answer, split[id]["reference"], split[id]["kind"], split[id]["question"])
        for id, answer in read.answers.items()
    ]
    recalls = [of["recall"] for of in own if "recall" in of]
    assert means["recall"] == pytest.approx(sum(recalls) / len(recalls), rel=1e-12)
    said = sorted((row["question"].lower(), row["response"].lower()) for row in kept)
    assert len(said) == len(read.replies)


def test_rows_without_ids_in_another_order_than_the_splits_are_refused_where_many_look_alike(shared, home, tmp_path):
    from stllava_eval.data.prepare import prepare

    prepare("slake", "test", str(shared / "data" / "slake"))
    rows = [{**row, "response": "x"} for row in official(shared, "slake") if row["lang"] == "en"]
    (tmp_path / "results.json").write_text(json.dumps(rows[::-1]))
    with pytest.raises(InputError, match=r"no ids.*\b751 of 1061\b.*same question.*--id-field"):
        read_answers(tmp_path / "results.json", "slake")


def test_rows_without_ids_are_refused_where_the_split_has_no_such_question(prepared, tmp_path):
    rows = [{"question": "What organ is shown?", "answer": "the lung", "response": "x"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"item 0\b.*no id\b.*'what organ is shown\?'.*reference.*--ignore-unknown"):
        read_answers(tmp_path / "a.json", "vqarad")


def test_llama_factorys_predictions_are_read_in_the_splits_order(prepared, tmp_path):
    rows = [
        {"prompt": f"user\n{row['question']}\nassistant\n", "predict": f"said {place}", "label": row["reference"]}
        for place, row in enumerate(split_rows("vqarad"))
    ]
    read = read_answers(write(tmp_path / "generated_predictions.jsonl", rows), "vqarad")
    assert list(read.answers.items()) == [(row["id"], f"said {i}") for i, row in enumerate(split_rows("vqarad"))]
    with pytest.raises(InputError, match="no id"):
        read_answers(write(tmp_path / "b.jsonl", rows[::-1]), "vqarad")


def test_lmms_evals_samples_of_another_task_are_held_to_our_questions(prepared, tmp_path):
    """Without our score records the number of the row counts, and another task's rows are other questions."""
    rows = [{"doc_id": 0, "target": "no", "input": "Is there a mass?", "filtered_resps": ["yes"], "resps": ["yes"]}]
    with pytest.raises(InputError, match=r":1\b.*\btarget\b.*test-0-0\b.*'no'.*'yes'.*leave"):
        read_answers(write(tmp_path / "a.jsonl", rows), "vqarad")
    rows[0] |= {"target": "yes", "input": "Is there a fracture?"}
    with pytest.raises(InputError, match=r":1\b.*\binput\b.*test-0-0\b.*'Is there a fracture\?'.*leave"):
        read_answers(write(tmp_path / "a.jsonl", rows), "vqarad")


def test_a_sample_that_says_nothing_of_its_question_is_refused(prepared, tmp_path):
    """Its number is a row's of the data set that was asked, which may be another copy in another order."""
    with pytest.raises(InputError, match=r"doc_id 0\b.*row number.*input.*target.*lmms-eval"):
        read_answers(write(tmp_path / "a.jsonl", [{"doc_id": 0, "filtered_resps": ["yes"]}]), "vqarad")
    row = {"doc_id": 0, "doc": {"question": "Is there a fracture?", "answer": "yes"}, "filtered_resps": ["yes"]}
    with pytest.raises(InputError, match=r":1\b.*\bquestion\b.*test-0-0\b.*'Is there a fracture\?'.*leave"):
        read_answers(write(tmp_path / "b.jsonl", [row]), "vqarad")


def test_ms_swifts_predictions_are_read_with_ids_and_without(prepared, tmp_path):
    def row(question, said, **more):
        turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": said}]
        return {"response": said, "messages": turns, "images": [{"bytes": None, "path": "a.png"}], **more}

    rows = [row(of["question"], f"said {i}", labels=of["reference"]) for i, of in enumerate(split_rows("vqarad"))]
    read = read_answers(write(tmp_path / "a.jsonl", rows), "vqarad")
    assert list(read.answers.values()) == [f"said {place}" for place in range(8)]
    assert read.prompt == "bare"
    with pytest.raises(InputError, match=r":1\b.*\bprompt\b.*test-1-0\b.*'<image>What organ is shown\?'.*leave"):
        read_answers(write(tmp_path / "b.jsonl", [row("What organ is shown?", "lung", id="test-1-0")]), "vqarad")


def test_questions_without_references_are_told_apart_by_order_alone(home, tmp_path):
    """Two images share a question with different references, so whose answer is whose changes the mean."""
    from conftest import png

    from stllava_eval.data.catalog import Row
    from stllava_eval.data.splits import write_split

    references = {"a": "CT", "b": "MRI", "c": "lung"}
    asked = {"a": "What is this?", "b": "What is this?", "c": "Which organ?"}
    rows = [Row(id, png((1, 2, 3)), f"{id}.png", asked[id], said, "open", {}) for id, said in references.items()]
    write_split("vqarad", "test", rows, edition="x", official=False, sample=True, source="x", licence="CC0-1.0")
    given = [{"question": asked[id], "prediction": said} for id, said in references.items()]
    assert read_answers(write(tmp_path / "a.jsonl", given), "vqarad").answers == references
    with pytest.raises(InputError, match=r"no id.*no reference.*'what is this\?'.*several images.*Add"):
        read_answers(write(tmp_path / "b.jsonl", given[::-1]), "vqarad")


@pytest.mark.parametrize("said", ["", "nan", "None", "#N/A"])
def test_answers_that_programs_write_for_none_are_warned_about(prepared, tmp_path, caplog, said):
    rows = [{"id": "test-0-0", "answer": said}, {"id": "test-1-0", "answer": "yes"}]
    read_answers(write(tmp_path / "a.jsonl", rows), "vqarad")
    assert f"1 answers are '{said}', which programs also write where there is none" in caplog.text


@pytest.mark.parametrize("said", [None, float("nan"), 2, True, ["yes"], {"text": "yes"}])
def test_an_answer_that_is_no_text_is_refused_with_its_value(prepared, tmp_path, said):
    with pytest.raises(InputError, match=r"a\.jsonl:1\b.*answer is .*text.*leave the row out"):
        read_answers(write(tmp_path / "a.jsonl", [{"id": "test-0-0", "answer": said}]), "vqarad")


@pytest.mark.parametrize(
    ("form", "what"),
    [
        ("USER: {question} ASSISTANT: {said}", "repeat their whole question"),
        ("{said}</s>", "end with a special token"),
        ("{said}<|im_end|>\n", "end with a special token"),
        ("{said}", None),
    ],
)
def test_a_prompt_or_a_token_that_was_decoded_with_the_answers_is_warned_about(prepared, tmp_path, caplog, form, what):
    rows = [
        {"id": row["id"], "answer": form.format(question=row["question"], said="left")} for row in split_rows("vqarad")
    ]
    read_answers(write(tmp_path / "a.jsonl", rows), "vqarad")
    assert f"8 of 8 answers {what}" in caplog.text if what else not caplog.text


def test_a_reference_that_says_none_is_no_missing_answer(home, tmp_path, caplog):
    from conftest import png

    from stllava_eval.data.catalog import Row
    from stllava_eval.data.splits import write_split

    row = Row("a", png((1, 2, 3)), "a.png", "Which organ is abnormal?", "None", "open", {})
    write_split("slake", "test", [row], edition="x", official=False, sample=True, source="x", licence="CC0-1.0")
    read_answers(write(tmp_path / "a.jsonl", [{"id": "a", "answer": "none"}]), "slake")
    assert "programs" not in caplog.text


def test_row_numbers_are_warned_about_where_unknown_ids_are_left_out(prepared, tmp_path, caplog):
    rows = [{"id": "test-0-0", "answer": "yes"}, {"id": "7", "answer": "yes"}]
    read_answers(write(tmp_path / "a.jsonl", rows), "vqarad", Reading(ignore_unknown=True))
    assert "1 of its 2 ids are not vqarad's, and no row has a question" in caplog.text


def test_an_excel_sheet_of_vlmevalkit_is_read(prepared, tmp_path):
    import openpyxl

    rows = [
        {"index": place, "question": row["question"], "answer": row["reference"], "prediction": said}
        for place, (row, said) in enumerate(zip(split_rows("vqarad"), ["=yes", "2", None, "no"], strict=False))
    ]
    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append([int(cell) if cell == "2" else cell for cell in row.values()])
    book.save(tmp_path / "model_PathVQA_TEST.xlsx")
    read = read_answers(tmp_path / "model_PathVQA_TEST.xlsx", "vqarad")
    assert list(read.answers.values()) == ["=yes", "2", "", "no"]


@pytest.mark.parametrize("content", [b"no zip", None])
def test_what_is_no_excel_file_is_refused_in_one_line(prepared, tmp_path, content):
    import io
    import zipfile

    if content is None:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("xl/worksheets/sheet1.xml", b"<a>" * 10)
        content = packed.getvalue()
    (tmp_path / "a.xlsx").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.xlsx\b.*not an Excel file.*[Ee]xport"):
        read_answers(tmp_path / "a.xlsx", "vqarad")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("id,answer,answer\n1,yes,no\n", r"a\.csv.*two columns.*'answer'.*Keep"),
        ("id,answer\n1,yes, it is\n", r"a\.csv:2\b.*\b3 cells.*\b2 columns.*quotes"),
        ("id,answer\n1\n", r"a\.csv:2\b.*\b1 cells.*\b2 columns.*quotes"),
    ],
)
def test_a_table_whose_cells_do_not_fit_its_columns_is_refused(prepared, tmp_path, text, why):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=why):
        read_answers(tmp_path / "a.csv", "vqarad")


def scored(capsys, *options):
    capsys.readouterr()
    assert main(["score", *map(str, options), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["scores"][0]["signature"]


def test_what_nobody_says_about_prompt_and_images_is_not_recorded(prepared, tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [{"id": name, "answer": answer} for name, answer in ANSWERS.items()])
    given = ["--task", "vqarad", "--answers", file]
    assert "|prompt not recorded|extract final-v1|images not recorded" in scored(capsys, *given)
    said = scored(capsys, *given, "--prompt", "short", "--images", "black", "--out", tmp_path / "black")
    assert "|prompt short|extract final-v1|images black" in said
    assert main(["score", "--task", "vqarad", "--answers", str(file), "--out", str(tmp_path / "plain")]) == 0
    run = json.loads((tmp_path / "plain" / "run.json").read_text())
    assert (run["images"], run["tasks"]["vqarad"]["prompt"]) == ("not recorded", "not recorded")
    assert json.loads((tmp_path / "plain" / "answers.jsonl").read_text().split("\n")[0])["text"] is None
    again = scored(capsys, "--task", "vqarad", "--answers", tmp_path / "black" / "answers.jsonl")
    assert again == said
    with pytest.raises(InputError, match=r"answers\.jsonl\b.*--images own\b.*black images.*option"):
        read_answers(tmp_path / "black" / "answers.jsonl", "vqarad", Reading(images="own"))
    kinds = {row.system: row.kind for row in board([tmp_path / "black", tmp_path / "plain"])}
    assert kinds["black (black images)"] == "blind"
    assert kinds["plain (images not recorded)"] == "measured"


def test_the_name_of_a_task_says_its_prompt(prepared, tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [{"id": name, "answer": answer} for name, answer in ANSWERS.items()])
    assert "|prompt options|" in scored(capsys, "--task", "vqarad_options", "--answers", file)


def test_the_prompt_is_what_the_rows_say(prepared, tmp_path):
    rows = [
        {
            "question_id": row["id"],
            "prompt": f"<image>\n{row['question']}\nAnswer the question using a single word or phrase.",
            "text": "x",
        }
        for row in split_rows("vqarad")
    ]
    file = write(tmp_path / "a.jsonl", rows)
    assert read_answers(file, "vqarad").prompt == "short"
    with pytest.raises(InputError, match=r"a\.jsonl\b.*--prompt bare\b.*\bshort\b.*Name"):
        read_answers(file, "vqarad", Reading(prompt="bare"))
    other = [{**row, "prompt": f"You are a doctor. {row['prompt']}"} for row in rows]
    read = read_answers(write(tmp_path / "b.jsonl", other), "vqarad")
    assert read.prompt.startswith("custom ")
    write_answers(tmp_path / "run", None, {"vqarad": read}, {"vqarad": tmp_path / "b.jsonl"})
    assert open_run(tmp_path / "run").tasks["vqarad"].prompt == read.prompt


def test_another_split_than_the_test_is_scored_and_never_a_run_folder(prepared, tmp_path, capsys):
    from conftest import png

    from stllava_eval.data.catalog import Row
    from stllava_eval.data.splits import write_split

    rows = [Row("v-0", png((1, 2, 3)), "v.png", "Is it?", "yes", "closed", {})]
    write_split("vqarad", "validation", rows, edition="t", official=False, sample=True, source="", licence="")
    file = write(tmp_path / "a.jsonl", [{"id": "v-0", "answer": "yes"}])
    given = ["--task", "vqarad", "--answers", str(file), "--split", "validation"]
    assert "|vqarad validation t|" in scored(capsys, *given)
    assert main(["score", *given, "--out", str(tmp_path / "run")]) == 2
    assert "a run folder is of the test split" in capsys.readouterr().err


def test_llavameds_own_prompt_has_its_suffix_on_every_closed_question_in_the_references_case(shared, home):
    """By the prompts in microsoft/LLaVA-Med's published answers: five of them, and the counts of both brackets."""
    from collections import Counter

    from stllava_eval.data.prepare import prepare
    from stllava_eval.data.prompts import text

    prepare("vqarad", "test", str(shared / "data" / "vqarad"))
    rows = {row["id"]: row for row in split_rows("vqarad")}
    asked = {name: text(row, {"prompt": "options_llavamed"}) for name, row in rows.items()}
    suffix = "Please choose from the following two options:"
    assert asked["1747"] == (
        f"Are pleural opacities located on the left, right, or both sides of the lung? {suffix} [Yes, No]"
    )
    assert asked["243"] == f"Are there multiple or just 1 metastatic focus? {suffix} [yes, no]"
    assert asked["988"] == f"Is the heart enlarged? {suffix} [yes, no]"
    assert asked["1354"] == f"Is the heart enlarged? {suffix} [Yes, No]"
    assert asked["1672"] == "Is the spleen present?"
    yes_no = [name for name, row in rows.items() if row["reference"].lower() in ("yes", "no")]
    closed = [name for name in yes_no if rows[name]["kind"] == "closed"]
    assert Counter(asked[name][-9:] for name in closed) == {"[Yes, No]": 171, "[yes, no]": 80}
    assert sum(held.endswith("]") for held in asked.values()) == 272
