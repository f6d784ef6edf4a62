import json
import os
import re
from itertools import product
from pathlib import Path

import pytest

from stllava_eval.metrics import SCORES, choices, chosen, closed_accuracy, closed_accuracy_v1, score, verdict
from stllava_eval.statements import affirms, stem
from stllava_eval.verdict import is_refusal, yes_or_no
from stllava_eval.words import singular

SHARED = Path(os.environ.get("STLLAVA_SHARED") or Path(__file__).parents[2] / "shared")
READ = [json.loads(line) for line in (Path(__file__).parent / "hand_read_verdicts.jsonl").read_text().splitlines()]
NO_READING = ("unparsed", "refusal")


def options_of(row):
    """The references under which an answer can be read: yes and no, or the options of the question."""
    return ("yes", "no") if row["options"] is None else row["options"]


def test_the_hand_read_answers_are_many_and_balanced():
    readings = [row["reading"] for row in READ]
    assert len(READ) >= 150
    assert all(row["reason"].endswith(".") for row in READ)
    assert len({(row["question"], row["answer"]) for row in READ}) == len(READ)
    assert 0.8 < readings.count("yes") / readings.count("no") < 1.25
    assert {row["half"] for row in READ} == {"development", "held-out", "held-out, second"}


@pytest.mark.parametrize("row", READ, ids=lambda row: f"{row['question']} {row['answer']}"[:80])
def test_an_answer_is_read_as_a_person_reads_it(row):
    options = options_of(row)
    wanted = None if row["reading"] in NO_READING else row["reading"]
    assert {chosen(row["answer"], option, row["question"]) for option in options} == {wanted}
    for option in options:
        expected = "unparsed" if wanted is None else "right" if wanted == option else "wrong"
        assert verdict(row["answer"], option, row["question"]) == expected


@pytest.mark.parametrize("row", [row for row in READ if row["reading"] == "refusal"], ids=lambda row: row["answer"])
def test_a_refusal_is_found(row):
    assert is_refusal(row["answer"])


def test_a_refusal_is_never_also_right():
    for row in READ:
        for option in options_of(row):
            scores = score(row["answer"], option, "closed", row["question"])
            assert scores["refused"] * scores["closed_accuracy"] == 0
            assert scores["refused"] <= scores["unparsed"], "what is refused has no verdict"


WORDS = {"yes": "no", "Yes": "No", "YES": "NO", "true": "false", "True": "False", "yep": "nope", "correct": "incorrect"}
FRAMES = [
    "{}",
    "{}.",
    "{}!",
    "**{}**",
    "({})",
    "Answer: {}",
    "The answer is {}.",
    "Human: {}",
    "Therefore, {}.",
    "1. {}",
    "I think {}.",
    "{}, as the image shows.",
    "{}. Would you like to know more?",
    "Is the heart enlarged? {}.",
    "It is hard to see at this size, but {}.",
    "{}. Please choose from the following two options: [yes, no]",
    "Most likely {}.",
    "{}\n\nThe image is a chest X-ray.",
]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(("yes", "no"), WORDS.items())
def test_yes_and_no_are_read_alike_in_every_frame(frame, yes, no):
    for question in ("Is the heart enlarged?", "Is there an effusion?", "Is this image normal?"):
        said = yes_or_no(frame.format(yes), question)
        assert said is not False
        assert yes_or_no(frame.format(no), question) is (None if said is None else not said)
        assert said is not None or yes not in ("yes", "Yes", "YES")


STATEMENTS = [  # a statement and its denial, of what there is
    ("There is {}.", "There is no {}."),
    ("I can see {}.", "I cannot see {}."),
    ("The image shows {}.", "The image does not show {}."),
    ("The image shows {}.", "The image fails to show {}."),
    ("There is evidence of {}.", "There is no evidence of {}."),
    ("{} is present.", "{} is absent."),
    ("{} is seen.", "{} is not seen."),
    ("{} is likely.", "{} is unlikely."),
    ("An image with {}.", "An image without {}."),
    ("The lungs have {}.", "The lungs are free of {}."),
    ("Presence of {}.", "Absence of {}."),
    ("{} is not absent.", "{} is not present."),
    ("The study is positive for {}.", "The study is negative for {}."),
    ("There is {}, but no fracture.", "There is no {}, but a fracture."),
    ("No fracture, but {} is visible.", "A fracture, but no {} is visible."),
]
FINDINGS = ["pneumothorax", "pleural effusion", "calcification of the aorta", "cardiomegaly", "a hypodense lesion"]
ASKED = [
    "Is there {}?",
    "Is there evidence of {}?",
    "Does the image show {}?",
    "Do you see {} in this image?",
    "Is {} present?",
]


@pytest.mark.parametrize(("finding", "asked"), list(product(FINDINGS, ASKED)))
def test_a_statement_and_its_denial_are_read_as_opposites(finding, asked):
    question = asked.format(finding)
    for statement, denial in STATEMENTS:
        assert yes_or_no(statement.format(finding), question) is True, statement
        assert yes_or_no(denial.format(finding.removeprefix("a ")), question) is False, denial
        # of a negative question the readings change places
        if asked.startswith("Is there {}"):
            negative = f"Is there no {finding.removeprefix('a ')}?"
            assert yes_or_no(statement.format(finding), negative) is False, statement
            assert yes_or_no(denial.format(finding.removeprefix("a ")), negative) is True, denial


CONTRARIES = ["normal", "abnormal", "healthy", "unhealthy"]


@pytest.mark.parametrize(("asked", "said", "denied"), list(product(CONTRARIES, CONTRARIES, [True, False])))
def test_normal_and_abnormal_are_contraries_in_the_question_and_in_the_answer(asked, said, denied):
    answer = f"The lung is {'not ' if denied else ''}{said}."
    agrees = (asked in ("normal", "healthy")) == ((said in ("normal", "healthy")) != denied)
    assert yes_or_no(answer, f"Is the lung {asked}?") is agrees
    assert yes_or_no(answer, f"Does the lung look {asked} in this image?") is agrees


def official_questions():
    files = ["data/vqarad/testset.json", "data/vqarad/trainset.json", "data/slake/test.json", "data/slake/train.json"]
    for file in files:
        if not (SHARED / file).is_file():
            pytest.skip(f"{SHARED / file} is absent: put the shared material there or set STLLAVA_SHARED")
        for row in json.loads((SHARED / file).read_text()):
            if row.get("q_lang", "en") == "en" and str(row["answer"]).strip().lower() in ("yes", "no"):
                yield " ".join(row["question"].split())


def test_official_questions_turned_into_statements_are_read_and_their_denials_as_opposites():
    pairs = []
    for question in sorted(set(official_questions())):
        text = question[0].lower() + question[1:].rstrip("? ")
        if found := re.match(r"(is|are|was|were) there (?:any |an |a |the )?(.*)", text):
            be, what = found.groups()
            pairs.append((question, f"There {be} {what}.", f"There {be} no {what}."))
            pairs.append((question, f"The image shows {what}.", f"The image does not show {what}."))
        elif found := re.match(r"(?:does|do) (.*?) (?:show|have|contain) (?:any |an |a |the )?(.*)", text):
            pairs.append((question, f"{found[1]} has {found[2]}.", f"{found[1]} has no {found[2]}."))
        elif found := re.match(r"(?:does|do) (.*?) (?:look|appear) (.*)", text):
            pairs.append((question, f"{found[1]} looks {found[2]}.", f"{found[1]} does not look {found[2]}."))
        elif found := re.match(r"is this (.*)", text):
            pairs.append((question, f"This is {found[1]}.", f"This is not {found[1]}."))
    readings = [(yes_or_no(statement, question), yes_or_no(denial, question)) for question, statement, denial in pairs]
    assert len(pairs) > 1000
    assert set(readings) <= {(True, False), (None, None)}, "never one without its opposite"
    assert readings.count((True, False)) / len(pairs) > 0.99


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Are there multiple or just 1 metastatic focus?", ("multiple", "1")),
        ("Is the lesion either on the left or on the right?", ("left", "right")),
        ("Is the mass in the liver or in the spleen?", ("liver", "spleen")),
        ("Is it benign or only inflamed?", ("benign", "inflamed")),
    ],
)
def test_fillers_belong_to_no_option(question, options):
    assert choices(question) == options


def test_every_option_is_chosen_by_its_own_words_by_naming_it_beside_a_denial_and_in_a_sentence():
    for question in (
        "Is this an MRI or a CT scan?",
        "Is the lesion on the left or right?",
        "Is it normal or abnormal?",
    ):
        options = choices(question)
        for option, other in (options, options[::-1]):
            for answer in (
                option,
                f"It is {option}, not {other}.",
                f"It's not {other}.",
                f"{option} rather than {other}",
            ):
                assert chosen(answer, option, question) == option, answer
                assert verdict(answer, other, question) == "wrong", answer


def test_both_versions_are_scored_under_their_own_signatures():
    assert (SCORES["closed_accuracy"].signature, SCORES["closed_accuracy_v1"].signature) == (
        "closed_accuracy|v2",
        "closed_accuracy|v1",
    )
    scores = score("The heart is enlarged.", "yes", "closed", "Is the heart enlarged?")
    assert (scores["closed_accuracy"], scores["closed_accuracy_v1"]) == (1, 0)


BLIND = ["yes and no", "yes or no", "I do not know.", "not", "yes no yes no", "true false", "left right", "no yes"]


@pytest.mark.parametrize("answer", BLIND)
def test_an_answer_that_names_everything_or_nothing_is_never_right(answer):
    for question, options in [("Is there an effusion?", ("yes", "no")), ("Left or right?", ("left", "right"))]:
        assert [closed_accuracy(answer, option, question) for option in options] == [0, 0]


def test_a_list_of_words_gains_nothing_on_the_official_tests():
    words = (
        "right left lobe and axial of in x is lung bilateral brain mri ray lesion pleural with t2 liver kidney effusion"
    )
    closed = []
    for file in ("data/vqarad/testset.json", "data/slake/test.json"):
        if not (SHARED / file).is_file():
            pytest.skip(f"{SHARED / file} is absent: put the shared material there or set STLLAVA_SHARED")
        rows = json.loads((SHARED / file).read_text())
        closed += [row for row in rows if row["answer_type"].strip() == "CLOSED" and row.get("q_lang", "en") == "en"]
    now, before = (
        sum(version(words, str(row["answer"]), row["question"]) for row in closed) / len(closed)
        for version in (closed_accuracy, closed_accuracy_v1)
    )
    assert now <= before + 0.005


def test_without_a_question_plain_verdicts_alone_are_read():
    assert (yes_or_no("No.", ""), yes_or_no("There is no fracture.", "")) == (False, None)


def test_what_a_sentence_denies_later_leaves_its_claim_as_it_is():
    answer = "The lesion is not enhanced as the image is a plain scan and does not show contrast."
    assert yes_or_no(answer, "Is the lesion enhanced?") is False
    assert yes_or_no("The lesion is enhanced and the rim is not.", "Is the lesion enhanced?") is True


def test_words_without_their_endings():
    assert {stem(word) for word in ("dilated", "dilation", "dilatation")} == {"dilat"}
    assert [singular(word) for word in ("kidneys", "masses", "diagnosis", "metastases", "gas")] == [
        "kidney",
        "mass",
        "diagnosis",
        "metastasis",
        "gas",
    ]


def test_a_clause_about_something_else_affirms_nothing():
    assert affirms("the liver is enlarged", "Is the heart enlarged?") is None
    assert affirms("a pleural effusion is present", "Is there a pericardial effusion?") is None
