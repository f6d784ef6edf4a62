"""Questions that a model asks about images, its answers, what is left out of them, and that nothing is lost."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import png
from families import write_family
from PIL import Image

from stllava_eval.errors import InputError
from stllava_eval.inference.answerer import Answerer
from stllava_eval.inference.generic import ASKING_INSTRUCTION
from stllava_eval.inference.types import Answer, Question, Sampling
from stllava_train.preferences import candidates as module
from stllava_train.preferences.candidates import (
    PRESETS,
    CandidateSettings,
    blind_answers,
    check_settings,
    images_in,
    listed_images,
    sampled,
    skip_reason,
)
from stllava_train.preferences.make_candidates import make_candidates
from stllava_train.preferences.rows import Candidate, read_candidates, rouge_l
from stllava_train.resumable import read_manifest, read_rows

OURS = PRESETS["ours"]
FEW = {"describe_tokens": 12, "question_tokens": 12, "answer_tokens": 12}


@pytest.fixture(autouse=True)
def one_thread(home):
    """And no prepared test split."""
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    """Twelve images in two folders, and a file that is none."""
    for number in range(12):
        file = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png((20 * number, 255 - 20 * number, (90 * number) % 256)))
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


class Script:
    """An answerer whose words are made by a function, and which answers in an order of its own."""

    name, sha256, dtype = "script", "0" * 64, torch.float32
    tokenizer = SimpleNamespace(all_special_tokens=["<s>", "</s>"], all_special_ids=[1, 2])

    def __init__(self, say, seed: int = 0) -> None:
        self.say, self.draw = say, random.Random(seed)
        self.asked = []

    def answer(self, questions, progress=True, on_answer=None):
        asked = list(questions)
        due = list(range(len(asked)))
        while due:
            place = due.pop(self.draw.randrange(len(due)))
            said = self.say(asked[place])
            found = said if isinstance(said, Answer) else Answer(said, len(said.split()), True)
            for question in on_answer(place, found):
                due.append(len(asked))
                asked.append(question)
            self.asked.append(asked[place])
            yield place, found


def write_candidates(answerer, names, folder, out, settings, *others, **named):
    checkpoint = {"name": answerer.name, "sha256": answerer.sha256, "dtype": str(answerer.dtype)}

    def draw(images):
        return module.rows_of(answerer, images, settings)

    return module.write_candidates(draw, checkpoint, names, folder, out, settings, *others, **named)


def rows(script, folder, tmp_path, settings=OURS, names=("a/0.png",), out="c.jsonl") -> list[dict]:
    write_candidates(script, names, folder, tmp_path / out, settings, progress=False)
    return read_rows(tmp_path / out)


def test_the_authors_prompts_and_settings(checkpoint, shared, folder, tmp_path):
    golden = json.loads((shared / "golden" / "g_prompts" / "prompts.json").read_text())
    script = Script(lambda question: "X" if question.template else "Q?")
    rows(script, folder, tmp_path, PRESETS["authors"])
    answerer = Answerer(str(checkpoint))
    describe, *others = script.asked
    asks, answers = [one for one in others if one.text is None], [one for one in others if one.text is not None]

    def prompt(question):
        return answerer.prompt(question.text, question.history, question.template).removeprefix("<s>")

    of_questions, of_answers = golden["question_generation"], golden["answer_generation"]
    assert prompt(describe) == of_questions["round1_prompt_v1_sq"]
    assert describe.sampling is None
    assert describe.max_new_tokens == of_questions["round1_decoding"]["max_new_tokens"]
    assert len(asks) == of_questions["n_shot_cli_default"]
    assert len(answers) == 2 * len(asks)
    for some, expected, how in (
        (asks, of_questions["round2_prompt_v1_sq_given_first_answer_X"], of_questions["round2_decoding"]),
        (answers, of_answers["prompt_v1"], of_answers["decoding"]),
    ):
        for one in some:
            assert prompt(one) == expected
            assert one.max_new_tokens == how["max_new_tokens"]
            assert one.sampling == Sampling(how["temperature"], how["top_k"], how["top_p"], seed=0)
    assert sorted(one.sample_index for one in asks) == [0, 1, 2, 3, 4]
    assert sorted(one.sample_index for one in answers) == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        pytest.param("Is there a mass?", True, None, id="a question"),
        pytest.param("There is a mass.", True, "no question", id="a statement"),
        pytest.param("", True, "no question", id="nothing"),
        pytest.param("?!", True, "no question", id="no words"),
        pytest.param("Is there a mass?", False, "no question", id="cut by its limit"),
        pytest.param("Is it? ASSISTANT: no", True, "no question", id="a role word"),
        pytest.param("Is it <s>?", True, "no question", id="a special token"),
        pytest.param("is the LUNG shown", True, "no question", id="no question mark"),
        pytest.param("Is the lung shown?", True, "repeat", id="the same words"),
        pytest.param("Is the heart shown?", True, None, id="another word, 3 of 4"),
        pytest.param(
            "What is seen in the upper left part of this image of the lung?",
            True,
            "near repeat",
            id="a word less of 14",
        ),
    ],
)
def test_what_is_left_out_of_questions(text, ended, expected):
    kept = ["Is the lung shown?", "What is seen in the upper left part of this image of the right lung?"]
    assert skip_reason(Answer(text, 9, ended), kept, CandidateSettings(), ["<s>"]) == expected
    theirs = skip_reason(Answer(text, 9, ended), kept, PRESETS["authors"], ["<s>"])
    assert theirs == ("no question" if text in ("", "?!", "Is it? ASSISTANT: no", "Is it <s>?") else None)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("the left lung", "The left lung.", 1.0), ("p q r s", "p x r y", 0.5), ("p", "q", 0.0), ("p q", "q p", 0.5)],
)
def test_rouge_l_is_twice_the_longest_common_subsequence_by_both_lengths(one, other, expected):
    assert rouge_l(one, other) == pytest.approx(expected)


def test_alike_answers_are_drawn_again_and_a_question_short_of_answers_is_left_out(folder, tmp_path):
    texts = {0: "Where?", 1: "Which?", 2: "How?"}
    drawn = {
        "Where?": ["left", "Left.", "left", "right"],  # the fourth draw differs
        "Which?": ["a lung"] * 6,
        "How?": [Answer("", 0, True), Answer("on and on", 12, False), *["by CT"] * 2, "by MRI", "never drawn"],
    }

    def say(question):
        if question.template:
            return "An image."
        return texts[question.sample_index] if question.text is None else drawn[question.text][question.sample_index]

    script = Script(say)
    (row,) = rows(script, folder, tmp_path, CandidateSettings(questions=3, redraws=4))
    assert [(one["question"], one["answers"], one["left_out"]) for one in row["questions"]] == [
        ("Where?", ["left", "right"], None),
        ("Which?", ["a lung"], "answers alike"),
        ("How?", ["by CT", "by MRI"], None),
    ]
    draws = {text: sorted(one.sample_index for one in script.asked if one.text == text) for text in drawn}
    assert draws == {"Where?": [0, 1, 2, 3], "Which?": [0, 1, 2, 3, 4, 5], "How?": [0, 1, 2, 3, 4]}
    assert read_manifest(tmp_path / "c.jsonl")["counts"] == {
        "images": 1,
        "images that cannot be decoded": 0,
        "questions": 3,
        "candidates": 2,
        "answers alike": 1,
    }
    (first, second) = read_candidates(tmp_path / "c.jsonl")
    assert (first.id, first.question, first.answers) == ("a/0.png#0", "Where?", ("left", "right"))
    assert second.id == "a/0.png#2"


def test_the_order_in_which_answers_come_changes_nothing(folder, tmp_path):
    def say(question):
        draw = random.Random(f"{question.text} {question.history} {question.sample_index} {question.image_key}")
        if question.text is None:
            return draw.choice(["Where?", "Which?", "How?", "No question."])
        return draw.choice(["left", "right", "no", Answer("", 0, True)])

    names = images_in(folder)
    found = []
    for seed in range(5):
        found.append(rows(Script(say, seed), folder, tmp_path, CandidateSettings(), names, f"{seed}.jsonl"))
    assert all(one == found[0] for one in found)
    assert [row["image"] for row in found[0]] == names


def test_equal_pairs_are_kept_by_the_authors_preset(folder, tmp_path):
    script = Script(lambda question: "Same?")
    (row,) = rows(script, folder, tmp_path, PRESETS["authors"])
    assert [one["answers"] for one in row["questions"]] == [["Same?", "Same?"]] * 5


def test_a_description_that_holds_a_special_token_can_be_asked_about(folder, tmp_path):
    script = Script(lambda question: "A </s> lung." if question.template else "Q?")
    rows(script, folder, tmp_path)
    assert {one.history[0][1] for one in script.asked if one.text is None} == {"A  lung."}


def test_images_that_cannot_be_decoded_are_listed_and_counted(folder, tmp_path):
    (folder / "broken.png").write_bytes(b"\x89PNG no image")
    script = Script(lambda question: "Q?")
    counts = write_candidates(
        script, ["a/0.png", "broken.png"], folder, tmp_path / "c.jsonl", CandidateSettings(), progress=False
    )
    assert counts["images"] == 2
    assert counts["images that cannot be decoded"] == 1
    first, broken = read_rows(tmp_path / "c.jsonl")
    assert first["image"] == "a/0.png"
    assert broken["questions"] == []
    assert broken["broken"].startswith(f"its image {folder / 'broken.png'}: ")


def test_test_images_are_refused(prepared, folder, tmp_path):
    (folder / "test.png").write_bytes(png((60, 195, 90)))  # an image of the small test splits
    script = Script(lambda question: "Q?")
    with pytest.raises(InputError, match=r"test image vqarad/test-1\.png\b.*pixel.*\b1 images.*--allow-test-images"):
        write_candidates(script, ["test.png"], folder, tmp_path / "c.jsonl", CandidateSettings(), progress=False)
    write_candidates(script, ["test.png"], folder, tmp_path / "c.jsonl", CandidateSettings(), True, progress=False)
    assert read_manifest(tmp_path / "c.jsonl")["test_images"] == 1


def test_images_are_named_sorted_and_sampled(folder, tmp_path):
    names = images_in(folder)
    assert names[:3] == ["a/0.png", "a/10.png", "a/2.png"]
    assert len(names) == 12
    some = sampled(names, 5, 0)
    assert len(some) == 5
    assert some == sorted(some, key=names.index) == sampled(names, 5, 0)
    assert some != sampled(names, 5, 1)
    (tmp_path / "list.txt").write_text("b/1.png\n\na/0.png\n")
    assert listed_images(tmp_path / "list.txt", folder) == ["b/1.png", "a/0.png"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a/0.png\nno.png\n", r"list\.txt:2: no\.png\b.*not in.*--images"),
        ("a/0.png\na/0.png\n", r"list\.txt:2: a/0\.png\b.*line 1\b.*once"),
        ("../a/0.png\n", r"list\.txt:1: \.\./a/0\.png\b.*plain.*relative"),
        ("./a/0.png\n", r"list\.txt:1: \./a/0\.png\b.*plain.*relative"),
        ("\n", r"list\.txt\b.*no image.*Write"),
    ],
)
def test_a_list_of_images_with_a_slip_is_refused(folder, tmp_path, text, said):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InputError, match=said):
        listed_images(tmp_path / "list.txt", folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": 1}, r"answers=1\b.*prefer.*\b2 or more"),
        ({"questions": 0}, r"questions=0\b.*whole number.*from 1\b"),
        ({"answer_temperature": 0.0}, r"answer_temperature=0\.0\b.*number above 0"),
        ({"question_top_p": 1.5}, r"question_top_p=1\.5\b.*share.*up to 1\b"),
        ({"question_top_k": -1}, "question_top_k=-1"),
        ({"alike": 0.0}, r"alike=0\.0"),
        ({"redraws": -1}, "redraws=-1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, said):
    with pytest.raises(InputError, match=said):
        check_settings(replace(CandidateSettings(), **changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"questions": [{"id": "x", "question": "Q?", "answers": ["a"], "left_out": None}]}, "a text is missing"),
        ({"questions": [{"id": "x", "question": None, "answers": ["a", "b"], "left_out": None}]}, "a text is missing"),
        ({"questions": [{"id": "x"}]}, "'left_out'"),
        (
            {
                "image": "/etc/a.png",
                "questions": [{"id": "x", "question": "Q", "answers": ["a", "b"], "left_out": None}],
            },
            "image /etc/a.png lies outside",
        ),
        ({"questions": [{"id": "x", "question": "\ud800", "answers": ["a", "b"], "left_out": None}]}, "half a char"),
        (
            {"questions": [{"id": "x", "question": "Q?", "answers": ["a", "b"], "left_out": None}] * 2},
            "x appears twice",
        ),
    ],
)
def test_rows_that_are_no_candidates_are_refused_with_their_line(tmp_path, change, said):
    row = {"image": "a.png", "image_sha256": "0", "questions": []}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(InputError, match=rf"c\.jsonl:2\b.*candidates \(.*{said}.*stllava-train candidates"):
        read_candidates(tmp_path / "c.jsonl")


def test_blind_answers_are_about_a_black_image(checkpoint):
    some = [Candidate(f"a#{number}", "a.png", "0", f"Is it {number}?", ("yes", "no")) for number in range(3)]
    answerer = Answerer(str(checkpoint))
    found = blind_answers(answerer, some, tokens=12)
    black = [Question(one.question, lambda: Image.new("RGB", (64, 64)), 12) for one in some]
    assert found == {some[place].id: answer.text for place, answer in answerer.answer(black, progress=False)}


def test_what_a_real_model_draws_hangs_neither_on_the_images_beside_nor_on_the_batch(checkpoint, folder, tmp_path):
    settings = replace(PRESETS["authors"], questions=2, **FEW)
    names = images_in(folder)[:4]
    together = rows(Answerer(str(checkpoint)), folder, tmp_path, settings, names, "together.jsonl")
    for number, name in enumerate(names):
        answerer = Answerer(str(checkpoint), rows=1)
        assert rows(answerer, folder, tmp_path, settings, [name], f"{number}.jsonl") == [together[number]]
    texts = [one["question"] for row in together for one in row["questions"]]
    assert len(set(texts)) == len(texts)  # each question is a draw of its own


def test_a_run_killed_at_twenty_random_moments_ends_as_an_unbroken_one(
    checkpoint, folder, tmp_path, monkeypatch, chance
):
    """No row is lost, doubled or changed, and no image that has its row is at work again."""
    settings = replace(PRESETS["authors"], questions=2, **FEW)
    names = images_in(folder)
    answerer = Answerer(str(checkpoint))
    monkeypatch.setattr(module, "AT_ONCE", 3)
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    start = time.monotonic()
    write_candidates(answerer, names, folder, whole, settings, progress=False)
    needed = time.monotonic() - start
    kept: dict[str, dict] = {}
    for kill in range(21):
        child = os.fork()
        if child == 0:
            try:
                if kill < 20:  # so slow that it is still at work when the kill comes
                    monkeypatch.setattr(module, "rouge_l", lambda *_: time.sleep(needed / 200) or 0.0)
                write_candidates(answerer, names, folder, broken, settings, progress=False)
            finally:
                os._exit(0)
        if kill < 20:
            time.sleep(chance.random() * needed / 2)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines = broken.read_bytes().split(b"\n")[:-1] if broken.exists() else []
        found = {row["image"]: row for row in map(json.loads, lines)}
        assert len(found) == len(lines)
        assert kept.items() <= found.items()
        kept = found
    assert broken.read_bytes() == whole.read_bytes()
    manifests = [json.loads(file.with_suffix(".json").read_text()) for file in (whole, broken)]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_model_of_another_family_asks_by_an_instruction_and_resumes(family, folder, tmp_path):
    checkpoint = str(write_family(family, tmp_path / family))
    settings = replace(PRESETS["authors"], questions=2, **FEW)
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    counts = make_candidates(checkpoint, folder, whole, settings, sample=4, progress=False)
    assert (counts["images"], counts["questions"]) == (4, 8)
    assert counts["candidates"] > 0
    assert read_manifest(whole)["checkpoint"]["asks_with"] == ASKING_INSTRUCTION
    rows = whole.read_text().splitlines(keepends=True)
    assert len({question["question"] for row in map(json.loads, rows) for question in row["questions"]}) > 4
    # as after a kill: two rows are there, and the manifest says that the job goes on
    again.write_text("".join(rows[:2]))
    manifest = read_manifest(whole) | {"finished": False}
    again.with_suffix(".json").write_text(json.dumps(manifest))
    make_candidates(checkpoint, folder, again, settings, sample=4, progress=False)
    assert sorted(again.read_text().splitlines()) == sorted(whole.read_text().splitlines())
