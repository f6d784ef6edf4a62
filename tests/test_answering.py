import json
import shutil

import pytest
from PIL import Image

from stllava_eval.answering import (
    PUBLISHED,
    Answerer,
    Question,
    checkpoint_folder,
    checkpoint_sha256,
    default_checkpoint,
    image_processor,
    pad_to_square,
    prompt,
    record_default_checkpoint,
)
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


@pytest.fixture(scope="module")
def answerer(checkpoint) -> Answerer:
    return Answerer(str(checkpoint))


def test_the_prompt_is_vicunas():
    assert prompt("Is it?").endswith("answers to the user's questions. USER: <image>\nIs it? ASSISTANT:")


@pytest.mark.parametrize(
    ("size", "top_left"),
    [pytest.param((101, 58), (0, 21), id="landscape"), pytest.param((70, 131), (30, 0), id="portrait")],
)
def test_padding_centres_the_image_on_clips_mean_colour(size, top_left):
    padded = pad_to_square(Image.new("RGB", size, "red"))
    assert padded.size == (max(size), max(size))
    assert padded.getpixel(top_left) == (255, 0, 0)
    outside = max(0, top_left[0] - 1), max(0, top_left[1] - 1)
    assert padded.getpixel(outside) == (122, 116, 104)


def test_pixels_are_the_authors_bit_for_bit(shared):
    from safetensors.torch import load_file

    folder = shared / "golden" / "f_image_preprocess"
    golden = load_file(folder / "pixel_values.safetensors")
    compared = 0
    for file in sorted(folder.glob("*.png")):
        for name in (f"{file.stem}.pad84", f"{file.name}.pad84"):
            if name in golden:
                with Image.open(file) as image:
                    ours = image_processor(84)(pad_to_square(image.convert("RGB")), return_tensors="pt")["pixel_values"]
                assert ours.reshape(golden[name].shape).equal(golden[name])
                compared += 1
    assert compared == 4, sorted(golden)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_answers_do_not_depend_on_the_batch(answerer, batch_size):
    one_by_one = [next(answerer.answer([question], 1, progress=False)) for question in questions()]
    assert len({answer.text for answer in one_by_one}) > 3
    assert list(answerer.answer(questions(), batch_size, progress=False)) == one_by_one


def test_each_question_has_its_own_length_limit(answerer):
    whole = list(answerer.answer(questions(), 12, progress=False))
    limits = [1 + place % 3 for place in range(12)]
    cut = [Question(question.text, question.image, limit) for question, limit in zip(questions(), limits, strict=True)]
    for answer, limit, full in zip(answerer.answer(cut, 12, progress=False), limits, whole, strict=True):
        assert answer.tokens == min(limit, full.tokens)
        assert answer.ended == (full.tokens < limit)


def test_an_answer_ends_before_a_stop_string(answerer):
    (whole, *_) = answerer.answer(questions()[:1], 1, progress=False)
    stop = whole.text[1:3]
    (cut, *_) = answerer.answer(questions(until=(stop,))[:1], 1, progress=False)
    assert cut.text == whole.text.split(stop)[0].strip()
    assert cut.ended


def test_a_question_that_names_the_images_token_is_refused(answerer):
    with pytest.raises(InputError, match="names the image's own token"):
        answerer.token_ids("What is <image>?")


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


def test_the_hash_of_a_checkpoint_changes_with_weights_and_tokenizer_and_not_with_notes(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "README.md").write_text("notes")
    assert checkpoint_sha256(copy) == checkpoint_sha256(checkpoint)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        before = checkpoint_sha256(copy)
        with (copy / file).open("ab") as opened:
            opened.write(b" ")
        assert checkpoint_sha256(copy) != before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(None, "has no config.json", id="none"),
        pytest.param("{", "not a JSON object", id="broken"),
        pytest.param("[]", "not a JSON object", id="a list"),
        pytest.param('{"architectures": 5}', "not a JSON object", id="a number of architectures"),
        pytest.param(
            json.dumps({"architectures": ["LlavaLlamaForCausalLM"]}), "LlavaLlamaForCausalLM cannot", id="other"
        ),
    ],
)
def test_a_folder_that_is_no_checkpoint_of_ours_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        checkpoint_folder(str(tmp_path))


def test_weights_that_cannot_be_read_are_one_line(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"cannot be loaded as a LLaVA") as error:
        Answerer(str(broken))
    assert "\n" not in str(error.value)
