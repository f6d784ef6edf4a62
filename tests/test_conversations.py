"""Conversations: what is read, what is refused, and what is learnt."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from stllava_eval.errors import InputError
from stllava_eval.network.processing import make_processor
from stllava_train.conversations import (
    ANSWER,
    NOTHING,
    QUESTION,
    Conversation,
    Encoder,
    asked,
    read_conversations,
)


def record(*turns: str, **other) -> dict:
    roles = ("human", "gpt")
    return {
        "id": "a",
        "conversations": [{"from": roles[number % 2], "value": text} for number, text in enumerate(turns)],
        **other,
    }


def write(folder: Path, *records: dict) -> Path:
    file = folder / "data.json"
    file.write_text("[\n" + ",\n".join(json.dumps(one) for one in records) + "\n]\n")
    return file


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    return tmp_path


def problems(folder: Path, one: dict) -> list[str]:
    sound, found = read_conversations(write(folder, record("Q?", "A.", id="sound"), one))
    assert [conversation.id for conversation in sound] == ["sound"]
    assert all(str(problem).startswith(f"{folder / 'data.json'}:3: ") for problem in found)
    return [problem.what for problem in found]


# what is learnt -----------------------------------------------------------------------------------------------------


def golden(shared: Path) -> list[dict]:
    return json.loads((shared / "golden" / "c_label_masks" / "label_masks.json").read_text())["cases"]


@pytest.mark.parametrize("legacy", [True, False])
def test_text_spans_ids_and_labels_are_the_authors(shared, tokenizers, folder, legacy):
    for case in golden(shared):
        one = {"id": case["id"], "conversations": case["conversation"]} | (
            {"image": "x.png"} if case["has_image"] else {}
        )
        ((conversation,), _) = read_conversations(write(folder, one))
        encoder = Encoder(make_processor(tokenizers[legacy], 28, 14), case["template"], image_tokens=4)
        asks = case["vuser_per_human_turn"]
        text, spans = encoder.rendered(conversation, asks)
        assert text == "<s>" + case["prompt"], case["id"]
        assert [(start - 3, end - 3) for start, end, _ in spans] == [
            (start, end) for start, end, _ in case["supervised_char_spans"]
        ]
        encoded = encoder(conversation, asks)
        ids = case["llama_token_ids" if legacy else "llama_token_ids_legacy_false"]
        labels = case["labels" if legacy else "labels_legacy_false"]
        image = tokenizers[legacy].convert_tokens_to_ids("<image>")
        expected = [
            (image if token == -200 else token, -100 if token == -200 else label)
            for token, label in zip(ids, labels, strict=True)
            for _ in range(4 if token == -200 else 1)
        ]
        assert encoded.ids == [token for token, _ in expected], case["id"]
        learnt = [token if kind else -100 for token, kind in zip(encoded.ids, encoded.kinds, strict=True)]
        assert learnt == [label for _, label in expected], case["id"]
        texts = [text[start:end] for start, end, kind in spans if kind == QUESTION]
        assert texts == [
            f" {question}</s>" for (question, _), ask in zip(conversation.rounds, asks, strict=True) if ask
        ]


def test_what_a_token_is_learnt_as(processor, folder):
    conversation = Conversation("a", folder / "x.png", (("What?", "A lung."), ("Where?", "Left."), ("Why?", "No.")), "")
    encoded = Encoder(processor, "v1_sq", image_tokens=3)(conversation, (False, True, False))
    decode = processor.tokenizer.decode
    parts = {
        kind: decode([token for token, of in zip(encoded.ids, encoded.kinds, strict=True) if of == kind])
        for kind in (ANSWER, QUESTION)
    }
    assert parts[QUESTION].replace(" ", "") == "Where?</s>"
    assert parts[ANSWER].replace(" ", "") == "Alung.</s>Left.</s>No.</s>"
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert [kind for token, kind in zip(encoded.ids, encoded.kinds, strict=True) if token == image] == [NOTHING] * 3


def test_a_template_that_a_checkpoint_lacks_is_refused(processor):
    with pytest.raises(InputError, match=r"template 'v2': the checkpoint has default, v1, v1_sq\. Choose"):
        Encoder(processor, "v2", 4)


def test_either_template_is_drawn(processor, folder):
    conversation = Conversation("a", folder / "x.png", (("What?", "A lung."), ("Where?", "Left.")), "")
    encoder = Encoder(processor, "either", 4)
    found = ["virtual user" in encoder.rendered(conversation, (False, True), draw)[0] for draw in (0, 0.49, 0.51, 1)]
    assert found == [False, False, True, True]


# which questions ----------------------------------------------------------------------------------------------------


def many(rounds: int, image: bool = True) -> list[Conversation]:
    return [
        Conversation(str(number), Path("x") if image else None, (("Q?", "A."),) * rounds, "") for number in range(400)
    ]


def test_questions_are_drawn_by_seed_epoch_and_id_alone():
    one, other = many(60)[:2]
    assert asked(one, 0, 0, 0.5) == asked(one, 0, 0, 0.5)
    draws = [asked(one, 0, 0, 0.5), asked(one, 1, 0, 0.5), asked(one, 0, 1, 0.5), asked(other, 0, 0, 0.5)]
    assert len(set(draws)) == 4


@pytest.mark.parametrize("sq_r", [0.0, 0.3, 0.5, 1.0])
def test_the_share_of_questions_is_sq_r_and_never_the_first(sq_r):
    drawn = [asked(conversation, 0, 0, sq_r) for conversation in many(6)]
    assert not any(asks[0] for asks in drawn)
    share = sum(map(sum, drawn)) / (5 * len(drawn))
    assert share == pytest.approx(sq_r, abs=4 * (sq_r * (1 - sq_r) / 2000) ** 0.5)  # four standard errors


def test_no_question_without_an_image_is_drawn():
    assert not any(any(asked(conversation, 0, 0, 1.0)) for conversation in many(3, image=False))


# what is read -------------------------------------------------------------------------------------------------------


def test_turns_are_stripped_and_the_image_comes_first(folder):
    one = record(" Where?\n<image>", "\nLeft. ", "<b>?", "x", image="x.png")
    ((conversation,), found) = read_conversations(write(folder, one))
    assert conversation == Conversation(
        "a", folder / "x.png", (("Where?", "Left."), ("<b>?", "x")), f"{folder / 'data.json'}:2"
    )
    assert found == []


def test_an_image_whose_tag_is_missing_comes_first_too(folder, processor):
    ((with_tag,), _) = read_conversations(write(folder, record("<image>\nQ?", "A.", image="x.png")))
    ((without,), _) = read_conversations(write(folder, record("Q?", "A.", image="x.png")))
    ((twice,), _) = read_conversations(write(folder, record("<image> Q? <image>", "A.", image="x.png")))
    encoder = Encoder(processor, "v1", 4)
    assert encoder(with_tag, (False,)) == encoder(without, (False,)) == encoder(twice, (False,))


def test_the_misspelt_key_of_llava_med_is_read(folder):
    one = record("Q?", "A.")
    one["conversatons"] = one.pop("conversations")
    assert read_conversations(write(folder, one))[0][0].rounds == (("Q?", "A."),)


def test_records_may_stand_a_line_each(folder):
    file = folder / "data.jsonl"
    file.write_text("\n".join(json.dumps(record("Q?", "A.", id=number)) for number in range(3)) + "\n")
    sound, found = read_conversations(file)
    assert [(one.id, one.place) for one in sound] == [(str(number), f"{file}:{number + 1}") for number in range(3)]
    assert found == []


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        pytest.param(record("Q?", "He wrote ASSISTANT: yes."), "turn 2 holds ASSISTANT:, which would", id="role word"),
        pytest.param(record("VUSER: Q?", "A."), "turn 1 holds VUSER:, which would", id="role word in a question"),
        pytest.param(record("Q?", "Tag </s> is eos."), "turn 2 holds </s>, which the tokenizer", id="end token"),
        pytest.param(record("Q?", ""), "turn 2 is empty. Write the answer", id="empty answer"),
        pytest.param(record("<image>", "A.", image="x.png"), "turn 1 is empty. Write the question", id="only an image"),
        pytest.param(record("Q?", "A.", "B?"), "ends with turn 3, a question without an answer", id="ends with human"),
        pytest.param(record("<image>\nQ?", "A."), "holds <image> and the record names no image", id="no image"),
        pytest.param(
            record("Q?", "A.", "<image> B?", "C.", image="x.png"), "turn 3 holds <image>. It belongs", id="late image"
        ),
        pytest.param(record("Q?", "A.", image="y.png"), "its image y.png is not in ", id="missing image"),
        pytest.param(
            record("Q?", "A.", image="x" * 300), r'its image "x{39}\.\.\. is not in ', id="a name of 300 characters"
        ),
        pytest.param(
            record("Q?", "A.", image="data:image/png;base64," + "iVBO" * 2000), "is not in ", id="the image as text"
        ),
        pytest.param(record("Q?", "A.", image="x\0.png"), r"x\\u0000\.png\", not the name of one file", id="a null"),
        pytest.param(record("Q?", "A.", image=["x.png"]), r"its image is \[\"x.png\"\], not the name", id="two images"),
        pytest.param(record("Q?", "A.", id=None), "its id is null. Give it a text", id="no id"),
        pytest.param(record("Q?", "A.", id="sound"), "its id stands at .*data.json:2 too", id="an id twice"),
        pytest.param({"id": "a"}, "its conversations are null. Give a list", id="no conversations"),
        pytest.param({"id": "a", "conversations": ["x"]}, 'turn 1 is "x", not an object', id="no turn"),
        pytest.param(record("Q?", "\ud800"), "turn 2 holds half a character", id="half a character"),
        pytest.param(7, "it is 7, not an object with id", id="no record"),
    ],
)
def test_a_record_with_a_problem_is_not_read(folder, one, expected):
    import re

    assert any(re.search(expected, problem) for problem in problems(folder, one))


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        pytest.param([("gpt", "Hello."), ("human", "Hi?"), ("gpt", "Yes.")], 'turn 1 is from "gpt", not', id="gpt"),
        pytest.param([("human", "Q?"), ("gpt", "A."), ("vuser", "B?"), ("gpt", "C.")], 'is from "vuser"', id="vuser"),
        pytest.param([("human", "Q?"), ("human", "R?")], 'turn 2 is from "human", not from gpt', id="twice"),
    ],
)
def test_turns_out_of_order_are_refused(folder, turns, expected):
    one = {"id": "a", "conversations": [{"from": role, "value": text} for role, text in turns]}
    assert any(expected in problem for problem in problems(folder, one))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param('[{"id": 1},\n{"id" 2}]', r":2: no JSON \(Expecting ':' delimiter\)", id="broken"),
        pytest.param('[\n{"id": 1}\n{"id": 2}]', r":3: no JSON \(a comma or \] is missing\)", id="no comma"),
        pytest.param('[{"id": 1}, ', r":1: no JSON \(the closing \] is missing\)", id="cut short"),
        pytest.param('[{"id": 1}] x', r":1: no JSON \(more stands behind", id="more"),
        pytest.param("[" * 100_000, r":1: no JSON \(nested too deeply\)", id="deep"),
        pytest.param("[]", "it holds no record", id="empty"),
        pytest.param("", "it holds no record", id="nothing"),
    ],
)
def test_a_file_that_is_no_json_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_conversations(tmp_path / "data.json")


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data.json: cannot be read \(No such file"):
        read_conversations(tmp_path / "data.json")
    (tmp_path / "data.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="it is not UTF-8"):
        read_conversations(tmp_path / "data.json")


def test_a_pipe_is_refused_since_data_is_read_more_than_once():
    read, write = os.pipe()
    os.write(write, json.dumps([record("Q?", "A.")]).encode())
    os.close(write)
    with pytest.raises(InputError, match=rf"/dev/fd/{read}: no regular file, .*\. Write it to a file first\."):
        read_conversations(Path(f"/dev/fd/{read}"))
    os.close(read)


def test_a_key_that_appears_twice_is_refused(tmp_path):
    file = tmp_path / "data.json"
    file.write_text('[\n{"id": "a", "id": "b", "conversations": []}]')
    with pytest.raises(InputError, match=r"data\.json:2: no JSON \(key 'id' appears twice\)\. Mend the file"):
        read_conversations(file)


def test_a_checkpoint_without_the_templates_is_refused_with_what_can_be_done(processor):
    class Mistral:
        tokenizer, chat_template = processor.tokenizer, {"default": "", "mistral_instruct": ""}

    with pytest.raises(InputError, match=r"has default, mistral_instruct\. Training needs v1 or v1_sq: start from"):
        Encoder(Mistral(), "v1", 4)
    Mistral.chat_template = {"default": "", "v1": ""}
    with pytest.raises(InputError, match=r"template 'v1_sq': the checkpoint has default, v1\. Choose v1\."):
        Encoder(Mistral(), "v1_sq", 4)
