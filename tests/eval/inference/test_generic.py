import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY_VISION, write_tokenizer
from families import TEXT, qwen2_5_vl, write_family
from loguru import logger
from PIL import Image

from stllava_eval.errors import InputError
from stllava_eval.inference.answerer import Answerer
from stllava_eval.inference.generic import TransformersAnswerer
from stllava_eval.inference.open import open_answerer
from stllava_eval.inference.replies import Failure
from stllava_eval.inference.types import Answer, Question, Sampling
from stllava_eval.network.pretrained import is_generic

TEMPLATE = (
    "<s>{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
COLOURS = ["red", "green", "black"]
TEXTS = ["Is there a mass?", "What organ is shown?", "Why?", "Where is the liver?"]


def save(folder: Path, model, processor, ends: tuple[int, ...] = (2,), unsaid: tuple[int, ...] = ()) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
        model.lm_head.weight[list(ends)] *= 2
        model.lm_head.weight[list(unsaid)] = 0  # never the likeliest
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
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**TINY_VISION),
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


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><image><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """Qwen2.5-VL: positions in three dimensions, images of many sizes, and an end token that ends a turn."""
    torch.manual_seed(0)
    model, processor = qwen2_5_vl(write_tokenizer(tmp_path_factory.mktemp("tokenizer")), "<think>", "</think>")
    processor.chat_template = CHATML
    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<video>", "<think>", "</think>"]
    unsaid = (3, *processor.tokenizer.convert_tokens_to_ids(marks))
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    return save(tmp_path_factory.mktemp("qwen"), model, processor, (2, end), unsaid)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory) -> Path:
    """A model that the engine cannot answer with."""
    return write_family("qwen3_5", tmp_path_factory.mktemp("qwen3_5"))


def changed(source: Path, folder: Path, **settings) -> Path:
    """A copy with `settings` in generation_config.json beside the tokens."""
    shutil.copytree(source, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def likeliest(folder: Path, question: Question, ends: set[int], never: tuple[int, ...] = ()) -> str:
    """Generate greedily without a cache: run the whole sequence for each token and take the argmax of its logits."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = dict(
        processor(
            images=[question.image()], text=text, add_special_tokens=not text.startswith("<s>"), return_tensors="pt"
        )
    )
    length, ids = inputs["input_ids"].shape[1], []
    while len(ids) < question.max_new_tokens and not ends & {*ids}:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0, -1]
        logits[list(never)] = float("-inf")
        ids.append(int(logits.argmax()))
        for name, value in inputs.items():
            if value.dim() == 2 and value.shape[1] == length:
                added = {"input_ids": ids[-1], "attention_mask": 1}.get(name, 0)
                inputs[name] = torch.cat([value, torch.full((1, 1), added, dtype=value.dtype)], 1)
        length += 1
    return processor.tokenizer.decode([one for one in ids if one not in ends], skip_special_tokens=True).strip()


def told_by(make) -> tuple[TransformersAnswerer, str]:
    """What `make` makes, and what it logs."""
    told: list[str] = []
    sink = logger.add(told.append, format="{message}")
    try:
        return make(), "".join(told)
    finally:
        logger.remove(sink)


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
        inputs = processor(
            images=[question.image()], text=text, add_special_tokens=not text.startswith("<s>"), return_tensors="pt"
        )
        ends = [2, *processor.tokenizer.convert_tokens_to_ids(["<|im_end|>"])]
        ends = [one for one in ends if one is not None]
        output = model.generate(**inputs, do_sample=False, max_new_tokens=question.max_new_tokens, eos_token_id=ends)
        ids = output[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return texts


def test_a_model_with_its_images_in_front_shares_them(llava_next, monkeypatch):
    answerer = open_answerer(str(llava_next))
    assert isinstance(answerer, TransformersAnswerer)
    encoded = []
    original = answerer.model.model.get_image_features
    monkeypatch.setattr(
        answerer.model.model, "get_image_features", lambda *a, **named: encoded.append(1) or original(*a, **named)
    )
    found = answers(answerer, questions())
    assert not answerer._mismatch
    assert found == plain(llava_next, questions())
    assert len(set(found)) > 6
    assert len(encoded) == 3 + 1  # one per image, and one of the model's own forward, with which the engine is compared


def test_a_model_whose_positions_the_engine_does_not_know_is_answered_in_plain_batches(llava_next, monkeypatch, caplog):
    told: list[str] = []
    sink = logger.add(told.append, format="{message}")
    answerer = TransformersAnswerer(str(llava_next), rows=3)
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


def test_what_is_other(llava_next, checkpoint, tmp_path):
    assert is_generic(str(llava_next))
    assert not is_generic(str(checkpoint))
    with pytest.raises(InputError, match="no such folder"):
        is_generic(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"prototypes is for models of our own network"):
        open_answerer(str(llava_next), prototypes=3)


def test_questions_without_a_key_and_special_tokens(llava_next):
    """A second call may have another image at the same place."""
    answerer = TransformersAnswerer(str(llava_next))
    for question in questions()[::4]:
        alone = replace(question, image_key=None)
        assert answers(answerer, [alone]) == plain(llava_next, [alone])
    with pytest.raises(InputError, match="holds the special token </s>"):
        answers(answerer, [replace(questions()[0], text="Is </s> it?")])


def test_missing_weights_are_refused(llava_next, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(llava_next, folder)
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "multi_modal_projector" in name)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 of its weights are missing"):
        TransformersAnswerer(str(folder))


def test_tensors_that_are_not_the_models_are_named_in_the_log(llava_next, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(llava_next, tmp_path / "more")
    weights = load_file(tmp_path / "more" / "model.safetensors")
    weights["model.adapter.weight"] = torch.ones(2, 2)
    save_file(weights, tmp_path / "more" / "model.safetensors", metadata={"format": "pt"})
    _, told = told_by(lambda: TransformersAnswerer(str(tmp_path / "more")))
    assert "1 of its tensors are not this model's and are not used (model.adapter.weight)" in told
    assert "tensors" not in told_by(lambda: TransformersAnswerer(str(llava_next)))[1]


@pytest.mark.parametrize("wrong", [{"system": "You read scans."}, {"enable_thinking": True}, {"max_pixels": 10}])
def test_arguments_are_refused_before_the_weights_are_read(llava_next, wrong, monkeypatch):
    from transformers import AutoModelForImageTextToText

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError):
        TransformersAnswerer(str(llava_next), **wrong)


def test_the_harness_answers_with_another_model(llava_next, prepared):
    from harness import answers_of, evaluate, run_folders

    from stllava_eval.lmms.model import StllavaMed

    evaluate(StllavaMed(str(llava_next)), ["vqarad"])
    (folder,) = run_folders(prepared)
    assert len(answers_of(folder)) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Greedy is greedy

SETTINGS = {
    "repetition_penalty": 1.9,  # 1.05 in Qwen2.5-VL; more, so that words of a tiny model change
    "no_repeat_ngram_size": 1,
    "begin_suppress_tokens": list(range(4, 200)),
    "forced_bos_token_id": 40,
    "forced_eos_token_id": 2,
    "min_new_tokens": 12,
    "min_length": 400,
    "exponential_decay_length_penalty": [1, 3.0],
    "sequence_bias": [[[50], 30.0]],
    "bad_words_ids": [[50, 51]],
    "guidance_scale": 3.0,
    "renormalize_logits": True,
    "num_beams": 3,
    "penalty_alpha": 0.6,
    "top_k": 4,
    "top_p": 0.1,
    "temperature": 5.0,
    "do_sample": True,
    "stop_strings": ["e", "a"],
    "max_time": 1e-9,
    "prompt_lookup_num_tokens": 3,
    "encoder_repetition_penalty": 2.0,
    "encoder_no_repeat_ngram_size": 1,
}


@pytest.mark.parametrize("of", ["qwen", "llava_next", "llava_next in plain batches"])
def test_no_setting_of_generation_config_changes_a_word(of, request, tmp_path):
    """`generate` merges a model's own settings into those that it is called with; the engine never knew them."""
    folder = changed(request.getfixturevalue(of.split()[0]), tmp_path / "model", **SETTINGS, max_length=3)
    answerer, told = told_by(lambda: TransformersAnswerer(str(folder), rows=3))
    answerer._mismatch = of if of.endswith("batches") else ""
    asked = questions()
    expected = [likeliest(folder, question, answerer.ends) for question in asked]
    assert len(set(expected)) > 6
    assert answers(answerer, asked) == expected
    assert bool(answerer._mismatch) == of.endswith("batches")
    assert answerer.preprocessing["decoding"] == "greedy"
    assert f"{folder}: not taken over from its generation_config.json: bad_words_ids [[50, 51]], begin_" in told
    assert all(f"{name} {value}" in told for name, value in SETTINGS.items() if name != "sequence_bias")
    assert "max_length" not in told


@pytest.mark.parametrize("name", ["repetition_penalty", "no_repeat_ngram_size", "num_beams", "sequence_bias", "top_k"])
def test_one_setting_alone_changes_no_word_either(qwen, name, tmp_path):
    with_penalty = {name: SETTINGS[name]} | ({"penalty_alpha": 0.6} if name == "top_k" else {})
    folder = changed(qwen, tmp_path / "model", **with_penalty)
    assert answers(TransformersAnswerer(str(folder)), questions()[:4]) == plain(qwen, questions()[:4])


@pytest.mark.parametrize("path", ["engine", "plain batches"])
def test_tokens_that_are_never_generated_are_kept_out_by_every_path_and_named(llava_next, path, tmp_path):
    asked = questions()[:6]
    free = TransformersAnswerer(str(llava_next))
    first, second = sorted({ids[0] for ids in first_tokens(free, asked)})[:2]
    folder = changed(llava_next, tmp_path / "model", suppress_tokens=[first], bad_words_ids=[[second], [5, 6]])
    answerer = TransformersAnswerer(str(folder))
    answerer._mismatch = "" if path == "engine" else path
    expected = [likeliest(folder, question, {2}, (first, second)) for question in asked]
    assert answers(answerer, asked) == expected != plain(llava_next, asked)
    assert answerer._mismatch == ("" if path == "engine" else path)
    told = f"{first}, {second}" if second > first + 1 else f"{first}-{second}"
    assert answerer.preprocessing["decoding"] == f"greedy; suppress_tokens [{told}]"


def first_tokens(answerer: TransformersAnswerer, asked: list[Question]) -> list[list[int]]:
    """The first token of each answer."""
    inputs = answerer._together(asked)
    return answerer._generated([(place, replace(one, max_new_tokens=1)) for place, one in enumerate(asked)], inputs)


def test_answers_end_with_the_settings_token_the_tokenizers_and_the_templates(qwen, tmp_path):
    answerer = TransformersAnswerer(str(qwen))
    end = answerer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answerer.ends == {2, end}  # generation_config.json names 2 only, as after a fine-tuning of a base model
    folder = changed(qwen, tmp_path / "model", eos_token_id=[end, 70])
    assert TransformersAnswerer(str(folder)).ends == {2, end, 70}
    del answerer
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"transformers_version": "5.0.0"}))
    assert TransformersAnswerer(str(folder)).ends == {2, end}


# ---------------------------------------------------------------------------------------------------------------------
# Draws

HOT = Sampling(temperature=1.2, top_k=50, top_p=0.95, seed=3)


def drawn(asked: list[Question], draws: int = 2) -> list[Question]:
    return [replace(question, sampling=HOT, sample_index=draw) for question in asked for draw in range(draws)]


def test_draws_in_plain_batches_are_the_engines(llava_next):
    asked = drawn(questions()[:6]) + questions()[6:8]
    by_engine = answers(TransformersAnswerer(str(llava_next)), asked)
    assert len(set(by_engine[:12])) > 9
    for rows in (1, 3, 8):
        answerer = TransformersAnswerer(str(llava_next), rows=rows)
        answerer._mismatch = "for a test"
        assert answers(answerer, asked) == by_engine


def test_a_draw_of_a_model_in_plain_batches_depends_on_nothing_but_seed_image_question_and_number(recurrent):
    asked = drawn(questions()[:6], draws=3)
    found = answers(TransformersAnswerer(str(recurrent), rows=5), asked)
    assert len(set(found)) > 12
    backwards = answers(TransformersAnswerer(str(recurrent), rows=2), asked[::-1])
    assert backwards[::-1] == found
    alone = TransformersAnswerer(str(recurrent))
    assert [answers(alone, [question])[0] for question in asked[:4]] == found[:4]
    others = [replace(question, sampling=replace(HOT, seed=4)) for question in asked]
    assert answers(TransformersAnswerer(str(recurrent)), others) != found
    one = asked[0]
    image = replace(one, image=partial(Image.new, "RGB", (40, 30), "blue"), image_key="blue")
    assert answers(alone, [image]) != found[:1]


# ---------------------------------------------------------------------------------------------------------------------
# System prompt, thinking, sizes of images


def test_a_system_prompt_stands_in_the_prompt(qwen, llava_next):
    answerer = open_answerer(str(qwen), system="You read scans.")
    expected = "<|im_start|>system\nYou read scans.<|im_end|>\n<|im_start|>user\n<|vision_start|><image>"
    assert answerer.prompt("Why?").startswith(expected)
    assert answerer.preprocessing["system"] == "You read scans."
    assert "You read scans." in answerer.preprocessing["prompt"]
    assert "system" not in open_answerer(str(qwen)).preprocessing
    assert answers(answerer, questions()[:4]) != answers(open_answerer(str(qwen)), questions()[:4])
    with pytest.raises(InputError, match=r"leaves the system prompt out, or has fixed words .* Leave system out"):
        open_answerer(str(llava_next), system="You read scans.")  # its template would say it in the user's name
    with pytest.raises(InputError, match="system prompt 'an <image>': it holds the special token <image>"):
        open_answerer(str(qwen), system="an <image>")


@pytest.mark.parametrize(
    ("turn", "takes"),
    [
        pytest.param("SYSTEM {{ message['content'] }}\n", True, id="as text"),
        pytest.param("SYSTEM {{ message['content'][0]['text'] }}\n", True, id="as a list of parts"),
        pytest.param("", False, id="left out"),
        pytest.param("{{ raise_exception('System role not supported') }}", False, id="refused"),
    ],
)
def test_a_system_prompt_has_the_form_that_the_template_takes(llava_next, turn, takes, tmp_path):
    loop = "{% for message in messages %}"
    rest = TEMPLATE.replace("IMAGE", "<image>").replace(loop, "").replace("{% endfor %} {% endfor %}", "{% endfor %} ")
    user, _, end = rest.partition("<s>")[2].partition("{% if add_generation_prompt")
    whole = f"{loop}{{% if message['role'] == 'system' %}}{turn}{{% else %}}{user}{{% endif %}}{{% endfor %}}"
    folder = with_template(llava_next, tmp_path, f"<s>{whole}{{% if add_generation_prompt{end}")
    if takes:
        assert (
            open_answerer(str(folder), system="Read it.").prompt("Why?").startswith("<s>SYSTEM Read it.\nUSER: <image>")
        )
    else:
        with pytest.raises(InputError, match="its chat template leaves the system prompt out"):
            open_answerer(str(folder), system="Read it.")
    assert open_answerer(str(folder)).prompt("Why?").startswith("<s>USER: <image>")


def test_thinking_is_switched_where_the_template_has_a_switch(qwen, llava_next):
    off, on = (open_answerer(str(qwen), enable_thinking=value) for value in (False, True))
    assert off.prompt("Why?").endswith("<think>\n\n</think>\n\n")
    assert on.prompt("Why?").endswith("<|im_start|>assistant\n")
    assert [one.preprocessing["enable_thinking"] for one in (off, on)] == [False, True]
    assert "enable_thinking" not in open_answerer(str(qwen)).preprocessing
    with pytest.raises(InputError, match=r"its chat template has no enable_thinking\. Leave it out"):
        open_answerer(str(llava_next), enable_thinking=False)
    with pytest.raises(InputError, match="enable_thinking='no': pass True or False"):
        open_answerer(str(qwen), enable_thinking="no")


def image_tokens(answerer: Answerer, size: tuple[int, int]) -> int:
    question = Question("Why?", partial(Image.new, "RGB", size), 4)
    return answerer._processed(question)["input_ids"][0].tolist().count(3)


def test_bounds_of_pixels_decide_how_many_tokens_an_image_becomes(qwen, llava_next):
    """A token stands for 28 x 28 pixels; the folder's own bounds are one and eight of them."""
    own, more = open_answerer(str(qwen)), open_answerer(str(qwen), max_pixels=20 * 28 * 28)
    assert image_tokens(own, (280, 280)) == 4  # 2 x 2: the largest square of at most 8
    assert image_tokens(more, (280, 280)) == 16
    assert image_tokens(own, (28, 28)) == image_tokens(more, (28, 28)) == 1
    assert image_tokens(open_answerer(str(qwen), min_pixels=4 * 28 * 28), (28, 28)) == 4
    both = open_answerer(str(qwen), min_pixels=30 * 28 * 28, max_pixels=40 * 28 * 28)
    assert image_tokens(both, (28, 28)) == image_tokens(both, (2800, 2800)) == 36
    assert {name: both.preprocessing[name] for name in ("min_pixels", "max_pixels")} == {
        "min_pixels": 30 * 28 * 28,
        "max_pixels": 40 * 28 * 28,
    }
    assert "min_pixels" not in more.preprocessing
    assert more.preprocessing["max_pixels"] == 20 * 28 * 28
    assert len(answers(both, questions()[:2])) == 2
    with pytest.raises(InputError, match=r"LlavaNextImageProcessor\w*\) takes no bounds .* Leave max_pixels out"):
        open_answerer(str(llava_next), max_pixels=10**6)


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ({"max_pixels": 700}, "leave no size. Pass a max_pixels of 784 or more"),
        ({"min_pixels": 28 * 28 * 9}, "min_pixels 7056 and max_pixels 6272 leave no size"),
        ({"max_pixels": 0}, "max_pixels=0: pass a whole number of pixels"),
        ({"min_pixels": 1e6}, "min_pixels=1000000.0: pass a whole number of pixels"),
        ({"min_pixels": True}, "min_pixels=True: pass a whole number of pixels"),
    ],
)
def test_bounds_that_leave_no_size_are_refused(qwen, bounds, reason):
    with pytest.raises(InputError, match=reason):
        open_answerer(str(qwen), **bounds)


# ---------------------------------------------------------------------------------------------------------------------
# Thought marks


def test_thought_marks_that_are_special_tokens_stay_in_the_text(qwen):
    answerer = TransformersAnswerer(str(qwen))
    ids = answerer.tokenizer("<think>a mass</think>Yes<|im_end|>", add_special_tokens=False).input_ids
    answer = answerer._read(ids, questions()[0])
    assert answer == Answer("<think>a mass</think>Yes", len(ids) - 1, True)
    without = [one for one in ids if one not in answerer._marks]
    assert answerer._read(without, questions()[0]).text == "a massYes"
    stopped = answerer._read(ids, replace(questions()[0], until=("</think>",)))
    assert (stopped.text, stopped.ended) == ("<think>a mass", True)


# ---------------------------------------------------------------------------------------------------------------------
# Models and images that misbehave


def with_template(source: Path, folder: Path, template: str) -> Path:
    shutil.copytree(source, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(template)
    return folder / "model"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for", "its chat template cannot be rendered (.*). Put the model's own chat_template.jinja"),
        ("{{ raise_exception('no, never') }}", r"cannot be rendered \(no, never\)"),
        ("{{ messages[0]['content'] + 1 }}", "its chat template cannot be rendered"),
        ("<s>{% for one in messages[0]['content'] %}{{ one['text'] }}{% endfor %}", "leaves the image out"),
        ("<s>USER: {{ messages[0]['content'] }}", "leaves the image out"),
        ("<s>USER: {{ messages[0]['content'] | tojson }}", "leaves the image out"),
        ("<s>{% for one in messages[0]['content'] %}{{ one['type'] }}{% endfor %}", "leaves the question out"),
        (TEMPLATE.replace("IMAGE", "picture"), "image"),
    ],
)
@pytest.mark.parametrize("of", ["llava_next", "qwen"])
def test_a_template_that_cannot_show_the_image_is_one_line_before_any_question(of, template, reason, request, tmp_path):
    folder = with_template(request.getfixturevalue(of), tmp_path, template)
    with pytest.raises(InputError, match=reason) as caught:
        TransformersAnswerer(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("plainly", [True, False])
def test_an_image_that_the_processor_refuses_fails_its_own_questions_only(recurrent, llava_next, plainly, monkeypatch):
    folder = recurrent if plainly else llava_next
    answerer = TransformersAnswerer(str(folder))
    wide = partial(Image.new, "RGB", (500, 2), "red")  # Qwen's processor refuses more than 200 : 1
    if not plainly:
        refuse_wide_images(answerer, monkeypatch)
    asked = questions()
    for place in (0, 4, 5):
        asked[place] = replace(asked[place], image=wide, image_key="wide")
    found = dict(answerer.answer(asked, progress=False))
    assert sorted(found) == list(range(12))
    for place, outcome in found.items():
        assert isinstance(outcome, Failure) == (place in (0, 4, 5))
    assert found[4].attempts == 1
    assert found[4].reason.startswith(f"{folder}: its processor refuses the image of question 'Is there a mass?' (")
    assert "aspect ratio must be smaller than 200, got 250" in found[4].reason
    assert bool(answerer._mismatch) == plainly
    kept = [place for place in range(12) if place not in (0, 4, 5)]
    assert [found[place].text for place in kept] == plain(folder, [asked[place] for place in kept])


def test_every_image_may_be_refused(llava_next, monkeypatch):
    answerer = TransformersAnswerer(str(llava_next))
    refuse_wide_images(answerer, monkeypatch)
    asked = [replace(one, image=partial(Image.new, "RGB", (500, 2)), image_key=None) for one in questions()[:3]]
    assert all(isinstance(one, Failure) for one in dict(answerer.answer(asked, progress=False)).values())


def refuse_wide_images(answerer: TransformersAnswerer, monkeypatch) -> None:
    """As Qwen's processor does."""
    original = type(answerer.processor.image_processor).preprocess

    def preprocess(self, images, *others, **named):
        for image in images if isinstance(images, list) else [images]:
            one = image[0] if isinstance(image, list) else image
            if one.width > 200 * one.height:
                raise ValueError(f"absolute aspect ratio must be smaller than 200, got {one.width / one.height}")
        return original(self, images, *others, **named)

    monkeypatch.setattr(type(answerer.processor.image_processor), "preprocess", preprocess)


def test_a_model_that_the_engine_does_not_fit_is_known_before_more_than_one_image_is_opened(
    recurrent, llava_next, monkeypatch
):
    from stllava_eval.inference import engine

    opened: list[int] = []

    def counted(asked: list[Question]) -> list[Question]:
        def opens(number: int) -> Image.Image:
            opened.append(number)
            return asked[number].image()

        return [replace(one, image=partial(opens, number)) for number, one in enumerate(asked)]

    answerer = TransformersAnswerer(str(recurrent), rows=2)
    next(answerer.answer(counted(questions()), progress=False))
    assert opened == [0, 1]  # the first batch, to be answered
    opened.clear()
    monkeypatch.setattr(engine, "engine_mismatch", lambda *_: "for a test")
    next(TransformersAnswerer(str(llava_next), rows=2).answer(counted(questions()), progress=False))
    assert set(opened) == {0, 1}


def test_a_model_that_needs_code_of_its_own_is_to_be_served(qwen, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    own = {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}}
    for config in (own, {"model_type": "llava_qwen2", "architectures": ["LlavaQwen2ForCausalLM"], "hidden_size": 8}):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"not run here. Serve it \(vllm serve .*backend=openai_server,base_url="):
            open_answerer(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))  # known, but no such model: as before
    with pytest.raises(InputError, match="architecture not named cannot be loaded"):
        open_answerer(str(folder))
    copy = tmp_path / "processor"
    shutil.copytree(qwen, copy)
    for file in copy.glob("*processor_config.json"):
        stored = json.loads(file.read_text()) | {"auto_map": {"AutoProcessor": "processing_own.OwnProcessor"}}
        stored["processor_class"] = "OwnProcessor"
        file.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"code that comes with a model is not run here\. Serve it"):
        open_answerer(str(copy))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            ImportError("Package `num2words` is required to run it. Install it with `pip install num2words`."),
            "num2words",
        ),
        (ModuleNotFoundError("No module named 'timm.layers'", name="timm.layers"), "timm"),
        (ImportError("X requires the PyAv library:\n```\npip install av\n```\nPlease restart."), "av"),
    ],
)
def test_a_missing_package_is_named(qwen, error, says, monkeypatch):
    from transformers import AutoProcessor

    def missing(*_, **__):
        raise error

    monkeypatch.setattr(AutoProcessor, "from_pretrained", missing)
    with pytest.raises(InputError, match=rf"a package that it needs is not installed .* Run `pip install {says}`\.$"):
        open_answerer(str(qwen))


def test_a_run_counts_the_questions_about_a_refused_image_and_scores_the_others(llava_next, prepared, monkeypatch):
    from harness import answers_of, evaluate, run_folders

    from stllava_eval.lmms.model import StllavaMed
    from stllava_eval.scoring.final_answer import is_failed_request

    lm = StllavaMed(str(llava_next))
    original = type(lm.answerer.processor.image_processor).preprocess

    def preprocess(self, images, *others, **named):
        if images[0].getpixel((0, 0)) == (60, 195, 90):  # the second image
            raise ValueError("absolute aspect ratio must be smaller than 200, got 250.0")
        return original(self, images, *others, **named)

    monkeypatch.setattr(type(lm.answerer.processor.image_processor), "preprocess", preprocess)
    results = evaluate(lm, ["vqarad"])
    (folder,) = run_folders(prepared)
    failed = {name for (_, name), answer in answers_of(folder).items() if is_failed_request(answer)}
    assert failed == {"test-1-0", "test-1-1"}
    assert len(answers_of(folder)) == 8
    assert "recall,none" in results["results"]["vqarad"]
