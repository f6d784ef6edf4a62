"""Rows with images -> a network of 1.7 million weights that learnt to answer them: the demo's checkpoint, from scratch.

The shape is STLLaVA-Med's (CLIP tower, prototype extractor, Llama) and so are the files. Three steps, as in recipe F of
the reference text embedded_data.md: the vision tower alone learns the facts that the rows state, the language model
alone learns how questions and answers read, then all of it learns to answer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava_eval.datasets import Row
from stllava_eval.errors import InputError
from stllava_eval.images import decode
from stllava_eval.network.processing import SYSTEM, make_processor
from stllava_train.augment import augmented

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from stllava_eval.network import StllavaMedForConditionalGeneration

SIDE = 112  # px, embedded_data.md
PATCH = 16  # px, embedded_data.md
IMAGE_TOKENS = (SIDE // PATCH) ** 2 + 1  # the patches and CLS, embedded_data.md
HIDDEN = 128  # embedded_data.md, both towers
VISION_LAYERS, TEXT_LAYERS = 4, 3  # embedded_data.md
PIECES = 640  # embedded_data.md
PROTOTYPES = 16  # 2.25 tokens of the paper's image are one prototype, 3 of this one's (our choice)
SPECIAL = ("<pad>", "<s>", "</s>")  # <image> comes behind the vocabulary, where nothing can generate it
# Our choice, on the validation split and near the core-seconds of embedded_data.md, whose batches are 24 and 6
VISION_IMAGES, IMAGES, QUESTIONS = (
    24,
    16,
    12,
)  # images in a step of the first and of the other two; questions of an image
VISION_STEPS, TEXT_STEPS, JOINT_STEPS = 700, 100, 400
VISION_RATE, TEXT_RATE, JOINT_RATE = 2e-3, 2e-3, 2.5e-3
# At CLIP's 0.02 the tower is slow to learn where, at Llama's 0.02 the language model is slow to look at the image
POSITION_SCALE, WEIGHT_SCALE = 2.0, 0.08
TOWER_SHARE = 0.1  # of JOINT_RATE, for the vision tower: embedded_data.md
WEIGHT_DECAY = 0.05  # our choice
IGNORE = -100


@dataclass(frozen=True)
class Album:
    """Images and the questions about them, ready for the network."""

    pixels: Tensor  # (images, 3, SIDE, SIDE), uint8
    questions: list[list[tuple[list[int], list[int]]]]  # for each image: token ids of question and of answer
    kinds: list[list[str]]
    facts: list[list[tuple[int, bool]]]  # for each image: places in `answers`, and whether they are true of it
    answers: list[tuple[str, str]]  # (concept, answer) that the training rows know


@dataclass(frozen=True)
class Packed:
    """One row per image: the prompt up to the question once, then every question with its answer.

    A question sees the prompt, the image and itself, at the positions it would have if it were alone.
    """

    ids: Tensor  # (rows, tokens)
    positions: Tensor  # (rows, tokens)
    mask: Tensor  # (rows, 1, tokens, tokens), True where the token of the first axis sees that of the second
    labels: Tensor  # (rows, tokens): the token itself where it belongs to an answer, else IGNORE
    owners: Tensor  # (rows, tokens): the question that a token belongs to, counted over the batch; -1 in the prompt


def train_tiny(
    train: Mapping[str, Sequence[Row]],
    validation: Mapping[str, Sequence[Row]],
    out: Path,
    seed: int = 0,
    effort: float = 1.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the tiny network and write its checkpoint folder.

    The same rows, seed and number of threads give the same bytes. With `effort` 1: about 400 core-seconds, below 3 GB.

    Args:
        train: Rows by data set.
        validation: Rows by data set, scored during training; nothing is learnt or chosen from them.
        out: The folder to write: weights, configuration, tokenizer, processor.
        seed: Of the first weights, the order of the images and their augmentation.
        effort: Factor on the number of steps.
        progress: Whether to show a bar on stderr.

    Returns:
        `losses`: nats per token (per question in the first step) for each of "vision", "text" and "joint", a value a
        step; `validation`: a list of {step, all, open, closed}, shares of exactly right answers in [0, 1].

    Raises:
        InputError: There are no training rows, or an image cannot be decoded.
    """
    import torch
    from tqdm import tqdm

    if not any(train.values()):
        raise InputError(
            "training rows: none. train_tiny learns from at least one row; see `stllava-eval prepare --sample`."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(train)
        model = make_model(tokenizer)
        prompt = prompt_ids(tokenizer)
        learn = read_album(train, tokenizer)
        check = read_album(validation, tokenizer, learn.answers)
        steps = [max(1, round(effort * count)) for count in (VISION_STEPS, TEXT_STEPS, JOINT_STEPS)]
        with tqdm(total=sum(steps), desc="training", unit="step", disable=not progress, file=sys.stderr) as bar:
            history: dict[str, Any] = {"losses": {}, "validation": []}
            history["losses"]["vision"] = _train_vision(model, learn, steps[0], bar)
            history["losses"]["text"] = _train_text(model, learn, prompt, steps[1], bar)
            history["losses"]["joint"] = _train_joint(model, learn, check, prompt, steps[2], bar, history["validation"])
    _write(model, tokenizer, out)
    return history


# --- rows to tokens and pixels ----------------------------------------------------------------------------------------


def make_tokenizer(rows: Mapping[str, Sequence[Row]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of PIECES pieces, learnt from the rows' questions and answers and the prompt's own words."""
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


def prompt_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The prompt's tokens up to the question, as `stllava_eval.answering.prompt` spells it, with the image's places."""
    ids = tokenizer(f"{SYSTEM} USER: <image>\n").input_ids
    place = ids.index(tokenizer.convert_tokens_to_ids("<image>"))
    return ids[:place] + [ids[place]] * IMAGE_TOKENS + ids[place + 1 :]


def read_album(
    rows: Mapping[str, Sequence[Row]], tokenizer: PreTrainedTokenizerFast, answers: list[tuple[str, str]] | None = None
) -> Album:
    """The rows grouped by image, tokenized and decoded. `answers`: those of the training rows (default: of these rows).

    Raises:
        InputError: An image cannot be decoded.
    """
    import torch

    processor = make_processor(tokenizer, SIDE, PATCH, "full").image_processor
    groups: dict[tuple[str, str], list[Row]] = {}
    for name in sorted(rows):
        for row in rows[name]:
            groups.setdefault((name, row.image_id), []).append(row)
    answers = known_answers(rows) if answers is None else answers
    pixels, questions, kinds, facts = [], [], [], []
    for group in groups.values():
        image = decode(group[0].image)
        sized = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        pixels.append(sized[0].to(torch.uint8))
        questions.append([_tokens(tokenizer, row) for row in group])
        kinds.append([row.kind for row in group])
        facts.append([fact for row in group if (fact := read_fact(row, answers)) is not None])
    stacked = torch.stack(pixels) if pixels else torch.empty(0, 3, SIDE, SIDE, dtype=torch.uint8)
    return Album(stacked, questions, kinds, facts, answers)


def known_answers(rows: Mapping[str, Sequence[Row]]) -> list[tuple[str, str]]:
    """(concept, answer) of every answer that names something; yes and no only where nothing else answers it."""
    found: dict[str, set[str]] = {}
    for row in (row for name in sorted(rows) for row in rows[name]):
        found.setdefault(concept(row), set()).add(row.reference)
    return sorted((name, answer) for name, all_ in found.items() for answer in (all_ - {"yes", "no"} or all_))


def concept(row: Row) -> str:
    """What the row asks about, by its set's own category."""
    return row.categories.get("question_type") or row.categories.get("content_type") or ""


def read_fact(row: Row, answers: list[tuple[str, str]]) -> tuple[int, bool] | None:
    """The place in `answers` of what the row says is true or false of its image; None where it names none of them.

    "Is the plane axial?" answered "no" says that (plane, axial) is false.
    """
    if (concept(row), row.reference) in answers:
        return answers.index((concept(row), row.reference)), True
    named = [answer for name, answer in answers if name == concept(row) and answer in row.question]
    if not named or row.reference not in ("yes", "no"):
        return None
    return answers.index((concept(row), max(named, key=len))), row.reference == "yes"


def _tokens(tokenizer: PreTrainedTokenizerFast, row: Row) -> tuple[list[int], list[int]]:
    question = tokenizer(f"{row.question} ASSISTANT:", add_special_tokens=False).input_ids
    answer = tokenizer(f" {row.reference}</s>", add_special_tokens=False).input_ids
    return question, answer


def pack(prompt: list[int], rows: Sequence[Sequence[tuple[list[int], list[int]]]], padding: int) -> Packed:
    """The questions of each image behind one copy of the prompt."""
    import torch

    width = len(prompt) + max(sum(len(q) + len(a) for q, a in row) for row in rows)
    ids = torch.full((len(rows), width), padding)
    positions = torch.zeros_like(ids)
    owners = torch.full_like(ids, -1)
    labels = torch.full_like(ids, IGNORE)
    padded = torch.ones_like(ids, dtype=torch.bool)
    ids[:, : len(prompt)] = torch.tensor(prompt)
    positions[:, : len(prompt)] = torch.arange(len(prompt))
    padded[:, : len(prompt)] = False
    count = 0
    for place, row in enumerate(rows):
        start = len(prompt)
        for question, answer in row:
            middle, end = start + len(question), start + len(question) + len(answer)
            ids[place, start:end] = torch.tensor(question + answer)
            labels[place, middle:end] = torch.tensor(answer)
            positions[place, start:end] = torch.arange(len(prompt), len(prompt) + end - start)
            owners[place, start:end] = count
            padded[place, start:end] = False
            start, count = end, count + 1
    seen = torch.ones(width, width, dtype=torch.bool).tril()
    mask = seen & ((owners[:, None, :] == -1) | (owners[:, None, :] == owners[:, :, None])) & ~padded[:, None, :]
    mask |= torch.eye(width, dtype=torch.bool)  # a padding token sees itself: a row of nothing would be NaN
    return Packed(ids, positions, mask[:, None], labels, owners)


# --- the network ------------------------------------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerFast) -> StllavaMedForConditionalGeneration:
    """The untrained network, its first weights from torch's global generator."""
    import torch
    from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig

    from stllava_eval.network import StllavaMedConfig, StllavaMedForConditionalGeneration

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
    """(patches, HIDDEN): sines and cosines of a patch's row and column, waves from 4 times the grid to 2 patches."""
    import math

    import torch

    side = SIDE // PATCH
    waves = math.pi / side * torch.logspace(math.log10(0.5), math.log10(side / 2), HIDDEN // 4)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * waves for place in (row, column)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def packed_hidden(model: Any, packed: Packed, pixels: Tensor | None) -> Tensor:
    """(rows, tokens, HIDDEN): the language model's last states; without pixels the image's tokens stand as such."""
    return model.model(
        input_ids=packed.ids,
        pixel_values=pixels,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state


def answer_loss(model: Any, packed: Packed, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the labelled tokens, in nats, and which questions were answered exactly right.

    Args:
        model: The LLaVA.
        packed: The batch.
        hidden: See `packed_hidden`.
        labels: As `Packed.labels`.

    Returns:
        The loss, and (questions,) True where every labelled token was the likeliest one: what greedy decoding writes.
    """
    import torch

    target = labels[:, 1:]
    at = target != IGNORE
    logits = model.lm_head(hidden[:, :-1][at])
    loss = torch.nn.functional.cross_entropy(logits, target[at])
    owners = packed.owners[:, 1:][at]
    wrong = torch.zeros(int(packed.owners.max()) + 1, dtype=torch.long)
    wrong.index_add_(0, owners, (logits.argmax(-1) != target[at]).long())
    return loss, wrong == 0


# --- the three steps --------------------------------------------------------------------------------------------------


def _train_vision(model: Any, album: Album, steps: int, bar: Any) -> list[float]:
    """The tower alone: a throw-away linear layer on CLS names, for each concept, the answer true of the image."""
    import torch

    tower = model.model.vision_tower
    norm, name = torch.nn.LayerNorm(HIDDEN), torch.nn.Linear(HIDDEN, len(album.answers))
    optimizer, schedule = _optimizer([(torch.nn.ModuleList([tower, norm, name]), VISION_RATE)], steps)
    numbers = {concept: number for number, concept in enumerate(dict(album.answers))}
    concepts = torch.tensor([numbers[concept] for concept, _ in album.answers])
    losses: list[float] = []
    with_facts = [place for place, facts in enumerate(album.facts) if facts]
    for batch in _batches(len(with_facts), steps if with_facts else 0, VISION_IMAGES):
        places = [with_facts[place] for place in batch]
        facts = [(row, *fact) for row, place in enumerate(places) for fact in album.facts[place]]
        rows, answers, true = (torch.tensor(column) for column in zip(*facts, strict=True))
        states = tower(_augmented(album.pixels[places])).last_hidden_state
        scores = name(norm(states[:, 0]))[rows]
        rivals = concepts == concepts[answers][:, None]  # an answer competes with those of its own concept
        chance = scores.masked_fill(~rivals, -1e9).log_softmax(1).gather(1, answers[:, None])[:, 0]
        loss = -torch.where(true, chance, torch.log1p(-chance.exp().clamp(max=1 - 1e-4))).mean()
        _step(loss, optimizer, schedule, bar, losses)
    return losses


def _train_text(model: Any, album: Album, prompt: list[int], steps: int, bar: Any) -> list[float]:
    """The language model alone, on questions and answers whose image it does not see."""
    image = model.config.image_token_id
    optimizer, schedule = _optimizer([(model.model.language_model, TEXT_RATE)], steps)
    losses: list[float] = []
    for places in _batches(len(album.questions), steps, IMAGES):
        packed = pack(
            prompt, [_some(album.questions[place]) for place in places], model.config.text_config.pad_token_id
        )
        packed = _without_image(packed, image)
        labels = packed.ids.masked_fill(packed.owners < 0, IGNORE)  # the question's words as well as the answer's
        loss, _ = answer_loss(model, packed, packed_hidden(model, packed, None), labels)
        _step(loss, optimizer, schedule, bar, losses)
    return losses


def _without_image(packed: Packed, image: int) -> Packed:
    """The batch less the image's tokens; the others keep their positions."""
    keep = packed.ids[0] != image
    return Packed(
        packed.ids[:, keep],
        packed.positions[:, keep],
        packed.mask[:, :, keep][..., keep],
        packed.labels[:, keep],
        packed.owners[:, keep],
    )


def _train_joint(
    model: Any, album: Album, check: Album, prompt: list[int], steps: int, bar: Any, scores: list[dict[str, Any]]
) -> list[float]:
    """Everything, on the answers; five times the validation rows are scored."""
    inner = model.model
    parts = [
        (inner.vision_tower, TOWER_SHARE * JOINT_RATE),
        (inner.multi_modal_projector, JOINT_RATE),
        (inner.language_model, JOINT_RATE),
    ]
    optimizer, schedule = _optimizer(parts, steps)
    losses: list[float] = []
    for places in _batches(len(album.questions), steps, IMAGES):
        packed = pack(
            prompt, [_some(album.questions[place]) for place in places], model.config.text_config.pad_token_id
        )
        loss, _ = answer_loss(
            model, packed, packed_hidden(model, packed, _augmented(album.pixels[places])), packed.labels
        )
        _step(loss, optimizer, schedule, bar, losses)
        if check.questions and (len(losses) == steps or len(losses) % max(1, steps // 5) == 0):
            scores.append({"step": len(losses)} | exact(model, check, prompt))
            bar.set_postfix(validation=f"{scores[-1]['all']:.3f}")
    return losses


def exact(model: Any, album: Album, prompt: list[int]) -> dict[str, float]:
    """Share of questions that greedy decoding answers exactly right: all, open, closed, where there are any."""
    import torch

    right: dict[str, list[bool]] = {"all": [], "open": [], "closed": []}
    with torch.inference_mode():
        for start in range(0, len(album.questions), 32):
            packed = pack(prompt, album.questions[start : start + 32], model.config.text_config.pad_token_id)
            hidden = packed_hidden(model, packed, _normalised(album.pixels[start : start + 32].float()))
            _, correct = answer_loss(model, packed, hidden, packed.labels)
            kinds = [kind for row in album.kinds[start : start + 32] for kind in row]
            for kind, hit in zip(kinds, correct.tolist(), strict=True):
                right["all"].append(hit)
                right[kind].append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items() if hits}


def _optimizer(parts: Sequence[tuple[Any, float]], steps: int) -> tuple[Any, Any]:
    """AdamW over the parts at their learning rates; a cosine to zero after a warm-up of a twentieth of the steps."""
    import math

    import torch

    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in parts]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _step(loss: Tensor, optimizer: Any, schedule: Any, bar: Any, losses: list[float]) -> None:
    import torch

    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)  # our choice
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
    bar.update()


def _batches(count: int, steps: int, size: int) -> Iterator[list[int]]:
    """`steps` batches of `size` places in range(count), through shuffled epochs."""
    import torch

    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(count).tolist()
        yield order[:size]
        order = order[size:]


def _some(questions: list[Any]) -> list[Any]:
    """At most QUESTIONS of them, at random."""
    import torch

    return [questions[place] for place in torch.randperm(len(questions))[:QUESTIONS].tolist()]


def _normalised(pixels: Tensor) -> Tensor:
    """0..255 -> what CLIP's processor hands to the network."""
    import torch
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = torch.tensor(OPENAI_CLIP_MEAN)[:, None, None], torch.tensor(OPENAI_CLIP_STD)[:, None, None]
    return (pixels / 255 - mean) / std


def _augmented(pixels: Tensor) -> Tensor:
    """0..255 -> augmented and normalised."""
    return _normalised(255 * augmented(pixels / 255))


def _write(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The checkpoint folder: what `from_pretrained` of model, processor and tokenizer read."""
    processor = make_processor(tokenizer, SIDE, PATCH, "full")
    out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(out)
    processor.save_pretrained(out)
