"""A seed -> a small random Qwen2.5-VL in its published layout, for the questions of toy_llava.py.

Its tower has the 14 px patches, windows and merging of 2 x 2 of the real one, its text model positions in three
dimensions. Images of 672 px become 576 tokens, as many as LLaVA's, and the text model has the width and depth of the
small LLaVA's, so that both tables say the same of the same work. Weights are rounded to bfloat16, in which lmms-eval's
adapter reads them.
"""

from __future__ import annotations

from pathlib import Path

from toy_llava import BOS, END, END_SCALE, IMAGE, PAD, VOCABULARY, make_tokenizer

SIDE = 672  # px: 48 x 48 patches, merged to 24 x 24 tokens
PIXELS = SIDE * SIDE
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><image><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = ("<video>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def write_qwen(folder: Path, length: str, seed: int = 0) -> None:
    """Write the network, its tokenizer and its processor; answers are `length`: short or long."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = make_tokenizer()
    # lmms-eval's adapter lets the tokenizer add its tokens, and Qwen's adds none
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    video, _, turn_end, vision_start, vision_end = tokenizer.convert_tokens_to_ids(list(TOKENS))
    images = Qwen2VLImageProcessor(min_pixels=PIXELS, max_pixels=PIXELS)
    processor = Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)
    processor.save_pretrained(folder)
    torch.manual_seed(seed)
    rows = VOCABULARY + len(TOKENS)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={
                **{"depth": 4, "hidden_size": 256, "num_heads": 4, "intermediate_size": 704, "out_hidden_size": 1024},
                **{"fullatt_block_indexes": [3], "window_size": 112, "patch_size": 14, "spatial_merge_size": 2},
            },
            text_config={
                **{"vocab_size": rows, "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 6},
                **{"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096},
                **{"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            },
            image_token_id=IMAGE,
            video_token_id=video,
            vision_start_token_id=vision_start,
            vision_end_token_id=vision_end,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                spread = 1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5
                if "language_model" in name and ("q_proj" in name or "k_proj" in name):
                    spread *= 2  # attention that chooses; see toy_llava.py
                parameter.normal_(0, spread)
            parameter.copy_(parameter.bfloat16())
        head = model.lm_head.weight
        head[END] *= END_SCALE[length]
        # never the greatest
        head[[PAD, BOS, IMAGE, video, turn_end - 1, turn_end, vision_start, vision_end]] = 0
        head.copy_(head.bfloat16())
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD)
    model.save_pretrained(folder)
