import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from stllava_eval.answering import PUBLISHED, Answer, Answerer, Question, default_checkpoint, record_default_checkpoint
from stllava_eval.engine import Sampling
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


def test_further_rounds_and_draws_are_what_the_same_questions_asked_alone_give(answerer):
    """The image is described, then two questions follow on each description, one drawn twice."""
    hot = Sampling(temperature=1.2, top_k=50, top_p=0.95, seed=3)
    first = [replace(question, image_key=number) for number, question in enumerate(questions()[::3])]
    asked = list(first)

    def follow(place: int, answer: Answer) -> list[Question]:
        if place >= len(first):
            return []
        of = replace(asked[place], history=((asked[place].text, answer.text),))
        more = [replace(of, text="Why?"), *(replace(of, text="Where?", sampling=hot, draw=draw) for draw in (0, 1))]
        asked.extend(more)
        return more

    found = dict(answerer.answer(first, progress=False, follow=follow))
    assert len(found) == len(asked) == 4 * 4
    assert [found[place] for place in range(16)] == [answers(answerer, [question])[0] for question in asked]
    drawn = [found[place].text for place, question in enumerate(asked) if question.sampling]
    assert len(set(drawn)) == 8


def test_a_prompt_goes_on_with_the_rounds_before_and_lets_the_model_ask(llama_tokenizer, tmp_path):
    from test_checkpoint import make, original_names, write_flat_config, write_tower

    from stllava_eval.network.processing import SYSTEM, SYSTEM_SQ

    model = make(rows=32000)
    write_flat_config(tmp_path, model)
    write_tower(tmp_path / "vit", model)
    torch.save(original_names(model), tmp_path / "pytorch_model.bin")
    for file in llama_tokenizer.iterdir():
        shutil.copy(file, tmp_path)
    answerer = Answerer(str(tmp_path), prototypes=3)
    rounds = [("Describe it.", "A chest CT.")]
    start = " USER: <image>\nDescribe it. ASSISTANT: A chest CT.</s>"
    assert answerer.prompt("Why?", rounds) == f"<s>{SYSTEM}{start}USER: Why? ASSISTANT:"
    assert answerer.prompt(None, rounds) == f"<s>{SYSTEM_SQ}{start}VUSER:"
    assert answerer.prompt("Why?", template="v1_sq") == f"<s>{SYSTEM_SQ} USER: <image>\nWhy? ASSISTANT:"
    del answerer.processor.chat_template["v1_sq"]
    with pytest.raises(InputError, match="no chat template v1_sq, so it cannot ask"):
        answerer.prompt(None, rounds)
    with pytest.raises(InputError, match="no chat template v1_sq, so it cannot be asked so"):
        answerer.prompt("Why?", template="v1_sq")


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
