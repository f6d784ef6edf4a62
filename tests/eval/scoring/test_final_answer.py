import json

import pytest

from stllava_eval.inference.decoding import THOUGHT_MARKS
from stllava_eval.scoring.final_answer import (
    FINAL,
    NONE,
    SEALED,
    final_answer,
    final_answers,
    lettered_options,
    opens_thought,
    pack_replies,
    unpack_final_answers,
    with_opened_thoughts,
)
from stllava_eval.scoring.metrics import SCORES, score, score_replies

FORMS = {
    "think": "<think>It could be yes or no.</think>{}",
    "think and answer": "<think>yes? no?</think>\n<answer>{}</answer>",
    "the template opened the thought": "It could be yes or no.\n</think>\n\n{}",
    "an empty thought": "<think>\n\n</think>\n\n{}",
    "capital letters": "<THINK>no</THINK> <ANSWER>{}</ANSWER>",
    "thinking": "<thinking>no</thinking>{}",
    "analysis": "<analysis>no</analysis>{}",
    "seed": "<seed:think>no</seed:think>{}",
    "MedGemma": "<unused94>thought\nIs it no?<unused95>{}",
    "MedGemma, announced": "<unused94>thought\nIs it no?<unused95>Final Answer: {}",
    "Kimi": "◁think▷no◁/think▷{}",
    "Magistral": "[THINK]no[/THINK]{}",
    "Gemma 4": "<|channel>thought\nno<channel|>{}",
    "gpt-oss": "<|channel|>analysis<|message|>no<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "OpenThinker": "<|begin_of_thought|>no<|end_of_thought|><|begin_of_solution|>{}<|end_of_solution|>",
    "GLM": "<think>no</think><|begin_of_box|>{}<|end_of_box|>",
    "LLaVA-CoT": "<SUMMARY>no</SUMMARY><CAPTION>no</CAPTION><REASONING>no</REASONING><CONCLUSION>{}</CONCLUSION>",
    "a tag that a stop text closed": "<think>no</think><answer>{}",
    "a tag that the template opened": "{}</answer>",
    "a thought that was never closed before a whole answer": "<think>yes or no <answer>{}</answer>",
    "an answer inside the thought is none": "<think>maybe <answer>no</answer></think><answer>{}</answer>",
    "a thought after the answer": "{}<think>Was that no?</think>",
    "boxed": "\\boxed{{{}}}",
    "boxed in a sentence": "So the answer is $\\boxed{{\\text{{{}}}}}$.",
    "boxed after a thought": "<think>no</think>The answer is \\boxed{{{}}}",
    "boxed in a tag": "<think>no</think><answer>\\boxed{{{}}}</answer>",
    "final answer": "There is no sign of it.\n\nFinal answer: {}",
    "final answer in bold": "No.\n\n**Final Answer:** {}",
    "final answer as a heading": "### Reasoning\nno\n\n### Final Answer\n\n**{}**",
    "the final answer is": "Is there one? The final answer is: {}",
    "answer on a line": "No sign of it.\nAnswer: {}",
    "JSON": '{{"answer": "{}"}}',
    "JSON in a fence": '```json\n{{"reasoning": "no", "answer": "{}"}}\n```',
    "JSON behind words": 'Here it is: {{"Final Answer": "{}"}}',
    "a Python dict": "{{'thought': 'no', 'answer': '{}'}}",
    "an announced answer in bold": "Is there one? The final answer is **{}**.",
    "answer as a heading": "### Reasoning\nno\n\n### Answer\n{}",
    "a tag with an attribute": '<think lang="en">no</think><answer type="text">{}</answer>',
    "gpt-oss, in a format": '<|channel|>final <|constrain|>json<|message|>{{"answer": "{}"}}<|return|>',
    "JSON that is not whole": '{{"reasoning": "no", "answer": "{}"',
    "escaped as in a web page": "&lt;think&gt;no&lt;/think&gt;&lt;answer&gt;{}&lt;/answer&gt;",
    "bold": "**{}**",
    "italic": "*{}*",
    "code": "`{}`",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("answer", ["Yes", "left lung", "T2-weighted image, 2.5 cm"])
def test_the_answer_is_taken_out_of_its_form(form, answer):
    found = final_answer(form.format(answer))
    assert (found.answer.removesuffix("."), found.cut) == (answer, False)
    assert found.forms
    assert found.reply == form.format(answer)


@pytest.mark.parametrize(
    "reply",
    [
        "<think>Let me look. Is it yes? The",
        "&lt;think&gt;Is it yes? The",
        "<unused94>thought\nThe answer is yes",
        "◁think▷yes",
        "<|channel|>analysis<|message|>yes, the",
        "Yes.<think>But is it? yes",
        "<think>a</think><think>yes",
        "<think>yes</think><answer>",
        "<SUMMARY>yes</SUMMARY><REASONING>yes, since",
        "It could be yes. Final answer:",
        '<think lang="en">yes, the',
        '{"reasoning": "so, the answer: yes, since',
        "So yes: \\boxed{",
        '{"reasoning": "is it yes',
        '<think>no</think>```json\n{"reasoning": "yes',
    ],
)
def test_a_reply_that_stopped_before_its_answer_is_cut_and_never_right(reply):
    found = final_answer(reply)
    assert (found.answer, found.cut) == ("", True)
    for kind, reference in (("closed", "yes"), ("open", "yes"), ("open", "-")):
        scores = score_replies([found], reference, kind, "Is it?")
        assert scores["cut"] == 1
        assert scores.get("unparsed", 1) == 1
        assert not any(value for name, value in scores.items() if name not in ("cut", "unparsed"))


@pytest.mark.parametrize(
    "reply",
    [
        "Yes, on the left.",
        " yes\n",
        "",
        "The answer is yes.",
        "I can't give a final answer.",
        "My final answer depends on the view",
        "A T2*-weighted and a T2* image",
        "2 * 3 * 4 and file_name_of",
        "x < y and y > z",
        "x &lt; y and y &gt; z",
        "The set {a, b}",
        "It answers: no",
        "A",
        "(B)",
        "1. No mass\n2. No effusion",
        "I think that it is normal.",
    ],
)
@pytest.mark.parametrize("rule", [FINAL, NONE])
def test_a_plain_reply_is_its_own_answer_to_the_last_character(reply, rule):
    found = final_answer(reply, "Is the lesion on the left or right?", rule)
    assert (found.answer, found.forms, found.cut) == (reply, (), False)


def test_the_rule_none_keeps_the_raw_reply():
    assert final_answer("<think>a</think><answer>b</answer>", rule=NONE).answer == "<think>a</think><answer>b</answer>"


LETTERED = "Is there a mass?\nA. Yes\nB. No"


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("A", "Yes"),
        ("b", "No"),
        ("(B)", "No"),
        ("B.", "No"),
        ("**A**", "Yes"),
        ("Option B", "No"),
        ("The answer is B.", "No"),
        ("The correct option is (A)", "Yes"),
        ("A. Yes", "Yes"),
        ("A) yes", "Yes"),
        ("(A) Yes, there is one", "Yes"),
        ("<think>B?</think><answer>A</answer>", "Yes"),
        ("\\boxed{B}", "No"),
        ("\\boxed{\\text{(B) No}}", "No"),
        ('{"answer": "B"}', "No"),
        ("Final answer: B. No", "No"),
        ("C", "C"),  # no such option
        ("A and B", "A and B"),
        ("A. No", "A. No"),  # letter and text contradict each other
        ("A. Yes\nB. No", "A. Yes\nB. No"),  # the options again
        ("A. Yes or no", "A. Yes or no"),
        ("The answer is (B) No.", "No"),
        ("The correct answer is B: no", "No"),
        ("Option A: Yes", "Yes"),
        ("(b) no", "No"),
        ("A, yes", "Yes"),
        ("A is the correct answer.", "Yes"),
        ("Yes", "Yes"),
        ("A mass is seen", "A mass is seen"),
    ],
)
def test_a_letter_names_its_option_where_options_were_lettered(reply, answer):
    assert final_answer(reply, LETTERED).answer == answer


def test_a_letter_beside_the_text_of_a_longer_option_contradicts_it():
    asked = "Where? A. lung B. lung and heart C. heart"
    assert final_answer("A. lung and heart", asked).answer == "A. lung and heart"
    assert final_answer("B. lung and heart", asked).answer == "lung and heart"
    assert final_answer("A. lung and spleen", asked).answer == "lung"


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Final answer:\n1. mass\n2. effusion\nThank you", "1. mass\n2. effusion"),
        ("Answer:\n- liver\n- spleen", "- liver\n- spleen"),
        ("Final answer: - liver", "- liver"),
        ("final_answer: yes", "yes"),
        ('{"answer": yes}', "yes"),
        ("{answer: yes, sure: true}", "yes"),
        ('{"answer": "Yes \\ud83d"}', "Yes \ufffd"),
        ("{'answer': '\\(x\\)'}", "\\(x\\)"),
        ('{"answer": null}', ""),
        ('{"answer": ["left", "right"]}', "left, right"),
        ('{"result": {"answer": "caf\\u00e9"}}', "café"),
    ],
)
def test_an_answer_may_be_a_list_or_no_quite_proper_json(reply, answer):
    assert final_answer(reply).answer == answer


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ("Which side? (A) left lung (B) right lung (C) both", ["left lung", "right lung", "both"]),
        ("Which?\nA: T1\nB: T2\nC: FLAIR\nAnswer with the letter.", ["T1", "T2", "FLAIR"]),
        ("Which? A) CT B) MRI. Answer with one letter only.", ["CT", "MRI"]),
        ("Options: [A. yes, B. no]", ["yes", "no]"]),
        ("Which? a) CT b) MRI Answer with the letter.", ["CT", "MRI"]),
        ("Which?\n**A.** CT\n**B.** MRI", ["CT", "MRI"]),
        ("Which? [A] CT [B] MRI", ["CT", "MRI"]),
        ("A：CT B：MRI", ["CT", "MRI"]),
        ("Is vitamin A or B. shown?", []),
        ("Is there a mass?", []),
        ("A. only one", []),
    ],
)
def test_lettered_options_are_read_from_what_was_asked(asked, options):
    assert list(lettered_options(asked).values()) == options


def test_a_thought_that_the_template_opened_is_marked_in_every_reply_of_the_run():
    replies = ["no\n</think>yes", "Let me see. Is it yes? The", "", "no</think>no"]
    marked = with_opened_thoughts(replies, [True, False, True, True])
    assert [final_answer(reply).answer for reply in marked] == ["yes", "", "", "no"]
    assert [final_answer(reply).cut for reply in marked] == [False, True, False, False]


def test_one_stray_mark_makes_no_thoughts_of_the_other_replies_but_a_warning(caplog):
    replies = ["a</think>yes", "yes", "no", "yes"]
    assert with_opened_thoughts(replies, [True] * 4) == replies
    assert "1 replies close a thought that they do not open, and 3 have no thought mark" in caplog.text


def test_half_of_the_replies_that_were_not_cut_are_enough():
    replies = ["a</think>yes", "Is it yes", "Is it no", "It may"]
    marked = with_opened_thoughts(replies, [True, False, False, False])
    assert [final_answer(reply).cut for reply in marked] == [False, True, True, True]


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("Think in <think> marks. ASSISTANT:", ""),
        ("USER: hi ASSISTANT:", ""),
    ],
)
def test_a_prompt_that_ends_in_an_opened_thought_is_known(prompt, mark):
    assert opens_thought(prompt) == mark


@pytest.mark.parametrize("mark", THOUGHT_MARKS)
def test_every_mark_that_decoding_keeps_is_a_mark_here(mark):
    assert final_answer(f"{mark}yes").forms
    closes = "/" in mark or "end" in mark.lower() or mark in ("<unused95>", "<channel|>")
    is_answer = any(word in mark for word in ("answer", "conclusion", "solution", "box"))
    assert final_answer(f"no{mark}yes").cut is (not closes and not is_answer)


def test_several_replies_travel_through_lmms_eval_as_one_text():
    replies = ["<think>a</think>A", "B", "[LMMS_EVAL_REQUEST_FAILED after 1 attempts] no"]
    told = pack_replies(replies, LETTERED, FINAL)
    assert [final.answer for final in unpack_final_answers(told, "another question")] == ["Yes", "No", replies[2]]
    assert unpack_final_answers(told) == final_answers(replies, LETTERED, FINAL)


@pytest.mark.parametrize("text", [SEALED, f"{SEALED}yes", f"{SEALED}[]", f"{SEALED}null", SEALED + '{"replies": [1]}'])
def test_a_reply_that_looks_like_several_is_a_reply(text):
    assert [final.answer for final in unpack_final_answers(text)] == [text]


@pytest.mark.parametrize("unit", ["<answer>", "final answer: ", "answer:\n", "*a", "<think>", "</think>", "{", '{"a":'])
def test_long_replies_of_marks_are_read_in_linear_time(unit):
    # a quadratic reading of these 200,000 characters takes minutes, which the time limit of a test ends
    final_answer(unit * (200_000 // len(unit)), LETTERED)


@pytest.mark.parametrize(("opening", "closing"), [('{"a": ', "}"), ('{"answer": ', "}"), ("[", "]")])
@pytest.mark.parametrize("depth", [300, 900, 5_000])
def test_json_that_is_nested_too_deep_is_no_traceback(opening, closing, depth):
    nested = opening * depth + "1" + closing * depth
    final_answer(nested)
    final_answer(f'{{"answer": {nested}}}')


@pytest.mark.parametrize("reply", ["{}x", "The answer is{}x", "A{}", "A. yes{}x", "\\boxed{{{}}}"])
@pytest.mark.parametrize("unit", [" ", "\n", " -", "\\text{"])
def test_a_long_run_of_blanks_or_marks_is_read_in_linear_time(reply, unit):
    final_answer(reply.format(unit * 50_000), LETTERED)


def official_test(shared, name: str) -> list[tuple[str, str, str]]:
    """Question, reference and kind of each row of an official test split."""
    if name == "vqarad":
        rows = json.loads((shared / "data" / "vqarad" / "VQA_RAD Dataset Public.json").read_text(encoding="utf-8"))
        rows = [row for row in rows if str(row["phrase_type"]).startswith("test")]
    else:
        rows = json.loads((shared / "data" / "slake" / "test.json").read_text(encoding="utf-8"))
        rows = [row for row in rows if row["q_lang"] == "en"]
    return [(row["question"], str(row["answer"]), row["answer_type"].strip().lower()) for row in rows]


@pytest.mark.parametrize(("name", "questions"), [("vqarad", 451), ("slake", 1061)])
def test_every_score_of_a_perfect_answer_is_the_same_in_every_form(shared, name, questions):
    rows = official_test(shared, name)
    assert len(rows) == questions
    for question, reference, kind in rows:
        plain = score(reference, reference, kind, question)
        for form in (*FORMS.values(), "{}"):
            (final,) = final_answers([form.format(reference)], question, FINAL)
            assert score(final.answer, reference, kind, question, final.cut) == plain, (form, reference, final)


@pytest.mark.parametrize("name", ["vqarad", "slake"])
def test_no_question_of_the_official_tests_letters_its_options(shared, name):
    assert not [question for question, _, _ in official_test(shared, name) if lettered_options(question)]


def test_cut_is_a_score_of_every_question():
    assert SCORES["cut"].kind == "both"
    assert score("yes", "yes", "closed", "")["cut"] == 0
