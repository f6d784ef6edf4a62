"""The audit: known biases are found again, figures can be checked by hand, and no text of a model's becomes HTML."""

import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import png
from PIL import Image

from stllava_eval.data.catalog import DATASETS, Row
from stllava_eval.data.splits import write_split
from stllava_eval.errors import InputError
from stllava_eval.images import decode, pixel_hash
from stllava_eval.scoring.words import folded_words
from stllava_train.preferences.audit.figures import audit, read_references
from stllava_train.preferences.audit.judges import cohen_kappa, gwet_ac1, is_right
from stllava_train.preferences.audit.page import examples, page, write_page
from stllava_train.preferences.rows import Candidate, rouge_l
from stllava_train.preferences.verdicts import AUTHORS_RULE, Rule, Verdict, preferences

RULE = Rule()
pytestmark = pytest.mark.usefixtures("home")


def verdict(candidate: Candidate, judge: str, shown=(0, 1), scores=(8, 6), **others) -> Verdict:
    """What a judge said; without scores, that it refused."""
    fields = {
        "repetition": 0,
        "outcome": "scored" if scores else "refused",
        "reply": " ".join(map(str, scores)) if scores else "I cannot help with that.",
        "why": None if scores else "it declined",
        "model": f"{judge}-2026-01-01",
        "date": "2026-11-20T10:00:00+00:00",
        "prompt_sha256": "0" * 64,
        "tokens": (900, 20),
        "cost": 0.002,
    } | others
    scores = tuple(map(float, scores)) if scores else None
    return Verdict(candidate.id, candidate.image, candidate.image_sha256, judge, shown, scores=scores, **fields)


def picture(number: int) -> bytes:
    return png((number % 256, 60, 255 - number % 256))


def candidate(folder, number: int, question: str = "Where is it?", answers=("left", "the right side")) -> Candidate:
    """About image `number // 10`, which is written to the folder."""
    name = f"{number // 10:03}.png"
    (folder / name).write_bytes(picture(number // 10))
    pixels = pixel_hash(decode(picture(number // 10)))
    return Candidate(f"{name}#{number % 10}", name, pixels, question, tuple(answers))


QUESTIONS = {
    "Is there a {}?": ("yes", "no"),
    "Does the image show a {}?": ("yes", "no"),
    "What is next to the {}?": ("the heart", "a rib"),
    "Which side shows the {}?": ("left", "right"),
    "Where is the {}?": ("in the lower lobe", "at the very top"),
    "In which plane is the {} seen?": ("axial", "coronal"),
}
FINDINGS = ("mass", "nodule", "fracture", "effusion", "cyst", "stent", "clip", "tube")


@pytest.fixture
def made_up(tmp_path):
    """360 candidates, 120 images; which answers are right; what two sound judges, two biased and a person say."""
    draw = random.Random(0)
    found, right = [], {}
    verdicts: list[Verdict] = []
    for number in range(1200):
        if number % 10 >= 3:
            continue
        question, (true, false) = draw.choice(list(QUESTIONS.items()))
        answers = [true, false]
        draw.shuffle(answers)
        right[f"{number // 10:03}.png#{number % 10}"] = answers.index(true)
        spun = [text + ", as far as this can be told" * draw.randrange(2) for text in answers]
        one = candidate(tmp_path, number, question.format(draw.choice(FINDINGS)), spun)
        found.append(one)
        longer = int(len(spun[1].split()) > len(spun[0].split()))
        sound = right[one.id] if draw.random() < 0.9 else 1 - right[one.id]
        other = right[one.id] if draw.random() < 0.8 else 1 - right[one.id]
        for shown in ((0, 1), (1, 0)):
            verdicts.append(verdict(one, "sound", shown, (8, 5) if shown[0] == sound else (5, 8)))
            verdicts.append(verdict(one, "other", shown, (9, 4) if shown[0] == other else (4, 9)))
            verdicts.append(verdict(one, "first", shown, (9, 3)))
            verdicts.append(verdict(one, "long", shown, (9, 7) if shown[0] == longer else (7, 9)))
        if number % 30 == 0:  # a person sees each pair once, in an order drawn by chance
            shown = draw.choice([(0, 1), (1, 0)])
            person = right[one.id] if draw.random() < 0.95 else 1 - right[one.id]
            verdicts.append(verdict(one, "human:ann", shown, (2, 1) if shown[0] == person else (1, 2)))
    return found, verdicts, right


def figures_of(found, verdicts, folder, rule=RULE, **settings):
    return audit(found, verdicts, folder, rule, progress=False, **settings)


# --- judges -----------------------------------------------------------------------------------------------------------


def test_known_biases_are_found_again(made_up, tmp_path):
    found, verdicts, right = made_up
    references = {(one.image_sha256, folded_words(one.question)): one.answers[right[one.id]] for one in found}
    judging = figures_of(found, verdicts, tmp_path, references=references)["judging"]
    assert judging["first"]["prefers_first"]["value"] == 1
    assert judging["first"]["prefers_first"]["low"] > 0.95
    assert judging["first"]["consistent"]["value"] == 0
    assert judging["first"]["fates"]["orders disagree"] == 360
    assert judging["long"]["prefers_longer"]["value"] == 1
    assert judging["long"]["words_more"]["low"] > 1
    assert judging["sound"]["consistent"] == {**judging["sound"]["consistent"], "value": 1, "n": 360, "clusters": 120}
    for name in ("sound", "other"):
        one = judging[name]
        assert one["prefers_first"]["low"] < 0.5 < one["prefers_first"]["high"]
        assert one["prefers_longer"]["low"] < 0.5 < one["prefers_longer"]["high"]
        assert one["stable"] == {**one["stable"], "value": None, "why": "nothing was asked twice in one order"}
    assert judging["sound"]["prefers_right"]["low"] < 0.9 < judging["sound"]["prefers_right"]["high"]
    assert judging["first"]["prefers_right"]["value"] is None
    assert judging["first"]["right_of_all"]["value"] == 0


def test_what_stands_out_is_said_of_the_biased_judges_alone(made_up, tmp_path):
    found, verdicts, _ = made_up
    checks = figures_of(found, verdicts, tmp_path)["checks"]
    warned = {(one["about"], one["text"].split(":")[0]) for one in checks if one["level"] == "warning"}
    assert ("first", "It prefers the answer shown first") in warned
    assert ("long", "It prefers the longer answer") in warned
    assert not {about for about, _ in warned} & {"sound", "human:ann"}


def test_a_person_who_saw_each_pair_in_one_order_is_compared_with_judges(made_up, tmp_path):
    found, verdicts, _ = made_up
    agreement = {tuple(one["judges"]): one for one in figures_of(found, verdicts, tmp_path)["agreement"]}
    one = agreement["human:ann", "sound"]
    assert one["equal"]["n"] == 40
    assert one["kappa"]["low"] < 0.72 < one["kappa"]["high"]  # 0.95 * 0.9 + 0.05 * 0.1 = 0.86 equal, one half by chance
    assert agreement["first", "sound"]["kappa"]["value"] == pytest.approx(0)


def test_position_figures_by_hand(tmp_path):
    one, two = candidate(tmp_path, 0), candidate(tmp_path, 10)
    verdicts = [
        verdict(one, "j", (0, 1), (8, 6)),  # the first
        verdict(one, "j", (1, 0), (8, 6)),  # the first again: another answer
        verdict(two, "j", (0, 1), (5, 5)),  # a tie decides nothing
        verdict(two, "j", (1, 0), (7, 7)),
    ]
    judge = figures_of([one, two], verdicts, tmp_path)["judging"]["j"]
    assert (judge["consistent"]["value"], judge["consistent"]["n"]) == (0.5, 2)
    assert (judge["prefers_first"]["value"], judge["prefers_first"]["n"]) == (1, 2)
    assert judge["scores"] == {"5": 2, "6": 2, "7": 2, "8": 2}
    assert judge["fates"] == {
        "preferred": 0, "tie": 1, "small margin": 0, "orders disagree": 1, "not scored": 0
    }  # fmt: skip


def test_repetitions_that_decide_alike_are_stable(tmp_path):
    one = candidate(tmp_path, 0)
    decided = [((0, 1), (8, 6)), ((0, 1), (9, 6)), ((0, 1), (6, 8)), ((1, 0), (3, 4)), ((1, 0), (2, 4))]
    verdicts = [verdict(one, "j", shown, scores, repetition=n) for n, (shown, scores) in enumerate(decided)]
    judge = figures_of([one], verdicts, tmp_path)["judging"]["j"]
    assert judge["stable"]["value"] == pytest.approx((1 / 3 + 1) / 2)  # one of three twos, and the only one


def test_what_is_not_scored_is_counted_and_no_score(tmp_path):
    one = candidate(tmp_path, 0)
    verdicts = [
        verdict(one, "j", (0, 1), (8, 6)),
        verdict(one, "j", (1, 0), None),
        verdict(one, "k", (0, 1), None, outcome="failed", reply=None, tokens=None, cost=None),
    ]
    figures = figures_of([one], verdicts, tmp_path)
    judge = figures["judging"]["j"]
    assert judge["outcomes"] == {"scored": 1, "refused": 1, "unparsable": 0, "failed": 0, "unknown": 0}
    assert judge["consistent"]["value"] is None
    assert judge["scored"]["value"] == 0.5
    assert figures["judging"]["k"]["score"]["value"] is None
    assert figures["agreement"][0]["kappa"]["why"] == "they scored no pair in common"
    assert ("j", "warning") in {(one["about"], one["level"]) for one in figures["checks"]}


def test_the_last_verdict_of_a_key_counts_and_those_on_other_candidates_do_not(tmp_path):
    one = candidate(tmp_path, 0)
    verdicts = [
        verdict(one, "j", (0, 1), None, outcome="failed"),
        verdict(one, "j", (0, 1), (8, 6)),
        verdict(replace(one, id="elsewhere#0"), "j"),
        verdict(replace(one, image_sha256="1" * 64), "k"),
        verdict(one, "j", (0, 2)),
    ]
    figures = figures_of([one], verdicts, tmp_path)
    assert figures["verdicts"] == {"on these candidates": 1, "on others": 3}
    assert figures["judging"]["j"]["outcomes"]["failed"] == 0
    assert list(figures["judging"]) == ["j"]


def test_the_authors_rule_is_followed(made_up, tmp_path):
    found, verdicts, _ = made_up
    figures = figures_of(found, verdicts, tmp_path, rule=AUTHORS_RULE, judges=["first"])
    assert figures["preferences"]["fates"]["preferred"]["count"] == 360
    assert figures["preferences"]["prefers_lower_place"]["value"] == 1
    assert figures["judges"] == ["first"]


@pytest.mark.parametrize(("answer", "reference", "question", "expected"), [
    pytest.param("Yes, on the left.", "yes", "Is there a mass?", True, id="a closed question needs the verdict alone"),
    pytest.param("It is a CT.", "CT", "Is this a CT or an MRI?", True, id="a choice counts as closed"),
    pytest.param("the left lung", "Left lung", "Where?", True, id="articles and case do not matter"),
    pytest.param("in the left lung", "left lung", "Where?", False, id="an open answer has exactly the words"),
])  # fmt: skip
def test_is_right(answer, reference, question, expected):
    assert is_right(answer, reference, question) is expected


# --- agreement --------------------------------------------------------------------------------------------------------

TABLES = [
    # rows are one judge's, columns the other's; kappa and AC1 computed by hand
    pytest.param([[20, 5, 0], [10, 15, 0], [0, 0, 0]], 0.4, 0.6013, id="70 % equal, half by chance"),
    pytest.param([[40, 0, 0], [0, 30, 0], [0, 0, 30]], 1.0, 1.0, id="always equal"),
    pytest.param([[0, 25, 0], [25, 0, 0], [0, 0, 0]], -1.0, -1 / 3, id="always opposite"),
    # the paradox: 90 % equal, but 0.95^2 + 0.05^2 by chance; AC1: (0.95 * 0.05 + 0.05 * 0.95) / 2 by chance
    pytest.param([[90, 5, 0], [5, 0, 0], [0, 0, 0]], (0.9 - 0.905) / 0.095, (0.9 - 0.0475) / 0.9525, id="one class"),
]


@pytest.mark.parametrize(("table", "kappa", "ac1"), TABLES)
def test_agreement_beyond_chance(table, kappa, ac1):
    assert cohen_kappa(np.array(table)) == pytest.approx(kappa, abs=1e-4)
    assert gwet_ac1(np.array(table)) == pytest.approx(ac1, abs=1e-4)


@pytest.mark.parametrize(("table", "kappa", "ac1"), TABLES)
def test_kappa_is_that_of_scikit_learn(table, kappa, ac1):
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn, which nilearn brings")
    cells = [(one, other) for one in range(3) for other in range(3) for _ in range(table[one][other])]
    one, other = zip(*cells, strict=True)
    assert cohen_kappa(np.array(table)) == pytest.approx(metrics.cohen_kappa_score(one, other))


def test_kappa_means_nothing_where_all_is_one_class_and_ac1_is_1():
    assert np.isnan(cohen_kappa(np.array([[7, 0, 0], [0, 0, 0], [0, 0, 0]])))
    assert gwet_ac1(np.array([[7, 0, 0], [0, 0, 0], [0, 0, 0]])) == 1


def test_the_interval_of_kappa_is_that_of_drawing_whole_images(made_up, tmp_path):
    found, verdicts, _ = made_up
    figures = figures_of(found, verdicts, tmp_path)
    (one,) = [one for one in figures["agreement"] if one["judges"] == ["other", "sound"]]
    choice = {}  # by judge and candidate: the place of the answer that it prefers
    for said in verdicts:
        if said.judge in ("other", "sound") and said.shown == (0, 1):
            choice[said.judge, said.id] = int(said.scores[1] > said.scores[0])
    by_image = {}
    for about in found:
        table = by_image.setdefault(about.image, np.zeros((3, 3)))
        table[choice["other", about.id], choice["sound", about.id]] += 1
    tables = np.stack(list(by_image.values()))
    assert one["table"] == tables.sum(0).astype(int).tolist()
    random = np.random.default_rng(1)
    drawn = [cohen_kappa(tables[random.integers(120, size=120)].sum(0)) for _ in range(2000)]
    assert (one["kappa"]["low"], one["kappa"]["high"]) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.015)


# --- data -------------------------------------------------------------------------------------------------------------


def test_types_repeats_and_variety_by_hand(tmp_path):
    questions = ("Is it big?", "is it BIG", "What organ?", "Which side?", "Where?", "How many?", "In which plane?")
    found = [candidate(tmp_path, number, text) for number, text in enumerate(questions)]
    data = figures_of(found, [], tmp_path)["data"]
    assert {name: round(7 * one["value"]) for name, one in data["types"].items()} == {
        "yes/no": 2, "what": 1, "which": 1, "where": 1, "how": 1, "other": 1
    }  # fmt: skip
    assert round(7 * data["repeats"]["value"]) == 1  # the second is the first in other letters
    assert round(7 * data["near_repeats"]["value"]) == 2
    assert data["variety"]["questions"]["distinct_words"] == 12 / 16  # is, it, big and which twice
    assert data["questions"] == 6


def test_near_repeats_are_those_of_rouge_l(made_up, tmp_path):
    found, verdicts, _ = made_up
    share = figures_of(found[:60], verdicts, tmp_path)["data"]["near_repeats"]["value"]
    texts = [one.question for one in found[:60]]
    near = [
        any(rouge_l(text, other) >= 0.7 for place, other in enumerate(texts) if place != own)
        for own, text in enumerate(texts)
    ]
    assert share == pytest.approx(sum(near) / 60)


def test_questions_that_say_the_same_have_a_self_bleu_of_1_and_those_that_share_no_word_nearly_0(tmp_path):
    same = [candidate(tmp_path, 10 * number, "Is there a large mass in the lung?") for number in range(3)]
    assert figures_of(same, [], tmp_path)["data"]["self_bleu"]["value"] == pytest.approx(1)
    other = [
        candidate(tmp_path, number, text) for number, text in enumerate(("Is it big now?", "Where does pain sit?"))
    ]
    assert figures_of(other, [], tmp_path)["data"]["self_bleu"]["value"] < 0.1


def test_lengths_are_of_the_chosen_and_rejected_answers(tmp_path):
    one = candidate(tmp_path, 0, answers=("one two three", "one"))
    two = candidate(tmp_path, 10, answers=("one", "one two three four five"))
    verdicts = [
        verdict(about, "j", shown, (8, 5) if shown[0] == about.answers.index(max(about.answers, key=len)) else (5, 8))
        for about in (one, two)
        for shown in ((0, 1), (1, 0))
    ]
    data = figures_of([one, two], verdicts, tmp_path)["data"]
    assert data["words"]["chosen"]["value"] == 4
    assert data["words"]["chosen"]["quartiles"] == [3.5, 4, 4.5]
    assert data["words"]["rejected"]["value"] == 1
    assert data["words_more"]["value"] == 3


def test_what_was_left_out_comes_from_the_rows(tmp_path):
    one = candidate(tmp_path, 0)
    asked = [{"left_out": None}, {"left_out": "repeat"}, {"left_out": "answers alike"}]
    rows = [{"image": "a", "questions": asked}, {"image": "b", "broken": "cut", "questions": []}]
    told = figures_of([one], [], tmp_path, rows=rows)["data"]["asked"]
    assert (told["images"], told["images that cannot be decoded"], told["questions"]) == (2, 1, 3)
    assert {name: times for name, times in told["left out"].items() if times} == {"repeat": 1, "answers alike": 1}


def test_answers_that_need_no_image_are_counted_among_those_given(tmp_path):
    one, two, three = (candidate(tmp_path, 10 * number) for number in range(3))
    found = [one, two, three]
    verdicts = [verdict(about, "j", *said) for about in found for said in (((0, 1), (8, 5)), ((1, 0), (5, 8)))]
    blind = figures_of(found, verdicts, tmp_path, blind={one.id: "Left.", two.id: "right"})["blind"]
    assert (blind["value"], blind["n"]) == (0.5, 2)
    without = figures_of(found, verdicts, tmp_path)["blind"]
    assert (without["value"], without["why"]) == (None, "no answers without the image were given")


def test_images_and_questions_of_a_prepared_test_split_are_leaks(tmp_path):
    asked = [candidate(tmp_path, 0, "Where is it?"), candidate(tmp_path, 1, "What is it?"), candidate(tmp_path, 10)]
    none = figures_of(asked, [], tmp_path)["leaks"]
    assert none["images"]["value"] is None
    assert none["images"]["why"] == "no test split is prepared (`stllava-eval prepare`)"
    fields = dict.fromkeys(DATASETS["vqarad"].categories, "")
    row = Row("1", picture(0), "synpic2.jpg", "where IS it", "left", "open", fields)
    write_split("vqarad", "test", [row], edition="t", official=False, sample=True, source="t", licence="CC0-1.0")
    leaks = figures_of(asked, [], tmp_path)["leaks"]
    assert (leaks["images"]["value"], leaks["images"]["n"]) == (0.5, 2)
    assert leaks["questions"]["value"] == pytest.approx(2 / 3)
    assert leaks["both"]["value"] == pytest.approx(1 / 3)
    assert (leaks["prepared"], leaks["samples"], leaks["not_prepared"]) == (
        ["vqarad"],
        ["vqarad"],
        ["slake", "pathvqa"],
    )


def test_an_image_that_is_missing_or_another_one_is_refused(tmp_path):
    one = candidate(tmp_path, 0)
    with pytest.raises(InputError, match=r"000\.png: not the image.*000\.png#0\b.*--images"):
        figures_of([replace(one, image_sha256="0" * 64)], [], tmp_path)
    with pytest.raises(InputError, match=r"gone.png cannot be read .*--images"):
        figures_of([replace(one, image="gone.png")], [], tmp_path)
    with pytest.raises(InputError, match="no candidates"):
        figures_of([], [], tmp_path)


def test_cost_is_summed_by_judge_and_what_has_no_price_is_counted(tmp_path):
    one = candidate(tmp_path, 0)
    verdicts = [
        verdict(one, "j"),
        verdict(one, "j", (1, 0), cost=None),
        verdict(one, "exact", tokens=None, cost=None, model=None, date=None),
    ]
    cost = figures_of([one], verdicts, tmp_path)["cost"]
    assert cost["j"] == {
        "verdicts": 2, "models": ["j-2026-01-01"], "first": "2026-11-20T10:00:00+00:00",
        "last": "2026-11-20T10:00:00+00:00", "prompt_tokens": 1800, "reply_tokens": 40, "tokens_unknown": 0,
        "usd": 0.002, "price_unknown": 1,
    }  # fmt: skip
    assert cost["exact"] == {**cost["exact"], "usd": None, "tokens_unknown": 1, "models": [], "first": None}


# --- references -------------------------------------------------------------------------------------------------------


def conversations(folder, *rounds: tuple[str, str], image: str) -> None:
    turns = [{"from": who, "value": text} for both in rounds for who, text in zip(("human", "gpt"), both, strict=True)]
    (folder / "data.json").write_text(json.dumps([{"id": "a", "image": image, "conversations": turns}]))


def test_references_are_found_by_file_name_pixels_and_words(tmp_path):
    one = candidate(tmp_path, 0, "Where is it?")
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / one.image).write_bytes(picture(0))
    rounds = [
        ("WHERE is it", "Left"),
        ("Big?", "yes"),
        ("Big?", "no"),
        ("Which plane?", "axial"),
        ("which plane", "Axial."),
    ]
    conversations(tmp_path / "data", *rounds, image=f"images/{one.image}")
    assert read_references([tmp_path / "data" / "data.json"], [one]) == {
        (one.image_sha256, ("where", "is", "it")): "Left",
        (one.image_sha256, ("which", "plane")): "axial",
    }
    (tmp_path / "data" / "images" / one.image).write_bytes(picture(1))  # another image under the same name
    assert read_references([tmp_path / "data" / "data.json"], [one]) == {}


def test_an_unsound_file_of_references_is_refused(tmp_path):
    one = candidate(tmp_path, 0)
    conversations(tmp_path, ("Where?", ""), image=one.image)
    with pytest.raises(InputError, match=r"turn 2\b.*empty.*stllava-train check .*\b1 problems"):
        read_references([tmp_path / "data.json"], [one])


# --- the page ---------------------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script></style></details><h1>mine",
    "{{ figures }} {% raw %} & &lt; ' ` \u202etxt \x00 \ud800",
)


class Tags(HTMLParser):
    """Names of all tags and attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def parsed(text: str) -> Tags:
    parser = Tags()
    parser.feed(text)
    parser.close()
    return parser


def test_what_models_and_judges_write_is_text_on_the_page(tmp_path):
    found = [candidate(tmp_path, n, text, (text, text[::-1] + " other")) for n, text in enumerate(HOSTILE)]
    verdicts = [
        verdict(one, judge, shown, (8, 5) if shown[0] == 0 else (5, 8), reply=text, why=text)
        for one, text in zip(found, HOSTILE, strict=True)
        for judge in (HOSTILE[0], HOSTILE[1])
        for shown in ((0, 1), (1, 0))
    ]
    verdicts.append(verdict(found[0], HOSTILE[2], model=HOSTILE[0], date=HOSTILE[1]))
    figures = figures_of(found, verdicts, tmp_path, note=HOSTILE[0])
    write_page(figures, examples(found, verdicts, tmp_path, RULE), tmp_path / "out")
    html = (tmp_path / "out" / "audit.html").read_text()
    harmless = [replace(one, question="Where?", answers=("left", "right other")) for one in found]
    said = [
        replace(one, judge=f"judge {one.judge == HOSTILE[0]}", reply="8 5", why=None, model="m") for one in verdicts
    ]
    plain = page(figures_of(harmless, said, tmp_path, note="note"), examples(harmless, said, tmp_path, RULE))
    tags = parsed(html)
    assert set(tags.tags) <= {*parsed(plain).tags, "i"}  # the reason that none of the harmless gives
    assert "script" not in tags.tags
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    for text in (*HOSTILE[:3], "{{ figures }} {% raw %}"):
        assert text in tags.text
    sources = [value for name, value in tags.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:image/jpeg;base64,", "#")) for value in sources)
    assert not re.search(r"url\(|@import|https?://", html)


def test_the_page_stands_without_verdicts_and_with_all(made_up, tmp_path):
    found, verdicts, _ = made_up
    empty = page(figures_of(found[:3], [], tmp_path), examples(found[:3], [], tmp_path, RULE))
    assert "There is no verdict on these candidates." in empty
    html = page(figures_of(found, verdicts, tmp_path), examples(found, verdicts, tmp_path, RULE))
    for text in ("Research only; not for clinical use.", "prefers-color-scheme: dark", "Gwet", "human:ann", "[9"):
        assert text in html
    assert "<script" not in html


def test_nothing_sticks_out_of_the_page_at_any_width(made_up, browser, tmp_path):
    found, verdicts, _ = made_up
    names = {one.judge: f"{one.judge} {'m' * 60}" for one in verdicts}
    said = [replace(one, judge=names[one.judge], reply="w" * 300) for one in verdicts]
    asked = [replace(one, question=f"Is it {'o' * 90}?") for one in found]
    write_page(figures_of(asked, said, tmp_path), examples(asked, said, tmp_path, RULE), tmp_path / "out")
    for width in (400, 640, 641, 900, 1280, 1920):
        browser.open(f"file://{tmp_path}/out/audit.html", width=width)
        browser.wait("document.readyState === 'complete' && document.querySelector('footer') !== null")
        browser.value("for (const one of document.querySelectorAll('details')) one.open = true")
        assert (width, browser.sticking_out()) == (width, [])


def test_examples_are_drawn_of_every_fate_with_small_pictures(made_up, tmp_path):
    found, verdicts, _ = made_up
    drawn = examples(found, verdicts, tmp_path, RULE, number=5, judges=["sound", "first"])
    fates = {one.outcome for one in preferences(found, verdicts, Rule(), ["sound", "first"])}
    assert fates == {"judges disagree"}
    assert [one.pair.outcome for one in drawn] == ["judges disagree"] * 4
    drawn = examples(found, verdicts, tmp_path, RULE, number=5, judges=["sound"])
    assert [one.pair.outcome for one in drawn] == ["preferred"] * 5
    assert {said.judge for said in drawn[0].verdicts} >= {"sound", "first", "long", "other"}
    Image.new("RGB", (1000, 400), "red").save(tmp_path / "big.png")
    big = Image.open(tmp_path / "big.png").convert("RGB")
    one = Candidate("big.png#0", "big.png", pixel_hash(big), "Red?", ("yes", "no"))
    (shown,) = examples([one], [], tmp_path, RULE)
    assert shown.pair.outcome == "not scored"
    assert shown.thumbnail.startswith("data:image/jpeg;base64,")


def test_equal_input_and_seed_give_equal_bytes_whatever_the_order_of_verdicts(made_up, tmp_path):
    found, verdicts, _ = made_up
    shuffled = random.Random(1).sample(verdicts, len(verdicts))
    for folder, given in (("a", verdicts), ("b", shuffled)):
        figures = figures_of(found, given, tmp_path, seed=3)
        write_page(figures, examples(found, given, tmp_path, RULE, seed=3), tmp_path / folder)
    for name in ("audit.json", "audit.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["seed"] == 3
    other = examples(found, verdicts, tmp_path, RULE, seed=4)
    assert [one.candidate.id for one in other] != [
        one.candidate.id for one in examples(found, verdicts, tmp_path, RULE, seed=3)
    ]
