"""A run -> where it errs."""

import json

import pytest
from conftest import png
from small_runs import always, right, small_run

from stllava_eval.cli.main import main
from stllava_eval.reports.board_rows import board
from stllava_eval.reports.inspect_run import inspect, inspect_text, is_worse
from stllava_eval.runs.scores import ScoreRow


@pytest.fixture
def contrasted(home):
    """Ten images, each with two questions that differ in a word, one right with yes, the other with no."""
    from stllava_eval.data.catalog import Row
    from stllava_eval.data.splits import write_split

    rows = [
        Row(
            id=f"{image}-{organ}",
            image=png((20 * image, 9, 9)),
            image_id=f"{image}.png",
            question=f"Is the left {organ} shown?",
            reference="yes" if organ == "lung" else "no",
            kind="closed",
            categories={"modality": "CT" if image < 5 else "MRI"},
        )
        for image in range(10)
        for organ in ("lung", "kidney")
    ]
    write_split("slake", "test", rows, edition="t", official=False, sample=True, source="", licence="")
    return home


def inspected(*runs):
    return inspect(board(list(runs)))


@pytest.mark.parametrize(
    ("say", "consistent", "both_right"),
    [
        pytest.param(right, 1.0, 1.0, id="right"),
        pytest.param(always("yes"), 0.0, 0.0, id="the same to both"),
        pytest.param(lambda row: {"yes": "no", "no": "yes"}[row["reference"]], 1.0, 0.0, id="wrong, but consistent"),
        pytest.param(always("I do not know."), 0.0, 0.0, id="no verdict"),
        pytest.param(lambda row: "yes and no" if row["reference"] == "no" else "yes", 0.0, 0.0, id="two verdicts"),
    ],
)
def test_opposites(contrasted, tmp_path, say, consistent, both_right):
    (found,) = inspected(small_run(tmp_path / "a", say, ("slake",)))
    (pairs,) = found.consistency
    assert (pairs.value, pairs.both_right, pairs.pairs, pairs.images) == (consistent, both_right, 10, 10)


def test_categories_are_the_data_sets_and_those_of_the_rules(contrasted, tmp_path):
    def no_mri(row):
        return "no" if row["modality"] == "MRI" else row["reference"]

    (found,) = inspected(small_run(tmp_path / "a", no_mri, ("slake",)))
    accuracy = {one.category: one.value for one in found.categories if one.metric == "closed_accuracy"}
    assert accuracy == {"modality=CT": 1.0, "modality=MRI": 0.5, "asks=laterality": 0.75}


def test_what_answers_without_the_image_reach_stands_beside_each_score(contrasted, tmp_path):
    same = {"checkpoint": {"name": "a", "sha256": "w", "trained_on": None}}
    other = small_run(tmp_path / "other", always("yes and no"), ("slake",), images="other", **same)
    (found,) = inspected(small_run(tmp_path / "a", right, ("slake",), **same), other)
    (closed,) = found.blind
    assert (closed.metric, closed.value, closed.best, closed.prior) == ("closed_accuracy", 1.0, 0.5, None)
    assert closed.best_of == 'always "yes"'


def test_another_models_blind_run_counts_for_it_alone(contrasted, tmp_path):
    mine = {"checkpoint": {"name": "a", "sha256": "mine", "trained_on": None}}
    runs = [
        small_run(tmp_path / "a", always("no"), ("slake",)),
        small_run(tmp_path / "b", right, ("slake",), images="black", **mine),
    ]
    (found,) = inspected(*runs)
    assert found.blind[0].best == 0.5


def test_paraphrases_of_real_questions(shared, home, tmp_path):
    from stllava_eval.data.prepare import prepare

    prepare("vqarad", "test", shared / "data" / "vqarad")
    (found,) = inspected(small_run(tmp_path / "a", right))
    by_what = {one.what: one for one in found.consistency}
    closed = by_what["paraphrases, closed: the same option"]
    assert (closed.value, closed.both_right, closed.pairs) == (1.0, 1.0, 88)
    assert by_what["paraphrases, open: F1 of one answer to the other"].value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        pytest.param("recall", 0.1, 0.4, True, id="below the mean"),
        pytest.param("recall", 0.1, 0.5, False, id="reaches it"),
        pytest.param("recall", None, None, False, id="one image has no interval"),
        pytest.param("unparsed", 0.6, 0.9, True, id="of what is better small, above it"),
    ],
)
def test_below(metric, low, high, expected):
    overall = {metric: ScoreRow("t", metric, "", "all", 0.5, 9, 9, 0.4, 0.6)}
    assert is_worse(ScoreRow("t", metric, "", "a=b", 0.3, 9, 9, low, high), overall) is expected


def test_the_command_prints_text_and_json_and_writes_the_page(contrasted, tmp_path, capsys):
    run = str(small_run(tmp_path / "a", always("yes"), ("slake",)))
    assert main(["inspect", run, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "opposites: one yes, one no" in shown
    assert "Research only; not for clinical use." in shown
    assert (tmp_path / "out" / "index.html").is_file()
    assert main(["inspect", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["task"] == "slake"
    assert "SAMPLE DATA" in inspect_text(inspected(tmp_path / "a"))


def test_a_run_of_black_images_alone_is_refused(contrasted, tmp_path, capsys):
    run = small_run(tmp_path / "a", right, ("slake",), images="black")
    assert main(["inspect", str(run)]) == 2
    assert "no run here was shown its own images" in capsys.readouterr().err


def test_answers_without_the_image_are_scored_on_the_questions_of_the_run(contrasted, tmp_path):
    run = small_run(tmp_path / "a", lambda row: "yes" if row["reference"] == "yes" else None, ("slake",))
    (found,) = inspected(run)
    assert (found.blind[0].value, found.blind[0].best, found.blind[0].best_of) == (1.0, 1.0, 'always "yes"')


def test_a_run_without_an_answer_is_refused(contrasted, tmp_path, capsys):
    run = small_run(tmp_path / "a", always("[LMMS_EVAL_REQUEST_FAILED after 5 attempts] refused"), ("slake",))
    assert main(["inspect", str(run)]) == 2
    assert "none of its questions is answered" in capsys.readouterr().err
