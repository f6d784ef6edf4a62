from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import write_tokenizer
from PIL import Image

from stllava_eval.answering import Answerer, Question, open_answerer
from stllava_eval.errors import InputError
from stllava_eval.other import OtherAnswerer, is_other

TEMPLATE = (
    "<s>{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
COLOURS = ["red", "green", "black"]
TEXTS = ["Is there a mass?", "What organ is shown?", "Why?", "Where is the liver?"]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save(folder: Path, model, processor) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
        model.lm_head.weight[2] *= 2
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory) -> Path:
    """Cuts an image into tiles, so that the number of its tokens depends on its size."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    torch.manual_seed(0)
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=vision,
            text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT),
            image_token_index=3,
            image_grid_pinpoints=pinpoints,
        )
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return save(tmp_path_factory.mktemp("llava_next"), model, processor)


def questions() -> list[Question]:
    sizes = [(40, 30), (30, 60), (64, 64)]
    return [
        Question(text, partial(Image.new, "RGB", size, colour), 12, image_key=colour)
        for colour, size in zip(COLOURS, sizes, strict=True)
        for text in TEXTS
    ]


def answers(answerer: Answerer, asked: list[Question]) -> list[str]:
    found = dict(answerer.answer(asked, progress=False))
    return [found[place].text for place in range(len(asked))]


def plain(folder: Path, asked: list[Question]) -> list[str]:
    """What transformers alone makes of the questions, one at a time."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    texts = []
    for question in asked:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[question.image()], text=text, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=question.max_new_tokens)
        ids = output[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return texts


def test_a_model_with_its_images_in_front_shares_them(llava_next, monkeypatch):
    answerer = open_answerer(str(llava_next))
    assert isinstance(answerer, OtherAnswerer)
    encoded = []
    original = answerer.model.model.get_image_features
    monkeypatch.setattr(
        answerer.model.model, "get_image_features", lambda *a, **named: encoded.append(1) or original(*a, **named)
    )
    found = answers(answerer, questions())
    assert not answerer._misfit
    assert found == plain(llava_next, questions())
    assert len(set(found)) > 6
    assert len(encoded) == 3 + 3  # one an image, and what trying the engine took


def test_a_model_whose_positions_the_engine_does_not_know_is_answered_in_plain_batches(llava_next, monkeypatch, caplog):
    from loguru import logger

    told: list[str] = []
    sink = logger.add(told.append, format="{message}")
    answerer = OtherAnswerer(str(llava_next), rows=3)
    decoder = type(answerer.model.model.language_model)
    forward = decoder.forward

    def shifted(self, *args, position_ids=None, plan=None, **named):
        """The engine's positions are not this model's."""
        if plan is not None:
            position_ids, named["plan"] = position_ids + 5, plan
        return forward(self, *args, position_ids=position_ids, **named)

    monkeypatch.setattr(decoder, "forward", shifted)
    found = answers(answerer, questions())
    logger.remove(sink)
    assert found == plain(llava_next, questions())
    assert "answered in plain batches, images are not shared (its logits differ by" in "".join(told)


def test_a_model_with_positions_in_three_dimensions_is_answered_in_plain_batches(tmp_path):
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = write_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>", "<start>", "<end>"]})
    video, start, end = tokenizer.convert_tokens_to_ids(["<video>", "<start>", "<end>"])
    turns = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": turns},
            vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
            image_token_id=3,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    )
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 8),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE.replace("IMAGE", "<start><image><end>"),
    )
    folder = save(tmp_path / "qwen", model, processor)
    answerer = OtherAnswerer(str(folder))
    assert answers(answerer, questions()) == plain(folder, questions())
    assert answerer._misfit == "its image tokens have positions in three dimensions"


def test_what_is_other(llava_next, checkpoint, tmp_path):
    assert is_other(str(llava_next))
    assert not is_other(str(checkpoint))
    with pytest.raises(InputError, match="no such folder"):
        is_other(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"prototypes is for models of our own network"):
        open_answerer(str(llava_next), prototypes=3)


def test_questions_without_a_key_and_special_tokens(llava_next):
    """A second call may have another image at the same place."""
    answerer = OtherAnswerer(str(llava_next))
    for question in questions()[::4]:
        alone = replace(question, image_key=None)
        assert answers(answerer, [alone]) == plain(llava_next, [alone])
    with pytest.raises(InputError, match="holds the special token </s>"):
        answers(answerer, [replace(questions()[0], text="Is </s> it?")])


def test_missing_weights_are_refused(llava_next, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(llava_next, folder)
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "multi_modal_projector" in name)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 of its weights are missing"):
        OtherAnswerer(str(folder))


def test_the_harness_answers_with_another_model(llava_next, prepared):
    from test_adapter import answers_of, evaluate, run_folders

    from stllava_eval.adapter import StllavaMed

    evaluate(StllavaMed(str(llava_next)), ["vqarad"])
    (folder,) = run_folders(prepared)
    assert len(answers_of(folder)) == 8
