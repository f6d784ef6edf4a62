import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import shared_folder

from stllava_eval.errors import InputError
from stllava_eval.scoring import final_answer, image_blind, llavamed, metrics, verdict_v1, words
from stllava_eval.scoring import verdict as scoring_verdict
from stllava_eval.scoring.metrics import SCORES, closed_accuracy_v1, score
from stllava_eval.scoring.verdict import choices, verdict

SHARED = shared_folder()


def shared_json(path):
    """JSON from the read-only material beside the checkout; the test is skipped where that is absent."""
    if not (SHARED / path).is_file():
        pytest.skip(f"{SHARED / path} is absent: put the shared material there or set STLLAVA_SHARED")
    return json.loads((SHARED / path).read_text(encoding="utf-8"))


def mean(values):
    return 100 * sum(values) / len(values)


# Published family: held to the outputs of the original scripts

GOLDEN_OPEN = {
    "recall": llavamed.recall_llavamed,
    "precision": llavamed.precision_llavamed,
    "f1": llavamed.f1_llavamed,
    "exact_match_score": llavamed.exact_match_llavamed,
    "contains": llavamed.open_accuracy_llavamed_batch,
    "open_accuracy_batch": llavamed.open_accuracy_llavamed_batch,
}
GOLDEN_CLOSED = {
    "recall": llavamed.recall_llavamed,
    "precision": llavamed.precision_llavamed,
    "f1": llavamed.f1_llavamed,
    "exact_match_score": llavamed.exact_match_llavamed,
    "contains": llavamed.closed_llavamed_batch,
    "closed_run_eval": llavamed.closed_llavamed,
    "closed_run_eval_batch": llavamed.closed_llavamed_batch,
    "closed_run_eval_before_b9a98a7": llavamed.closed_llavamed_before_fix,
}


@pytest.mark.parametrize(("name", "n_open", "n_closed"), [("hand", 67, 42), ("random", 239, 272)])
class TestThePublishedScripts:
    @pytest.fixture
    def golden(self, name):
        return shared_json(f"golden/metrics/llava_med_v1_{name}.json")

    @pytest.fixture
    def cases(self, name, golden):
        """(answer, reference, is open, what the script computed), matched by id."""
        given = {case["id"]: case for case in shared_json(f"golden/metrics/cases_{name}.json")}
        return [
            (
                given[out["id"]]["prediction"],
                given[out["id"]]["reference"],
                given[out["id"]]["answer_type"] == "OPEN",
                out,
            )
            for out in golden["cases"]
        ]

    def test_all_cases_are_there(self, cases, n_open, n_closed):
        assert sum(is_open for _, _, is_open, _ in cases) == n_open
        assert sum(not is_open for _, _, is_open, _ in cases) == n_closed

    def test_normalise_alike(self, cases, n_open, n_closed):
        for answer, reference, _, out in cases:
            for text, key in ((answer, "pred_normalized"), (reference, "ref_normalized")):
                once = llavamed.normalize_llavamed(text)
                assert once == out[key], out["id"]
                assert llavamed.normalize_llavamed(once) == out.get(f"{key}_twice", out[key]), out["id"]

    def test_score_every_case_alike(self, cases, n_open, n_closed):
        for answer, reference, is_open, out in cases:
            for key, function in (GOLDEN_OPEN if is_open else GOLDEN_CLOSED).items():
                expected = out[key]
                if expected is not None:
                    expected = pytest.approx(float(expected), rel=1e-9, abs=1e-12)
                assert function(answer, reference) == expected, (out["id"], key)

    def test_score_bleu_alike(self, cases, n_open, n_closed):
        for answer, reference, is_open, out in cases:
            if is_open:
                for key, n in (("bleu", None), ("bleu_1", 1), ("bleu_2", 2), ("bleu_3", 3)):
                    ours = llavamed.bleu_llavamed(answer, reference, n)
                    assert ours == pytest.approx(out[key], rel=1e-9, abs=0), (out["id"], key)

    def test_score_open_accuracy_alike(self, cases, n_open, n_closed):
        candidates = shared_json("golden/metrics/candidates_vqarad_train_open.json")["0"]
        for answer, reference, is_open, out in cases:
            if is_open:
                ours = llavamed.open_accuracy_llavamed(answer, reference, candidates)
                assert ours == out["open_accuracy_candidates"], out["id"]

    def test_report_the_same_means(self, cases, golden, n_open, n_closed):
        candidates = shared_json("golden/metrics/candidates_vqarad_train_open.json")["0"]
        opened = [(answer, reference) for answer, reference, is_open, _ in cases if is_open]
        closed = [(answer, reference) for answer, reference, is_open, _ in cases if not is_open]
        kept = [v for pair in closed if (v := llavamed.closed_llavamed_before_fix(*pair)) is not None]
        ours = {
            "n_open": len(opened),
            "n_closed": len(closed),
            "n_closed_counted_before_b9a98a7": len(kept),
            "recall": mean([llavamed.recall_llavamed(*pair) for pair in opened]),
            "precision": mean([llavamed.precision_llavamed(*pair) for pair in opened]),
            "f1": mean([llavamed.f1_llavamed(*pair) for pair in opened]),
            "exact_match_score": mean([llavamed.exact_match_llavamed(*pair) for pair in opened]),
            "open_accuracy_batch": mean([llavamed.open_accuracy_llavamed_batch(*pair) for pair in opened]),
            "open_accuracy_candidates": mean([llavamed.open_accuracy_llavamed(*pair, candidates) for pair in opened]),
            "closed_run_eval": mean([llavamed.closed_llavamed(*pair) for pair in closed]),
            "closed_run_eval_batch": mean([llavamed.closed_llavamed_batch(*pair) for pair in closed]),
            "closed_run_eval_before_b9a98a7": mean(kept),
        }
        assert ours == pytest.approx(golden["aggregate_full"], rel=1e-9)
        printed = {
            "bleu_score": mean([llavamed.bleu_llavamed(*pair) for pair in opened]),
            "bleu_score_1": mean([llavamed.bleu_llavamed(*pair, 1) for pair in opened]),
            "bleu_score_2": mean([llavamed.bleu_llavamed(*pair, 2) for pair in opened]),
            "bleu_score_3": mean([llavamed.bleu_llavamed(*pair, 3) for pair in opened]),
            "recall_closed": mean([llavamed.recall_llavamed(*pair) for pair in closed]),
        }
        assert printed == pytest.approx(  # the scripts print six digits of these and keep no more
            {key: golden["aggregate_printed"]["run_eval_batch"][key] for key in printed}, rel=5e-6
        )


def vqarad_test():
    """(reference, is open) of VQA-RAD."""
    rows = shared_json("data/vqarad/testset.json")
    return [(str(row["answer"]), row["answer_type"].strip() == "OPEN") for row in rows]


def slake(part):
    """(reference, is open) of SLAKE's English questions."""
    rows = [row for row in shared_json(f"data/slake/{part}.json") if row["q_lang"] == "en"]
    return [(str(row["answer"]), row["answer_type"].strip() == "OPEN") for row in rows]


def test_answers_that_see_no_image_score_what_the_published_script_gives_them():
    test_sets = {"vqa_rad_official_test": vqarad_test(), "slake_en_test": slake("test")}
    for row in shared_json("golden/metrics/degenerate_baselines.json")["rows"]:
        answer = row["constant_answer"]
        opened = [reference for reference, is_open in test_sets[row["dataset"]] if is_open]
        closed = [reference for reference, is_open in test_sets[row["dataset"]] if not is_open]
        assert {
            "dataset": row["dataset"],
            "constant_answer": answer,
            "n_open": len(opened),
            "n_closed": len(closed),
            "recall": pytest.approx(mean([llavamed.recall_llavamed(answer, reference) for reference in opened])),
            "precision": pytest.approx(mean([llavamed.precision_llavamed(answer, reference) for reference in opened])),
            "f1": pytest.approx(mean([llavamed.f1_llavamed(answer, reference) for reference in opened])),
            "closed_run_eval_hits": sum(llavamed.closed_llavamed(answer, reference) for reference in closed),
            "closed_run_eval_batch_hits": sum(
                llavamed.closed_llavamed_batch(answer, reference) for reference in closed
            ),
        } == row


def vqarad_public_train():
    rows = shared_json("data/vqarad/VQA_RAD Dataset Public.json")
    assert len(rows) == 2248
    train = [row for row in rows if row["phrase_type"] not in ("test_freeform", "test_para")]
    return [(str(row["answer"]), row["answer_type"].strip() == "OPEN") for row in train]


@pytest.mark.parametrize(
    ("dataset", "train"),
    [
        # the public file's 1797 training rows; the 3064 of trainset.json rank otherwise
        pytest.param("vqa_rad_official_test", vqarad_public_train, id="vqarad"),
        pytest.param("slake_en_test", lambda: slake("train"), id="slake"),
    ],
)
def test_the_commonest_training_words_are_those_of_the_published_baseline(dataset, train):
    rows = shared_json("golden/metrics/degenerate_baselines.json")["rows"]
    of_dataset = [row["constant_answer"] for row in rows if row["dataset"] == dataset]
    references = [reference for reference, is_open in train() if is_open]
    assert [image_blind.commonest_words(references, k) for k in (10, 25, 50, 100)] == of_dataset[6:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("x-ray - chest", "xray chest", id="a dash beside a space deletes all dashes"),
        pytest.param("1,000 x-ray", "1000 xray", id="a comma between digits deletes every mark"),
        pytest.param("Vitamin A, 2.5 cm.", "vitamin 2.5 cm", id="articles vanish, decimals stay"),
        pytest.param("wouldn'tve wouldnt've", "wouldn't've wouldn't've", id="either apostrophe may be missing"),
        pytest.param("Im Ive its wed", "im ive its wed", id="no contraction that the original misses"),
        pytest.param("somebody'd", "somebodyd", id="the pair that is the wrong way round"),
        pytest.param(". " * 33 + "end", ". end", id="32 periods go"),
    ],
)
def test_normalize_llavamed(text, expected):
    assert llavamed.normalize_llavamed(text) == expected


def test_closed_answers_that_the_old_script_left_out_are_none():
    assert llavamed.closed_llavamed_before_fix("No.", "yes") is None
    assert llavamed.closed_llavamed_before_fix("Yes.", "yes") == 1.0
    assert llavamed.closed_llavamed_before_fix("There is a fracture.", "yes") == 0.0


def test_open_accuracy_takes_the_first_of_equal_candidates():
    assert llavamed.open_accuracy_llavamed("left lung", "left", ["left", "lung"]) == 1.0
    assert llavamed.open_accuracy_llavamed("left lung", "left", ["lung", "left"]) == 0.0
    assert llavamed.open_accuracy_llavamed("", "lung", ["lung", "left"]) == 1.0  # no hit names the first
    with pytest.raises(InputError, match="no candidates"):
        llavamed.open_accuracy_llavamed("left", "left", [])


def test_ties_between_the_commonest_words_go_by_alphabet():
    assert image_blind.commonest_words(["the lung", "brain", "two lungs", "Brain, lung"], 3) == "brain lung 2"


# Clean family


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("A mass in the Left Lung.", "mass in left lung", id="case, articles, full stop"),
        pytest.param("X-ray x‑ray x–ray", "x ray x ray x ray", id="dashes of any kind"),
        pytest.param("“Ménière’s” Meniere's", "meniere's meniere's", id="curly quotes, accents"),
        pytest.param("20 µm 20μm", "20 μm 20 μm", id="micro sign and mu, unit glued or not"),
        pytest.param("ﬁbrosis soft\u00adtissue ＣＴ", "fibrosis softtissue ct", id="ligature, soft hyphen, full width"),
        pytest.param("1,000 cells; 3,4", "1000 cells 3 4", id="commas in thousands and in lists"),
        pytest.param("T2-weighted L2-3 4th", "t2 weighted l2 3 4 th", id="letters and digits"),
        pytest.param("One, eleven, none", "1 11 none", id="number words"),
        pytest.param("'No' doesn't", "no doesn't", id="quotes go, apostrophes stay"),
        pytest.param("snake_case", "snake case", id="an underscore separates"),
        pytest.param("The", "the", id="an article stands where there is nothing else"),
        pytest.param(" \n\t…", "", id="no words"),
    ],
)
def test_folded_words(text, expected):
    assert " ".join(words.folded_words(text)) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "recall", "precision", "f1", "exact", "bleu1"),
    [
        pytest.param("Left lung.", "left lung", 1, 1, 1, 1, 1, id="exact"),
        pytest.param("lung, left", "left lung", 1, 1, 1, 0, 1, id="order counts in exact match only"),
        pytest.param("a mass in the left lung", "left lung", 1, 1 / 2, 2 / 3, 0, 1 / 2, id="extra words"),
        pytest.param("lung lung lung", "right lung", 1 / 2, 1 / 3, 2 / 5, 0, 1 / 3, id="a repeated word counts once"),
        pytest.param("lung", "lung and lung", 1 / 3, 1, 1 / 2, 0, 0.1353352832366127, id="e^-2 for one word of three"),
        pytest.param("lung lung", "lung and lung", 2 / 3, 1, 4 / 5, 0, 0.6065306597126334, id="twice if wanted twice"),
        pytest.param("liver", "left lung", 0, 0, 0, 0, 0, id="nothing in common"),
        pytest.param("", "left lung", 0, 0, 0, 0, 0, id="no answer"),
        pytest.param("normal", "no", 0, 0, 0, 0, 0, id="words, not letters"),
    ],
)
def test_open_scores(answer, reference, recall, precision, f1, exact, bleu1):
    assert metrics.recall(answer, reference) == pytest.approx(recall)
    assert metrics.precision(answer, reference) == pytest.approx(precision)
    assert metrics.f1(answer, reference) == pytest.approx(f1)
    assert metrics.exact_match(answer, reference) == exact
    assert metrics.bleu1(answer, reference) == pytest.approx(bleu1)


@pytest.mark.parametrize(
    "function", [metrics.recall, metrics.precision, metrics.f1, metrics.exact_match, metrics.bleu1, verdict]
)
def test_a_reference_without_words_is_refused(function):
    with pytest.raises(InputError, match=r"reference '\.': it has no words"):
        function("lung", ".")


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Yes", "yes", "right"),
        ("YES!!!", "Yes.", "right"),
        ("No, the lungs are abnormal.", "no", "right"),
        ("No, the lungs are abnormal.", "yes", "wrong"),
        ("There is no evidence of fracture.", "no", "right"),
        ("<answer>yes</answer>", "yes", "right"),
        (r"\boxed{no}", "no", "right"),
        ("It is not visible in this image, so the answer is yes.", "yes", "right"),
        ("yes and no", "yes", "wrong"),
        ("yes and no", "no", "wrong"),
        ("Yes, there is no effusion.", "yes", "wrong"),
        ("Yes.\nNo.", "no", "wrong"),
        ("The heart is normal in size.", "no", "unparsed"),
        ("The diagnosis is unknown.", "no", "unparsed"),
        ("Eyes are visible.", "yes", "unparsed"),
        ("There is not a fracture.", "no", "unparsed"),
        ("I am not sure.", "no", "unparsed"),
        ("There is a fracture.", "yes", "unparsed"),
        ("nope", "no", "unparsed"),
        ("left", "yes", "unparsed"),
        ("", "yes", "unparsed"),
    ],
)
def test_the_first_version_of_the_verdict_reads_yes_and_no_as_it_did(answer, reference, expected):
    assert verdict_v1.verdict(answer, reference) == expected


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Is the lesion on the left or right side of the brain?", "left|right"),
        ("Is the gastric bubble shown on the left or right side of the patient?", "left|right"),
        ("In this image, is the lesion left or right?", "left|right"),
        ("Is the lesion left or right, in this image?", "left|right"),
        ("Are pleural opacities located on the left, right, or both sides of the lung?", "left|right|both"),
        ("Is this an MRI or a CT scan?", "mri|ct"),
        ("Was a CT or MRI used to take the above image?", "ct|mri"),
        ("Is this image normal or abnormal?", "normal|abnormal"),
        ("Is there hypoinflation or hyperinflation of the lung", "hypoinflation|hyperinflation"),
        ("Is this a T1 weighted, T2 weighted, or FLAIR image?", "t1 weighted|t2 weighted|flair"),
        ("Is this a T1 weighted or T2 weighted MRI image?", "t1 weighted|t2 weighted"),
        ("Which is the biggest in this image,lung,liver or heart?", "lung|liver|heart"),
        ("Which is smaller in this image,liver or right kidney?", "liver|right kidney"),
        ("Which plane is the image scanned, transverse plane or coronal plane?", "transverse plane|coronal plane"),
        ("Which type of modality is shown about this image, MRI, CT or X-Ray?", "mri|ct|x ray"),
        ("Where is the heart in this image,left,top or upper left?", "left|top|upper left"),
        ("Is there a fracture of the fourth rib?", ""),
        ("", ""),
        ("or", ""),
    ],
)
def test_choices(question, options):
    assert "|".join(choices(question)) == options


SIDE = "Is the lesion on the left or right side?"
MODALITY = "Is this an MRI or a CT scan?"
PLANE = "Which plane is the image scanned, transverse plane or coronal plane?"
WEIGHTING = "Is this a T1 weighted, T2 weighted, or FLAIR image?"
PLACE = "Where is the heart in this image,left,top or upper left?"
COUNT = "Are there multiple or just 1 metastatic focus?"
SIZE = "Which is bigger in this image, kidney or spleen?"


@pytest.mark.parametrize(
    ("answer", "reference", "question", "expected"),
    [
        pytest.param("The left side.", "Left", SIDE, "right", id="in a sentence"),
        pytest.param("left", "Left side", SIDE, "right", id="the option that the reference names is enough"),
        pytest.param("right", "Left", SIDE, "wrong", id="the other option"),
        pytest.param("left and right", "Left", SIDE, "wrong", id="both options"),
        pytest.param("upright", "Right", SIDE, "unparsed", id="letters of an option"),
        pytest.param("yes", "Left", SIDE, "unparsed", id="yes to a choice"),
        pytest.param("It is an MRI, not a CT", "MRI", MODALITY, "wrong", id="a denied option is named too"),
        pytest.param("A CT", "MRI", MODALITY, "wrong", id="the other modality"),
        pytest.param(
            "abnormal", "normal", "Is it normal or abnormal?", "wrong", id="an option inside another's letters"
        ),
        pytest.param("Coronal", "Coronal Plane", PLANE, "right", id="the word that sets an option apart"),
        pytest.param("the plane", "Coronal Plane", PLANE, "unparsed", id="the word that options share"),
        pytest.param("T2", "T2 weighted", WEIGHTING, "right", id="one word of two"),
        pytest.param("FLAIR", "T2 weighted", WEIGHTING, "wrong", id="the last option"),
        pytest.param("upper left", "left", PLACE, "wrong", id="a longer option hides a shorter"),
        pytest.param("on the left", "left", PLACE, "right", id="the shorter by itself"),
        pytest.param("upper", "upper left", PLACE, "right", id="the longer by the word that sets it apart"),
        pytest.param("one", "1", COUNT, "right", id="a number as a word"),
        pytest.param("multiple", "one", COUNT, "wrong", id="the other count"),
        pytest.param("the liver", "Liver", SIZE, "right", id="a reference that was not offered"),
        pytest.param("liver, then spleen", "Liver", SIZE, "wrong", id="beside one that was"),
        pytest.param(
            "a T2 weighted image", "T2 weighted", "", "right", id="no question: the reference's words in a row"
        ),
        pytest.param("weighted T2", "T2 weighted", "", "unparsed", id="no question: not in a row"),
        pytest.param("CT", "MRI", "", "unparsed", id="no question: no other option is known"),
    ],
)
def test_the_first_version_of_the_verdict_reads_choices_as_it_did(answer, reference, question, expected):
    assert verdict_v1.verdict(answer, reference, question) == expected
    assert closed_accuracy_v1(answer, reference, question) == (expected == "right")


def test_every_choice_question_of_the_tests_is_right_by_its_reference_and_wrong_by_the_other_options():
    rows = shared_json("data/vqarad/testset.json")
    rows += [row for row in shared_json("data/slake/test.json") if row["q_lang"] == "en"]
    closed = [(row["question"], str(row["answer"])) for row in rows if row["answer_type"].strip() == "CLOSED"]
    asked = [(question, answer) for question, answer in closed if answer.strip().lower() not in ("yes", "no")]
    assert len(asked) == 21 + 61
    not_offered = set()
    for question, reference in asked:
        options = choices(question)
        assert len(options) in (2, 3), question
        assert verdict(reference, reference, question) == "right", question
        verdicts = [verdict(option, reference, question) for option in options]
        assert set(verdicts) <= {"right", "wrong"}, question
        assert verdicts.count("right") <= 1, question
        if "right" not in verdicts:
            not_offered.add((question, reference))
    assert not_offered == {(SIZE, "Liver")}  # a mistake of the data set


# Answers, whatever the reference


def test_words_are_divided_by_white_space():
    assert metrics.words("The T2-weighted\n scan.") == 3
    assert metrics.words(" ") == 0


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I am sorry, but I cannot determine that from this image.", True),
        ("I'm unable to provide a diagnosis.", True),
        ("I’m not able to interpret medical images", True),
        ("As an AI language model, I do not give advice.", True),
        ("This cannot be determined from the image.", True),
        ("It is not possible to tell.", True),
        ("I do not know.", True),
        ("I cannot view the images.", True),
        ("[SAFETY_BLOCKED:finish_reason=2]", True),
        ("I cannot see a fracture.", False),
        ("I am unable to find any mass.", False),
        ("A small effusion cannot be excluded.", False),
        ("I am not sure, but it is possible.", False),
        ("No.", False),
        ("", False),
    ],
)
def test_is_refusal(answer, refused):
    assert scoring_verdict.is_refusal(answer) is refused


@pytest.mark.parametrize(
    ("answer", "failed"),
    [
        ("[LMMS_EVAL_REQUEST_FAILED after 5 retries] Connection error.", True),
        ('Error: can only concatenate str (not "NoneType") to str', True),
        ("[GENERATION_FAILED] out of memory", True),
        ("[ERROR] Empty prompt", True),
        ("Batch failed", True),
        ("Video a.mp4\nb.mp4 can not load, check the source", True),
        ("[SAFETY_BLOCKED:unknown]", False),
        ("The request failed.", False),
        ("Error bars are shown.", False),
        ("", False),
    ],
)
def test_is_failed_request(answer, failed):
    assert final_answer.is_failed_request(answer) is failed


def test_failure_texts_are_those_of_the_installed_lmms_eval():
    models = Path(importlib.util.find_spec("lmms_eval").submodule_search_locations[0]) / "models"
    for file, text in [
        ("simple/openai.py", 'f"[LMMS_EVAL_REQUEST_FAILED after {'),
        ("chat/openai.py", 'f"[LMMS_EVAL_REQUEST_FAILED after {'),
        ("chat/async_openai.py", 'f"[LMMS_EVAL_REQUEST_FAILED after {'),
        ("chat/async_openai.py", 'all_response += f"Error: {str(e)}"'),
        ("simple/gemini.py", 'f"[LMMS_EVAL_REQUEST_FAILED after {'),
        ("chat/gemini.py", 'f"[SAFETY_BLOCKED:{'),
        ("simple/batch_gpt4.py", '"Batch failed"'),
        ("simple/generation_api.py", '"[ERROR] Empty prompt"'),
        ("simple/cosmos_wm.py", 'f"[GENERATION_FAILED] {'),
        ("simple/oryx.py", "can not load, check the source"),
    ]:
        assert text in (models / file).read_text(encoding="utf-8"), file


# The table


def test_score_gives_every_score_of_a_kind():
    assert score("A CT scan.", "CT", "open", "What is this?") == {
        "recall_llavamed": 1.0,
        "precision_llavamed": 0.5,
        "f1_llavamed": pytest.approx(2 / 3),
        "exact_match_llavamed": 0.5,
        "open_accuracy_llavamed_batch": 1.0,
        "bleu_llavamed": pytest.approx(0.0, abs=1e-100),
        "recall": 1.0,
        "precision": 0.5,
        "f1": pytest.approx(2 / 3),
        "exact_match": 0.0,
        "bleu1": 0.5,
        "recall_v1": 1.0,
        "precision_v1": 0.5,
        "f1_v1": pytest.approx(2 / 3),
        "exact_match_v1": 0.0,
        "bleu1_v1": 0.5,
        "words": 3.0,
        "refused": 0.0,
        "cut": 0.0,
    }
    assert score("I do not know.", "Left", "closed", SIDE) == {
        "closed_llavamed": 0.0,
        "closed_llavamed_batch": 0.0,
        "closed_accuracy": 0.0,
        "closed_accuracy_v1": 0.0,
        "unparsed": 1.0,
        "words": 4.0,
        "refused": 1.0,
        "cut": 0.0,
    }


def test_score_hands_the_question_to_the_scores_that_need_it():
    assert score("right or left", "left", "closed", SIDE)["closed_accuracy"] == 0.0
    assert score("right or left", "left", "closed", "")["closed_accuracy"] == 1.0


def test_scores_lie_between_0_and_1_and_repeat_exactly():
    for case in shared_json("golden/metrics/cases_random.json"):
        given = (case["prediction"], case["reference"], case["answer_type"].lower(), case["question"])
        scores = score(*given)
        assert all(0 <= value <= 1 for name, value in scores.items() if name != "words"), case["id"]
        assert score(*given) == scores


def test_every_score_has_its_own_name_and_signature():
    assert all(name == each.name for name, each in SCORES.items())
    assert len({each.signature for each in SCORES.values()}) == len(SCORES)
    assert {each.name for each in SCORES.values() if each.published} == {name for name in SCORES if "_llavamed" in name}


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="kind 'OPEN': a question is 'open' or 'closed'"):
        score("CT", "CT", "OPEN", "")


def test_importing_metrics_loads_nothing_heavy():
    heavy = "{'torch', 'numpy', 'nltk', 'transformers', 'datasets', 'pyarrow', 'lmms_eval'}"
    code = f"import sys, stllava_eval.scoring.metrics; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.filterwarnings("ignore:\\s*The hypothesis contains:UserWarning")  # nltk's remark on every short answer
def test_bleu_is_nltks():
    import random

    from nltk.translate.bleu_score import sentence_bleu

    draw = random.Random(0)
    weights = {None: (0.25,) * 4, 1: (1,), 2: (0, 1), 3: (0, 0, 1)}
    for _ in range(300):
        answer, reference = (
            draw.choices(["lung", "mass", "left", "right", "seen"], k=draw.randint(1, 9)) for _ in "ar"
        )
        for n, weight in weights.items():
            ours = llavamed.bleu_llavamed(" ".join(answer), " ".join(reference), n)
            assert ours == pytest.approx(sentence_bleu([reference], answer, weights=weight), abs=1e-12)


@pytest.mark.parametrize("kind", ["open", "closed"])
def test_a_reference_without_words_gets_the_published_scores_only(kind):
    names = set(score("a mass", "-", kind, "What is it?"))
    assert names == {s.name for s in SCORES.values() if s.kind == "both" or (s.kind == kind and s.published)}
