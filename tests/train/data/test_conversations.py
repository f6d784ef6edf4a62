"""Conversations: what is read, what is refused, and what is learnt."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from stllava_eval.errors import InputError
from stllava_eval.network.processing import make_processor
from stllava_train.data.conversations import Conversation, counted, own_in_words, read_conversations, read_files
from stllava_train.data.encoding import ANSWER, NOTHING, QUESTION, Encoder, asked, in_epoch


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
    with pytest.raises(InputError, match=r"template 'v2'.*default, v1, v1_sq\b.*v1 or v1_sq"):
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
    encoder = Encoder(processor, "v1", 4)
    assert encoder(with_tag, (False,)) == encoder(without, (False,))


def test_two_places_for_the_one_picture_are_refused(folder):
    """The record of two pictures of which one was lost would be learnt with the other."""
    assert problems(folder, record("<image> Q? <image>", "A.", image="x.png")) == [
        "turn 1 holds 2 images, and one is read. Make a record of each."
    ]


def test_the_misspelt_key_of_llava_med_is_read(folder):
    one = record("Q?", "A.")
    one["conversatons"] = one.pop("conversations")
    assert read_conversations(write(folder, one))[0][0].rounds == (("Q?", "A."),)


def test_records_may_stand_a_line_each(folder):
    file = folder / "data.jsonl"
    file.write_text("\n".join(json.dumps(record("Q?", "A.", id=number)) for number in range(3)) + "\n")
    sound, found = read_conversations(file)
    assert [(one.id, one.location) for one in sound] == [(str(number), f"{file}:{number + 1}") for number in range(3)]
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
            record("Q?", "A.", image="data:image/png;base64," + "iVBO" * 2000),
            "the picture itself",
            id="the image as text",
        ),
        pytest.param(record("Q?", "A.", image="x\0.png"), r"x\\u0000\.png\", not the name of one file", id="a null"),
        pytest.param(record("Q?", "A.", image=7), "its image is 7, not the name of one file", id="a number"),
        pytest.param(record("Q?", "A.", id=None), "its id is null. Give it a text", id="no id"),
        pytest.param(
            record("Q?", "A.", id="sound"), "its id, image and rounds are those of .*data.json:2. Keep", id="one twice"
        ),
        pytest.param({"id": "a"}, "its keys are id, of which none holds a conversation", id="no conversations"),
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


# pictures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["image", "images", "image_path", "imagePath", "image_file", "Image", "img", "image_url", "file_name", "media"],
)
@pytest.mark.parametrize("of", [str, lambda name: [name], lambda name: {"path": name}, lambda name: f"FILE://{name}"])
def test_a_key_that_names_a_picture_is_read(folder, key, of):
    named = of(str(folder / "x.png"))
    ((one,), found) = read_conversations(write(folder, record("<image>\nQ?", "A.", **{key: named})))
    assert (one.image, one.rounds, found) == (folder / "x.png", (("Q?", "A."),), [])


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_a_key_for_pictures_without_one_is_text_alone(folder, nothing):
    ((one,), _) = read_conversations(write(folder, record("Q?", "A.", images=nothing)))
    assert one.image is None


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        pytest.param({"images": ["x.png", "y.png"]}, r'names 2 pictures \("x.png", "y.png"\), and one', id="two"),
        pytest.param({"image": "x.png", "img": "y.png"}, "names 2 pictures", id="two keys"),
        pytest.param({"image_path": "y.png"}, "its image y.png is not in ", id="a file that is not there"),
        pytest.param({"image_url": "https://a.org/x.png"}, "is a web address. Download it", id="an address"),
        pytest.param({"image": {"bytes": "iVBO", "path": "x.png"}}, "a picture, and the name of one", id="bytes, path"),
        pytest.param({"image": "data:image/png;base64," + 60 * "i"}, r'"data:.+\.\.\., the picture itself', id="data"),
        pytest.param({"image": "iVBORw0KGgo" * 9}, r'"iVBOR.+\.\.\., the picture itself. Save it', id="base64"),
        pytest.param({"image": "hf://datasets/x.png"}, "is a web address. Download it", id="a hub's address"),
        pytest.param({"image": "HTTPS://a.org/x.png"}, "is a web address. Download it", id="an address in capitals"),
        pytest.param({"image": "file://server/x.png"}, "is a web address. Download it", id="of another machine"),
        pytest.param({"images": ["x.png", "https://a.org/y.png"]}, "names 2 pictures", id="a file and an address"),
        pytest.param({"imagefile": "12345"}, "its imagefile is .*, which names a picture", id="no suffix"),
        pytest.param({"xray": "12345"}, "its xray is .*, which names a picture", id="an x-ray's number"),
        pytest.param({"images": [{"bytes": "iVBO"}]}, r"its images is \{.*, not the name of one file", id="bytes"),
        pytest.param({"scan": "x.png"}, 'its scan is "x.png", which names a picture that is not read', id="scan"),
        pytest.param({"xray_file": "a/x.dcm"}, "its xray_file is .*, which names a picture", id="a DICOM file"),
        pytest.param({"meta": {"study": ["x.png"]}}, "its meta is .*, which names a picture", id="deep inside"),
        pytest.param({"meta": {"of": [{"images": ["12345"]}]}}, "its meta is .*, which names a", id="deep, no suffix"),
        pytest.param({"image_id": 7}, "its image_id is 7, which names a picture", id="an id of an image"),
        pytest.param({"videos": ["x.mp4"]}, "its videos is .*, which names a picture", id="a video"),
        pytest.param({"content64": "iVBORw0KGgo" * 9}, "its content64 is .*, which names a picture", id="base64"),
        pytest.param({"image": "x.png", "image2": "b/x.png", "image3": "y.png"}, "its image3 is .*, which", id="third"),
        pytest.param({"image": "x.png", "image2": "y.png"}, "its image2 is .*, which names a picture", id="a second"),
        pytest.param({"image": "x.png", "videos": ["x2.mp4"]}, "its videos is ", id="a video beside a picture"),
    ],
)
def test_a_picture_that_would_not_be_shown_is_refused(folder, others, expected):
    import re

    assert any(re.search(expected, problem) for problem in problems(folder, record("Q?", "A.", **others)))


@pytest.mark.parametrize(
    "others",
    [
        {"image_id": 7, "image_size": [4, 4]},
        {"image_url": "https://a.org/1234.png"},
        {"file_name": "x.png"},
        {"domain": {"chest_xray": True}, "source": "PMC1", "history": "cough", "label": 0, "framework": "x"},
    ],
)
def test_what_is_said_about_a_picture_that_is_shown_is_let_pass(folder, others):
    ((one,), found) = read_conversations(write(folder, record("Q?", "A.", image="x.png", **others)))
    assert (one.image, found) == (folder / "x.png", [])


FOREIGN_TAGS = (
    *("<IMAGE>", "<Image>", "<image1>", "<image 1>", "<image_1>", "<img>", "</img>", "<|image_pad|>", "<ImageHere>"),
    *("<|vision_start|>", "<|video_pad|>", "<image_placeholder>", "[IMG]", "[IMG_END]", "<|image_1|>", "<|image|>"),
    *("<start_of_image>", "<IMG_CONTEXT>", "<im_patch>", "</image>", "<video>", "<img src='x.png'/>", "![a](x.png)"),
    *("<ref>", "</box>", "<BOI>", "<pic>", "<dicom>"),
    *("<fake_token_around_image>", "<|im_start|>", "data:image/png;base64,iVBO", "&lt;image&gt;", "{image}"),
)


@pytest.mark.parametrize("tag", FOREIGN_TAGS)
def test_another_familys_tag_in_a_text_is_refused_with_and_without_a_picture(folder, tag):
    (without,) = problems(folder, record(f"{tag}\nQ?", "A."))
    assert "turn 1 holds " in without
    assert without.endswith("would be learnt as text. Name its image, or leave the record out.")
    (beside,) = problems(folder, record(f"<image>\n{tag} Q?", "A.", image="x.png"))
    assert beside.endswith("Take it out: its image comes first.")
    assert any("turn 2 holds " in problem for problem in problems(folder, record("Q?", f"A {tag}")))


@pytest.mark.parametrize(
    "text",
    ["p<0.05 in the image, n>3?", "Is this <b>bold</b>?", "Image [1] shows what?", "HU < 30 and > 10?", "A {b} c?"],
)
def test_signs_of_ordinary_text_are_no_tags(folder, text):
    assert read_conversations(write(folder, record(text, "A.")))[0][0].rounds == ((text, "A."),)


def test_a_tag_without_a_picture_is_not_answered_with_a_way_into_text_alone(folder):
    (found,) = problems(folder, record("<image>\nQ?", "A."))
    assert found == ("turn 1 holds <image> and the record names no image. Add its image, or leave the record out.")


# other layouts ------------------------------------------------------------------------------------------------------

QUESTION_TEXT = {"type": "text", "text": "Where?"}
PLACE = {"type": "image"}


@pytest.mark.parametrize(
    ("content", "others"),
    [
        pytest.param("<image>Where?", {"images": ["x.png"]}, id="ms-swift, LLaMA-Factory"),
        pytest.param([PLACE, QUESTION_TEXT], {"images": ["x.png"]}, id="trl"),
        pytest.param([PLACE | {"text": None}, QUESTION_TEXT | {"image": None}], {"images": ["x.png"]}, id="Arrow"),
        pytest.param([{"type": "image", "image": "x.png"}, QUESTION_TEXT], {}, id="Qwen"),
        pytest.param([QUESTION_TEXT, {"type": "image", "path": "x.png"}], {}, id="transformers"),
        pytest.param([{"type": "image_url", "image_url": {"url": "x.png"}}, QUESTION_TEXT], {}, id="OpenAI"),
        pytest.param([{"type": "input_image", "image_url": "x.png"}, QUESTION_TEXT], {}, id="OpenAI's responses"),
        pytest.param([{"image": "x.png"}, {"text": "Where?"}], {}, id="Qwen's first"),
        pytest.param([PLACE, "Where?"], {"image": "x.png"}, id="a text as a part"),
        pytest.param([{"type": "text", "text": "Where?", "image": "x.png"}], {}, id="both in one part"),
    ],
)
def test_messages_are_read_as_conversations_are(folder, content, others):
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "Left."}]},
    ]
    ((one,), found) = read_conversations(write(folder, {"messages": turns, **others}))
    assert found == []
    assert (one.id, one.image, one.rounds) == ("record-1", folder / "x.png", (("Where?", "Left."),))


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        pytest.param([[PLACE, QUESTION_TEXT], "A."], "turn 1 holds <image> and the record names no", id="no picture"),
        pytest.param([[{"type": "video", "video": "x.mp4"}, QUESTION_TEXT], "A."], "turn 1 has the part ", id="video"),
        pytest.param([[{"type": "image", "url": "https://a.org/x.png"}, QUESTION_TEXT], "A."], "web address", id="web"),
        pytest.param([["Q?", {"type": "image", "image": "x.png"}, PLACE], "A."], "holds 2 images", id="two places"),
        pytest.param([["Q?", PLACE | {"source": {"data": "iVBO"}}], "A."], "which names no file", id="Anthropic's"),
        pytest.param(["Q?", "A.", [{"type": "image", "image": "x.png"}, "B?"], "C."], "turn 3 holds an", id="late"),
        pytest.param(["Q?", [{"type": "image", "image": "x.png"}, "A."]], "turn 2 holds an image", id="an answer's"),
    ],
)
def test_parts_that_would_be_dropped_are_refused(folder, turns, expected):
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(turns)]
    assert any(expected in problem for problem in problems(folder, {"id": "a", "messages": messages}))


def test_a_picture_that_a_turn_names_is_the_records(folder):
    one = record("Q?", "A.")
    one["conversations"][0]["image"] = "x.png"
    assert read_conversations(write(folder, one))[0][0].image == folder / "x.png"
    one["conversations"][0] = {"from": "human", "value": "Q?", "scan": "x.png"}
    assert problems(folder, one)[0].startswith('turn 1\'s scan is "x.png", which names a picture that is not read.')
    late = record("Q?", "A.", "B?", "C.")
    late["conversations"][2]["images"] = ["x.png"]
    assert problems(folder, late) == ["turn 3 holds an image. It belongs into the first turn."]


@pytest.mark.parametrize(
    "first", [{"role": "system", "content": "Be brief."}, {"from": "system", "value": "Be brief."}]
)
def test_a_system_text_takes_the_place_of_the_templates(folder, processor, first):
    one = record("Q?", "A.", "R?", "B.", image="x.png")
    one["conversations"].insert(0, first)
    plain = record("Q?", "A.", "R?", "B.", image="x.png", id="b")
    of_key = record("Q?", "A.", "R?", "B.", image="x.png", id="c", system=" Be brief.\n")
    (own, others, by_key), found = read_conversations(write(folder, one, plain, of_key))
    assert (own.system, others.system, by_key.system, found) == ("Be brief.", None, "Be brief.", [])
    for template in ("v1", "v1_sq"):
        encoder = Encoder(processor, template, image_tokens=3)
        (text, spans), (usual, before) = (encoder.rendered(each, (False, True)) for each in (own, others))
        system = usual[len("<s>") : usual.index(" USER:")]
        assert text == usual.replace(system, "Be brief.")
        assert [text[start:end] for start, end, _ in spans] == [usual[start:end] for start, end, _ in before]
        assert [kind for _, _, kind in spans] == [ANSWER, QUESTION, ANSWER]


def test_a_system_text_is_refused_where_the_template_has_none(folder, processor):
    turns = "{% for message in messages %}{% generation %}{{ message['content'] }}{% endgeneration %}{% endfor %}"
    bare = SimpleNamespace(tokenizer=processor.tokenizer, chat_template={"v1": "{{ bos_token }}" + turns})
    ((one,), _) = read_conversations(write(folder, record("Q?", "A.", system="Be brief.")))
    with pytest.raises(InputError, match=r'data\.json:2: a\b.*system.*"Be brief\.".*template.*first question'):
        Encoder(bare, "v1", 4)(one, (False,))


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        pytest.param("ASSISTANT: hi", "its system text holds ASSISTANT:, which would read", id="a role word"),
        pytest.param("Look at <image>.", "its system text holds ", id="a tag"),
        pytest.param("</s>", "its system text holds </s>, which the tokenizer", id="a token"),
        pytest.param({"a": 1}, "its system is {.*, not a text", id="no text"),
        pytest.param([{"type": "image"}], "its system holds an image. It belongs into the first", id="an image"),
    ],
)
def test_a_system_text_that_cannot_be_rendered_is_refused(folder, system, expected):
    import re

    assert any(re.search(expected, problem) for problem in problems(folder, record("Q?", "A.", system=system)))


def test_two_system_texts_and_settings_of_a_system_turn_are_refused(folder):
    one = record("Q?", "A.", system="Be brief.")
    one["conversations"].insert(0, {"from": "system", "value": "Be long.", "loss": True, "image": "x.png"})
    assert problems(folder, one) == [
        "its system turn's loss is true, and a system text is never learnt. Take it out.",
        'its system turn\'s image is "x.png". A picture belongs into the first turn.',
        'it has 2 system texts ("Be brief.", "Be long."). Keep one of them.',
    ]
    one["conversations"][0] = {"from": "system", "value": "Be brief.", "weight": 0}
    assert read_conversations(write(folder, one))[0][0].system == "Be brief."


def test_an_empty_system_text_changes_nothing(folder):
    one = record("Q?", "A.", system="")
    one["conversations"].insert(0, {"from": "system", "value": ""})
    assert read_conversations(write(folder, one))[0][0].rounds == (("Q?", "A."),)


@pytest.mark.parametrize(
    ("turn", "fields", "expected"),
    [
        pytest.param(1, {"weight": 0.5}, "turn 2's weight is 0.5, and an answer is learnt with weight 1 or", id="half"),
        pytest.param(1, {"loss": [0]}, r"turn 2's loss is \[0\], and an answer is learnt", id="a list"),
        pytest.param(1, {"loss": False}, "none of its answers is learnt, by their loss or weight", id="nothing"),
        pytest.param(1, {"loss": True, "weight": 0}, "turn 2 has loss true and weight 0. Keep one", id="both"),
        pytest.param(1, {"loss_mask": [1, 0]}, r"turn 2's loss_mask is \[1, 0\], and every", id="a mask of tokens"),
        pytest.param(1, {"lossWeight": 2}, "turn 2's lossWeight is 2", id="another spelling"),
        pytest.param(0, {"loss": True}, "turn 1's loss is true, and the recipe's sq_r draws which", id="a question"),
        pytest.param(None, {"weight": 3}, "its weight is 3, and every answer", id="of the record"),
        pytest.param(None, {"sample_weight": 0.1}, "its sample_weight is 0.1", id="sample weight"),
        pytest.param(
            1, {"reasoning_content": "x"}, 'turn 2\'s reasoning_content is "x", which would not', id="thoughts"
        ),
        pytest.param(0, {"ask": False}, "turn 1's ask is false, and the recipe's sq_r", id="our template's own flag"),
        pytest.param(1, {"content": "B."}, "turn 2 has value and content", id="two texts"),
        pytest.param(None, {"repeat": 3}, "its repeat is 3", id="more often"),
        pytest.param(None, {"tools": ["x"]}, "its tools is .*, which would not be learnt", id="tools"),
        pytest.param(None, {"history": [["a", "b"]]}, "its history is ", id="earlier rounds"),
        pytest.param(None, {"rejected_response": "x"}, "its rejected_response is .*pairs --from", id="a pair"),
        pytest.param(None, {"messages": [{"role": "user"}]}, "it has conversations and messages", id="two lists"),
    ],
)
def test_what_would_change_training_and_is_not_read_is_named(folder, turn, fields, expected):
    import re

    one = record("Q?", "A.")
    (one if turn is None else one["conversations"][turn]).update(fields)
    assert any(re.search(expected, problem) for problem in problems(folder, one))


@pytest.mark.parametrize(
    "fields",
    [{"loss": False}, {"loss": 0}, {"weight": 0}, {"weight": "0"}, {"train": False}, {"Loss": 0.0}],
)
def test_an_answer_that_is_switched_off_is_read_and_not_learnt(folder, processor, fields):
    one = record("Q?", "A lung.", "R?", "Left.", "S?", "No.", image="x.png", unordered=True)
    one["conversations"][1].update(fields)
    one["conversations"][5].update(weight=1)
    ((read,), found) = read_conversations(write(folder, one))
    assert (read.learnt, found) == ((False, True, True), [])
    encoder = Encoder(processor, "v1", image_tokens=3)
    all_learnt = encoder(replace(read, learnt=None), (False, True, False))
    masked = encoder(read, (False, True, False))
    assert masked.ids == all_learnt.ids
    assert all_learnt.kinds.count(QUESTION) == masked.kinds.count(QUESTION) > 0
    off = [
        token
        for token, usual, kind in zip(masked.ids, all_learnt.kinds, masked.kinds, strict=True)
        if usual == ANSWER and kind == NOTHING
    ]
    assert processor.tokenizer.decode(off).replace(" ", "") == "Alung.</s>"
    for epoch in range(4):  # an unordered one keeps its switches with its rounds
        shown = in_epoch(read, 0, epoch)
        assert {round: shown.learns(place) for place, round in enumerate(shown.rounds)} == {
            ("Q?", "A lung."): False,
            ("R?", "Left."): True,
            ("S?", "No."): True,
        }
        packed = encoder.together(shown, (False, False, False))
        learnt = [token for token, kind in zip(packed.ids, packed.kinds, strict=True) if kind == ANSWER]
        assert "lung" not in processor.tokenizer.decode(learnt)
    assert own_in_words([read]) == ["1 answer not learnt, by loss or weight 0"]


def test_the_same_rounds_under_another_system_text_or_mask_are_no_duplicate(folder):
    one, off = record("Q?", "A.", "R?", "B."), record("Q?", "A.", "R?", "B.")
    off["conversations"][1]["loss"] = False
    sound, found = read_conversations(write(folder, one, record("Q?", "A.", "R?", "B.", system="Be brief."), off))
    assert ([each.id for each in sound], found) == (["a", "a-2", "a-3"], [])


@pytest.mark.parametrize("fields", [{"loss": True}, {"weight": 1}, {"weight": 1.0}, {"loss": None}, {"train": "true"}])
def test_what_says_what_is_done_anyway_is_let_pass(folder, fields):
    one = record("Q?", "A.")
    one["conversations"][1].update(fields)
    assert len(read_conversations(write(folder, one))[0]) == 1


# ids ----------------------------------------------------------------------------------------------------------------


def test_an_id_that_comes_again_with_another_conversation_gets_a_number(folder):
    answers = [("a", "1."), ("a", "2."), ("a-2", "3."), ("a", "4."), ("a", "2.")]
    file = write(folder, *(record("Q?", answer, id=id) for id, answer in answers))
    sound, found = read_conversations(file)
    assert [(one.id, one.rounds[0][1]) for one in sound] == [("a", "1."), ("a-3", "2."), ("a-2", "3."), ("a-4", "4.")]
    assert [str(one) for one in found] == [
        f"{file}:6: a: its id, image and rounds are those of {file}:3. Keep one of the two."
    ]


def test_ids_of_several_files_are_numbered_together(folder):
    file, other = write(folder, record("Q?", "1."), record("Q?", "2.")), folder / "other.json"
    other.write_text(json.dumps([record("Q?", "2."), record("Q?", "3.")]))
    read, found = read_files([file, other])
    assert [[one.id for one in of] for of in read] == [["a", "a-2"], ["a-3"]]
    assert [one.location for one in found] == [f"{other}:1"]


def test_what_was_read_is_counted_with_its_pictures(folder):
    some = [record("Q?", f"{number}.", image="x.png", id=number) for number in range(3)]
    sound, _ = read_conversations(write(folder, *some, record("Q?", "A."), record("R?", "A.")))
    assert counted(sound) == "5 conversations about 1 image (2 about none)"
    assert counted(sound[:3]) == "3 conversations about 1 image"


# files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param('[{"id": 1},\n{"id" 2}]', r":2\b.*JSON.*':'.*[Ff]ix", id="broken"),
        pytest.param('[\n{"id": 1}\n{"id": 2}]', r":3\b.*JSON.*comma.*missing.*[Ff]ix", id="no comma"),
        pytest.param('[{"id": 1}, ', r":1\b.*JSON.*closing \] is missing.*[Ff]ix", id="cut short"),
        pytest.param('[{"id": 1}] x', r":1\b.*JSON.*more behind.*[Ff]ix", id="more"),
        pytest.param("[" * 100_000, r":1\b.*JSON.*nested.*[Ff]ix", id="deep"),
        pytest.param("[]", "it holds no record", id="empty"),
        pytest.param("", "it holds no record", id="nothing"),
    ],
)
def test_a_file_that_is_no_json_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_conversations(tmp_path / "data.json")


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data\.json\b.*read.*No such file.*Pass"):
        read_conversations(tmp_path / "data.json")
    (tmp_path / "data.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="it is not UTF-8"):
        read_conversations(tmp_path / "data.json")


def test_a_pipe_is_refused_since_data_is_read_more_than_once():
    read, write = os.pipe()
    os.write(write, json.dumps([record("Q?", "A.")]).encode())
    os.close(write)
    with pytest.raises(InputError, match=rf"/dev/fd/{read}\b.*regular.*Write.*file"):
        read_conversations(Path(f"/dev/fd/{read}"))
    os.close(read)


def test_a_key_that_appears_twice_is_refused(tmp_path):
    file = tmp_path / "data.json"
    file.write_text('[\n{"id": "a", "id": "b", "conversations": []}]')
    with pytest.raises(InputError, match=r"data\.json:2\b.*JSON.*'id'.*twice.*[Ff]ix"):
        read_conversations(file)


def test_a_checkpoint_without_the_templates_is_refused_with_what_can_be_done(processor):
    class Mistral:
        tokenizer, chat_template = processor.tokenizer, {"default": "", "mistral_instruct": ""}

    with pytest.raises(
        InputError, match=r"template 'v1'.*default, mistral_instruct\b.*v1 or v1_sq\b.*another checkpoint"
    ):
        Encoder(Mistral(), "v1", 4)
    Mistral.chat_template = {"default": "", "v1": ""}
    with pytest.raises(InputError, match=r"template 'v1_sq'.*default, v1\b.*Choose v1\."):
        Encoder(Mistral(), "v1_sq", 4)


def test_files_of_one_name_in_two_folders_are_two_pictures(folder):
    """As SLAKE's are: each is called source.jpg."""
    (folder / "a").mkdir()
    (folder / "a" / "source.png").write_bytes((folder / "x.png").read_bytes())
    one = record("Q?", "A.", image="a/source.png", image_before="b/source.png")
    assert problems(folder, one)[0].startswith("its image_before is ")
    ((read,), _) = read_conversations(write(folder, record("Q?", "A.", image="a/source.png", image_raw="a/source.dcm")))
    assert read.image == folder / "a" / "source.png"
