"""Every family of models that the engine answers: the answers are those of the model's own `generate`."""

import random
import re
from functools import partial

import pytest
import torch
from families import SHARED, UNSHARED, write_family
from loguru import logger
from PIL import Image

from stllava_eval.errors import InputError
from stllava_eval.inference.generic import ASKING_INSTRUCTION, TransformersAnswerer
from stllava_eval.inference.types import Answer, Question, Sampling, cut_at_stop

ASKED = [
    "Is there a mass?",
    "Why?",
    "What organ is shown in this image?",
    "\nWhere is it?",
    " is the lung normal, or is there an effusion on the left side",
]
SAID = ["Yes.", "a mass in the left lung", "no"]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """A random checkpoint of the family that the test names."""
    return write_family(request.param, tmp_path_factory.mktemp(request.param))


def picture(number: int) -> Image.Image:
    """One of several images of noise, of several sizes."""
    size = [(40, 30), (30, 60), (64, 64), (90, 33)][number % 4]
    values = random.Random(number).randbytes(size[0] * size[1] * 3)
    return Image.frombytes("RGB", size, values)


def some_questions(seed: int, count: int, images: int = 4) -> list[Question]:
    """Questions about a few images, with limits, stops and earlier rounds by chance."""
    chance = random.Random(seed)
    asked = []
    for _ in range(count):
        image = chance.randrange(images)
        rounds = [(chance.choice(ASKED), chance.choice(SAID)) for _ in range(chance.choice([0, 0, 0, 1, 2]))]
        asked.append(
            Question(
                chance.choice(ASKED),
                partial(picture, image),
                chance.choice([1, 3, 12, 20]),
                until=chance.choice([(), (), ("a", "e"), ("\n",)]),
                image_key=image,
                history=tuple(rounds),
            )
        )
    return asked


def generated(answerer: TransformersAnswerer, question: Question, **settings) -> Answer:
    """What `generate` makes of one question alone, from the model's own template and processor."""
    processor, messages = answerer.processor, []
    turns = [*question.history, (ASKING_INSTRUCTION if question.text is None else question.text, None)]
    for number, (asked, said) in enumerate(turns):
        image = [] if number else [{"type": "image"}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": asked}]})
        if said is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(
        images=[question.image()], text=text, add_special_tokens=not text.startswith("<s>"), return_tensors="pt"
    )
    ends = sorted(answerer.ends)
    with torch.inference_mode():
        output = answerer.model.generate(
            **inputs, max_new_tokens=question.max_new_tokens, eos_token_id=ends, pad_token_id=0, do_sample=False
        )
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    end = next((number for number, token in enumerate(ids) if token in ends), None)
    whole = processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
    said, stopped = cut_at_stop(whole, question.until)
    return Answer(said.strip(), len(ids[:end]), end is not None or stopped)


def answers(answerer: TransformersAnswerer, asked: list[Question]) -> list[Answer]:
    came = dict(answerer.answer(asked, progress=False))
    return [came[index] for index in range(len(asked))]


def logged(call) -> str:
    """What `call` logs."""
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    try:
        call()
    finally:
        logger.remove(sink)
    return "".join(lines)


def same(answer: Answer, expected: Answer) -> bool:
    """Equal; behind a stop string `generate` runs on, and its tokens are not counted."""
    return (answer.text, answer.ended) == (expected.text, expected.ended) and answer.tokens <= expected.tokens


@pytest.mark.parametrize("folder", SHARED, indirect=True)
def test_answers_are_those_of_generate(folder):
    answerer = TransformersAnswerer(str(folder), rows=5, batch_tokens=1500)
    for seed in range(2):
        asked = some_questions(seed, 12)
        came: list[Answer] = []
        assert "plain batches" not in logged(lambda asked=asked, came=came: came.extend(answers(answerer, asked)))
        expected = [generated(answerer, question) for question in asked]
        assert [answer.text for answer in came] == [answer.text for answer in expected]
        assert all(map(same, came, expected))


@pytest.mark.parametrize("folder", SHARED, indirect=True)
def test_an_image_is_encoded_once(folder):
    answerer = TransformersAnswerer(str(folder))

    def passes(images: int) -> int:
        """Passes of images through the model for five questions about each of so many."""
        seen: list[int] = []
        hook = answerer.model.model.register_forward_pre_hook(
            lambda _, __, named: seen.append("pixel_values" in named), with_kwargs=True
        )
        answers(
            answerer, [Question(text, partial(picture, i), 6, image_key=i) for i in range(images) for text in ASKED]
        )
        hook.remove()
        return sum(seen)

    # the first call also compares the engine's logits with the model's own, on one question
    assert [passes(images) for images in (1, 1, 2, 4)] == [2, 1, 2, 4]


@pytest.mark.parametrize("folder", UNSHARED, indirect=True)
def test_a_family_that_cannot_share_is_answered_in_plain_batches_and_a_line_says_why(folder):
    answerer = TransformersAnswerer(str(folder), rows=3)
    asked = some_questions(0, 8)
    came: list[Answer] = []
    why = {"qwen3_5": "keep no keys and values of each token (linear_attention)", "mllama": "by cross-attention"}
    line = logged(lambda: came.extend(answers(answerer, asked)))
    assert "plain batches" in line
    assert next(why[name] for name in why if name in str(folder)) in line
    assert [answer.text for answer in came] == [generated(answerer, question).text for question in asked]


@pytest.mark.parametrize("folder", SHARED, indirect=True)
def test_sampled_answers_depend_on_seed_image_question_and_index_alone(folder):
    answerer = TransformersAnswerer(str(folder))
    sampling = Sampling(1.0, top_k=50, top_p=0.95, seed=3)
    asked = [
        Question(text, partial(picture, image), 8, image_key=image, sampling=sampling, sample_index=index)
        for image in range(2)
        for text in (ASKED[0], None)
        for index in range(3)
    ]
    together = answers(answerer, asked)
    alone = [answers(answerer, [question])[0] for question in asked]
    assert together == alone
    assert len({answer.text for answer in together}) > len(asked) // 2


@pytest.mark.parametrize("folder", ["qwen2_5_vl", "gemma3", "qwen3_5", "mllama"], indirect=True)
def test_a_model_asks_by_an_instruction_and_further_rounds_share_what_was_said(folder):
    answerer = TransformersAnswerer(str(folder))
    first = Question(ASKED[0], partial(picture, 0), 8, image_key=0, template="v1_sq")
    further: list[Question] = []

    def on_answer(index: int, answer: Answer) -> list[Question]:
        if index:
            return []
        said = "".join(letter for letter in answer.text if letter.isascii() and letter.isprintable())
        further.append(Question(None, partial(picture, 0), 8, image_key=0, history=((ASKED[0], said),)))
        return further

    came = dict(answerer.answer([first], progress=False, on_answer=on_answer))
    assert [came[0].text, came[1].text] == [generated(answerer, question).text for question in (first, *further)]
    assert ASKING_INSTRUCTION in answerer.prompt(None, further[0].history)


@pytest.mark.parametrize("folder", ["qwen2_vl", "idefics3"], indirect=True)
def test_a_question_with_any_special_token_is_refused(folder):
    """Most tokenizers name few of them as attributes: Llama 3.2's <|image|> and <|eot_id|> are marked special alone."""
    answerer = TransformersAnswerer(str(folder))
    for token in ("<image>", "<|im_end|>", "<video>" if "qwen" in folder.name else "<row_1_col_2>"):
        with pytest.raises(InputError, match=f"holds the special token {re.escape(token)}"):
            answers(answerer, [Question(f"Is {token} it?", partial(picture, 0), 4)])


@pytest.mark.parametrize("folder", ["gemma3"], indirect=True)
def test_the_special_tokens_of_a_large_vocabulary_are_read_once(folder, monkeypatch):
    """Gemma's tokenizer has 6,400 added tokens, which take 20 ms to list."""
    answerer = TransformersAnswerer(str(folder))
    asked = [Question(text, partial(picture, 0), 2, image_key=0) for text in ASKED]
    before = answers(answerer, asked)
    monkeypatch.setattr(
        type(answerer.tokenizer), "added_tokens_decoder", property(lambda _: pytest.fail("the tokens are listed again"))
    )
    assert answers(answerer, asked) == before
