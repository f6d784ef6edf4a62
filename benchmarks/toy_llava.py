"""A seed -> a small random LLaVA in the layout of llava-hf, and questions about random images as prepared data sets.

The network is LLaVA-1.5 in miniature: CLIP's 336 px in patches of 14 px (576 image tokens, the layer before the last),
256 wide x 5 layers, into a Llama of 1024 wide x 6 layers with heads of 128. The language model then does some 16 times
the work of the vision tower for a prompt (22 times in the real one). It is initialised so that its answers depend on
image and question, and end by themselves.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from stllava_eval.data.catalog import DATASETS, Row
from stllava_eval.data.splits import write_split
from stllava_eval.network.processing import SYSTEM

# how many questions each image has
SHAPES: dict[str, tuple[int, ...]] = {
    "vqarad_short": (1, 2, 2, 3, 3) * 4,  # 44 questions, 20 images: 2.2 an image, as in VQA-RAD's test
    "slake_short": (11,) * 6,  # 66 on 6
    "pathvqa_short": (3, 4, 5, 6, 7, 9, 11, 17),  # 62 on 8: 7.8 an image, skewed
    "vqarad_long": (1, 2, 2, 3, 3) * 3,
    "slake_long": (11,) * 4,
    "pathvqa_long": (3, 5, 6, 7, 9, 17),
}
# sets of 100 questions or more: the counts of the first images, in a seeded order, of the official tests of VQA-RAD and
# SLAKE; of PathVQA its mean of 7.8 and its skew, since its images are not at hand
OFFICIAL: dict[str, tuple[int, ...]] = {
    "vqarad": (
        *(1, 2, 1, 1, 2, 4, 1, 2, 3, 2, 2, 1, 3, 1, 3, 1, 2, 2, 1, 3, 1, 2, 1, 2),
        *(1, 1, 5, 3, 2, 1, 2, 3, 1, 3, 2, 2, 4, 2, 3, 6, 1, 1, 1, 3, 3, 2, 2, 2),
    ),
    "slake": (9, 8, 8, 7, 15, 8, 10, 5, 8, 9, 9, 9),
    "pathvqa": (3, 4, 5, 6, 7, 9, 11, 17, 3, 5, 8, 11, 12),
}
MOST_TOKENS = {"short": 12, "long": 100}  # of an answer
END_SCALE = {"short": 2.25, "long": 1.44}  # of the end token's row: answers of some 9 and 75 tokens
IMAGE_SIDE, GRID = 336, 8  # px of an image, which nobody then resizes; random colours it is made of, each way
VOCABULARY = 560
PAD, BOS, END, IMAGE = range(4)

# The prompt of stllava_eval for a model of Vicuna's kind, without `<s>`, which llava_hf's tokenizer puts there.
TEMPLATE = (
    f"{SYSTEM} "
    "{% for message in messages %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

ASKS = (
    "Is there a {finding} in the {side} {organ}{more}?",
    "Where in the {organ} is the {finding} located{more}?",
    "Does the {side} {organ} in this {modality} image show signs of a {finding}{more}?",
    "What is the most likely cause of the {finding} seen in the {side} {organ}{more}?",
    "Which part of the {organ} appears abnormal in this {modality}{more}?",
    "How large is the {finding} of the {side} {organ} in the {modality} image{more}?",
)
WORDS = {
    "finding": [
        "mass",
        "effusion",
        "fracture",
        "consolidation",
        "edema",
        "nodule",
        "hemorrhage",
        "infarct",
        "necrosis",
    ],
    "side": ["left", "right", "upper", "lower", "anterior", "posterior", "medial", "lateral"],
    "organ": ["lung", "liver", "kidney", "brain", "heart", "spleen", "pancreas", "bladder", "stomach", "chest wall"],
    "modality": ["CT", "MRI", "X-ray", "ultrasound", "histology"],
    "more": ["", "", " of the patient", " when compared with the other side", ", or is the image normal"],
}


def ask(draw: random.Random) -> str:
    """A question of 8 to 24 tokens."""
    return draw.choice(ASKS).format(**{name: draw.choice(words) for name, words in WORDS.items()})


def jpeg(draw: np.random.Generator) -> bytes:
    """A smooth image in random colours."""
    colours = draw.integers(0, 256, (GRID, GRID, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_questions(home: Path, name: str, counts: Sequence[int], seed: int) -> None:
    """The test split of data set `name` under `home`: one new image for each of `counts`, with that many questions."""
    draw, draw_pixels = random.Random(seed), np.random.default_rng(seed)
    rows = []
    for image, count in enumerate(counts):
        pixels, asked = jpeg(draw_pixels), set[str]()
        while len(asked) < count:
            asked.add(ask(draw))
        rows += [
            Row(
                id=f"{image}-{number}",
                image=pixels,
                image_id=f"{image}.jpg",
                question=question,
                reference="yes",
                kind="open",
                categories=dict.fromkeys(DATASETS[name].categories, ""),
            )
            for number, question in enumerate(sorted(asked))
        ]
    draw.shuffle(rows)  # the questions about an image need not stand together; in VQA-RAD they do not
    write_split(
        name,
        "test",
        rows,
        edition="for benchmarks",
        official=False,
        sample=True,
        source="benchmarks",
        licence="CC0-1.0",
        home_folder=home,
    )


def write_checkpoint(folder: Path, length: str, seed: int = 0) -> None:
    """The network, its tokenizer and its processor, whose answers are `length`: short or long."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = make_tokenizer()
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=256,
                intermediate_size=1024,
                num_hidden_layers=5,
                num_attention_heads=4,
                image_size=336,
                patch_size=14,
            ),
            text_config=LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=1024,
                intermediate_size=2752,
                num_hidden_layers=6,
                num_attention_heads=8,
                max_position_embeddings=2048,
                bos_token_id=BOS,
                eos_token_id=END,
                pad_token_id=PAD,
            ),
            image_token_id=IMAGE,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                spread = 1.0 if "embed" in name else parameter[0].numel() ** -0.5
                if "language_model" in name and ("q_proj" in name or "k_proj" in name):
                    spread *= 2  # attention that chooses; a mean over 600 tokens would be the same for every question
                parameter.normal_(0, spread)
        head = model.lm_head.weight
        head[END] *= END_SCALE[length]
        head[[PAD, BOS, IMAGE]] = 0  # never the greatest of 560
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD)
    model.save_pretrained(folder)


def make_tokenizer():
    """Byte pairs that join the questions' words, `<s>` in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(0)
    text = Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    text.train_from_iterator(
        [ask(draw) for _ in range(1000)] + [f"{SYSTEM} USER: {SYSTEM} ASSISTANT:"] * 20,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<pad>", "<s>", "</s>", "<image>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    text.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=text,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
