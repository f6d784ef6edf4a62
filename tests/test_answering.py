import pytest
from PIL import Image

from stllava_eval.answering import PUBLISHED, Answer, Answerer, Question, default_checkpoint, record_default_checkpoint
from stllava_eval.errors import InputError

COLOURS = [(0, 0, 0), (200, 10, 10), (10, 200, 90), (255, 255, 255)]
TEXTS = ["Is there a mass?", "What organ is shown in this image, and where does it lie?", "Why?"]


def questions(**options) -> list[Question]:
    options = {"max_new_tokens": 64} | options
    return [
        Question(text, lambda colour=colour: Image.new("RGB", (40, 30), colour), **options)
        for colour in COLOURS
        for text in TEXTS
    ]


def answers(answerer: Answerer, asked: list[Question]) -> list[Answer]:
    """In the order of the questions."""
    found = dict(answerer.answer(asked, progress=False))
    return [found[place] for place in range(len(asked))]


@pytest.fixture(scope="module")
def answerer(checkpoint) -> Answerer:
    return Answerer(str(checkpoint))


def test_the_prompt_is_vicunas(answerer):
    assert answerer.prompt("Is it?").startswith("<s>A chat between a curious user")
    assert answerer.prompt("Is it?").endswith("answers to the user's questions. USER: <image>\nIs it? ASSISTANT:")
    assert answerer.preprocessing["prompt"] == answerer.prompt("{question}")
    assert "pad to a square" in answerer.preprocessing["image_preprocessing"]


@pytest.mark.parametrize("rows", [1, 2, 5, None])
def test_answers_do_not_depend_on_the_batch(answerer, rows, monkeypatch):
    one_by_one = [answers(answerer, [question])[0] for question in questions()]
    assert len({answer.text for answer in one_by_one}) > 3
    monkeypatch.setattr(answerer, "rows", rows)
    assert answers(answerer, questions()) == one_by_one


def test_each_question_has_its_own_length_limit(answerer):
    whole = answers(answerer, questions())
    limits = [1 + place % 3 for place in range(12)]
    cut = [Question(question.text, question.image, limit) for question, limit in zip(questions(), limits, strict=True)]
    for answer, limit, full in zip(answers(answerer, cut), limits, whole, strict=True):
        assert answer.tokens == min(limit, full.tokens)
        assert answer.ended == (full.tokens < limit)


def test_an_answer_ends_before_a_stop_string(answerer):
    (whole,) = answers(answerer, questions()[:1])
    stop = whole.text[1:3]
    (cut,) = answers(answerer, questions(until=(stop,))[:1])
    assert cut.text == whole.text.split(stop)[0].strip()
    assert cut.ended


@pytest.mark.parametrize("token", ["<image>", "</s>"])
def test_a_question_that_holds_a_special_token_is_refused(answerer, token):
    with pytest.raises(InputError, match=f"holds the special token {token}"):
        answerer.token_ids(f"What is {token}?")


def test_the_default_checkpoint_is_the_environments_then_the_recorded_then_the_published_one(
    home, tmp_path, monkeypatch
):
    assert default_checkpoint() == PUBLISHED
    record_default_checkpoint(tmp_path / "mine")
    assert default_checkpoint() == str(tmp_path / "mine")
    monkeypatch.setenv("STLLAVA_CHECKPOINT", "other/one")
    assert default_checkpoint() == "other/one"


@pytest.mark.parametrize("record", ["[]", "{", '{"checkpoint": 5}'])
def test_a_broken_record_of_the_default_checkpoint_is_refused(home, record):
    home.mkdir()
    (home / "checkpoint.json").write_text(record)
    with pytest.raises(InputError, match=r"checkpoint\.json: not a record"):
        default_checkpoint()
