import json

import golden
import numpy as np
import pytest
from conftest import write_llama_tokenizer
from PIL import Image

from stllava_eval.network.processing import StllavaMedImageProcessor, StllavaMedTokenizer, make_processor, read_pieces

IMAGE = 32000


def messages(case: dict) -> list[dict]:
    """A golden conversation as messages; `ask` where its human turn was rendered as VUSER."""
    asked = iter(case["vuser_per_human_turn"])
    return [
        {"role": "user", "content": turn["value"], "ask": next(asked)}
        if turn["from"] == "human"
        else {"role": "assistant", "content": turn["value"]}
        for turn in case["conversation"]
    ]


# --- prompts and token ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
def test_prompts_and_ids_are_the_authors(shared, tokenizers, legacy):
    cases = json.loads((shared / "golden" / "c_label_masks" / "label_masks.json").read_text())["cases"]
    processor = make_processor(tokenizers[legacy], 28, 14)
    for case in cases:
        text = processor.apply_chat_template(messages(case), chat_template=case["template"])
        assert text == "<s>" + case["prompt"], case["id"]
        wanted = case["llama_token_ids" if legacy else "llama_token_ids_legacy_false"]
        images = [Image.new("RGB", (40, 30))] if case["has_image"] else None
        got = processor(text=text, images=images, add_special_tokens=False).input_ids[0]
        expected = [token for one in wanted for token in ([IMAGE] * 4 if one == -200 else [one])]
        assert got == expected, case["id"]


@pytest.mark.parametrize("legacy", [True, False])
def test_what_is_learnt_is_what_the_authors_supervise(shared, tokenizers, legacy):
    cases = json.loads((shared / "golden" / "c_label_masks" / "label_masks.json").read_text())["cases"]
    processor = make_processor(tokenizers[legacy], 28, 14)
    for case in cases:
        conversation = messages(case)
        if case["has_image"]:
            text = conversation[0]["content"].replace("<image>", "").strip()
            image = {"type": "image", "image": Image.new("RGB", (40, 30))}
            conversation[0]["content"] = [image, {"type": "text", "text": text}]
        made = processor.apply_chat_template(
            conversation,
            chat_template=case["template"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"return_offsets_mapping": True, "return_text_replacement_offsets": True},
        )
        labels = case["labels" if legacy else "labels_legacy_false"]
        ids = case["llama_token_ids" if legacy else "llama_token_ids_legacy_false"]
        learnt = [
            label != -100 for token, label in zip(ids, labels, strict=True) for _ in range(4 if token == -200 else 1)
        ]
        assert [bool(one) for one in made["assistant_masks"][0]] == learnt, case["id"]


def test_the_generation_prompts_are_the_authors(shared, processor):
    prompts = json.loads((shared / "golden" / "g_prompts" / "prompts.json").read_text())
    describe = "Can you describe the image in detail?"
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": describe}]}
    rendered = {
        "round1": processor.apply_chat_template([asked], chat_template="v1_sq", add_generation_prompt=True),
        "round2": processor.apply_chat_template(
            [asked, {"role": "assistant", "content": "X"}], chat_template="v1_sq", add_generation_prompt=True, ask=True
        ),
        "answer": processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}],
            add_generation_prompt=True,
        ),
    }
    questions = prompts["question_generation"]
    assert rendered["round1"] == "<s>" + questions["round1_prompt_v1_sq"]
    assert rendered["round2"] == "<s>" + questions["round2_prompt_v1_sq_given_first_answer_X"]
    assert (
        rendered["answer"] == "<s>" + prompts["answer_generation"]["prompt_v1"] == "<s>" + prompts["eval"]["prompt_v1"]
    )


@pytest.mark.parametrize(
    ("text", "pieces", "without_space"),
    [
        pytest.param(
            "yes</s>USER: no", "▁yes </s> ▁US ER : ▁no", "▁yes </s> US ER : ▁no", id="the first piece loses it"
        ),
        pytest.param("yes</s> USER", "▁yes </s> ▁ ▁US ER", "▁yes </s> ▁ ▁US ER", id="a space of the text stays"),
        pytest.param("yes</s>\nno", "▁yes </s> ▁ <0x0A> no", "▁yes </s> <0x0A> no", id="a space alone goes"),
        pytest.param("USER: <image>\nIs", "▁US ER : ▁ <image> ▁ <0x0A> Is", None, id="after an image it stays"),
        pytest.param("ü", "▁ <0xC3> <0xBC>", None, id="bytes stand in for unknown letters"),
    ],
)
def test_spaces_around_special_tokens(tokenizers, text, pieces, without_space):
    expected = {True: pieces.split(" "), False: (without_space or pieces).split(" ")}
    for legacy, tokenizer in tokenizers.items():
        assert tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids) == expected[legacy]


def test_both_modes_are_those_of_sentencepiece_itself(llama_tokenizer, tokenizers):
    import sentencepiece
    from hypothesis import given, settings
    from hypothesis import strategies as st

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(llama_tokenizer / "tokenizer.model"))

    @settings(max_examples=300, deadline=None)
    @given(st.text(st.sampled_from("aeinorstUSER:.,? \n12éü中▁"), min_size=1, max_size=25))
    def same(text):
        assert tokenizers[True](text, add_special_tokens=False).input_ids == theirs.encode(text)
        after = tokenizers[False]("yes</s>" + text, add_special_tokens=False).input_ids[2:]
        first, *rest = theirs.encode(text, out_type=str)
        if not text.startswith(" ") and first.startswith("▁"):
            first = first[1:]
        wanted = ([first] if first else []) + rest
        assert after == [theirs.piece_to_id(piece) for piece in wanted]

    same()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_batch_is_padded_and_offsets_point_into_the_text(tokenizers, legacy):
    tokenizer, texts = tokenizers[legacy], ["yes</s>USER: no", "Is it"]
    batch = tokenizer(texts, padding=True, return_tensors="pt", padding_side="left")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == tokenizer(text).input_ids
        assert (ids[~mask.bool()] == 0).all()
    one = tokenizer(texts[0], return_offsets_mapping=True, add_special_tokens=False)
    words = [texts[0][start:end].strip() for start, end in one["offset_mapping"]]
    assert words == ["yes", "</s>", "US", "ER", ":", "no"]


@pytest.mark.parametrize("legacy", [True, False])
def test_text_comes_back(tokenizers, legacy):
    tokenizer = tokenizers[legacy]
    for text in ("Is the CT normal?", "left lung", "a\nb", "café"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_saved_tokenizer_keeps_its_mode_and_its_ids(tokenizers, tmp_path):
    from transformers import AutoTokenizer

    for legacy, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / str(legacy))
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(legacy))
        assert loaded.legacy is legacy
        assert (loaded.image_token, loaded.image_token_id, loaded.pad_token_id) == ("<image>", IMAGE, 0)
        assert loaded("yes</s>USER: <image>\nIs").input_ids == tokenizer("yes</s>USER: <image>\nIs").input_ids


def test_tokenizer_json_gives_the_ids_of_tokenizer_model(tokenizers, llama_tokenizer, tmp_path):
    tokenizers[True].save_pretrained(tmp_path)
    again = StllavaMedTokenizer.from_pieces(*read_pieces(tmp_path), legacy=True)
    text = "Is the CT normal?</s>USER: <image>\nleft lung"
    assert again(text).input_ids == tokenizers[True](text).input_ids


def test_a_truncating_call_says_that_it_cannot(tokenizers):
    with pytest.raises(ValueError, match="cannot truncate"):
        tokenizers[False]("yes no", truncation=True, max_length=1)


def test_no_model_in_the_file_is_one_line(tmp_path):
    from stllava_eval.errors import InputError

    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff not a model")
    with pytest.raises(InputError, match=r"tokenizer\.model: no SentencePiece model"):
        read_pieces(tmp_path)


def test_legacy_is_read_from_the_checkpoint(tmp_path):
    from stllava_eval.network.checkpoint import _tokenizer

    for legacy, expected in ((True, True), (False, False), (None, True)):
        write_llama_tokenizer(tmp_path / str(legacy), legacy)
        assert _tokenizer([tmp_path / str(legacy)]).legacy is expected


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("<image>\nWhy?", id="as LLaVA writes it"),
        pytest.param("Why?\n<image>", id="at the end"),
        pytest.param("<image> Why? <image>", id="twice"),
        pytest.param([{"type": "text", "text": "Why?"}, {"type": "image"}], id="as parts, the image last"),
    ],
)
def test_the_image_comes_first_wherever_its_tag_stood(processor, content):
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text.endswith("USER: <image>\nWhy? ASSISTANT:")


def test_a_text_of_its_own_is_left_alone(processor):
    text = processor.apply_chat_template([{"role": "user", "content": " two  spaces "}])
    assert text.endswith("USER:  two  spaces  ")


def test_a_saved_processor_is_the_same(processor, tmp_path):
    from transformers import AutoProcessor

    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    assert loaded.chat_template == processor.chat_template
    assert set(loaded.chat_template) == {"default", "v1", "v1_sq"}
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    image = Image.new("RGB", (40, 30), "red")
    ours, theirs = (one(text="<image> yes", images=image, return_tensors="pt") for one in (processor, loaded))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert (ours["input_ids"] == IMAGE).sum() == 4


# --- images -----------------------------------------------------------------------------------------------------------


def test_pixels_are_the_authors_bit_for_bit(shared):
    worst = golden.preprocessing(shared / "golden")
    assert len(worst) == 9
    assert set(worst.values()) == {0.0}


def test_padding_and_cropping_by_hand():
    """A white 8 x 4 image on 4 px: padded, it is a band of 2 px between bands of CLIP's mean; cropped, it is white."""
    image, size = Image.new("RGB", (8, 4), "white"), {"height": 4, "width": 4}
    for pads in (True, False):
        made = StllavaMedImageProcessor(
            size={"shortest_edge": 4}, crop_size=size, do_pad=pads, resample=0, do_normalize=False
        )
        rows = np.rint(255 * np.array(made(image)["pixel_values"][0]))[:, :, 0].T.tolist()
        mean = [122, 116, 104]
        assert rows == ([mean, [255] * 3, [255] * 3, mean] if pads else [[255] * 3] * 4)


def _image(mode: str) -> Image.Image:
    grey = Image.linear_gradient("L").resize((16, 16))
    if mode == "I;16":
        return Image.fromarray(np.asarray(grey).astype(np.uint16) * 16 + 1000)  # 12 bits of a scan, and an offset
    if mode == "P":
        return grey.quantize(256)
    if mode == "LA":
        return Image.merge("LA", (grey, Image.new("L", grey.size, 255)))
    if mode in ("CMYK", "RGBA", "F", "1", "L"):
        return grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode)
    raise AssertionError(mode)


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "LA", "RGBA", "CMYK", "F"])
def test_a_scan_looks_the_same_in_every_mode(mode):
    size = {"height": 16, "width": 16}
    make = StllavaMedImageProcessor(size={"shortest_edge": 16}, crop_size=size, do_normalize=False)
    grey, other = (np.array(make(_image(one))["pixel_values"][0]) for one in ("L", mode))
    assert np.ptp(grey) > 0.9
    np.testing.assert_allclose(other, grey, atol=0.04 if mode in ("I;16", "F", "P") else 0.01)


def test_what_is_transparent_lies_on_black():
    size = {"height": 2, "width": 2}
    make = StllavaMedImageProcessor(size={"shortest_edge": 2}, crop_size=size, do_normalize=False)
    made = np.array(make(Image.new("RGBA", (2, 2), (255, 255, 255, 0)))["pixel_values"][0])
    assert made.max() == 0


def test_an_image_is_turned_upright(tmp_path):
    image = Image.new("RGB", (4, 4), "black")
    for x in range(4):
        image.putpixel((x, 0), (255, 255, 255))  # a white row on top
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it"
    image.save(tmp_path / "turned.png", exif=exif)
    size = {"height": 4, "width": 4}
    make = StllavaMedImageProcessor(size={"shortest_edge": 4}, crop_size=size, do_normalize=False)
    with Image.open(tmp_path / "turned.png") as opened:
        made = np.array(make(opened)["pixel_values"][0])[0]
    assert made[:, 3].min() == 1  # now it is the right-hand column
    assert made[:, :3].max() == 0
