import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from small_runs import right, small_run

from stllava_eval.cli.main import main
from stllava_eval.errors import InputError
from stllava_eval.reports.board_formats import board_text
from stllava_eval.reports.board_rows import board
from stllava_eval.runs import folder as runs_folder
from stllava_eval.runs.answer_files import read_answers
from stllava_eval.runs.folder import open_run, read_run, trained_on
from stllava_eval.runs.scores import score_table

REFERENCES = {0: "yes", 1: "the left lung"}  # of vqarad's two questions on each image, see conftest.py


def answers(*, closed: str, opened: str, images=range(4)) -> dict[str, str]:
    return {f"test-{image}-{number}": (closed, opened)[number] for image in images for number in range(2)}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_scores_are_means_over_the_questions_of_their_kind(prepared):
    scored = score_table("vqarad", answers(closed="Yes.", opened="the left side"))
    overall = {row.metric: row for row in scored.rows if row.category == "all"}
    assert (overall["closed_accuracy"].value, overall["closed_accuracy"].n, overall["closed_accuracy"].images) == (
        1,
        4,
        4,
    )
    assert overall["recall_llavamed"].value == 0.5  # "the" is dropped: left of left, lung
    assert overall["recall"].n == 4
    assert overall["words"].n == 8


def test_categories_have_rows_of_their_own(prepared):
    scored = score_table("vqarad", answers(closed="no", opened="the left lung"))
    of_organ = {
        row.category: row for row in scored.rows if row.metric == "recall" and row.category.startswith("organ=")
    }
    assert {name: (row.n, row.value) for name, row in of_organ.items()} == {
        "organ=organ 0": (2, 1),
        "organ=organ 1": (2, 1),
    }


def test_a_signature_names_metric_data_and_prompt(prepared):
    (row,) = [
        row
        for row in score_table("vqarad", answers(closed="no", opened="x"), "short").rows
        if (row.metric, row.category) == ("recall", "all")
    ]
    assert row.signature == "recall|v2|vqarad test for tests|prompt short|extract final-v1"


def test_a_question_without_an_answer_is_listed_and_in_no_mean(prepared):
    given = answers(closed="yes", opened="the left lung", images=range(1, 4))
    given["test-1-0"] = "[LMMS_EVAL_REQUEST_FAILED after 5 retries] timeout"
    scored = score_table("vqarad", given)
    assert scored.unanswered == ["test-0-0", "test-0-1", "test-1-0"]
    (closed,) = [row for row in scored.rows if (row.metric, row.category) == ("closed_accuracy", "all")]
    assert (closed.value, closed.n) == (1.0, 2)


def test_ids_that_the_split_does_not_have_are_refused_by_name(prepared):
    with pytest.raises(InputError, match=r"vqarad.*1 unknown.*\bq7\b.*test-0-0\b.*--ignore-unknown"):
        score_table("vqarad", {"q7": "yes"})


@pytest.mark.parametrize(
    ("row", "of"),
    [
        pytest.param({"id": "test-0-0", "answer": "yes"}, "test-0-0", id="ours"),
        pytest.param({"question_id": "test-0-1", "text": "yes", "answer_id": "x"}, "test-0-1", id="LLaVA's"),
        pytest.param(
            {"doc_id": 3, "filtered_resps": ["yes"], "recall": {"score": 1, "id": "test-1-1", "image_id": "i"}},
            "test-1-1",
            id="lmms-eval's, by the id in its records",
        ),
        pytest.param(
            {"doc_id": 3, "target": "the left lung", "filtered_resps": "yes", "resps": [["no"]]},
            "test-1-1",
            id="lmms-eval's, by place",
        ),
    ],
)
def test_answers_are_read_from_every_form(prepared, tmp_path, row, of):
    assert read_answers(write(tmp_path / "a.jsonl", [row]), "vqarad").answers == {of: "yes"}


def test_an_empty_answer_is_an_answer(prepared, tmp_path):
    file = write(
        tmp_path / "a.jsonl", [{"doc_id": 0, "target": "yes", "filtered_resps": ""}, {"id": "test-1-0", "answer": ""}]
    )
    assert read_answers(file, "vqarad").answers == {"test-0-0": "", "test-1-0": ""}


@pytest.mark.parametrize("run", ["[]", "{}", '{"tasks": 3}', '{"tasks": {"vqarad": {}}}'])
def test_a_folder_with_a_broken_manifest_is_no_run(prepared, tmp_path, run):
    (tmp_path / "run.json").write_text(run)
    (tmp_path / "answers.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="is not a run folder"):
        board([tmp_path])


def test_line_separators_inside_an_answer_do_not_end_its_line(prepared, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "test-0-0", "answer": "yes\u2028or\u0085no"}\n', encoding="utf-8")
    assert read_answers(tmp_path / "a.jsonl", "vqarad").answers == {"test-0-0": "yes\u2028or\u0085no"}


def test_an_edited_run_is_no_run(prepared, tmp_path):
    data = {"edition": "x", "sha256_rows": "x", "sha256_pixels": "x"}
    tasks = {"vqarad": {"data": data, "prompt": "bare", "questions": 2, "of": 8}}
    (tmp_path / "run.json").write_text(json.dumps({"tasks": tasks}))
    for second in ({"id": "1", "answer": "no"}, {"id": "2", "answer": None}, {"id": 2, "answer": "no"}):
        write(
            tmp_path / "answers.jsonl", [{"task": "vqarad", "id": "1", "answer": "yes"}, {"task": "vqarad", **second}]
        )
        with pytest.raises(InputError, match=r"run folder.*answers\.jsonl.*twice.*stllava-eval run"):
            board([tmp_path])


def test_lines_of_other_tasks_are_left_out(prepared, tmp_path):
    rows = [{"task": "slake", "id": "1", "answer": "a"}, {"task": "vqarad", "id": "2", "answer": "b"}]
    assert read_answers(write(tmp_path / "a.jsonl", rows), "vqarad").answers == {"2": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "no answers to vqarad", id="empty"),
        pytest.param('{"id": "1", "answer": "x"}\n{"id"', r"a.jsonl:2: not JSON", id="cut off"),
        pytest.param("[1]", r"a\.jsonl item 0\b.*not an object.*id and answer", id="a list"),
        pytest.param('{"answer": "x"}', r"a.jsonl:1: no id", id="no id"),
        pytest.param('{"id": "1"}', r"a.jsonl:1: no answer", id="no answer"),
        pytest.param(
            '{"id": "1", "answer": 3}', r"a\.jsonl:1\b.*answer is 3\b.*text.*leave the row out", id="not text"
        ),
        pytest.param('{"id": "1", "answer": "x"}\n' * 2, r"1 ids.*twice.*\(1\).*Keep", id="twice"),
        pytest.param(
            '{"id": "1", "answer": "x"}\n{"id": "2", "answer": "no", "answer": "yes"}',
            r"a\.jsonl:2\b.*not JSON.*'answer'.*twice.*id and answer",
            id="a key twice",
        ),
    ],
)
def test_a_bad_file_of_answers_is_refused_with_its_line(prepared, tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_answers(tmp_path / "a.jsonl", "vqarad")


def test_the_board_has_image_blind_rows_and_says_that_the_data_is_a_sample(prepared):
    rows = {row.system: row for row in board([], ["vqarad"])}
    assert rows['always "yes"'].scores["closed_accuracy"].value == 1.0
    assert rows['always "yes and no"'].scores["closed_llavamed"].value == 1.0  # gamed: both words are there
    assert rows['always "yes and no"'].scores["closed_accuracy"].value == 0.0
    assert rows["commonest answer"].scores["recall"].value == 1.0  # train and test ask the same here
    text = board_text(list(rows.values()))
    assert "SAMPLE DATA" in text
    assert "not for clinical use" in text


def test_blind_baselines_are_those_of_the_published_scorer(shared, home):
    """Issue 2's table: constant answers on the official tests, from `golden/metrics/degenerate_baselines.json`."""
    from stllava_eval.data.prepare import prepare

    golden = json.loads((shared / "golden" / "metrics" / "degenerate_baselines.json").read_text())["rows"]
    for name in ("vqarad", "slake"):
        for split in ("train", "test"):
            prepare(name, split, str(shared / "data" / name))
    ours = {(row.task, row.system): row.scores for row in board([], ["vqarad", "slake"])}
    task_of = {"vqa_rad_official_test": "vqarad", "slake_en_test": "slake"}
    compared = 0
    for row in golden:
        constant = row["constant_answer"]
        scores = ours.get((task_of[row["dataset"]], f'always "{constant}"'))
        if scores is not None:
            closed = scores["closed_llavamed"]
            assert 100 * scores["recall_llavamed"].value == pytest.approx(row["recall"], abs=1e-9)
            assert 100 * scores["f1_llavamed"].value == pytest.approx(row["f1"], abs=1e-9)
            assert round(closed.value * closed.n) == row["closed_run_eval_hits"]
            compared += 1
    assert compared == 10


def test_answers_of_several_tasks_make_one_run(prepared, tmp_path, capsys):
    for task, answer in (("vqarad", "yes"), ("slake_short", "MRI")):
        lines = [{"id": f"test-{image}-0", "answer": answer} for image in range(4)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = ["--task", "vqarad", "--answers", str(tmp_path / "vqarad.jsonl")]
    files += ["--task", "slake_short", "--answers", str(tmp_path / "slake_short.jsonl")]
    out = tmp_path / "run"
    shown = ["--prompt", "bare", "--images", "own"]
    assert main(["score", *files[4:], *shown]) == 2
    assert "--prompt bare: slake_short is asked with the prompt in its name" in capsys.readouterr().err
    assert main(["score", *files, *shown, "--system", "MedVInT", "--out", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {row["task"] for row in shown["scores"]} == {"vqarad", "slake_short"}
    assert {task: len(ids) for task, ids in shown["unanswered"].items()} == {"vqarad": 4, "slake_short": 4}
    run = read_run(out)
    (row, *_) = [row for row in board([out], ["vqarad"]) if row.system == "MedVInT"]
    assert row.unanswered == 4  # what a file lacks is unanswered, not unasked
    assert {task: (of.prompt, len(of.answers)) for task, of in run.items()} == {
        "vqarad": ("bare", 8),
        "slake_short": ("short", 8),
    }
    assert json.loads((out / "run.json").read_text())["checkpoint"]["name"] == "MedVInT"
    assert main(["score", *files, "--out", str(out)]) == 2  # it is not written over
    assert main(["score", *files[:4], "--task", "slake"]) == 2
    assert main(["score", *files[:4], "--system", "a"]) == 2


@pytest.mark.parametrize(
    "line",
    [
        pytest.param({"id": "test-0-0", "text": "Is there a mass?", "answer": None}, id="null"),
        pytest.param({"id": "test-0-0", "text": "Is there a mass?", "answer": 3}, id="a number"),
    ],
)
def test_what_was_asked_is_never_taken_for_the_answer(prepared, tmp_path, line):
    (tmp_path / "answers.jsonl").write_text(json.dumps(line))
    with pytest.raises(InputError, match=r"answers\.jsonl:1\b.*answer is .*text.*leave the row out"):
        read_answers(tmp_path / "answers.jsonl", "vqarad")


@pytest.mark.parametrize("id", [{"a": 1}, 7])
def test_an_id_of_lmms_evals_samples_is_text_or_the_rows_place_counts(prepared, tmp_path, id):
    record = {"id": id, "image_id": "a", "score": 1}
    line = {"doc_id": 0, "target": "yes", "filtered_resps": ["yes"], "recall": record}
    (tmp_path / "samples.jsonl").write_text(json.dumps(line))
    assert read_answers(tmp_path / "samples.jsonl", "vqarad").answers == {"test-0-0": "yes"}


DAMAGE = {
    "no checkpoint": {"checkpoint": None},
    "a checkpoint that is text": {"checkpoint": "a"},
    "a checkpoint without a name": {"checkpoint": {"sha256": "a"}},
    "a checkpoint with an empty name": {"checkpoint": {"name": ""}},
    "trained on a number": {"checkpoint": {"name": "a", "trained_on": 5}},
    "no tasks": {"tasks": {}},
    "answering that is text": {"answering": "fast"},
    "seconds that are no number": {"answering": {"questions": 1, "seconds": "2"}},
    "endless seconds": {"answering": {"questions": 1, "seconds": float("inf")}},
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["leaderboard", "compare", "gate", "inspect"])
def test_a_damaged_manifest_is_one_line_everywhere(prepared, tmp_path, capsys, damage, command):
    good, bad = (small_run(tmp_path / name, right) for name in ("good", "bad"))
    manifest = json.loads((bad / "run.json").read_text())
    (bad / "run.json").write_text(json.dumps(manifest | DAMAGE[damage]))
    calls = {"gate": ["gate", str(bad), "--baseline", str(good)], "inspect": ["inspect", str(bad)]}
    assert main(calls.get(command, [command, str(good), str(bad)])) == 2
    told = capsys.readouterr().err
    assert "is not a run folder" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("of", [float("inf"), -3, 0.5, 1, 900])
def test_counts_that_cannot_be_are_refused(prepared, tmp_path, of):
    run = small_run(tmp_path / "run", right)
    manifest = json.loads((run / "run.json").read_text())
    manifest["tasks"]["vqarad"]["of"] = of
    (run / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"not a run folder.*stllava-eval run|\b900 questions of vqarad\b.*\b8\b"):
        board([run])


def test_answers_that_were_cut_off_are_no_run(prepared, tmp_path):
    run = small_run(tmp_path / "run", right)
    lines = (run / "answers.jsonl").read_text().splitlines(keepends=True)
    (run / "answers.jsonl").write_text("".join(lines[:5]))
    with pytest.raises(InputError, match=r"\b5 answers of vqarad\b.*\b8\b.*asked.*stllava-eval run"):
        read_run(run)


@pytest.mark.parametrize("command", ["leaderboard", "compare", "gate", "inspect"])
def test_answers_to_other_questions_and_runs_of_another_split_are_refused(prepared, tmp_path, capsys, command):
    for damage in ("id", "split"):
        runs = [small_run(tmp_path / damage / name, right) for name in ("a", "b")]
        for run in runs:  # both alike, so that they could be compared
            if damage == "id":
                text = (run / "answers.jsonl").read_text()
                (run / "answers.jsonl").write_text(text.replace('"id": "test-0-0"', '"id": "foreign"'))
            else:
                manifest = json.loads((run / "run.json").read_text())
                manifest["tasks"]["vqarad"]["data"]["sha256_rows"] = "a" * 64
                (run / "run.json").write_text(json.dumps(manifest))
        one, other = map(str, runs)
        calls = {"gate": ["gate", other, "--baseline", one], "inspect": ["inspect", one]}
        assert main(calls.get(command, [command, one, other])) == 2
        shown = capsys.readouterr()
        assert ("foreign" if damage == "id" else "is prepared now") in shown.out + shown.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param('{"trained_on": ["slake"]}', ["slake"], id="told"),
        pytest.param('{"trained_on": []}', [], id="of none"),
        pytest.param("{}", None, id="not told"),
        pytest.param('{"trained_on": "slake"}', None, id="no list"),
        pytest.param("[", None, id="damaged"),
        pytest.param(None, None, id="no such file: a hub id"),
    ],
)
def test_what_a_checkpoint_has_learnt_from(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert trained_on(str(tmp_path)) == expected


@pytest.mark.parametrize("file", ["run.json", "answers.jsonl"])
def test_a_run_folder_with_a_key_twice_is_no_run(prepared, tmp_path, file):
    folder = small_run(tmp_path / "a", right)
    key = "checkpoint" if file == "run.json" else "answer"
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace(f'"{key}": ', f'"{key}": "another", "{key}": ', 1))
    with pytest.raises(InputError, match=rf"/a\b.*not a run folder.*'{key}'.*twice.*stllava-eval run"):
        read_run(folder)


# --- whose folder it is -----------------------------------------------------------------------------------------------


RESERVE = """
import datetime, sys
from stllava_eval.runs import folder as runs
from stllava_eval.errors import InputError

class Frozen(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 11, 30, 12, 0, 0, tzinfo=tz)

runs.datetime.datetime = Frozen
try:
    folder = runs._new_folder(sys.argv[1])
except InputError as error:
    print(error, flush=True)
else:
    if "written" in sys.argv:
        (folder / "run.json").write_text("{}")
    print(folder, flush=True)
    sys.stdin.read()  # until the others have theirs
"""


def reserving(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RESERVE, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_runs_of_one_second_get_a_folder_each(home):
    started = [reserving("checkpoints/a") for _ in range(4)]
    given = sorted(one.stdout.readline().strip() for one in started)
    stem = f"{home}/runs/20261130-120000-a"
    assert given == [stem, f"{stem}-2", f"{stem}-3", f"{stem}-4"]
    assert sorted(map(str, (home / "runs").iterdir())) == given
    for one in started:
        one.communicate(timeout=60)
        assert one.returncode == 0
    assert not list((home / "runs").iterdir())  # nothing was written in any


def test_a_chosen_folder_is_one_runs_alone(home, tmp_path):
    chosen = {"STLLAVA_RUN": str(tmp_path / "run")}
    first = reserving("a", "written", **chosen)
    assert first.stdout.readline().strip() == chosen["STLLAVA_RUN"]
    second = reserving("a", **chosen)
    assert second.stdout.readline().strip() == (
        f"{tmp_path}/run: another process is writing it. Wait for it, or choose another folder."
    )
    first.communicate(timeout=60)
    second.communicate(timeout=60)
    third = reserving("a", **chosen)
    assert "run: another run has been written there meanwhile. Choose another folder" in third.stdout.readline()
    third.communicate(timeout=60)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["run.json"]


@pytest.mark.parametrize("checkpoint", ["x" * 255, "ö" * 120, "models/" + "y" * 1000 + "/", "org/model:latest"])
def test_a_checkpoint_of_any_name_has_a_run_folder(home, checkpoint):
    folder = runs_folder._new_folder(checkpoint)
    assert folder.is_dir()
    assert folder.parent == home / "runs"


def test_a_chosen_folder_whose_name_is_too_long_is_one_line(home, monkeypatch, tmp_path):
    monkeypatch.setenv("STLLAVA_RUN", str(tmp_path / ("x" * 256)))
    with pytest.raises(InputError, match=r"cannot be made or read \(File name too long\)"):
        runs_folder._new_folder("a")


def test_what_cannot_be_a_file_of_answers_or_a_folder_for_a_run_is_one_line(prepared, tmp_path, capsys, monkeypatch):
    answers = write(tmp_path / "a.jsonl", [{"id": "test-0-0", "answer": "yes"}])
    long = str(tmp_path / ("x" * 256))
    for arguments, told in (
        (["score", "--task", "vqarad", "--answers", "/dev/zero"], "/dev/zero: no regular file"),
        (["score", "--task", "vqarad", "--answers", str(answers), "--out", long], "File name too long"),
        (["run", "--tasks", "vqarad", "--out", long], "File name too long"),
        (["convert", str(tmp_path), "--out", long], "it has no config.json"),
        (["leaderboard", long], "is not a run folder"),
    ):
        monkeypatch.delenv("STLLAVA_RUN", raising=False)
        assert main(arguments) == 2
        *_, last = capsys.readouterr().err.strip().splitlines()
        assert last.startswith("stllava-eval: ")
        assert told in last
    monkeypatch.setenv("STLLAVA_RUN", "")  # `run --out` sets it


def test_a_run_that_fails_before_it_is_written_leaves_no_folder(prepared, home):
    with pytest.raises(KeyError):
        runs_folder.write_run([{"task": "vqarad", "id": "test-0-0"}], {"checkpoint": {"name": "a"}})
    assert not (home / "runs").exists()


def edited(run, change):
    """Put every line of a run's answers through `change`, which is handed the line and its number."""
    file = run / "answers.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for number, line in enumerate(lines):
        change(line, number)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("cut", "false", "cut 'false' of test-0-0 is neither true nor false"),
        ("cut", 1, "cut 1 of test-0-0"),
        ("forms", None, "forms None of test-0-0"),
        ("forms", "tag", "forms 'tag' of test-0-0"),
        ("draw", "1", "draw '1' of test-0-0"),
        ("draw", -1, "draw -1 of test-0-0"),
        ("draw", True, "draw True of test-0-0"),
        ("extract", "none", "extract 'none' of test-0-0 is not the run.json's 'final-v1'"),
    ],
)
def test_a_line_that_was_edited_by_hand_is_refused_by_name(prepared, tmp_path, name, value, told):
    run = small_run(tmp_path / "run", right)
    edited(run, lambda line, number: number or line.update({name: value}))
    with pytest.raises(InputError, match=re.escape(told)):
        open_run(run)


def test_an_old_run_with_opened_thoughts_has_one_value_in_score_and_board(prepared, tmp_path):
    run = small_run(tmp_path / "run", right)

    def as_before(line, number):
        for name in ("reply", "extract", "forms", "cut", "draw"):
            del line[name]
        cut = line["reference"] == "yes" and number > 2
        line |= {"answer": "Is it yes? The" if cut else f"no</think>{line['reference']}", "ended": not cut}

    edited(run, as_before)
    of_score = read_answers(run / "answers.jsonl", "vqarad").replies
    of_board = open_run(run).tasks["vqarad"].replies
    assert of_board == of_score
    assert 0 < sum(of[0].cut for of in of_board.values()) < 4


def test_a_run_names_the_commit_of_our_checkout():
    if not (ROOT / ".git").exists():  # as in an unpacked sdist
        pytest.skip(f"needs git's record of the checkout: {ROOT} has no .git (run the tests in a clone)")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert runs_folder.commit().removesuffix("+changes") == head.stdout.strip()
