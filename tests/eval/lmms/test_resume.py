import json
import os
import random
import signal
import time
from functools import partial

import pytest
from fault_server import FaultServer, completes, refuses
from harness import evaluate, run_folders
from PIL import Image

from stllava_eval.cli.main import main
from stllava_eval.errors import InputError
from stllava_eval.inference.answerer import Answerer
from stllava_eval.inference.types import Answer, Question
from stllava_eval.lmms.model import StllavaMed
from stllava_eval.lmms.resume import SavedAnswers, question_key


@pytest.fixture
def stopped(monkeypatch):
    """Make the answering engine stop after so many answers of a call; the numbers of questions that it was given."""
    given: list[int] = []
    original = Answerer.answer

    def stop_after(count: int | None):
        def answer(self, questions, *args, **kwargs):
            given.append(len(questions))
            for place, one in enumerate(original(self, questions, *args, **kwargs)):
                if place == count:
                    raise KeyboardInterrupt
                yield one

        monkeypatch.setattr(Answerer, "answer", answer)

    stop_after.given = given
    return stop_after


def test_a_stopped_run_is_gone_on_from_and_ends_as_an_unbroken_one(prepared, checkpoint, stopped):
    stopped(None)
    evaluate(StllavaMed(str(checkpoint), batch_size=2))
    for count in (5, 7):
        stopped(count)
        with pytest.raises(KeyboardInterrupt):
            evaluate(StllavaMed(str(checkpoint), batch_size=2))
    assert len(list((prepared / "unfinished").iterdir())) == 1
    stopped(None)
    evaluate(StllavaMed(str(checkpoint), batch_size=2))
    assert stopped.given == [24, 24, 19, 12]  # nothing is answered twice
    unbroken, gone_on = run_folders(prepared)
    assert (unbroken / "answers.jsonl").read_bytes() == (gone_on / "answers.jsonl").read_bytes()
    assert not list((prepared / "unfinished").iterdir())


def test_another_checkpoint_prompt_or_image_starts_afresh(prepared, checkpoint, stopped):
    stopped(5)
    with pytest.raises(KeyboardInterrupt):
        evaluate(StllavaMed(str(checkpoint)))
    stopped(None)
    evaluate(StllavaMed(str(checkpoint), images="black"))
    evaluate(StllavaMed(str(checkpoint), dtype="bfloat16"))
    assert stopped.given == [24, 24, 24]
    assert len(list((prepared / "unfinished").iterdir())) == 1  # the stopped run's


PRELOAD = ("lmms_eval.evaluator",)


def answer_slowly(checkpoint: str, counts) -> None:
    """Evaluate with a pause after each answer, and send how many answers the engine gave."""
    original, answered = Answerer.answer, []

    def slow(self, questions, **options):
        for answer in original(self, questions, **options):
            time.sleep(0.3)
            answered.append(1)
            yield answer

    Answerer.answer = slow
    evaluate(StllavaMed(checkpoint))
    counts.send(len(answered))


def test_kill_9_loses_at_most_the_batch_in_hand(prepared, checkpoint, warm_processes):
    """Killed at five random moments; then it ends with the answers of an unbroken run."""
    evaluate(StllavaMed(str(checkpoint)))
    counted, counts = warm_processes.Pipe(duplex=False)
    known = 0
    for wanted in sorted(random.Random(4).sample(range(1, 20), 5)):
        process = warm_processes.Process(target=answer_slowly, args=(str(checkpoint), counts))
        process.start()
        end = time.monotonic() + 120
        while known < wanted and time.monotonic() < end and process.is_alive():
            time.sleep(0.01)
            files = list((prepared / "unfinished").glob("*.jsonl"))
            now = sum(file.read_bytes().count(b"\n") for file in files)
            assert now >= known  # what was on the disk stays there
            known = now
        assert known >= wanted
        assert process.is_alive(), "it ended before it could be killed"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = warm_processes.Process(target=answer_slowly, args=(str(checkpoint), counts))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert counted.recv() == 24 - known
    unbroken, gone_on = run_folders(prepared)
    assert (unbroken / "answers.jsonl").read_bytes() == (gone_on / "answers.jsonl").read_bytes()


def test_a_line_that_a_kill_has_cut_is_not_read_and_not_continued(home):
    kept = SavedAnswers("f" * 64, 0)
    kept.add([("a", Answer("yes", 1, True)), ("b", Answer("no\u2028", 2, False))])
    with kept.file.open("ab") as file:
        file.write(b'{"key": "c", "text": "n')
    again = SavedAnswers("f" * 64, 0)
    assert again.answers == {"a": Answer("yes", 1, True), "b": Answer("no\u2028", 2, False)}
    again.add([("c", Answer("no", 1, True))])
    assert set(SavedAnswers("f" * 64, 0).answers) == {"a", "b", "c"}
    assert [json.loads(line)["key"] for line in kept.file.read_text("utf-8").split("\n")[:-1]] == ["a", "b", "c"]


def test_half_a_character_and_the_key_in_answers_of_a_server_end_no_run_and_stand_in_no_file(
    prepared, monkeypatch, tmp_path
):
    key = "sk-secret/0123456789+abc"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    asked = []

    def reply(request):
        asked.append(request)
        if len(asked) == 5:
            return refuses(402, "pay")
        return completes({"content": f"Yes \ud83d \0 {key}"})

    with FaultServer(reply=reply) as server:
        model = partial(StllavaMed, backend="openai_server", base_url=server.url, concurrency=1)
        with pytest.raises(SystemExit):
            evaluate(model(), ["vqarad"])
        kept = b"".join(file.read_bytes() for file in (prepared / "unfinished").iterdir())
        evaluate(model(), ["vqarad"])
    assert len(asked) == 4 + 1 + 4  # nothing is paid twice
    (folder,) = run_folders(prepared)
    answers = [json.loads(line)["answer"] for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    assert answers == ["Yes \ufffd \0 ***"] * 8
    assert main(["leaderboard", str(folder), "--out", str(tmp_path / "board")]) == 0
    written = [file for of in (folder, tmp_path / "board") for file in of.rglob("*") if file.is_file()]
    assert len(written) > 4
    assert not [file for file in written if key.encode() in file.read_bytes()]
    assert key.encode() not in kept


def test_any_text_can_be_kept_and_comes_back_as_it_was(home):
    texts = ["Yes \ud83d", "\udc00\ud800", "a\0b", "\\ud83d", 'a "quoted"\nline\u2028', "\U0001f600", "\ufffd\uffff"]
    kept = SavedAnswers("f" * 64, 0)
    kept.add([(f"key {number} {text}", Answer(text, 1, True)) for number, text in enumerate(texts)])
    assert [answer.text for answer in SavedAnswers("f" * 64, 0).answers.values()] == texts
    assert len(kept.file.read_text("utf-8").split("\n")) == len(texts) + 1


def test_lines_that_are_not_ours_are_not_read(home):
    kept = SavedAnswers("f" * 64, 0)
    kept.add([("a", Answer("yes", 1, True))])
    tokens = ("1e999", "NaN", "9" * 5000, "[]", '"many"', "null")
    lines = [
        b'{"key": "%d", "text": "x", "tokens": %s, "ended": true}' % one for one in enumerate(map(str.encode, tokens))
    ]
    lines += [
        b'{"key": "b", "text": null, "tokens": 1, "ended": true}',
        b'{"key": [], "text": "x"}',
        b"[" * 9999,
        b"\xff",
    ]
    with kept.file.open("ab") as file:
        file.write(b"\n".join(lines) + b"\n")
    assert SavedAnswers("f" * 64, 0).answers == {"a": Answer("yes", 1, True)}


def test_every_process_reads_all_and_a_written_run_leaves_none(home):
    first, second = SavedAnswers("a" * 64, 0), SavedAnswers("a" * 64, 1)
    first.add([("a", Answer("yes", 1, True))])
    second.add([("b", Answer("no", 1, True))])
    assert set(SavedAnswers("a" * 64, 1).answers) == {"a", "b"}
    assert not SavedAnswers("b" * 64, 0).answers
    first.done()
    second.done()
    assert not list(first.file.parent.iterdir())


@pytest.mark.parametrize("options", [{"text": "Is it not?"}, {"max_new_tokens": 9}, {"until": ("\n",)}])
def test_a_question_asked_otherwise_is_another_question(options):
    asked = {"text": "Is it?", "max_new_tokens": 8, "until": ()}
    assert question_key("vqarad", "test", 3, **asked) != question_key("vqarad", "test", 3, **asked | options)


def test_a_full_disk_is_one_line(home, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot be written .*Free some space"):
        SavedAnswers("a" * 64, 0).add([("a", Answer("yes", 1, True))])


FOREIGN = """
dataset_path: json
dataset_kwargs: {data_files: {test: rows.json}}
test_split: test
task: colours
output_type: generate_until
doc_to_messages: !function functions.messages
doc_to_visual: !function functions.image
doc_to_text: question
doc_to_target: reference
generation_kwargs: {max_new_tokens: 5, until: ["</s>"]}
metric_list: [{metric: exact_match}]
"""
FUNCTIONS = """
from PIL import Image
def image(row):
    return [Image.new("RGB", (40, 30), row["colour"])]
def messages(row, kwargs=None):
    content = [{"type": "image", "url": image(row)[0]}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": content}]
"""


def test_a_task_that_is_not_ours_is_answered_and_not_kept(prepared, checkpoint, tmp_path, monkeypatch):
    """No fingerprint knows its data."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    rows = [{"question": "Why?", "reference": "a", "colour": colour} for colour in ("red", "blue", "white")]
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "colours.yaml").write_text(FOREIGN)
    (folder / "functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(folder)
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(SavedAnswers, "add", lambda self, answers: kept.extend(answers))
    kept: list[object] = []
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name="stllava_med")
    results = simple_evaluate(StllavaMed(str(checkpoint)), tasks=["colours"], task_manager=manager)
    texts = [sample["filtered_resps"][0] for sample in results["samples"]["colours"]]
    answerer = Answerer(str(checkpoint))
    asked = [Question("Why?", partial(Image.new, "RGB", (40, 30), row["colour"]), 5) for row in rows]
    assert texts == [answer.text for _, answer in sorted(answerer.answer(asked, progress=False))]
    assert not kept
