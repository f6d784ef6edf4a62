"""Make the tiny network that recipe `tiny` starts from, of rows with images: 1.8 million weights, towers taught apart.

The shape is STLLaVA-Med's (CLIP tower, prototype extractor, Llama) and so are the files. The real network starts from
CLIP and Vicuna; here two steps do as much, the first of recipe F in the reference text embedded_data.md: the vision
tower learns the facts that the rows state; the language model learns to answer from such facts in words, as Vicuna can.
Neither is trained together with the other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.data.catalog import Row
from stllava_eval.errors import InputError
from stllava_eval.images import decode
from stllava_eval.network.processing import SYSTEM, make_processor
from stllava_train.data.augment import augmented

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from stllava_eval.network.modeling import StllavaMedForConditionalGeneration

SIDE = 112  # px, embedded_data.md
PATCH = 16  # px, embedded_data.md
IMAGE_TOKENS = (SIDE // PATCH) ** 2 + 1  # the patches and CLS, embedded_data.md
HIDDEN = 128  # embedded_data.md, both towers
VISION_LAYERS, TEXT_LAYERS = 4, 3  # embedded_data.md
PIECES = 640  # embedded_data.md
PROTOTYPES = 16  # 2.25 tokens of the paper's image are one prototype, 3 of this one's (our choice)
SPECIAL = ("<pad>", "<s>", "</s>")  # <image> comes behind the vocabulary, where nothing can generate it
# Our choice, on the validation split and near the core-seconds of embedded_data.md, whose batches are 24 and 6
VISION_IMAGES, TEXT_IMAGES, QUESTIONS = 24, 16, 12  # images in a step of either; questions of an image
VISION_STEPS, TEXT_STEPS = 700, 300
VISION_RATE, TEXT_RATE = 2e-3, 2e-3
# At CLIP's 0.02 the tower is slow to learn where, at Llama's 0.02 the language model is slow to look at the image
POSITION_SCALE, WEIGHT_SCALE = 2.0, 0.08
WEIGHT_DECAY = 0.05  # our choice
IGNORE = -100
FILES = {  # all that its checkpoint folder holds
    "additional_chat_templates",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@dataclass(frozen=True)
class Album:
    """Images and the questions about them, ready for the network."""

    pixels: Tensor  # (images, 3, SIDE, SIDE), uint8
    texts: list[list[list[int]]]  # for each image: token ids of every question with its answer
    facts: list[list[tuple[int, bool]]]  # for each image: indexes in `answers`, and whether they are true of it
    answers: list[tuple[str, str]]  # (concept, answer) that the training rows know


def write_start(
    train: Mapping[str, Sequence[Row]], out: Path, seed: int = 0, effort: float = 1.0, progress: bool = True
) -> dict[str, list[float]]:
    """Make the tiny network, teach its towers apart, and write its checkpoint folder.

    The same rows, seed and number of threads give the same bytes. With `effort` 1: about 210 core-seconds.

    Args:
        train: Rows by data set.
        out: The folder to write: weights, configuration, tokenizer, processor. A tiny start in it is overwritten.
        seed: Of the first weights, the order of the images and their augmentation; from 0 to 2**32 - 1.
        effort: Factor on the number of steps.
        progress: Whether to show a bar on stderr.

    Returns:
        The losses of every step: "vision" in nats per question, "text" in nats per token.

    Raises:
        InputError: There are no training rows, an image cannot be decoded, or `out` holds something else.
    """
    import torch
    from tqdm import tqdm

    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: it is from 0 to {2**32 - 1}.")
    if not any(train.values()):
        raise InputError("training rows: none. The towers learn from some; see `stllava-eval prepare --sample`.")
    _make_folder(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(train)
        model = make_model(tokenizer)
        album = read_album(train, tokenizer)
        vision_steps, text_steps = (max(1, round(effort * count)) for count in (VISION_STEPS, TEXT_STEPS))
        hidden = None if progress else True  # None: where stderr is no terminal
        with tqdm(total=vision_steps + text_steps, desc="towers", unit="step", disable=hidden, file=sys.stderr) as bar:
            losses = {
                "vision": _train_vision(model, album, vision_steps, bar),
                "text": _train_text(model, album, tokenizer, text_steps, bar),
            }
    _write(model, tokenizer, out)
    return losses


# --- rows to tokens and pixels ----------------------------------------------------------------------------------------


def make_tokenizer(rows: Mapping[str, Sequence[Row]]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of PIECES pieces, learnt from the rows' questions and answers and the prompt's words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [f"{row.question} ASSISTANT: {row.reference}" for name in sorted(rows) for row in rows[name]]
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # every prompt opens with the system's text: a hundred times makes its words whole pieces
    core.train_from_iterator([*texts, *[f"{SYSTEM} USER:"] * 100], trainer)
    start = ("<s>", core.token_to_id("<s>"))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[start])
    core.add_special_tokens(["<image>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )


def read_album(rows: Mapping[str, Sequence[Row]], tokenizer: PreTrainedTokenizerFast) -> Album:
    """Return the rows grouped by image, tokenized and decoded.

    Raises:
        InputError: An image cannot be decoded.
    """
    import torch

    processor = make_processor(tokenizer, SIDE, PATCH, "full").image_processor
    groups: dict[tuple[str, str], list[Row]] = {}
    for name in sorted(rows):
        for row in rows[name]:
            groups.setdefault((name, row.image_id), []).append(row)
    answers = known_answers(rows)
    pixels, texts, facts = [], [], []
    for group in groups.values():
        sized = processor(decode(group[0].image), do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels.append(sized["pixel_values"][0].to(torch.uint8))
        texts.append([_tokens(tokenizer, row) for row in group])
        stated = [read_fact(row, answers) for row in group]
        facts.append([fact for fact in stated if fact is not None])
    return Album(torch.stack(pixels), texts, facts, answers)


def known_answers(rows: Mapping[str, Sequence[Row]]) -> list[tuple[str, str]]:
    """Return (concept, answer) of every answer that names something, sorted.

    Yes and no are among them only for a concept that has no other answer.
    """
    by_concept: dict[str, set[str]] = {}
    for name in sorted(rows):
        for row in rows[name]:
            by_concept.setdefault(concept(row), set()).add(row.reference)
    known = []
    for name, answers in by_concept.items():
        known += [(name, answer) for answer in (answers - {"yes", "no"} or answers)]
    return sorted(known)


def concept(row: Row) -> str:
    """Return what the row asks about, by the category that its data set gives it."""
    return row.categories.get("question_type") or row.categories.get("content_type") or ""


def read_fact(row: Row, answers: list[tuple[str, str]]) -> tuple[int, bool] | None:
    """Return the index in `answers` of what the row states about its image, and whether it is true; None for neither.

    "Is the plane axial?" answered "no" says that (plane, axial) is false.
    """
    if (concept(row), row.reference) in answers:
        return answers.index((concept(row), row.reference)), True
    named = [answer for name, answer in answers if name == concept(row) and answer in row.question]
    if not named or row.reference not in ("yes", "no"):
        return None
    return answers.index((concept(row), max(named, key=len))), row.reference == "yes"


def _tokens(tokenizer: PreTrainedTokenizerFast, row: Row) -> list[int]:
    """Return the token ids of a row's question and answer, as the prompt has them behind the image."""
    parts = (f"{row.question} ASSISTANT:", f" {row.reference}</s>")
    return [token for part in parts for token in tokenizer(part, add_special_tokens=False).input_ids]


# --- the network ------------------------------------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerFast) -> StllavaMedForConditionalGeneration:
    """Return the untrained network, its first weights from torch's global generator."""
    import torch
    from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig

    from stllava_eval.network.configuration import StllavaMedConfig
    from stllava_eval.network.modeling import StllavaMedForConditionalGeneration

    pad, bos, eos, image = (tokenizer.get_vocab()[name] for name in (*SPECIAL, "<image>"))
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=HIDDEN,
    )
    text = LlamaConfig(
        vocab_size=image,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=2048,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
        tie_word_embeddings=True,
    )
    config = StllavaMedConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,  # the last layer: a tower of four has none to spare
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        projector_type="prototype",
        num_prototypes=PROTOTYPES,
    )
    model = StllavaMedForConditionalGeneration(config)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = POSITION_SCALE * _grid_waves()
        projector = model.model.multi_modal_projector
        for part in (projector.linear_1, projector.linear_2, model.model.language_model):
            for weight in part.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, WEIGHT_SCALE)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=16, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos
    )
    return model


def _grid_waves() -> Tensor:
    """Return (patches, HIDDEN): sines and cosines of a patch's row and column, waves of 4 times the grid to 2 patches.

    It is the sinusoidal encoding of Vaswani et al. (arXiv:1706.03762, section 3.5) in two dimensions.
    """
    import math

    import torch

    side = SIDE // PATCH
    waves = math.pi / side * torch.logspace(math.log10(0.5), math.log10(side / 2), HIDDEN // 4)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")  # (side, side) each
    down, across = row.reshape(-1, 1) * waves, column.reshape(-1, 1) * waves  # (patches, HIDDEN / 4) each
    return torch.cat([down.sin(), down.cos(), across.sin(), across.cos()], dim=1)


# --- the two steps ----------------------------------------------------------------------------------------------------


def _train_vision(model: Any, album: Album, steps: int, bar: Any) -> list[float]:
    """Train the tower alone, and return the losses of its steps.

    A linear layer on CLS, which is thrown away afterwards, names for each concept the answer that is true of the image.
    """
    import torch

    tower = model.model.vision_tower
    norm, name = torch.nn.LayerNorm(HIDDEN), torch.nn.Linear(HIDDEN, len(album.answers))
    optimizer, schedule = _optimizer([(torch.nn.ModuleList([tower, norm, name]), VISION_RATE)], steps)
    numbers = {concept: number for number, concept in enumerate(dict(album.answers))}
    concepts = torch.tensor([numbers[concept] for concept, _ in album.answers])  # (answers,)
    losses: list[float] = []
    with_facts = [image for image, facts in enumerate(album.facts) if facts]
    for batch in _batches(len(with_facts), steps if with_facts else 0, VISION_IMAGES):
        images = [with_facts[index] for index in batch]
        facts: list[tuple[int, int, bool]] = []  # (row of the batch, answer, whether it is true)
        for row, image in enumerate(images):
            facts += [(row, *fact) for fact in album.facts[image]]
        rows, answers, true = (torch.tensor(column) for column in zip(*facts, strict=True))  # (facts,) each
        states = tower(_augmented(album.pixels[images])).last_hidden_state  # (batch, 1 + patches, HIDDEN)
        scores = name(norm(states[:, 0]))[rows]  # (facts, answers), of CLS
        rivals = concepts == concepts[answers][:, None]  # (facts, answers): an answer competes within its concept
        # (facts,): log-probability of the answer that each fact is about
        logp = scores.masked_fill(~rivals, -1e9).log_softmax(1).gather(1, answers[:, None])[:, 0]
        # -log p of a true fact, -log(1 - p) of a false one; the clamp keeps log(0) out
        loss = -torch.where(true, logp, torch.log1p(-logp.exp().clamp(max=1 - 1e-4))).mean()
        _step(loss, optimizer, schedule, bar, losses)
    return losses


def _train_text(model: Any, album: Album, tokenizer: PreTrainedTokenizerFast, steps: int, bar: Any) -> list[float]:
    """Train the language model alone, on every token of questions and answers; return the losses of its steps.

    Behind the prompt one vector is the image, at the position of the image's first: the sum of the embeddings of the
    words of all facts that are true of it. So "Is the plane axial?" is answered by whether "axial" is among them, which
    stage 1 from a blind start learnt late or never (docs/results.md). The image's other vectors are left out, and their
    positions are kept.
    """
    import torch
    from torch.nn.functional import cross_entropy

    ids = tokenizer(f"{SYSTEM} USER: <image>\n").input_ids
    image_at = ids.index(tokenizer.convert_tokens_to_ids("<image>"))
    positions = [at if at <= image_at else at + IMAGE_TOKENS - 1 for at in range(len(ids))]
    words = _fact_words(album, tokenizer)
    embed = model.model.language_model.embed_tokens
    optimizer, schedule = _optimizer([(model.model.language_model, TEXT_RATE)], steps)
    losses: list[float] = []
    for batch in _batches(len(album.texts), steps, TEXT_IMAGES):
        asked: list[tuple[int, list[int]]] = []  # (image, token ids of a question with its answer)
        for image in batch:
            asked += [(image, text) for text in _some(album.texts[image])]
        width = max(len(text) for _, text in asked)
        # (texts, prompt + width)
        rows = torch.tensor([ids + text + [IGNORE] * (width - len(text)) for _, text in asked])
        rows[:, image_at] = 0  # the image's vector replaces what is embedded here
        at = torch.tensor(positions + [positions[-1] + 1 + number for number in range(width)])
        vectors = embed(rows.clamp(min=0))  # (texts, prompt + width, HIDDEN)
        facts = torch.stack([words[image] for image, _ in asked]) @ embed.weight  # (texts, vocab) @ (vocab, HIDDEN)
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([vectors[:, :image_at], facts[:, None], vectors[:, image_at + 1 :]], dim=1),
            attention_mask=(rows != IGNORE).long(),
            position_ids=at.expand(len(rows), -1),
            use_cache=False,
        ).last_hidden_state
        learnt = rows[:, len(ids) :]  # (texts, width); the vector before each of these tokens predicts it
        logits = model.lm_head(hidden[:, len(ids) - 1 : -1][learnt != IGNORE])  # (tokens learnt, vocab)
        _step(cross_entropy(logits, learnt[learnt != IGNORE]), optimizer, schedule, bar, losses)
    return losses


def _fact_words(album: Album, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return (images, vocab): 1 where a token is in the words of a fact that is true of the image, else 0.

    A fact's words are its answer; those of "yes" are the concept, and "no" has none.
    """
    import torch

    words = torch.zeros(len(album.facts), tokenizer.get_vocab()["<image>"])
    for image, facts in enumerate(album.facts):
        for concept, answer in (album.answers[number] for number, true in facts if true):
            named = {"yes": concept, "no": ""}.get(answer, answer)
            words[image, tokenizer(f" {named}".rstrip(), add_special_tokens=False).input_ids] = 1
    return words


def _optimizer(parts: Sequence[tuple[Any, float]], steps: int) -> tuple[Any, Any]:
    """Return AdamW over the parts at their learning rates, and its schedule.

    The schedule is a cosine to zero after a warm-up of a twentieth of the steps, which is our choice.
    """
    import math

    import torch

    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in parts]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _step(loss: Tensor, optimizer: Any, schedule: Any, bar: Any, losses: list[float]) -> None:
    """Take one step of training, and append its loss to `losses`."""
    import torch

    optimizer.zero_grad()
    loss.backward()
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # our choice
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
    bar.update()


def _batches(count: int, steps: int, size: int) -> Iterator[list[int]]:
    """Yield `steps` batches of `size` indexes below `count`, through shuffled epochs."""
    import torch

    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(count).tolist()
        yield order[:size]
        order = order[size:]


def _some(questions: list[Any]) -> list[Any]:
    """Return at most QUESTIONS of the questions, at random."""
    import torch

    return [questions[index] for index in torch.randperm(len(questions))[:QUESTIONS].tolist()]


def _normalised(pixels: Tensor) -> Tensor:
    """Return pixels of 0 to 255, (images, 3, SIDE, SIDE), as CLIP's processor hands them to the network."""
    import torch
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = torch.tensor(OPENAI_CLIP_MEAN)[:, None, None], torch.tensor(OPENAI_CLIP_STD)[:, None, None]
    return (pixels / 255 - mean) / std


def _augmented(pixels: Tensor) -> Tensor:
    """Return pixels of 0 to 255, (images, 3, SIDE, SIDE), augmented and normalised."""
    return _normalised(255 * augmented(pixels / 255))


def _make_folder(out: Path) -> None:
    """Make the folder of the checkpoint before any training.

    Raises:
        InputError: It cannot be made, or holds something other than a tiny start.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        other = any(out.iterdir()) and not _is_start(out)
    except OSError as error:
        raise InputError(f"{out}: no folder can be made there ({error.strerror}). Choose another --out.") from error
    if other:
        raise InputError(f"{out}: it is not empty and holds no tiny start. Choose another --out.")


def _is_start(folder: Path) -> bool:
    """Return whether a folder holds a tiny start alone; a run or a merge of the tiny network has other files too."""
    try:
        network = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    names = {file.name for file in folder.iterdir()}
    return names <= FILES and isinstance(network, dict) and network.get("num_prototypes") == PROTOTYPES


def _write(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint folder, which `from_pretrained` of model, processor and tokenizer read."""
    processor = make_processor(tokenizer, SIDE, PATCH, "full")
    model.eval().save_pretrained(out)
    processor.save_pretrained(out)
