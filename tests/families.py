"""Tiny random checkpoints of the model families that people run, each in a folder of the published layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_TEXT, TINY_VISION, write_tokenizer

TEXT = TINY_TEXT | {"num_key_value_heads": 2, "head_dim": 16}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOWER = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}  # of Qwen2.5-VL and later
TURNS = ["<|im_start|>", "<|im_end|>"]


def with_tokens(tokenizer: Any, *more: str, **named: str) -> tuple[Any, list[int]]:
    """Return the tokenizer with further special tokens, those of `named` as its attributes too, and the ids of all."""
    from transformers import PreTrainedTokenizerFast

    added = [*TURNS, *more, *named.values()]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"} | named,
    )
    return tokenizer, tokenizer.convert_tokens_to_ids(added)


def _qwen(
    tokenizer: Any, family: str, processor: str, text: dict[str, Any], vision: dict[str, Any], patch: int, *more: str
) -> tuple[Any, Any]:
    """A Qwen-VL: its classes' names begin with `family` and `processor`; `more` are further special tokens."""
    import transformers

    marks = ("<video>", "<|vision_start|>", "<|vision_end|>")
    tokenizer, (*_, video, start, end) = with_tokens(tokenizer, *more, *marks)
    config = getattr(transformers, f"{family}Config")(
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": MROPE} | text,
        vision_config={"depth": 2, "num_heads": 2} | vision,
        image_token_id=3,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    side = 2 * patch  # px of a token: patches are merged 2 x 2
    images = transformers.Qwen2VLImageProcessor(patch_size=patch, min_pixels=side**2, max_pixels=8 * side**2)
    videos = "Qwen3VLVideoProcessor" if processor.startswith("Qwen3") else "Qwen2VLVideoProcessor"
    return model, getattr(transformers, f"{processor}Processor")(
        images,
        tokenizer,
        getattr(transformers, videos)(),
        chat_template=CHATML.replace("IMAGE", "<|vision_start|><image><|vision_end|>"),
    )


def qwen2_vl(tokenizer: Any) -> tuple[Any, Any]:
    """Positions in three dimensions."""
    vision = {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 64}
    return _qwen(tokenizer, "Qwen2VL", "Qwen2VL", {}, vision, 14)


def qwen2_5_vl(tokenizer: Any, *more: str) -> tuple[Any, Any]:
    """The same, with a windowed vision tower."""
    vision = TOWER | {"fullatt_block_indexes": [1], "window_size": 56}
    return _qwen(tokenizer, "Qwen2_5_VL", "Qwen2_5_VL", {}, vision, 14, *more)


def qwen3_vl(tokenizer: Any) -> tuple[Any, Any]:
    """Interleaved positions in three dimensions, and features of the tower's inner layers (deepstack)."""
    text = {"rope_parameters": MROPE | {"mrope_interleaved": True}}
    vision = TOWER | {"depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64, "patch_size": 16}
    return _qwen(tokenizer, "Qwen3VL", "Qwen3VL", text, vision, 16)


def gemma3(tokenizer: Any, window: int = 12) -> tuple[Any, Any]:
    """Image tokens see each other in both directions; every other layer has a window shorter than a prompt."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    tokenizer, (*_, image, boi, eoi) = with_tokens(
        tokenizer, image_token="<soft>", boi_token="<boi>", eoi_token="<eoi>"
    )
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": window}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=TEXT | layers | {"vocab_size": len(tokenizer), "query_pre_attn_scalar": 16},
            vision_config=TINY_VISION | {"image_size": 56, "vision_use_head": False},
            mm_tokens_per_image=4,
            boi_token_index=boi,
            eoi_token_index=eoi,
            image_token_index=image,
        )
    )
    images = Gemma3ImageProcessor(size={"height": 56, "width": 56})
    template = CHATML.replace("IMAGE", "<boi>")
    return model, Gemma3Processor(images, tokenizer, chat_template="{{ bos_token }}" + template, image_seq_length=4)


def internvl(tokenizer: Any) -> tuple[Any, Any]:
    """InternVL3 in transformers' layout: tiles in front of the question, and Qwen2 as its text model."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tokenizer, (*_, context) = with_tokens(
        tokenizer,
        start_image_token="<img>",
        end_image_token="</img>",
        video_token="<video>",
        context_image_token="<IMG_CONTEXT>",
    )
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer)},
            vision_config=TINY_VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
            image_token_id=context,
            image_seq_length=1,
        )
    )
    images = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    processor = InternVLProcessor(
        images,
        tokenizer,
        InternVLVideoProcessor(),
        image_seq_length=1,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    return model, processor


def llava_onevision(tokenizer: Any) -> tuple[Any, Any]:
    """Tiles of any resolution with SigLIP and Qwen2."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer, (*_, video) = with_tokens(tokenizer, "<video>")
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer)},
            vision_config=TINY_VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            image_token_index=3,
            video_token_index=video,
            image_grid_pinpoints=pinpoints,
            vision_feature_layer=-1,
        )
    )
    images = LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints)
    processor = LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    return model, processor


def _idefics(tokenizer: Any, config: Any, network: Any) -> tuple[Any, Any]:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    fakes = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer, _ = with_tokens(tokenizer, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *fakes)
    model = network(
        config(
            text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokenizer)},
            vision_config=TINY_VISION | {"patch_size": 7},
            image_token_id=3,
            scale_factor=2,
            tie_word_embeddings=False,
        )
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    template = CHATML.replace("IMAGE", "<image>")
    return model, Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


def idefics3(tokenizer: Any) -> tuple[Any, Any]:
    """Its text model is called `text_model`; a large image becomes rows and columns of tiles."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return _idefics(tokenizer, Idefics3Config, Idefics3ForConditionalGeneration)


def smolvlm(tokenizer: Any) -> tuple[Any, Any]:
    """As Idefics3, whose processor it has here: its own wants the package num2words, for videos."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return _idefics(tokenizer, SmolVLMConfig, SmolVLMForConditionalGeneration)


def qwen3_5(tokenizer: Any) -> tuple[Any, Any]:
    """Most of its layers are recurrent: they keep a state and no keys and values of each token."""
    text = {f"linear_{what}": 8 for what in ("key_head_dim", "value_head_dim")}
    text |= {f"linear_num_{what}_heads": 2 for what in ("key", "value")}
    text |= {"layer_types": ["linear_attention", "full_attention"]}
    text |= {"rope_parameters": MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}}
    vision = TOWER | {"num_position_embeddings": 64, "patch_size": 16}
    return _qwen(tokenizer, "Qwen3_5", "Qwen3VL", text, vision, 16)


def mllama(tokenizer: Any) -> tuple[Any, Any]:
    """Llama 3.2 Vision: its text model reads images by cross-attention."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor, MllamaProcessor

    tokenizer, (*_, image) = with_tokens(tokenizer, "<|python_tag|>", image_token="<|image|>")
    text = {name: value for name, value in TEXT.items() if name != "head_dim"} | {"num_hidden_layers": 3}
    model = MllamaForConditionalGeneration(
        MllamaConfig(
            text_config=text | {"vocab_size": len(tokenizer), "cross_attention_layers": [1]},
            vision_config={
                **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1},
                **{"attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 64},
                **{"intermediate_layers_indices": [0], "max_num_tiles": 2},
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
            image_token_index=image,
        )
    )
    images = MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=2)
    return model, MllamaProcessor(images, tokenizer, chat_template=CHATML.replace("IMAGE", "<|image|>"))


SHARED: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    make.__name__: make
    for make in (qwen2_vl, qwen2_5_vl, qwen3_vl, gemma3, internvl, llava_onevision, idefics3, smolvlm)
}
UNSHARED = {make.__name__: make for make in (qwen3_5, mllama)}  # families that are answered in plain batches
FAMILIES = SHARED | UNSHARED


def write_family(name: str, folder: Path) -> Path:
    """Write a random checkpoint of the family into `folder`; its answers depend on the image and mostly end."""
    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder)
    model, processor = FAMILIES[name](tokenizer)
    tokenizer = processor.tokenizer
    ends = [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    special = [number for token, number in tokenizer.get_vocab().items() if token.startswith("<") and len(token) > 2]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
        head = torch.nn.Linear(64, len(tokenizer), bias=False)
        head.weight.normal_(0, 0.12)
        head.weight[special] = 0  # never the likeliest
        head.weight[ends] = torch.randn(2, 64) * 0.2
        model.lm_head = head
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ends, 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
