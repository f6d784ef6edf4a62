"""One run, one value: lmms-eval's table, scores.json, score, board, page, compare and gate, to the last digit."""

import base64
import csv
import gzip
import io
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from fault_server import FaultServer, says, text

from stllava_eval.cli.main import main
from stllava_eval.reports.board_formats import board_csv
from stllava_eval.reports.board_rows import board
from stllava_eval.reports.cells import mean_text
from stllava_eval.reports.compare import compare
from stllava_eval.reports.gate import gate
from stllava_eval.reports.gate_policy import read_policy
from stllava_eval.reports.page import page
from stllava_eval.runs.folder import open_run

# lmms_eval 0.7.3 leaves the results file open: loggers/evaluation_tracker.py:212
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file .*results.json:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*results.json:pytest.PytestUnraisableExceptionWarning"),
]

WORDS = {"Is there a mass?": ["yes", "no"], "What organ is shown?": ["the left lung", "a lung, on the left"]}


def plain(answer: str):
    return answer


def thinking(answer: str):
    return f"<think>It could be yes or no or the left lung.</think>\n<answer>{answer}</answer>"


def opened_by_the_template(answer: str):
    return f"It could be yes or no or the left lung.\n</think>\n\n{answer}"


def now_and_then_cut(answer: str):
    if answer in ("no", "the left lung"):
        return says("It could be yes, or the left lung", finish="length")
    return opened_by_the_template(answer)


def boxed(answer: str):
    return f"So it is \\boxed{{\\text{{{answer}}}}}."


class Model:
    """Says the first answer that fits a question, then the second, then the first again, in a form."""

    def __init__(self, form) -> None:
        self.form, self.asked = form, dict.fromkeys(WORDS, 0)

    def __call__(self, request):
        question = text(request)
        self.asked[question] += 1
        return self.form(WORDS[question][self.asked[question] % 2])


def values_of_lmms_eval(results) -> dict[str, float]:
    return {
        key.split(",")[0]: value
        for key, value in results["results"]["vqarad"].items()
        if "," in key and "_stderr" not in key
    }


@pytest.fixture(autouse=True)
def only_our_tasks(monkeypatch):
    """lmms-eval's own 1,900 task files are left aside: reading them takes longer than all else here."""
    import lmms_eval.__main__ as lmms_eval_main

    monkeypatch.setattr(lmms_eval_main, "TaskManager", partial(lmms_eval_main.TaskManager, include_defaults=False))


def evaluate(model_args: str, tmp_path: Path, *more: str) -> dict[str, float]:
    """Call lmms-eval's command and return what it writes into its own table."""
    from lmms_eval.__main__ import cli_evaluate

    # one for each call: lmms-eval names its files by the second, and appends to one that is there
    out = tmp_path / "lmms" / str(len(list(tmp_path.glob("lmms/*"))))
    sys.argv = [
        *("lmms-eval", "--model", "stllava_med", "--tasks", "vqarad", "--model_args", model_args),
        *("--output_path", str(out), "--log_samples", *more),
    ]
    cli_evaluate()
    newest = max(out.rglob("*results.json"), key=lambda file: file.stat().st_mtime_ns)
    return values_of_lmms_eval(json.loads(newest.read_text()))


def values_everywhere(run: Path, samples: Path, capsys) -> dict[str, dict[str, float]]:
    """By where it is shown, the value of each score."""
    stored = json.loads((run / "scores.json").read_text())["scores"]
    found = {"scores.json": {row["metric"]: row["value"] for row in stored if row["category"] == "all"}}
    for name, file in (("score", run / "answers.jsonl"), ("score of lmms-eval's samples", samples)):
        capsys.readouterr()
        assert main(["score", "--task", "vqarad", "--answers", str(file), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["scores"]
        found[name] = {row["metric"]: row["value"] for row in rows if row["category"] == "all"}
    rows = board([run])
    (own,) = [row for row in rows if row.kind == "measured"]
    by_kind = ("words_open", "words_closed")  # what boards alone have
    found["board"] = {name: score.value for name, score in own.scores.items() if name not in by_kind}
    found["board.csv"] = {
        line["metric"]: float(line["value"])
        for line in csv.DictReader(io.StringIO(board_csv(rows)))
        if line["system"] == own.system and line["metric"] not in by_kind
    }
    other = run.parent / "other"
    for difference in compare([run, other]).differences:
        found.setdefault("compare", {})[difference.metric] = difference.first
    for check in gate(run, other, read_policy()).checks:
        if check.score in found["board"]:
            found.setdefault("gate", {})[check.score] = check.candidate
    packed = re.search(r'id="data">([^<]*)<', page(rows))[1]
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    (row,) = [row for row in data["rows"] if row["system"] == own.system]
    shown = {name: cell[4] for name, cell in row["scores"].items()}
    assert shown.pop("empty") == str(own.empty)
    assert shown == {name: mean_text(own.scores[name]) for name in shown}
    return found


TAGS = ("--reasoning_tags", '[["<think>", "</think>"]]')


@pytest.mark.parametrize(
    ("form", "options"),
    [
        *(pytest.param(form, (), id=form.__name__) for form in (plain, thinking, opened_by_the_template, boxed)),
        pytest.param(now_and_then_cut, (), id="cut"),
        pytest.param(thinking, ("--reasoning_tags", "none"), id="thinking, reasoning_tags none"),
        *(pytest.param(form, TAGS, id=f"{form.__name__}, reasoning_tags") for form in (thinking, now_and_then_cut)),
        *(
            pytest.param(form, ("--use_cache", "cache"), id=f"{form.__name__}, use_cache")
            for form in (plain, thinking, now_and_then_cut)
        ),
    ],
)
def test_one_run_has_one_value_everywhere(prepared, tmp_path, monkeypatch, capsys, form, options):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.chdir(tmp_path)
    with FaultServer(reply=Model(form)) as server:
        arguments = f"backend=openai_server,base_url={server.url},concurrency=1"
        monkeypatch.setenv("STLLAVA_RUN", str(tmp_path / "other"))
        first = evaluate(arguments, tmp_path, *options)
        monkeypatch.setenv("STLLAVA_RUN", str(tmp_path / "run"))
        table = evaluate(arguments, tmp_path, *options)
        assert len(server.requests) == (8 if "--use_cache" in options else 16)
    assert table == first
    samples = max(tmp_path.rglob("*samples_vqarad.jsonl"), key=lambda file: file.stat().st_mtime_ns)
    for where, values in values_everywhere(tmp_path / "run", samples, capsys).items():
        assert values == {name: table[name] for name in values}, where
    cut = 0.5 if form is now_and_then_cut else 0
    assert (table["closed_accuracy"], table["cut"], table["unparsed"]) == (0.5, cut, cut)
    if form is not now_and_then_cut:  # every form scores what the plain answers do
        assert table["recall"] == 1
        assert table["f1"] == pytest.approx((1 + 0.8) / 2)  # lung, on, left for left, lung: 2 of 3 and 2 of 2


def test_the_raw_reply_and_its_answer_are_both_kept(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("STLLAVA_RUN", str(tmp_path / "run"))
    with FaultServer(reply=Model(thinking)) as server:
        evaluate(f"backend=openai_server,base_url={server.url}", tmp_path)
    line = json.loads((tmp_path / "run" / "answers.jsonl").read_text().splitlines()[0])
    assert line["reply"] == thinking(line["answer"])
    assert (line["extract"], line["forms"], line["cut"]) == ("final-v1", ["thought", "tag"], False)
    run = open_run(tmp_path / "run")
    assert run.tasks["vqarad"].settings["extract"] == "final-v1"
    row = json.loads((tmp_path / "run" / "scores.json").read_text())["scores"][0]
    assert "|extract final-v1|images own|decoding greedy (temperature 0)|max_new_tokens 1024|" in row["signature"]


def test_the_rule_none_scores_the_raw_reply_everywhere(prepared, tmp_path, monkeypatch, capsys):
    with FaultServer(reply=Model(thinking)) as server:
        arguments = f"backend=openai_server,base_url={server.url},concurrency=1,extract=none"
        for name in ("other", "run"):
            monkeypatch.setenv("STLLAVA_RUN", str(tmp_path / name))
            table = evaluate(arguments, tmp_path)
    assert table["closed_accuracy_v1"] == 0  # which reads the first verdict, here one of the thought
    samples = max(tmp_path.rglob("*samples_vqarad.jsonl"), key=lambda file: file.stat().st_mtime_ns)
    for where, values in values_everywhere(tmp_path / "run", samples, capsys).items():
        assert values == {name: table[name] for name in values}, where
    capsys.readouterr()
    answers = str(tmp_path / "run" / "answers.jsonl")
    assert main(["score", "--task", "vqarad", "--answers", answers, "--extract", "final", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["scores"]
    (closed,) = [row for row in rows if (row["metric"], row["category"]) == ("closed_accuracy", "all")]
    assert closed["value"] == 0.5


def test_sampled_replies_are_scored_by_their_mean_everywhere(prepared, tmp_path, monkeypatch, capsys):
    lock_step = ["yes", "no", "no"]

    def reply(request):
        # three draws of each question in a row
        if "mass" in text(request):
            return thinking(lock_step[request["seed"] - 7])
        return thinking(["left lung", "left", "heart"][request["seed"] - 7])

    with FaultServer(reply=reply) as server:
        sampling = "temperature=0.6,top_p=0.95,top_k=20,seed=7,draws=3"
        arguments = f"backend=openai_server,base_url={server.url},concurrency=1,{sampling}"
        for name in ("other", "run"):
            monkeypatch.setenv("STLLAVA_RUN", str(tmp_path / name))
            table = evaluate(arguments, tmp_path)
        assert len(server.requests) == 2 * 8 * 3
    assert table["closed_accuracy"] == pytest.approx(1 / 3)
    assert table["recall"] == pytest.approx((1 + 1 / 2 + 0) / 3)  # of left, lung
    samples = max(tmp_path.rglob("*samples_vqarad.jsonl"), key=lambda file: file.stat().st_mtime_ns)
    for where, values in values_everywhere(tmp_path / "run", samples, capsys).items():
        assert values == {name: table[name] for name in values}, where
    stored = json.loads((tmp_path / "run" / "scores.json").read_text())["scores"]
    of_draws = {row["category"]: row["value"] for row in stored if row["metric"] == "closed_accuracy"}
    assert [of_draws[f"draw={number}"] for number in range(3)] == [1, 0, 0]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["decoding"] == "sampled: temperature 0.6, top_p 0.95, top_k 20, seed 7"
    assert run["tasks"]["vqarad"]["draws"] == 3


def test_a_draw_that_failed_leaves_the_mean_of_the_others(prepared, tmp_path, monkeypatch):
    def reply(request):
        return says(None, finish="content_filter") if request["seed"] == 1 else WORDS[text(request)][0]

    monkeypatch.setenv("STLLAVA_RUN", str(tmp_path / "run"))
    with FaultServer(reply=reply) as server:
        table = evaluate(f"backend=openai_server,base_url={server.url},temperature=1,draws=2", tmp_path)
    assert table["closed_accuracy"] == 1
    run = json.loads((tmp_path / "run" / "run.json").read_text())["tasks"]["vqarad"]
    assert (run["unanswered"], run["failed_requests"]) == ([], 8)


def test_draws_of_a_checkpoint_are_those_of_its_seed(prepared, checkpoint, tmp_path, monkeypatch):
    texts = []
    for name, draws in (("one", 2), ("two", 2), ("three", 3)):
        monkeypatch.setenv("STLLAVA_RUN", str(tmp_path / name))
        evaluate(f"pretrained={checkpoint},temperature=1.5,seed=3,draws={draws},max_new_tokens=12", tmp_path)
        lines = (tmp_path / name / "answers.jsonl").read_text().splitlines()
        texts.append({(row["id"], row["draw"]): row["reply"] for row in map(json.loads, lines)})
    assert texts[0] == texts[1]
    assert texts[0].items() <= texts[2].items()
    assert len(texts[2]) == 24
    assert len(set(texts[2].values())) > 12


def test_a_thought_that_a_local_template_opens_is_cut_where_it_never_closes(
    prepared, checkpoint, tmp_path, monkeypatch
):
    from stllava_eval.inference.answerer import Answerer

    monkeypatch.setattr(Answerer, "preprocessing", {"prompt": "USER: {question} ASSISTANT: <think>\n"}, raising=True)
    monkeypatch.setenv("STLLAVA_RUN", str(tmp_path / "run"))
    table = evaluate(f"pretrained={checkpoint}", tmp_path)
    assert (table["cut"], table["closed_accuracy"]) == (1, 0)


def test_a_cut_thought_is_cut_when_the_cache_holds_all_other_replies(prepared, tmp_path, monkeypatch):
    asked = []

    def reply(request):
        asked.append(text(request))
        if len(asked) == 1:
            return says(None, finish="content_filter")  # no answer, so none that the cache keeps
        if len(asked) > 8:
            return says("It could be yes, or the left lung", finish="length")
        return opened_by_the_template(WORDS[text(request)][0])

    tables = []
    with FaultServer(reply=reply) as server:
        for name in ("first", "second", "third"):
            monkeypatch.setenv("STLLAVA_RUN", str(tmp_path / name))
            arguments = f"backend=openai_server,base_url={server.url},concurrency=1"
            tables.append(evaluate(arguments, tmp_path, "--use_cache", str(tmp_path / "cache")))
    assert len(asked) == 9
    assert [table["cut"] for table in tables] == [0, 1 / 8, 1 / 8]
    for name in ("second", "third"):
        (line,) = [
            row for row in map(json.loads, (tmp_path / name / "answers.jsonl").read_text().splitlines()) if row["cut"]
        ]
        assert (line["answer"], line["reply"]) == ("", "<think>\nIt could be yes, or the left lung")
