"""Training answers -> answers that look at no image, from a prepared split or the counts that the package ships."""

import json

import pytest

from stllava_eval.data.prepare import prepare
from stllava_eval.data.splits import read_split
from stllava_eval.errors import InputError
from stllava_eval.scoring.image_blind import PRIOR, image_blind_answers, prepared_answers, shipped_answers


def of_train(home, name: str):
    return home / "data" / name / "train.json"


@pytest.mark.parametrize("name", ["vqarad", "slake"])
def test_the_shipped_counts_give_what_the_prepared_training_split_gives(home, shared, name):
    for split in ("test", "train"):
        prepare(name, split, shared / "data" / name)
    prepared = image_blind_answers(name)
    counted = prepared_answers(name)
    assert counted == shipped_answers(name)
    rows = read_split(name, "train", images=False).to_list()
    assert sum(sum(counts.values()) for counts in counted.questions.values()) == len(rows)
    of_train(home, name).unlink()
    assert prepared_answers(name) is None
    shipped = image_blind_answers(name)
    assert shipped.answers == prepared.answers  # every baseline, answer by answer
    assert PRIOR in shipped.answers
    assert ("which is prepared" in prepared.note, "that the package ships" in shipped.note) == (True, True)


def test_the_shipped_file_is_what_its_command_writes(home, shared):
    from training_answers import FILE, text

    for name in ("vqarad", "slake"):
        prepare(name, "train", shared / "data" / name)
    assert FILE.read_text(encoding="utf-8") == text()
    for of in json.loads(text())["sets"].values():
        assert all(of[key] for key in ("source", "licence", "edition", "sha256_rows"))


def test_the_commonest_answer_is_that_to_the_same_words_else_of_the_kind(prepared):
    answers = image_blind_answers("vqarad").answers
    assert answers[PRIOR]["test-0-0"] == "yes"
    assert answers[PRIOR]["test-0-1"] == "the left lung"
    assert answers["5 commonest words"]["test-0-0"] == "left lung"


@pytest.mark.parametrize(
    ("changed", "command"),
    [
        pytest.param({}, "stllava-eval prepare vqarad --sample", id="sample"),
        pytest.param({"sample": False}, "prepare vqarad --split train --from DIR", id="another edition"),
    ],
)
def test_shipped_counts_are_not_taken_for_a_sample_or_another_edition(prepared, changed, command):
    of_train(prepared, "vqarad").unlink()
    manifest = prepared / "data" / "vqarad" / "test.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changed))
    blind = image_blind_answers("vqarad")
    assert set(blind.answers) == {label for label in blind.answers if label.startswith("always")}
    assert "are missing" in blind.note
    assert command in blind.note


def test_pathvqa_has_no_shipped_counts_and_says_what_to_do(prepared):
    of_train(prepared, "pathvqa").unlink()
    manifest = prepared / "data" / "pathvqa" / "test.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"official": True, "sample": False}))
    assert "stllava-eval prepare pathvqa --split train --from DIR" in image_blind_answers("pathvqa").note


def test_a_training_split_of_the_sample_says_nothing_about_an_official_test(prepared):
    manifest = prepared / "data" / "vqarad" / "test.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"official": True, "sample": False}))
    assert "public train" in image_blind_answers("vqarad").note  # that which is shipped


def test_a_damaged_training_split_is_refused_and_not_passed_over(prepared):
    of_train(prepared, "vqarad").write_text("{")
    with pytest.raises(InputError, match=r"train\.json: cannot be read"):
        image_blind_answers("vqarad")
