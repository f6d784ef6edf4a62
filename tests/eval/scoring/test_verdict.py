import json
import re
from itertools import product

import pytest
from conftest import ROOT, shared_folder

from stllava_eval.scoring.metrics import SCORES, closed_accuracy, closed_accuracy_v1, score
from stllava_eval.scoring.statements import _SPELLINGS, affirms, stem
from stllava_eval.scoring.verdict import _DISCLAIMERS, _REFUSALS, choices, chosen, is_refusal, verdict, yes_or_no
from stllava_eval.scoring.words import folded, singular

SHARED = shared_folder()


def rows_of(file):
    return [json.loads(line) for line in (ROOT / "tests" / file).read_text(encoding="utf-8").splitlines()]


READ = rows_of("hand_read_verdicts.jsonl")
INDEPENDENT = rows_of("independent_read_verdicts.jsonl")  # by another reader, who had not seen the rules at first
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


def test_what_another_reader_wrote_is_never_read_as_its_opposite_and_nothing_undecidable_is_credited():
    agreed = 0
    for row in INDEPENDENT:
        wanted = None if row["reading"] in NO_READING else row["reading"]
        for option in options_of(row):
            read = chosen(row["answer"], option, row["question"])
            assert read in (wanted, None), row
        agreed += read == wanted
    assert len({(row["question"], row["answer"]) for row in [*READ, *INDEPENDENT]}) == len(READ) + len(INDEPENDENT)
    assert agreed >= 0.89 * len(INDEPENDENT)


PNEUMOTHORAX, HEART, CT = "Is there a pneumothorax?", "Is the heart enlarged?", "Is this a CT?"
LEFT, ORGAN = "Is the lesion on the left or right?", "Which organ is abnormal, heart or lung?"
BIGGER, NEITHER = "Which is bigger in this image, liver or spleen?", "Is this image normal or abnormal?"
BOTH, MODALITY = "Are both lungs clear?", "Is this an MRI or a CT scan?"
AP = "Is the heart size in this image smaller or larger than if the image was taken AP?"
MEDIASTINUM = "Is this image taken above the diaphragm?"


@pytest.mark.parametrize(
    ("question", "answer", "reading"),
    [
        (PNEUMOTHORAX, "Rather than a pneumothorax, there is an effusion.", "no"),
        (PNEUMOTHORAX, "There is an effusion instead of a pneumothorax.", "no"),
        (PNEUMOTHORAX, "This is inconsistent with a pneumothorax.", "no"),
        (PNEUMOTHORAX, "The previously seen pneumothorax is no longer visible.", "no"),
        (PNEUMOTHORAX, "I doubt that there is a pneumothorax.", "no"),
        (PNEUMOTHORAX, "There is no doubt that there is a pneumothorax.", "yes"),
        (PNEUMOTHORAX, "There is more likely an effusion than a pneumothorax.", None),
        (PNEUMOTHORAX, "A pneumothorax would show as a lucent area.", None),
        (HEART, "The heart is hardly enlarged.", None),
        (HEART, "I think so.", "yes"),
        (HEART, "I don't think so.", "no"),
        (HEART, "Indeed, it is.", "yes"),
        (HEART, "It is very unlikely.", "no"),
        (CT, "It's an MRI rather than a CT.", "no"),
        (CT, "MRI", "no"),
        (CT, "CT, MRI", None),
        (BOTH, "Only the left lung is clear.", "no"),
        (BOTH, "The left lung is clear.", None),
        (BOTH, "The left lung is not clear.", "no"),
        (BOTH, "Both lungs are clear.", "yes"),
        ("Is there an effusion on both sides?", "There is an effusion on the left side only.", "no"),
        (MEDIASTINUM, "The image is at the level of the kidneys, which is below the diaphragm.", None),
        ("Is the mass homogenous?", "The mass is heterogeneous.", "no"),
        ("Is the mass homogenous?", "The liver is heterogeneous.", None),
        ("Is the trachea midline?", "The trachea is deviated.", "no"),
        ("Is this image normal?", "The heart is normal.", None),
        ("Is this image abnormal?", "There is no clear evidence of an abnormality.", "no"),
        ("Is this image normal?", "No clear answer can be given.", None),
        ("Is this image normal?", "Impression: No acute cardiopulmonary abnormality.", "yes"),
        ("Is the lung normal?", "The lungs are clear of consolidation.", "yes"),
        ("Is this image normal?", "The chest X-ray is normal.", "yes"),
    ],
)
def test_a_statement_is_not_read_as_its_opposite(question, answer, reading):
    assert chosen(answer, "yes", question) == reading


@pytest.mark.parametrize(
    ("question", "answer", "reading"),
    [
        (LEFT, "The left side is not affected.", "right"),
        (LEFT, "Left (the right side is normal)", "left"),
        (LEFT, "The left side is normal.", None),
        (ORGAN, "The lung is not abnormal.", "heart"),
        (ORGAN, "The lungs are clear and the heart is enlarged.", "heart"),
        (ORGAN, "The heart and lungs are normal.", None),
        (BIGGER, "The spleen is smaller.", "liver"),
        (BIGGER, "The spleen is not as big as the liver.", "liver"),
        (AP, "It is smaller than on an AP image.", "smaller"),
        (AP, "smaller rather than larger", "smaller"),
        (NEITHER, "Abnormal. The heart is enlarged. The lungs are normal.", "abnormal"),
        (NEITHER, "Normal. Abnormal.", None),
        (MODALITY, "It is an MRI because CT would show bone as bright.", "mri"),
        (MODALITY, "CT. MRI would show more soft tissue contrast.", "ct"),
        (MODALITY, "I'm sorry, I cannot tell. MRI.", None),
    ],
)
def test_a_choice_is_not_read_as_another(question, answer, reading):
    assert chosen(answer, choices(question)[0], question) == reading


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


def shared_rows(file: str) -> list[dict]:
    if not (SHARED / file).is_file():
        pytest.skip(f"{SHARED / file} is absent: put the shared material there or set STLLAVA_SHARED")
    return json.loads((SHARED / file).read_text())


def official_questions():
    files = ["data/vqarad/testset.json", "data/vqarad/trainset.json", "data/slake/test.json", "data/slake/train.json"]
    for file in files:
        for row in shared_rows(file):
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
        rows = shared_rows(file)
        closed += [row for row in rows if row["answer_type"].strip() == "CLOSED" and row.get("q_lang", "en") == "en"]
    now, before = (
        sum(version(words, str(row["answer"]), row["question"]) for row in closed) / len(closed)
        for version in (closed_accuracy, closed_accuracy_v1)
    )
    assert now <= before + 0.005


YES_AND_NO = [  # a right answer and its opposite
    ("Yes.", "No."),
    ("Yes, it is.", "No, it is not."),
    ("The answer is yes", "The answer is no"),
    ("I think so", "I don't think so"),
    ("Certainly", "Certainly not"),
    ("**Answer:** Yes", "**Answer:** No"),
    ("Yes, I can see it.", "No, I cannot see it."),
    ("Affirmative.", "Negative."),
    ("Definitely yes.", "Definitely not."),
    ("Most probably yes.", "Most probably not."),
    ("I would answer yes to this question.", "I would answer no to this question."),
]
OF_A_CHOICE = ["{0}", "It is {0}.", "{0}, not {1}", "The image shows {0}.", "The answer is {0}.", "{0} rather than {1}"]
OF_A_CHOICE += [
    "Not {1}, but {0}.",
    "{0} (not {1})",
    "It's {0}, because the image shows it.",
    "Of {1} and {0}, it is {0}.",
]


def test_right_answers_in_many_wordings_are_right_on_the_official_tests_and_their_opposites_wrong():
    left_out = []
    for file in ("data/vqarad/testset.json", "data/slake/test.json"):
        for row in shared_rows(file):
            if row["answer_type"].strip() != "CLOSED" or row.get("q_lang", "en") != "en":
                continue
            question, reference = row["question"], str(row["answer"]).strip()
            if reference.lower() in ("yes", "no"):
                wordings = [pair if reference.lower() == "yes" else pair[::-1] for pair in YES_AND_NO]
            else:
                option, options = chosen(reference, reference, question), choices(question)
                if option not in options:
                    left_out.append((question, reference))  # the reference is none of the options offered
                    continue
                others = [one for one in options if one != option]
                wordings = [
                    (form.format(option, other), form.format(other, option)) for form in OF_A_CHOICE for other in others
                ]
            for right, wrong in wordings:
                assert verdict(right, reference, question) == "right", (question, right)
                assert verdict(wrong, reference, question) == "wrong", (question, wrong)
    assert left_out == [("Which is bigger in this image, kidney or spleen?", "Liver")]


def test_looking_for_letters_first_hides_no_spelling_and_no_refusal():
    texts = {folded(text) for row in [*READ, *INDEPENDENT] for text in (row["question"], row["answer"])}
    texts |= {f"there is {needle} and {other}" for one, _, _ in _SPELLINGS for needle in one for other in one}
    for text in texts:
        for needles, pattern, _ in _SPELLINGS:
            assert not pattern.search(text) or any(needle in text for needle in needles)
        assert is_refusal(text) == bool(_REFUSALS.search(text) or _DISCLAIMERS.search(text))


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


@pytest.mark.parametrize(
    "frame",
    [
        "It appears to be {}.",
        "The answer seems to be {}",
        "the image shows {}",
        "this is a {}",
        "I would say {}.",
        "I think the answer is probably {}.",
    ],
)
def test_a_verdict_at_the_end_of_its_clause_is_read(frame):
    assert yes_or_no(frame.format("yes"), "Is there a mass?") is True
    assert yes_or_no(frame.format("no"), "Is there a mass?") is False


@pytest.mark.parametrize(
    "answer",
    ["I would not say yes.", "It could be yes.", "I cannot say if the answer is yes", "It isn't clear that it is no"],
)
def test_a_verdict_that_is_not_given_is_not_read(answer):
    assert yes_or_no(answer, "Is there a mass?") is None
