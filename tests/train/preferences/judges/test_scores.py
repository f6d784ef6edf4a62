"""What is read in the reply of a judge, and what is not."""

import json

import pytest

from stllava_train.preferences.judges.scores import enumerates, read_scores, read_scores_authors


def test_replies_of_the_golden_table_are_read_sensibly_and_as_the_authors_read_them(shared):
    golden = json.loads((shared / "golden" / "g_prompts" / "prompts.json").read_text())
    sensible = {
        "Answer 1: 8": None,
        "-1 5": None,
        "8, 6": (8, 6),
        "**8 6**": (8, 6),
        "8/10 6/10": (8, 6),
        " 8 6": (8, 6),
        "8 6 ": (8, 6),
        "9  7": (9, 7),
        "8\t6": (8, 6),
        "\n8 6": (8, 6),
    }
    for case in golden["parse_score_original"]:
        reply, skipped = case["reply"], case["original_decision"] == "skipped"
        scores = None if skipped else tuple(case["scores"])
        assert read_scores_authors(reply) == scores, reply
        assert read_scores(reply) == sensible.get(reply, scores), reply


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Answer 1: 8\nAnswer 2: 6", (8, 6)),
        ("Answer 1: 8, Answer 2: 6.\nAnswer 1 is better.", (8, 6)),
        ("Score for Answer 1: 8\nScore for Answer 2: 9", (8, 9)),
        ("8 out of 10, 6 out of 10", (8, 6)),
        ("Scores: 8 and 6.5", (8, 6.5)),
        ("```\n8 6\n```", (8, 6)),
        ('{"score_1": 8, "score_2": 6, "reason": "3 4"}', (8, 6)),
        ('```json\n{"score_1": 8, "score_2": 6, "reason": ""}\n```', (8, 6)),
        ('{"score_1": true, "score_2": 6}', None),
        ('{"score_1": 80, "score_2": 60}', None),
        ("Answer 2: 6\nAnswer 1: 8", None),  # which is whose is not guessed
        ("I see 2 nodules and 3 masses.", None),
        ("I would give 8 to the first and 6 to the second.", None),
        ("8", None),
        ("8 6 7", None),
        ("8\n6", None),
        ("80 60", None),
        ("0 5", None),
        ("11 5", None),
        ("", None),
        ("[" * 5000, None),
        ("9" * 5000 + " 5", None),
        ("Answer 1" + " " * 100_000, None),  # no pattern takes long for it
        ("Answer 1 : 8" + " " * 100_000 + "Answer 2: 6", (8, 6)),
        ('{"score_1": 1' + "0" * 400 + ', "score_2": 6}', None),
        ('{"score_1": NaN, "score_2": 6}', None),
    ],
)
def test_scores_in_a_reply(reply, expected):
    assert read_scores(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("1. 8\n2. 6", (8, 6)),
        ("Score 1: 8\nScore 2: 6", (8, 6)),
        ("1) 8\n2) 6", (8, 6)),
        ("1: 8\n2: 6", (8, 6)),
        ("1 - 8\n2 - 6", (8, 6)),
        ("#1: 8\n#2: 6", (8, 6)),
        ("(1) 8 (2) 6", (8, 6)),
        ("1. 8 2. 6", (8, 6)),
        ("1. 1\n2. 2", (1, 2)),
        ("1. 8\n2. 6\n3. 4", (8, 6)),
        ("1. Answer 1: 8\n2. Answer 2: 6", (8, 6)),
        ("Scores:\n1. 8/10\n2. 6/10", (8, 6)),
        ("| 1 | 8 |\n| 2 | 6 |", (8, 6)),
        ("1. 8", None),
        ("1. 8\nBecause it is right.", None),
        ("1: 8", None),
        ("1. 8, 6", None),
        ("1 8\n2 6", None),  # two scores a line, or the number of an answer and its score
        ("1, 8\n2, 6", None),
        ("2. 6\n1. 8", None),
        ("Score 1 8", None),
        ("Score 1, 8", None),
        ("1 8\nBecause.", (1, 8)),
        ("1/10 8/10", (1, 8)),
        ("Scores: 1, 8", (1, 8)),
        ("1 2\n8 6", None),  # the head of a table, perhaps
        ("1 and 2:\n8 6", None),
        ("1 > 2", None),  # a preference, which read as scores is the other one
        ("2 > 1", None),
        ("1.8 2.6", None),
        ("1,8 2,6", None),
        ("1 -> 8\n2 -> 6", (8, 6)),
        ("1 \u2192 8\n2 \u2192 6", (8, 6)),
    ],
)
def test_the_number_of_an_answer_is_not_its_score(reply, expected):
    assert read_scores(reply) == expected


@pytest.mark.parametrize("reply", ["1. 8\n2. 6", "1 8\n2 6", "1. 8", "1: 8\n2: 6", "2. 6\n1. 8", "1 2\n8 6"])
def test_a_first_line_that_numbers_answers_is_known(reply):
    assert enumerates(reply)
    assert not enumerates("8 6\n2 6")
    assert not enumerates("1 8\nBecause.")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("**Answer 1:** 8\n**Answer 2:** 6", (8, 6)),
        ("- Answer 1: 8/10\n- Answer 2: 6/10", (8, 6)),
        ("Answer 1 (8/10), Answer 2 (6/10)", (8, 6)),
        ("Answer 1 scores 8 and Answer 2 scores 6", (8, 6)),
        ("Answer A: 8, Answer B: 6", (8, 6)),
        ("A: 8, B: 6", (8, 6)),
        ("First: 8, Second: 6", (8, 6)),
        ("Assistant 1's score: 8, Assistant 2's score: 6", (8, 6)),
        ("eight six", (8, 6)),
        ("Answer one: eight; Answer two: six", (8, 6)),
        ("| Answer 1 | Answer 2 |\n|---|---|\n| 8 | 6 |", (8, 6)),
        ("| Answer | Score |\n|---|---|\n| 1 | 8 |\n| 2 | 6 |", (8, 6)),
        ("| Answer | Score |\n|---|---|\n| Answer 1 | 8 |\n| Answer 2 | 6 |", (8, 6)),
        ("8,5 6,5", (8.5, 6.5)),  # decimal commas
        ("8,6", (8, 6)),
        ("Answer 1: 8,5\nAnswer 2: 6", (8.5, 6)),
        ("8,5 6", None),
        ("8,5\n6,5", None),  # two scores, or the first of two
        ("\ufeff8\u200b 6", (8, 6)),
        ("> 8 6", (8, 6)),
        ("8 -6", None),
        ("\u22128 6", None),  # a minus
        ("80/100 60/100", None),
        ("4/5 3/5", None),
        ("85% 60%", None),
        ("0.8 0.6", None),
        ("8/10", None),
        ("Answer 1: 8 7, Answer 2: 6", None),
        ("Answer 1\n8\nAnswer 2\n6", None),
        ("1\n8\n2\n6", None),
    ],
)
def test_scores_written_in_other_ways(reply, expected):
    assert read_scores(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"score_1": "8", "score_2": "6", "reason": ""}', (8, 6)),
        ('{"score_1": "8/10", "score_2": "6/10"}', (8, 6)),
        ('{"scores": {"score_1": 8, "score_2": 6}}', (8, 6)),
        ('{"scores": [8, 6]}', (8, 6)),
        ('{"Answer 1": 8, "Answer 2": 6}', (8, 6)),
        ('{"answer_1": {"score": 8}, "answer_2": {"score": 6}}', (8, 6)),
        ('{"score_1": 8, "score_2": 6, "reason": "The first ans', (8, 6)),
        ('{"score_1": 8, "score_2": 6, "reason": "a "quoted" word"}', (8, 6)),
        ('{"score_1": 8, "score_2": 6,', (8, 6)),
        ('{"score_1": 8, "score_2": "6"', (8, 6)),
        ('{"score_1": 8, "score_2": 1', None),  # of 10, perhaps
        ('{"score_1": 8, "score_2": "1', None),
        ('{"score_1": 8', None),
        ('{"score_1": 8, "score_1": 2, "score_2": 6}', None),
        ('{"score_1": 8, "score_2": 6}\n{"score_1": 2, "score_2": 3}', None),
        ('{"score_1": "eight", "score_2": 6}', None),
        ('{"score_1": -8, "score_2": 6}', None),
        ('{"score_1": "8 out of 10", "score_2": "6,5"}', (8, 6.5)),
        ('{"scores": [{"answer": 1, "score": 8}, {"answer": 2, "score": 6}]}', (8, 6)),
        ('{"scores": [{"answer": 2, "score": 6}, {"answer": 1, "score": 8}]}', None),
        ('{"scores": [{"id": "Answer B", "rating": 6}, {"id": "Answer A", "rating": 8}]}', None),
        ('{"score_1": 8, "score_2": 6, "final_score_1": 3, "final_score_2": 4}', None),
        ('8 6\n{"score_1": 6, "score_2": 8}', None),
        ('{"score_1": 6, "score_2": 8}\n8 6', None),
        ('8 6\n{"score_1": 8, "score_2": 6}', (8, 6)),
        ("8 6\nThe set {a, b}", (8, 6)),
        ("{" * 5000, None),
        ('{"a":' * 5000, None),
    ],
)
def test_scores_in_a_form(reply, expected):
    assert read_scores(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<think>Answer 1 gets 3, 4</think>8 6", (8, 6)),
        ("<think>3 4</think>\n<think>5 5</think>\n\n8 6\nBecause", (8, 6)),
        ("3 4</think>8 6", (8, 6)),  # the template has opened it
        ('<think>{"score_1": 1, "score_2": 2}</think>{"score_1": 8, "score_2": 6}', (8, 6)),
        ("<|channel|>analysis<|message|>1 2<|end|><|start|>assistant<|channel|>final<|message|>8 6", (8, 6)),
        ("<think>8 6", None),
    ],
)
def test_scores_follow_the_thought(reply, expected):
    assert read_scores(reply) == expected


@pytest.mark.parametrize("reply", ["Answer 1 " * 20_000, "1. " * 50_000, "8 " * 50_000, '{"score_1": ' * 20_000])
def test_a_long_reply_is_read_at_once(reply):
    assert read_scores(reply) is None
