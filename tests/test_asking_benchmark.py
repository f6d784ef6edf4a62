import io
from dataclasses import replace

import asking
import pytest
from asking import Asked, Book, Picture
from PIL import Image

from stllava_eval.data.catalog import Row
from stllava_eval.errors import InputError
from stllava_eval.inference.types import Answer, Sampling
from stllava_eval.scoring.words import folded_words

TRAINED = ["Is this an MRI?", "What plane is this?", "Is there a red cross?"]
# what the sets can ask beside: two questions that only pathology images answer, one wording that training never shows
KNOWN = [*TRAINED, "What is the stain?", "How many nuclei are shown?", "Which plane is shown?"]
BOOK = Book(TRAINED, {folded_words(text) for text in KNOWN}, special=["</s>", "<image>"])


def picture(name: str, look: str, **truths: str) -> Picture:
    """Its conversation starts with "Is there a red cross?"; `truths` are answers by question, less spaces and "?"."""
    texts = {text.replace(" ", "").rstrip("?"): text for text in KNOWN}
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (len(name), 0, 0)).save(file, "PNG")
    known = {folded_words(texts[text]): truth for text, truth in truths.items()}
    start = ("Is there a red cross?", "no")
    return Picture(name, file.getvalue(), look, start, known | {folded_words(start[0]): "no"}, frozenset())


BRAIN = picture("brain", "MRI", IsthisanMRI="yes", Whatplaneisthis="axial", Whichplaneisshown="axial")
TISSUE = picture("tissue", "H&E histology", Whatisthestain="DAB and hematoxylin", Howmanynucleiareshown="up to 5")


class FakeAnswerer:
    """Says `says[question, key of the image in view]`, where None stands for asking; leaves out what is not there."""

    def __init__(self, says: dict[tuple[str | None, str], str | Answer]) -> None:
        self.says, self.seen = says, []

    def answer(self, questions, progress=True):
        for place, question in enumerate(questions):
            self.seen.append(question)
            said = self.says.get((question.text, question.image_key))
            if said is not None:
                yield place, said if isinstance(said, Answer) else Answer(said, 3, True)


def asked(text: str, fate: str, place: int = 0) -> Asked:
    return Asked(place, 0, text, "", fate)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("Is the lung clear?", "", id="well-formed, whether it is known or not"),
        pytest.param("", "no words", id="empty"),
        pytest.param(" ?", "no words", id="a mark alone"),
        pytest.param("Is this </s> an MRI?", "special token", id="special token"),
        pytest.param("Is it? ASSISTANT: yes?", "role word", id="role word"),
        pytest.param("VUSER: is it?", "role word", id="questioner's role word"),
        pytest.param("Is the user's lung clear?", "", id="an ordinary word that looks like a role"),
        pytest.param("the lung", "does not end in ?", id="an answer"),
        pytest.param("Describe the lung.", "does not end in ?", id="no training question ends so"),
        pytest.param("so " * 29 + "what?", "", id="thirty words"),
        pytest.param("so " * 30 + "what?", "over 30 words", id="thirty-one words"),
    ],
)
def test_a_question_is_well_formed_or_its_flaw_is_named(text, expected):
    assert asking.flaw(Answer(text, 5, True), BOOK) == expected


def test_a_question_that_does_not_end_or_come_is_malformed():
    assert asking.flaw(Answer("Is it?", 100, False), BOOK) == "no end within 100 tokens"
    assert asking.flaw(None, BOOK) == "nothing came back"


def test_a_full_stop_ends_a_question_where_training_questions_end_so():
    assert asking.flaw(Answer("Describe it.", 5, True), replace(BOOK, trained=["Describe the image.", "Is it?"])) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("Is there the Red cross?", "repeat", id="the round before, in other case and article"),
        pytest.param("Is this MRI?", "applicable", id="known answer, article left out"),
        pytest.param("Which plane is shown?", "applicable", id="a wording that is in no training row"),
        pytest.param("What is the stain?", "not applicable", id="of another kind of image"),
        pytest.param("What is the plain?", "unknown", id="in no set"),
    ],
)
def test_a_well_formed_question_has_one_fate(text, expected):
    assert asking.fate(text, BRAIN, BOOK.known) == expected


def test_partners_are_others_of_another_look_each_taken_once():
    looks = ["MRI", "CT", "MRI", "MRI", "X-ray", "CT"]
    for seed in range(5):
        others = asking.partners(looks, seed)
        assert sorted(others) == list(range(6))
        assert all(looks[place] != looks[other] for place, other in enumerate(others))
        assert others == asking.partners(looks, seed)


def test_a_look_that_over_half_of_the_images_have_is_its_own_partner_as_seldom_as_can_be():
    looks = ["MRI", "MRI", "MRI", "CT"]
    others = asking.partners(looks, 0)
    assert sorted(others) == [0, 1, 2, 3]
    assert all(place != other for place, other in enumerate(others))
    assert sum(looks[place] == looks[other] for place, other in enumerate(others)) == 2
    assert sorted(asking.partners(["MRI"] * 3, 0)) == [0, 1, 2]
    with pytest.raises(InputError, match="1 images: another one is shown beside each"):
        asking.partners(["MRI"], 0)


def test_pictures_are_chosen_by_the_seed_and_keep_their_order():
    pictures = [picture(f"{number:02d}", "CT") for number in range(20)]
    chosen = asking.choose(pictures, 5, seed=1)
    assert len(chosen) == 5
    assert chosen == sorted(chosen, key=lambda of: of.id) == asking.choose(pictures, 5, seed=1)
    assert chosen != asking.choose(pictures, 5, seed=2)
    assert asking.choose(pictures, 50, seed=1) == pictures


def test_variety_counts_distinct_questions_words_and_pairs():
    # is it red | is it blue | is it red: 9 words of which 4 differ, 6 pairs of which 3 differ
    found = asking.variety(["Is it red?", "Is it blue?", "is it red"])
    assert found == {
        "n": 3,
        "distinct": 2,
        "distinct_questions": pytest.approx(2 / 3),
        "distinct_words": pytest.approx(4 / 9),
        "distinct_pairs": pytest.approx(3 / 6),
    }
    assert asking.variety([])["distinct_words"] is None


def test_a_model_is_asked_to_ask_after_the_round_before_with_the_image_in_view():
    sampling = Sampling(1.2, 300, 0.95, 7)
    fake = FakeAnswerer({(None, "brain"): "Is this an MRI?"})
    found = asking.ask(fake, [BRAIN, TISSUE], [1, 0], sampling, 2)
    assert found == [None, None, *[Answer("Is this an MRI?", 3, True)] * 2]
    assert [(q.text, q.image_key, q.history, q.sample_index) for q in fake.seen] == [
        (None, shown, (("Is there a red cross?", "no"),), draw) for shown in ("tissue", "brain") for draw in (0, 1)
    ]
    assert {q.sampling for q in fake.seen} == {sampling}
    assert [q.image().getpixel((0, 0))[0] for q in fake.seen] == [6, 6, 5, 5]


def test_own_answers_are_judged_by_the_truth_of_the_image_that_was_asked_about():
    questions = [
        asked("Is this an MRI?", "applicable"),
        asked("What plane is this?", "applicable"),
        asked("What is it?", "unknown"),
        asked("What is the stain?", "applicable", place=1),
    ]
    fake = FakeAnswerer(
        {
            ("Is this an MRI?", "brain"): "Yes.",
            ("Is this an MRI?", "tissue"): "no",
            ("What plane is this?", "brain"): Answer("axial", 9, False),  # cut off: not right
            ("What plane is this?", "tissue"): "",  # not answered
            ("What is the stain?", "tissue"): "the DAB and hematoxylin",  # and nothing comes back for the brain
        }
    )
    figures, each = asking.own_answers(fake, [BRAIN, TISSUE], [1, 0], questions)
    assert (figures["judged"], figures["not_judged"]) == (3, 1)
    assert figures["right_own_image"]["value"] == pytest.approx(2 / 3)
    assert figures["right_another_image"]["value"] == 0
    assert figures["difference"]["value"] == pytest.approx(2 / 3)
    assert (figures["cut_own_image"], figures["cut_another_image"]) == (1, 0)
    assert (figures["unanswered_own_image"], figures["unanswered_another_image"]) == (0, 2)
    assert each[0] == {"place": 0, "draw": 0, "truth": "yes", "own_image": "Yes.", "another_image": "no"}
    assert each[2]["another_image"] is None
    assert all(q.history == () and q.sampling is None for q in fake.seen)


def test_a_model_that_looks_asks_what_fits_its_image_and_one_that_only_reads_does_not():
    pictures = [BRAIN, TISSUE]
    looks = FakeAnswerer({(None, "brain"): "Which plane is shown?", (None, "tissue"): "What is the stain?"})
    found = asking.report(looks, pictures, BOOK, None, 1, seed=0)
    assert found["fates"] == dict.fromkeys(asking.FATES, 0) | {"applicable": 2}
    value = {name: of["value"] for name, of in found.items() if isinstance(of, dict) and "value" in of}
    assert value["well_formed"] == value["known"] == value["applicable"] == value["applicable_difference"] == 1
    assert value["new"] == value["new_known"] == 1  # neither wording is in a training row
    assert value["applicable_shuffled"] == value["repeats"] == 0
    shown = found["shown_another"]
    assert (shown["of_conversation"]["value"], shown["of_image"]["value"]) == (0, 1)
    assert shown["difference"]["value"] == 1

    blind = FakeAnswerer({(None, "brain"): "Is this an MRI?", (None, "tissue"): "Is this an MRI?"})
    found = asking.report(blind, pictures, BOOK, None, 1, seed=0)
    assert found["applicable"]["value"] == found["applicable_shuffled"]["value"] == 0.5
    assert found["applicable_difference"]["value"] == found["shown_another"]["difference"]["value"] == 0
    assert found["variety"]["distinct"] == 1


def test_every_question_is_counted_once_and_every_figure_shown():
    says = {(None, "brain"): "Is there a red cross?"}  # a repeat, and nothing at all about the tissue
    found = asking.report(FakeAnswerer(says), [BRAIN, TISSUE], BOOK, Sampling(1.2), 3, seed=0)
    assert found["fates"] == dict.fromkeys(asking.FATES, 0) | {"repeat": 3, "malformed": 3}
    assert found["flaws"] == {"nothing came back": 3}
    assert len(found["questions"]) == found["questions_asked"] == sum(found["fates"].values()) == 6
    assert found["well_formed"]["value"] == found["repeats"]["value"] == 0.5
    assert found["applicable"]["value"] == 0  # though its answer is known: it was copied
    assert found["own_answers"]["right_own_image"]["value"] is None
    shown = asking.table({"a, drawn": found})
    assert "flaw: nothing came back" in shown
    assert "- (none)" in shown


def test_pictures_of_other_data_than_the_sample_sets_are_refused(monkeypatch):
    row = Row("q1", b"", "vqarad-sample-test-held-000-x", "What modality is shown?", "MRI", "open", {})
    facts = {row.image_id: {"modality": "MRI", "cross": "no"}}
    monkeypatch.setattr(asking, "SETS", ("vqarad",))
    monkeypatch.setattr(asking, "sample_facts", lambda *_: facts)
    later = replace(row, id="q0", question="Is there a red cross?", reference="no", kind="closed")
    monkeypatch.setattr(asking, "read_rows", lambda *_: [row, later])
    [found] = asking.read_pictures("test")
    assert (found.look, found.start) == ("MRI", ("Is there a red cross?", "no"))
    assert found.in_rows == {folded_words(row.question), folded_words(later.question)}
    assert found.truths[folded_words("Is a CT scan shown?")] == "no"  # more than its rows ask
    for other in (replace(row, reference="CT"), replace(row, image_id="synpic1"), replace(row, question="Is it?")):
        monkeypatch.setattr(asking, "read_rows", lambda *_, other=other: [other])
        with pytest.raises(InputError, match="vqarad test, row q1: not what the sample set says"):
            asking.read_pictures("test")


def test_a_call_that_cannot_work_is_one_line_and_exit_code_2(monkeypatch, capsys, home):
    for arguments, message in (
        (["--images", "1"], "'1' is not a whole number from 2 on"),
        (["--draws", "0"], "'0' is not a whole number from 1 on"),
    ):
        monkeypatch.setattr("sys.argv", ["asking.py", "nowhere", "--json", "-", *arguments])
        with pytest.raises(SystemExit, match="2"):
            asking.main()
        assert message in capsys.readouterr().err
