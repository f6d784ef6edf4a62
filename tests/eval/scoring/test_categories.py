"""Declared rules: what a question asks about, and which questions belong together."""

import pytest

from stllava_eval.scoring.categories import asks, opposites, paraphrases


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        pytest.param("Is there no fracture?", ("negation",), id="no"),
        pytest.param("Isn't the heart enlarged?", ("negation", "size"), id="n't"),
        pytest.param("Is it normal?", (), id="no is a word, not letters"),
        pytest.param("Which side of the lungs is affected?", ("laterality",), id="side"),
        pytest.param("How many ribs are seen?", ("counting",), id="how many"),
        pytest.param("Are >12 ribs present?", ("counting",), id="more than, as a sign"),
        pytest.param("Is the heart larger than normal?", ("size",), id="larger"),
        pytest.param("Is there small bowel in this image?", (), id="small bowel is an organ"),
        pytest.param("Is this an MRI?", ("modality",), id="is this an MRI"),
        pytest.param("Are there joints in the CT?", (), id="a CT is named, not asked for"),
        pytest.param("What is the mr weighting in this image?", ("modality",), id="weighting"),
        pytest.param("In what plane is this scan?", ("plane",), id="plane"),
        pytest.param("Is this a PA film?", ("plane",), id="view"),
    ],
)
def test_asks(question, expected):
    assert asks(question) == expected


def row(id, question, reference, image="a", kind="closed"):
    return {"id": id, "image_id": image, "question": question, "reference": reference, "kind": kind}


def test_opposites_differ_in_one_word_and_in_what_is_right():
    rows = [
        row("1", "Is the lung healthy?", "Yes"),
        row("2", "Is the lung abnormal?", "no"),
        row("3", "Is the liver healthy?", "yes"),  # the same is right
        row("4", "Is the lung quite abnormal?", "no"),  # a word more
        row("5", "Is the lung abnormal?", "no", image="b"),  # of another image
        row("6", "Is the lung broken?", "left"),  # no yes or no
    ]
    assert opposites(rows) == [("1", "2")]


def test_paraphrases_are_vqarads_linked_questions_with_one_answer(shared, tmp_path, home):
    from stllava_eval.data.prepare import prepare
    from stllava_eval.data.splits import read_split

    prepare("vqarad", "test", shared / "data" / "vqarad")
    rows = read_split("vqarad", "test", images=False).to_list()
    pairs = paraphrases("vqarad", rows)
    assert len(pairs) == 136
    by_id = {row["id"]: row for row in rows}
    assert all(by_id[a]["image_id"] == by_id[b]["image_id"] for a, b in pairs)
    assert all(by_id[a]["reference"].lower() == by_id[b]["reference"].lower() for a, b in pairs)


def test_the_linked_questions_are_those_of_the_public_file(shared):
    import csv
    import json
    from collections import defaultdict
    from importlib.resources import files

    public = json.loads((shared / "data" / "vqarad" / "VQA_RAD Dataset Public.json").read_text())
    linked = defaultdict(set)
    for record in public:
        if record["phrase_type"].startswith("test_"):
            linked[record["qid_linked_id"]].add(str(record["qid"]))
    ours = defaultdict(set)
    text = files("stllava_eval.tasks").joinpath("vqarad", "paraphrases.csv").read_text()
    for line in csv.DictReader(text.splitlines()):
        ours[line["group"]].add(line["qid"])
    wanted = sorted(map(sorted, (ids for ids in linked.values() if len(ids) > 1)))
    assert sorted(map(sorted, ours.values())) == wanted
    assert len(ours) == 148


def test_other_data_sets_have_no_paraphrases():
    assert paraphrases("slake", [row("1", "Is it?", "yes")]) == []


@pytest.mark.parametrize(
    ("name", "field", "theirs", "ours", "of_theirs", "of_ours", "of_both"),
    [
        pytest.param("vqarad", "question_type", "SIZE", "size", 46, 52, 43, id="vqarad size"),
        pytest.param("vqarad", "question_type", "COUNT", "counting", 6, 6, 6, id="vqarad count"),
        pytest.param("vqarad", "question_type", "MODALITY", "modality", 33, 30, 29, id="vqarad modality"),
        pytest.param("vqarad", "question_type", "PLANE", "plane", 26, 23, 23, id="vqarad plane"),
        pytest.param("slake", "content_type", "Size", "size", 65, 67, 65, id="slake size"),
        pytest.param("slake", "content_type", "Quantity", "counting", 52, 52, 52, id="slake count"),
        pytest.param("slake", "content_type", "Modality", "modality", 108, 108, 108, id="slake modality"),
        pytest.param("slake", "content_type", "Plane", "plane", 58, 58, 58, id="slake plane"),
    ],
)
def test_the_rules_agree_with_the_data_sets_own_types(
    shared, home, name, field, theirs, ours, of_theirs, of_ours, of_both
):
    """How many official test questions have the type, have the words, and have both; docs/results.md repeats it."""
    from stllava_eval.data.prepare import prepare
    from stllava_eval.data.splits import read_split

    prepare(name, "test", shared / "data" / name)
    rows = read_split(name, "test", images=False).to_list()
    typed = {row["id"] for row in rows if theirs in row[field].split(", ")}
    worded = {row["id"] for row in rows if ours in asks(row["question"])}
    assert (len(typed), len(worded), len(typed & worded)) == (of_theirs, of_ours, of_both)
