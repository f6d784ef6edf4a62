"""A candidate against a baseline -> pass, fail, or cannot decide."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import png
from small_runs import always, right, small_run

from stllava_eval.cli.main import main
from stllava_eval.errors import InputError
from stllava_eval.reports.compare import Paired
from stllava_eval.reports.gate import decide, gate, gate_json, gate_junit, gate_markdown, gate_text
from stllava_eval.reports.gate_policy import read_policy

IMAGES = 120


@pytest.fixture
def questions(home):
    """A set of `IMAGES` images with one open and one closed question each."""
    from stllava_eval.data.catalog import Row
    from stllava_eval.data.splits import write_split

    rows = [
        Row(
            id=f"{image}-{kind}",
            image=png((image, 0, 7)),
            image_id=f"{image:03}.png",
            question="Is there a mass?" if kind == "closed" else "What is seen?",
            reference="yes" if kind == "closed" else "left lung",
            kind=kind,
            categories={},
        )
        for image in range(IMAGES)
        for kind in ("open", "closed")
    ]
    write_split("vqarad", "test", rows, edition="t", official=False, sample=True, source="", licence="")
    return home


def wrong_of(kind: str, count: int, answer: str):
    """Right but for the first `count` questions of a kind."""

    def say(row):
        number, of = row["id"].split("-")
        return answer if of == kind and int(number) < count else row["reference"]

    return say


def verdicts(found) -> dict[str, str]:
    return {check.score: check.verdict for check in found.checks}


def policy_file(folder: Path, text: str) -> Path:
    file = folder / "policy.yaml"
    file.write_text(text)
    return file


def test_the_same_answers_pass(questions, tmp_path):
    runs = [small_run(tmp_path / name, right) for name in ("old", "new")]
    found = gate(runs[1], runs[0], read_policy())
    assert (found.verdict, found.exit_code, found.reasons) == ("pass", 0, [])
    assert set(verdicts(found).values()) == {"held"}


def test_a_loss_of_more_than_the_margin_fails_and_is_told_in_words(questions, tmp_path):
    runs = [small_run(tmp_path / "old", right), small_run(tmp_path / "new", wrong_of("closed", 20, "no"))]
    found = gate(runs[1], runs[0], read_policy())
    assert (found.verdict, found.exit_code) == ("fail", 1)
    assert verdicts(found) == {
        **dict.fromkeys(("recall", "f1", "unparsed", "closed_format", "words"), "held"),
        "closed_accuracy": "lost",
    }
    assert found.reasons[0].startswith(
        "vqarad: accuracy of closed questions went from 100.0 to 83.3 (-16.7 points [-23.4, -9.9]): a loss is certain"
    )


def test_a_gain_is_no_loss(questions, tmp_path):
    runs = [small_run(tmp_path / "old", wrong_of("closed", 60, "no")), small_run(tmp_path / "new", right)]
    assert gate(runs[1], runs[0], read_policy()).verdict == "pass"


def test_too_few_questions_decide_nothing_and_it_says_how_many_would(questions, tmp_path):
    runs = [small_run(tmp_path / "old", right), small_run(tmp_path / "new", wrong_of("closed", 4, "no"))]
    found = gate(runs[1], runs[0], read_policy(policy_file(tmp_path, "margins: {vqarad: {closed_accuracy: 4}}")))
    assert (found.verdict, found.exit_code) == ("cannot decide", 2)
    (few,) = [check for check in found.checks if check.verdict == "too few"]
    assert few.needed > few.n == IMAGES
    assert f"About {few.needed} questions would decide." in found.reasons[0]


def test_the_questions_that_it_asks_for_would_decide():
    """As many as it asks for, with the same share of losses, end one way or the other."""
    change = [-1.0] * 4 + [0.0] * 116

    def checked(times: int):
        changes = change * times
        both = Paired([1.0] * len(changes), [1 + x for x in changes], [str(i) for i in range(len(changes))])
        policy = read_policy()
        policy.margins["vqarad"]["closed_accuracy"] = 5
        return decide({("vqarad", "closed_accuracy"): both}, policy)[0]

    few = checked(1)
    assert few.verdict == "too few"
    assert checked(-(-few.needed // 120)).verdict in ("held", "lost")


def test_answers_without_a_verdict_are_a_drift(questions, tmp_path):
    runs = [
        small_run(tmp_path / "old", right),
        small_run(tmp_path / "new", wrong_of("closed", 20, "it is hard to tell")),
    ]
    found = gate(runs[1], runs[0], read_policy())
    assert verdicts(found)["unparsed"] == verdicts(found)["closed_format"] == "lost"


def test_verdicts_in_other_words_break_the_format_but_are_no_silence(questions, tmp_path):
    runs = [small_run(tmp_path / "old", right), small_run(tmp_path / "new", wrong_of("closed", 20, "nope"))]
    found = verdicts(gate(runs[1], runs[0], read_policy()))
    assert (found["unparsed"], found["closed_format"]) == ("held", "lost")


@pytest.mark.parametrize("longer", [True, False])
def test_long_and_short_answers_are_a_drift(questions, tmp_path, longer):
    wordy = small_run(tmp_path / "wordy", lambda row: f"{row['reference']} as far as can be seen here")
    plain = small_run(tmp_path / "plain", right)
    runs = (wordy, plain) if longer else (plain, wordy)
    assert verdicts(gate(*runs, read_policy()))["words"] == "lost"


def test_a_guard_that_is_off_is_not_looked_at(questions, tmp_path):
    runs = [
        small_run(tmp_path / "old", right),
        small_run(tmp_path / "new", wrong_of("open", 120, "the left lung " * 9)),
    ]
    policy = read_policy(policy_file(tmp_path, "guards: {words: null}\nmargins: {vqarad: {f1: 99}}"))
    found = gate(runs[1], runs[0], policy)
    assert "words" not in verdicts(found)


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [pytest.param(2.2, "pass", id="nearly as fast"), pytest.param(4.0, "fail", id="half as fast")],
)
def test_speed_is_looked_at_where_the_policy_asks(questions, tmp_path, seconds, verdict):
    runs = [small_run(tmp_path / name, right) for name in ("old", "new")]
    manifest = json.loads((runs[1] / "run.json").read_text())
    manifest["answering"]["seconds"] = seconds
    (runs[1] / "run.json").write_text(json.dumps(manifest))
    assert gate(runs[1], runs[0], read_policy()).verdict == "pass"
    found = gate(runs[1], runs[0], read_policy(policy_file(tmp_path, "guards: {speed: 0.8}")))
    assert found.verdict == verdict
    manifest["device"] = "cuda"
    (runs[1] / "run.json").write_text(json.dumps(manifest))
    found = gate(runs[1], runs[0], read_policy(policy_file(tmp_path, "guards: {speed: 0.8}")))
    assert (found.verdict, "Run both on one machine" in found.reasons[0]) == ("cannot decide", True)
    assert found.checks  # what could be said is said


def test_a_loss_fails_even_where_the_speed_cannot_be_said(questions, tmp_path):
    runs = [small_run(tmp_path / "old", right), small_run(tmp_path / "new", always("no"), device="cuda")]
    assert gate(runs[1], runs[0], read_policy(policy_file(tmp_path, "guards: {speed: 0.8}"))).verdict == "fail"


def test_open_and_closed_questions_keep_their_own_images():
    """As many of one as of the other, but the closed ones on few images: a test says the same beside others."""
    few = [str(i // 10) for i in range(40)]
    lost = Paired([1.0] * 40, [0.0] * 20 + [1.0] * 20, few)
    same = Paired([1.0] * 40, [1.0] * 40, [str(i) for i in range(40)])
    alone = decide({("vqarad", "closed_accuracy"): lost}, read_policy())[0]
    beside = decide({("vqarad", "recall"): same, ("vqarad", "closed_accuracy"): lost}, read_policy())[1]
    assert alone.p_loss == pytest.approx(0.25, abs=0.02)  # two of four images, both one way
    assert beside.p_loss == pytest.approx(2 * alone.p_loss)  # Holm, of two


def test_unlike_runs_are_not_decided_and_what_differs_is_named(questions, tmp_path, monkeypatch):
    old = small_run(tmp_path / "old", right)
    dark = small_run(tmp_path / "dark", right, images="black")
    assert "images is 'own'" in gate(dark, old, read_policy()).reasons[0]
    manifest = json.loads((dark / "run.json").read_text())
    manifest["images"] = "own"
    manifest["tasks"]["vqarad"]["data"]["sha256_rows"] = "0" * 64
    (dark / "run.json").write_text(json.dumps(manifest))
    found = gate(dark, old, read_policy())
    assert (found.exit_code, "hash of the questions" in found.reasons[0]) == (2, True)


def answer_file(folder: Path, name: str, say) -> Path:
    """A run folder of a file of answers, with those that `say` gives."""
    from stllava_eval.runs.scores import split_rows

    lines = [{"id": row["id"], "answer": said} for row in split_rows("vqarad") if (said := say(row)) is not None]
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert main(["score", "--task", "vqarad", "--answers", str(file), "--out", str(folder / name)]) == 0
    return folder / name


def only(kind: str):
    return lambda row: row["reference"] if row["kind"] == kind else None


@pytest.mark.parametrize("made", [answer_file, lambda folder, name, say: small_run(folder / name, say)])
@pytest.mark.parametrize(
    ("kind", "scores"), [("closed", {"closed_accuracy", "unparsed", "closed_format"}), ("open", {"recall", "f1"})]
)
def test_runs_that_were_asked_one_kind_of_question_are_decided_on_its_scores(questions, tmp_path, made, kind, scores):
    old, new = (made(tmp_path, name, only(kind)) for name in ("old", "new"))
    found = gate(new, old, read_policy())
    assert found.verdict == "pass"
    assert set(verdicts(found)) == scores | {"words"}
    other = "open" if kind == "closed" else "closed"
    assert any(f"asked no {other} question" in note for note in found.notes)
    whole = made(tmp_path, "whole", right)
    assert gate(whole, old, read_policy()).verdict == "pass"  # it was asked more than the baseline
    worse = made(tmp_path, "worse", lambda row: "no lung" if row["kind"] == kind else None)
    assert gate(worse, old, read_policy()).verdict == "fail"


@pytest.mark.parametrize("made", [answer_file, lambda folder, name, say: small_run(folder / name, say)])
def test_a_candidate_escapes_no_score_by_not_being_asked(questions, tmp_path, made):
    whole, closed, opened = (
        made(tmp_path, name, say)
        for name, say in {"whole": right, "closed": only("closed"), "opened": only("open")}.items()
    )
    found = gate(closed, whole, read_policy())
    assert (found.verdict, found.checks) == ("cannot decide", [])
    assert f"asked {IMAGES} open questions, the candidate none, so recall and f1 cannot be decided" in found.reasons[0]
    assert gate(opened, closed, read_policy()).verdict == "cannot decide"
    few = made(tmp_path, "few", lambda row: right(row) if row["kind"] == "closed" and row["id"][0] != "1" else None)
    assert "not answered in both runs" in gate(few, closed, read_policy()).reasons[0]


def test_missing_answers_are_never_passed_over(questions, tmp_path):
    old = small_run(tmp_path / "old", right)
    new = small_run(tmp_path / "new", lambda row: None if row["id"] == "7-open" else row["reference"])
    found = gate(new, old, read_policy())
    assert (found.verdict, "7-open" in found.reasons[0]) == ("cannot decide", True)
    allowed = read_policy(policy_file(tmp_path, "unanswered: 1"))
    assert gate(new, old, allowed).verdict == "pass"


def test_a_task_that_the_candidate_lacks_is_not_passed_over(prepared, tmp_path):
    old = small_run(tmp_path / "old", right, ("vqarad", "slake"))
    new = small_run(tmp_path / "new", right, ("vqarad",))
    assert "lacks slake" in gate(new, old, read_policy()).reasons[0]


def test_the_reports_tell_the_same(questions, tmp_path):
    hostile = tmp_path / "<b>|`\x1b[31m"
    runs = [small_run(tmp_path / "old", right), small_run(hostile, wrong_of("closed", 20, "no"))]
    found = gate(runs[1], runs[0], read_policy())
    suite = ElementTree.fromstring(gate_junit(found))
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("7", "2", "0")
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == ["verdict", "closed_accuracy"]
    assert "<b>" not in gate_markdown(found)
    assert "FAIL" in gate_text(found)
    assert "\x1b" not in gate_text(found)
    assert gate_json(found)["exit_code"] == 1
    for text in (gate_text(found), gate_markdown(found)):
        assert "Research only; not for clinical use." in text
        assert "SAMPLE DATA" in text


def test_what_cannot_be_decided_is_an_error_in_junit(questions, tmp_path):
    runs = [small_run(tmp_path / "old", right), small_run(tmp_path / "new", right, images="black")]
    suite = ElementTree.fromstring(gate_junit(gate(runs[1], runs[0], read_policy())))
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "1")


@pytest.mark.parametrize(
    ("say", "code"),
    [
        pytest.param(right, 0, id="pass"),
        pytest.param(always("no"), 1, id="fail"),
        pytest.param(wrong_of("closed", 6, "no"), 2, id="cannot decide"),
    ],
)
def test_the_command_ends_with_its_verdict_and_writes_three_reports(questions, tmp_path, say, code, capsys):
    old, new = small_run(tmp_path / "old", right), small_run(tmp_path / "new", say)
    assert main(["gate", str(new), "--baseline", str(old), "--out", str(tmp_path / "out")]) == code
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"gate.json", "gate.md", "gate.xml"}
    assert json.loads((tmp_path / "out" / "gate.json").read_text())["exit_code"] == code


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("margin: {}", "'margin': unknown. Known are alpha", id="unknown name"),
        pytest.param("margins: {vqa: {}}", r"margins.vqa: unknown", id="unknown set"),
        pytest.param("margins: {slake: {recal: 1}}", "margins.slake: 'recal': unknown", id="unknown score"),
        pytest.param("margins: {slake: {recall: -1}}", "recall is -1", id="negative margin"),
        pytest.param("margins: {slake: 3}", "maps names to numbers", id="no mapping"),
        pytest.param("alpha: 5", "alpha is 5", id="percent for a share"),
        pytest.param("guards: {words: 0.5}", "guards.words is 0.5", id="fewer than as many"),
        pytest.param("unanswered: 0.1", "unanswered is 0.1", id="a share for a number"),
        pytest.param("- 1", "not a mapping", id="a list"),
        pytest.param("a: [", "cannot be read", id="no YAML"),
        pytest.param("alpha: .nan", "alpha is nan", id="no number"),
        pytest.param("alpha: 0.1\nalpha: 0.2", "alpha comes twice", id="a name twice"),
        pytest.param("alpha: !!bool maybe", "cannot be read", id="no yes or no"),
        pytest.param(f"alpha: 0x{'f' * 5000}", "alpha is a int", id="hexadecimal digits"),
        pytest.param(f"unanswered: 0x{'f' * 5000}", "unanswered is a int", id="too many questions"),
        pytest.param("margins: {slake: {recall: 1.0e-15}}", "recall is 1e-15", id="hardly a margin"),
        pytest.param("alpha: 1.0e-17", "alpha is 1e-17", id="hardly a chance"),
        pytest.param("alpha: 2026-99-99", "cannot be read", id="no date"),
        pytest.param("alpha: !!int abc", "cannot be read", id="no whole number"),
        pytest.param("false", "not a mapping", id="false"),
        pytest.param("margins: [" + "1, " * 60_000 + "1]", "A policy is a few lines", id="too large"),
        pytest.param("a: &a [1, 1]\nmargins: [*a, *a]", "unknown", id="aliases"),
        pytest.param(f"alpha: {'9' * 5000}", "cannot be read|alpha is 9{60}", id="digits"),
    ],
)
def test_a_wrong_policy_is_one_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_policy(policy_file(tmp_path, text))


def test_the_default_margins_are_what_the_rule_gives():
    from gate_simulation import margins

    policy = read_policy()
    assert margins(policy) == {task: dict(of) for task, of in policy.margins.items()}


def test_without_a_change_it_fails_no_more_often_than_alpha():
    """150 simulated comparisons of the official size: at 5 %, 95 % of such tests see at most 13 failures."""
    from gate_simulation import batch

    counts = batch((range(150), read_policy(), {}, 0.7))
    assert counts["fail"] <= 13
    assert 0.93 < counts["covering"] / counts["intervals"] < 0.97


def test_a_loss_of_twice_the_margin_is_found():
    """40 comparisons each; 80 % power sees at least 27 in 97 % of such tests."""
    from gate_simulation import batch, designs

    policy = read_policy()
    for task, kind in designs():
        margin = policy.margins[task]["recall" if kind == "open" else "closed_accuracy"] / 100
        assert batch((range(40), policy, {(task, kind): 2 * margin}, 0.7))["fail"] >= 27, (task, kind)


def test_noninferior_is_students_t_and_never_more_certain_than_the_images_allow():
    from scipy import stats

    from stllava_eval.scoring.statistics import noninferior

    random = np.random.default_rng(0)
    changes = random.normal(-0.01, 0.2, 300)
    names = [str(i) for i in range(300)]
    theirs = stats.ttest_1samp(changes, -0.03, alternative="greater").pvalue
    assert noninferior(changes.tolist(), names, 0.03) == pytest.approx(theirs, rel=1e-9)
    assert noninferior([0.0] * 20, names[:20], 0.05) == pytest.approx(0.95**20)
    assert noninferior([0.0], ["a"], 0.05) == 1.0
    assert noninferior([-0.1] * 20, names[:20], 0.05) == 1.0


def test_what_neither_run_answered_is_not_passed_over(questions, tmp_path):
    failed = "[LMMS_EVAL_REQUEST_FAILED after 5 attempts] Connection error."

    def half(row):
        return failed if row["kind"] == "closed" else row["reference"]

    found = gate(small_run(tmp_path / "new", half), small_run(tmp_path / "old", half), read_policy())
    assert (found.verdict, "not answered in both runs" in found.reasons[0]) == ("cannot decide", True)


def test_questions_that_neither_was_asked_are_told(questions, tmp_path):
    def some(row):
        return row["reference"] if int(row["id"].split("-")[0]) < 100 else None

    found = gate(small_run(tmp_path / "new", some), small_run(tmp_path / "old", some), read_policy())
    assert found.notes[-1].startswith("SAMPLE DATA")
    assert "vqarad: 40 questions of its split were not asked." in found.notes


def test_two_runs_of_black_images_say_so(questions, tmp_path):
    runs = [small_run(tmp_path / name, right, images="black") for name in ("old", "new")]
    assert any("black images" in note for note in gate(runs[1], runs[0], read_policy()).notes)


def test_no_difference_at_all_has_no_interval(questions, tmp_path):
    runs = [small_run(tmp_path / name, right) for name in ("old", "new")]
    assert all(check.low is None for check in gate(runs[1], runs[0], read_policy()).checks)


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_reader_that_has_left_does_not_change_the_verdict(questions, tmp_path, unbuffered):
    old, new = small_run(tmp_path / "old", right), small_run(tmp_path / "new", always("no"))
    command = f'"{sys.executable}" -m stllava_eval.cli gate "{new}" --baseline "{old}" | true; exit ${{PIPESTATUS[0]}}'
    ran = subprocess.run(
        ["bash", "-c", command], env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, capture_output=True
    )
    assert (ran.returncode, ran.stderr) == (1, b"")


def test_a_full_disk_is_one_line(questions, tmp_path):
    run = small_run(tmp_path / "old", right)
    command = f'"{sys.executable}" -m stllava_eval.cli inspect "{run}" > /dev/full'
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "stdout: cannot be written" in ran.stderr


def test_names_that_no_encoding_has_are_written_as_numbers(questions, tmp_path):
    checkpoint = {"name": "half \ud800 of a letter", "sha256": "a", "trained_on": None}
    runs = [small_run(tmp_path / "old", right), small_run(tmp_path / "new", right, checkpoint=checkpoint)]
    assert main(["gate", str(runs[1]), "--baseline", str(runs[0]), "--out", str(tmp_path / "out")]) == 0
    assert main(["leaderboard", *map(str, runs), "--out", str(tmp_path / "board")]) == 0
    assert "ud800" in (tmp_path / "board" / "board.md").read_text(encoding="utf-8")


def test_answers_from_elsewhere_are_held_against_a_runs(questions, tmp_path):
    run = small_run(tmp_path / "run", right)
    lines = (run / "answers.jsonl").read_text()
    (tmp_path / "answers.jsonl").write_text(lines)
    out = tmp_path / "elsewhere"
    score = ["score", "--task", "vqarad", "--answers", str(tmp_path / "answers.jsonl")]
    assert main([*score, "--out", str(tmp_path / "unsaid")]) == 0
    unsaid = gate(tmp_path / "unsaid", run, read_policy())
    assert (unsaid.verdict, unsaid.exit_code) == ("cannot decide", 2)
    assert any("images" in why and "not recorded" in why for why in unsaid.reasons)
    assert main([*score, "--images", "own", "--out", str(out)]) == 0
    found = gate(out, run, read_policy())
    assert found.verdict == "pass"
    assert "decoding differs: 'greedy' and None" in found.notes


def test_a_wrong_call_whose_message_nobody_reads_is_one_all_the_same(questions, tmp_path):
    run = small_run(tmp_path / "old", right)
    command = (
        f'"{sys.executable}" -m stllava_eval.cli gate nowhere --baseline "{run}" 2>&1 | true; exit ${{PIPESTATUS[0]}}'
    )
    ran = subprocess.run(["bash", "-c", command], env=os.environ | {"PYTHONUNBUFFERED": "1"}, capture_output=True)
    assert ran.returncode == 2


UNLIKE = [
    pytest.param({"asked": {"max_new_tokens": 8}}, {"asked": {"max_new_tokens": 1024}}, "max_new_tokens", id="limit"),
    pytest.param({"asked": {"until": ["</s>"]}}, {"asked": {"until": ["\n"]}}, "until", id="stop texts"),
    pytest.param({"decoding": "greedy"}, {"decoding": "sampled: temperature 1"}, "decoding", id="decoding"),
    pytest.param({"system": None}, {"system": "Think."}, "system", id="system prompt"),
    pytest.param({"enable_thinking": True}, {"enable_thinking": False}, "enable_thinking", id="thinking"),
    pytest.param({"max_pixels": None}, {"max_pixels": 100}, "max_pixels", id="pixels"),
    pytest.param({"images": "own"}, {"images": "black"}, "images", id="images"),
    pytest.param({"asked": {"extract": "final-v1"}}, {"asked": {"extract": "none"}}, "extract", id="rule"),
]


@pytest.mark.parametrize(("one", "other", "name"), UNLIKE)
def test_runs_that_were_asked_otherwise_are_not_decided_and_compared_with_a_note(questions, tmp_path, one, other, name):
    from stllava_eval.reports.compare import compare

    runs = small_run(tmp_path / "a", right, **one), small_run(tmp_path / "b", right, **other)
    found = gate(runs[1], runs[0], read_policy())
    assert found.verdict == "cannot decide"
    assert found.reasons[0].startswith(f"{name} is ")
    assert [note for note in compare(list(runs)).notes["b"] if f"{name} differs" in note]


def test_runs_that_were_asked_alike_have_no_note(questions, tmp_path):
    from stllava_eval.reports.compare import compare

    how = {"system": None, "asked": {"max_new_tokens": 8, "until": ["</s>"]}}
    runs = small_run(tmp_path / "a", right, **how), small_run(tmp_path / "b", right, **how)
    assert gate(runs[1], runs[0], read_policy()).verdict == "pass"
    assert compare(list(runs)).notes["b"] == []


def test_replies_at_their_limit_are_told_on_the_board_and_by_inspect(questions, tmp_path):
    from stllava_eval.inference.types import Answer
    from stllava_eval.reports.board_formats import board_text
    from stllava_eval.reports.board_rows import board
    from stllava_eval.reports.inspect_run import inspect, inspect_text
    from stllava_eval.runs.folder import answer_row, write_run
    from stllava_eval.runs.scores import split_rows
    from stllava_eval.scoring.final_answer import final_answer

    rows = [
        answer_row("vqarad", row, row["question"], final_answer("yes, the"), Answer("yes, the", 8, number >= 6))
        for number, row in enumerate(split_rows("vqarad"))
    ]
    run = {"model": "stllava_med", "checkpoint": {"name": "x", "sha256": "x"}, "images": "own"}
    write_run(rows, run, folder=tmp_path / "a", asked_with={"vqarad": {"max_new_tokens": 8}})
    shown = board([tmp_path / "a"])
    for text in (board_text(shown), inspect_text(inspect(shown))):
        assert "6 replies were stopped at the limit of 8 new tokens." in text


def test_a_full_disk_leaves_the_whole_old_verdict(prepared, tmp_path, monkeypatch, capsys):
    runs = [str(small_run(tmp_path / name, right)) for name in ("a", "b")]
    out = tmp_path / "out"
    call = ["gate", runs[0], "--baseline", runs[1], "--out", str(out)]
    assert main(call) in (0, 1, 2)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert sorted(before) == ["gate.json", "gate.md", "gate.xml"]
    (tmp_path / "policy.yaml").write_text("alpha: 0.1\n")
    calls, rename = iter(range(100)), Path.rename

    def full(*arguments):
        if next(calls) == 4:
            raise OSError(28, "No space left on device")
        return rename(*arguments)

    monkeypatch.setattr(Path, "rename", full)
    capsys.readouterr()
    assert main([*call, "--policy", str(tmp_path / "policy.yaml")]) == 2
    assert "out: cannot be written (No space left on device)" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
