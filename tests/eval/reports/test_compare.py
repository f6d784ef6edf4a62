"""Two runs -> their paired differences: checked by hand, against scipy and by simulation."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_runs import small_run

from stllava_eval.cli.main import main
from stllava_eval.errors import InputError
from stllava_eval.reports.compare import compare, power
from stllava_eval.scoring.statistics import holm, sign_flip


def run_of(folder: Path, answers: dict[str, str], **changes) -> Path:
    """A run folder with these answers to the prepared test split, by id; `changes`: of its data in run.json."""
    run = small_run(folder, lambda row: answers.get(row["id"]))
    manifest = json.loads((run / "run.json").read_text())
    manifest["tasks"]["vqarad"]["data"] |= changes
    (run / "run.json").write_text(json.dumps(manifest))
    return run


@pytest.fixture
def ids(prepared):
    from stllava_eval.data.splits import read_rows

    return {row.id: row.kind for row in read_rows("vqarad", "test")}


def test_differences_are_those_of_the_same_questions(ids, tmp_path):
    wrong = dict.fromkeys(ids, "nothing")
    right = {id: "the left lung" if kind == "open" else "yes" for id, kind in ids.items()}
    one = run_of(tmp_path / "one", wrong)
    other = run_of(tmp_path / "other", right | {"test-0-1": "left"})
    found = {difference.metric: difference for difference in compare([one, other]).differences}
    assert list(found) == ["recall", "f1", "closed_accuracy"]
    recall = found["recall"]
    assert (recall.first, recall.n, recall.images) == (0.0, 4, 4)
    assert recall.value == pytest.approx(3.5 / 4) == recall.second  # articles do not count
    assert found["closed_accuracy"].value == 1.0
    assert recall.p == pytest.approx(2 / 2**4, abs=0.02)  # all four images one way, or all the other
    assert recall.p_holm >= recall.p


def test_runs_of_other_questions_are_refused_and_what_differs_is_named(ids, tmp_path):
    answers = dict.fromkeys(ids, "yes")
    one = run_of(tmp_path / "one", answers)
    other = run_of(tmp_path / "other", answers, sha256_rows="f" * 64)
    with pytest.raises(
        InputError, match=r"vqarad\b.*hash of the questions.* in .*/one\b.*\bf{16} in .*/other\b.*run one again"
    ):
        compare([one, other])
    with pytest.raises(InputError, match="is not a run folder"):
        compare([one, tmp_path])


def test_a_question_that_one_run_lacks_counts_for_neither(ids, tmp_path):
    answers = dict.fromkeys(ids, "yes")
    one = run_of(tmp_path / "one", answers)
    less = {id: answer for id, answer in answers.items() if id != "test-0-0"}
    other = run_of(tmp_path / "other", less)
    (closed,) = [one for one in compare([one, other]).differences if one.metric == "closed_accuracy"]
    assert (closed.n, closed.value, closed.p) == (3, 0.0, 1.0)


def test_the_command_prints_a_table_and_json(ids, tmp_path, capsys):
    runs = [str(run_of(tmp_path / name, dict.fromkeys(ids, name))) for name in ("no", "yes")]
    assert main(["compare", *runs]) == 0
    shown = capsys.readouterr().out
    assert "closed_accuracy" in shown
    assert "Research only; not for clinical use." in shown
    assert main(["compare", *runs, "--json"]) == 0
    assert {one["task"] for one in json.loads(capsys.readouterr().out)["differences"]} == {"vqarad"}


def test_signs_are_flipped_as_scipy_does():
    from scipy.stats import permutation_test

    draw = np.random.default_rng(1)
    changes = draw.normal(0.3, 1, 12)
    theirs = permutation_test(
        (changes, np.zeros(12)), lambda x, y: np.sum(x - y), permutation_type="samples", n_resamples=2**12
    ).pvalue
    assert sign_flip(changes.tolist(), [str(n) for n in range(12)], draws=40_000) == pytest.approx(theirs, abs=0.01)


def test_equal_systems_differ_falsely_in_one_of_twenty_comparisons_however_questions_depend_on_their_image():
    draw = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        sizes = draw.integers(1, 12, 60)
        images = np.repeat(np.arange(60), sizes)
        shift = np.repeat(draw.normal(0, 0.3, 60), sizes)  # of all questions of an image
        one, other = (draw.random(len(images)) < 0.6 + shift for _ in range(2))
        found += sign_flip((one.astype(float) - other).tolist(), images.astype(str).tolist(), draws=400) <= 0.05
    assert 0.03 <= found / 400 <= 0.075  # 95 % of such experiments with a true 5 % lie within 0.03 and 0.072


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_what_a_reader_has_to_know_besides_is_told(ids, tmp_path, capsys):
    answers = dict.fromkeys(ids, "yes")
    one = run_of(tmp_path / "one", answers)
    other = run_of(tmp_path / "other", {"test-0-0": "yes"})
    manifest = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(manifest | {"images": "black"}))
    assert main(["compare", str(one), str(other)]) == 0
    shown = capsys.readouterr().out
    assert "vqarad: compared on 1 of 8 questions; the rest are not answered in both." in shown
    assert "images differs: 'own' and 'black'" in shown


def test_runs_without_a_question_in_common_are_refused(ids, tmp_path):
    one = run_of(tmp_path / "one", {"test-0-0": "yes"})
    other = run_of(tmp_path / "other", {"test-1-0": "yes"})
    with pytest.raises(InputError, match=r"no question.*both.*same questions"):
        compare([one, other])


def test_a_damaged_manifest_is_no_run(ids, tmp_path):
    one = run_of(tmp_path / "one", dict.fromkeys(ids, "yes"))
    other = run_of(tmp_path / "other", dict.fromkeys(ids, "yes"), sha256_rows=7)
    with pytest.raises(InputError, match="is not a run folder"):
        compare([one, other])


def test_several_runs_are_compared_with_the_first_in_one_family(ids, tmp_path):
    answers = {"a": "no", "b": "yes", "c": "yes"}
    runs = [run_of(tmp_path / name, dict.fromkeys(ids, answer)) for name, answer in answers.items()]
    found = compare(runs).differences
    assert [(one.baseline, one.run) for one in found] == [("a", "b")] * 3 + [("a", "c")] * 3
    closed = [one for one in found if one.metric == "closed_accuracy"]
    assert [one.p_mcnemar for one in closed] == [2 / 2**4] * 2
    assert all(one.p_mcnemar is None for one in found if one.metric != "closed_accuracy")
    two = compare(runs[:2]).differences
    assert closed[0].p_holm >= next(one for one in two if one.metric == "closed_accuracy").p_holm


def test_one_run_is_no_comparison(ids, tmp_path, capsys):
    run = run_of(tmp_path / "a", dict.fromkeys(ids, "yes"))
    assert main(["compare", str(run)]) == 2
    assert "takes two runs or more" in capsys.readouterr().err


def test_power_is_of_the_differences_or_of_an_assumed_correlation(ids, tmp_path, capsys):
    half = {id: "yes" if number % 4 < 2 else "no" for number, id in enumerate(ids)}
    one = run_of(tmp_path / "one", half)
    other = run_of(tmp_path / "other", dict.fromkeys(ids, "yes"))
    alone = {(found.metric, found.correlation): found for found in power([one])}
    closed = [alone["closed_accuracy", correlation].alone for correlation in (0.5, 0.8)]
    # the standard error of two of four right, t(0.975, 3) + t(0.8, 3), times the root of 2 (1 - correlation)
    error = (4 / 3 * 4 * 0.25) ** 0.5 / 4
    assert closed == pytest.approx([(3.18245 + 0.97847) * error * spread for spread in (1, 0.4**0.5)], rel=1e-4)
    (measured,) = [found for found in power([one, other]) if found.metric == "closed_accuracy"]
    assert measured.correlation is None
    assert measured.with_holm >= measured.alone
    assert main(["compare", str(one), "--power"]) == 0
    assert "0.8 assumed" in capsys.readouterr().out
    assert main(["compare", str(one), str(other), "--power", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["power"][0]["run"] == "other"


def test_prompts_of_ones_own_are_compared_only_if_they_are_the_same(ids, tmp_path):
    runs = [run_of(tmp_path / name, dict.fromkeys(ids, "yes")) for name in ("a", "b", "c")]
    for run, prompt in zip(runs, ("Doctor, {}", "Doctor, {}", "{} Be brief."), strict=True):
        lines = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
        lines = [line | {"text": prompt.format(line["question"])} for line in lines]
        (run / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        manifest = json.loads((run / "run.json").read_text())
        manifest["tasks"]["vqarad"]["prompt"] = "custom"
        (run / "run.json").write_text(json.dumps(manifest))
    assert len(compare(runs[:2]).differences) == 3
    lines = (runs[1] / "answers.jsonl").read_text().splitlines(keepends=True)
    manifest = json.loads((runs[1] / "run.json").read_text())
    manifest["tasks"]["vqarad"]["questions"] = 2  # as with --limit 2
    (runs[1] / "answers.jsonl").write_text("".join(lines[:2]))
    (runs[1] / "run.json").write_text(json.dumps(manifest))
    assert compare(runs[:2]).differences[0].n == 1
    with pytest.raises(InputError, match=r"vqarad\b.*prompt.*custom .*custom .*run one again"):
        compare([runs[0], runs[2]])


def test_json_tells_what_differs_too(ids, tmp_path, capsys):
    runs = [str(run_of(tmp_path / name, dict.fromkeys(ids, "yes"))) for name in ("a", "b")]
    manifest = json.loads((tmp_path / "b" / "run.json").read_text())
    (tmp_path / "b" / "run.json").write_text(json.dumps(manifest | {"images": "black"}))
    assert main(["compare", *runs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == {"b": ["images differs: 'own' and 'black'"]}
