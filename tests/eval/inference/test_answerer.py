import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loguru import logger
from PIL import Image

from stllava_eval.errors import InputError
from stllava_eval.inference.answerer import Answerer, only_answers
from stllava_eval.inference.open import PUBLISHED, default_checkpoint, open_answerer, record_default_checkpoint
from stllava_eval.inference.replies import Failure
from stllava_eval.inference.types import Answer, Question, Sampling

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

    def on_answer(place: int, answer: Answer) -> list[Question]:
        if place >= len(first):
            return []
        of = replace(asked[place], history=((asked[place].text, answer.text),))
        more = [
            replace(of, text="Why?"),
            *(replace(of, text="Where?", sampling=hot, sample_index=draw) for draw in (0, 1)),
        ]
        asked.extend(more)
        return more

    found = dict(answerer.answer(first, progress=False, on_answer=on_answer))
    assert len(found) == len(asked) == 4 * 4
    assert [found[place] for place in range(16)] == [answers(answerer, [question])[0] for question in asked]
    drawn = [found[place].text for place, question in enumerate(asked) if question.sampling]
    assert len(set(drawn)) == 8


def test_a_prompt_goes_on_with_the_rounds_before_and_lets_the_model_ask(llama_tokenizer, tmp_path):
    from author_layouts import make, original_names, write_flat_config, write_tower

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


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            {"system": "You read scans."},
            "leaves the system prompt out, or has fixed words of its own. Leave system out",
        ),
        ({"enable_thinking": False}, "its chat template has no enable_thinking. Leave it out"),
        ({"enable_thinking": True}, "its chat template has no enable_thinking. Leave it out"),
        ({"max_pixels": 10**6}, "its processor scales every image to one fixed size. Leave min_pixels and max_pix"),
        ({"min_pixels": 100}, "its processor scales every image to one fixed size"),
    ],
)
def test_what_our_own_template_and_processor_do_not_take_is_refused(checkpoint, arguments, reason):
    with pytest.raises(InputError, match=re.escape(reason)):
        open_answerer(str(checkpoint), **arguments)


@pytest.fixture(scope="module")
def own(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint in our own layout, whose templates are files."""
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_eval.network.convert import convert

    folder = tmp_path_factory.mktemp("own") / "model"
    convert(open_checkpoint(str(checkpoint)), folder, progress=False)
    return folder


def with_template(own: Path, folder: Path, template: str) -> Path:
    shutil.copytree(own, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(template)
    return folder / "model"


def test_a_system_prompt_and_thinking_reach_a_template_of_ours_that_takes_them(own, tmp_path):
    template = (
        "<s>{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}\n"
        "{% else %}USER: <image>{{ '\n' + message['content'][-1]['text'] }}{% endif %}{% endfor %}"
        " ASSISTANT:{% if enable_thinking %}<think>{% endif %}"
    ).replace("<image>", "{% if message['content'][0]['type'] == 'image' %}<image>{% endif %}")
    folder = with_template(own, tmp_path, template)
    answerer = open_answerer(str(folder), system="You read scans.", enable_thinking=True)
    assert answerer.prompt("Why?") == "<s>You read scans.\nUSER: <image>\nWhy? ASSISTANT:<think>"
    assert answerer.preprocessing["system"] == "You read scans."
    assert answerer.preprocessing["enable_thinking"] is True
    assert open_answerer(str(folder)).prompt("Why?") == "<s>USER: <image>\nWhy? ASSISTANT:"
    assert not {"system", "enable_thinking"} & open_answerer(str(folder)).preprocessing.keys()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if", "cannot be rendered"),
        ("{{ raise_exception('no') }}", r"cannot be rendered \(no\)"),
        ("USER: {{ messages[0]['content'][-1]['text'] }}", "leaves the image out"),
        ("{% for one in messages[0]['content'] if one['type'] == 'image' %}<image>{% endfor %}", "the question out"),
        (
            "{{ messages[0]['content'][-1]['text'] }} {{ '<image>' * messages[0]['content'] | length }}",
            "writes 2 image",
        ),
    ],
)
def test_a_template_that_cannot_show_the_image_is_one_line(own, template, reason, tmp_path):
    folder = with_template(own, tmp_path, template)
    with pytest.raises(InputError, match=reason) as caught:
        Answerer(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_that_the_processor_refuses_fails_its_own_questions_only(answerer, monkeypatch):
    original = Answerer.pixels

    def pixels(self, image):
        if image.getpixel((0, 0)) == COLOURS[1]:
            raise MemoryError("Unable to allocate 30 GiB\nfor an array")
        return original(self, image)

    asked = [replace(question, image_key=number // 3) for number, question in enumerate(questions())]
    expected = answers(answerer, asked)
    monkeypatch.setattr(Answerer, "pixels", pixels)
    for options in ({}, {"image_key": None}):
        found = answers(answerer, [replace(question, **options) for question in asked])
        assert found[:3] + found[6:] == expected[:3] + expected[6:]
        assert all(isinstance(one, Failure) for one in found[3:6])
    assert found[4] == Failure(
        f"{answerer.name}: its processor refuses the image of question 'What organ is shown in this image, and where "
        "does it lie?' (Unable to allocate 30 GiB for an array)",
        1,
    )
    with pytest.raises(InputError, match=r"refuses the image of question .*Take the image out of the data\.$"):
        list(only_answers(answerer.answer(asked, progress=False)))
    assert all(isinstance(one, Failure) for one in answers(answerer, asked[3:6]))  # and none of them is answered


def test_an_image_that_cannot_be_decoded_still_ends_the_run(answerer):
    def broken():
        raise InputError("an image of 3 bytes cannot be decoded. Download it again.")

    with pytest.raises(InputError, match="an image of 3 bytes cannot be decoded"):
        answers(answerer, [*questions()[:2], replace(questions()[3], image=broken)])


def test_tokens_that_the_sources_settings_exclude_are_never_generated_nor_after_converting(checkpoint, tmp_path):
    from stllava_eval.network.checkpoint import open_checkpoint
    from stllava_eval.network.convert import convert

    free = Answerer(str(checkpoint))
    first = free.tokenizer(answers(free, questions()[:1])[0].text, add_special_tokens=False).input_ids[0]
    folder = tmp_path / "source"
    shutil.copytree(checkpoint, folder)
    file = folder / "generation_config.json"
    settings = {"suppress_tokens": [first], "bad_words_ids": [[3]], "repetition_penalty": 1.9, "num_beams": 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    told: list[str] = []
    sink = logger.add(told.append, format="{message}")
    on_the_fly = Answerer(str(folder))
    logger.remove(sink)
    assert on_the_fly.preprocessing["decoding"] == f"greedy; suppress_tokens [3, {first}]"
    expected = f"{folder}: not taken over from its generation_config.json: num_beams 4, repetition_penalty 1.9\n"
    assert told == [expected]
    convert(open_checkpoint(str(folder)), tmp_path / "own", progress=False)
    converted = Answerer(str(tmp_path / "own"))
    assert converted.preprocessing["decoding"] == on_the_fly.preprocessing["decoding"]
    assert answers(converted, questions()) == answers(on_the_fly, questions()) != answers(free, questions())


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
