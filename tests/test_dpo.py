"""Stage 2: batches as trees, equality with trl and with the authors' values, a run that no kill harms."""

import json
import random
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from conftest import png
from PIL import Image

from stllava_eval.network.checkpoint import open_checkpoint
from stllava_train.dpo import Answered, groups, make_trainer, open_work, train, tree
from stllava_train.recipe import DpoRecipe, read_dpo_recipe
from stllava_train.training import read_trace

LORA = {"train": "lora", "learning_rate": 2e-3, "rank": 4, "alpha": 8, "dropout": 0.0}
SMALL = {
    "start_vision_tower": None,
    "template": "v1",
    "loss": ["sigmoid"],
    "loss_weights": [1.0],
    "beta": 0.1,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "reference": "live",
    "epochs": 2,
    "batch": 4,
    "micro_batch": 2,
    "max_tokens": 600,
    "warmup": 0.1,
    "weight_decay": 0.0,
    "betas": [0.9, 0.999],
    "max_grad_norm": 1.0,
    "dtype": "float32",
    "four_bit": False,
    "gradient_checkpointing": False,
    "save_every": 2,
    "seed": 0,
    "evaluate_on": [],
    "evaluate_every": 2,
    "evaluate_questions": 4,
    "stop_unparsed": 1.0,
    "language_model": LORA,
    "vision_tower": {**LORA, "rank": 2, "alpha": 4, "learning_rate": 1e-3},
    "projector": {"train": "full", "learning_rate": 5e-4},
}
FULL = {name: {"train": "full", "learning_rate": 1e-3} for name in ("language_model", "vision_tower", "projector")}
WORDS = ("left", "lung", "a mass", "is normal", "in the upper lobe", "CT", "no sign of", "effusion", "the liver")


@pytest.fixture(autouse=True)
def one_thread(home):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with ten pairs about six images, of answers of 1 to 12 words, some with a common beginning."""
    from stllava_eval.images import decode, pixel_hash

    folder = tmp_path_factory.mktemp("pairs")
    draw = random.Random(0)
    rows = []
    for number in range(10):
        image = number % 6
        file = folder / f"{image}.png"
        file.write_bytes(png((40 * image, 255 - 40 * image, 90)))
        chosen, rejected = (" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(2))
        if number % 3 == 0:
            chosen, rejected = f"It shows {chosen}.", f"It shows {rejected}."
        rows.append(
            {
                "id": f"{image}.png#{number}",
                "image": file.name,
                "image_sha256": pixel_hash(decode(file.read_bytes())),
                "question": draw.choice(("What is shown?", "What organ is shown?", "Where is it?")),
                "chosen": chosen,
                "rejected": rejected,
                "margin": 2.0,
                "judges": ["ada"],
            }
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def recipe_file(checkpoint, tmp_path):
    def write(**changes) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(SMALL | {"start": str(checkpoint)} | changes))
        return file

    return write


@pytest.fixture
def small(recipe_file):
    return lambda **changes: read_dpo_recipe(str(recipe_file(**changes)))


def work_of(recipe: DpoRecipe, data: Path):
    return open_work(recipe, data / "pairs.jsonl", data, progress=False)


# --- trees ----------------------------------------------------------------------------------------------------------


def test_a_tree_holds_every_shared_beginning_once():
    made = tree([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4], [1, 2, 3], [9]])
    assert sorted(made.ids) == [1, 2, 3, 4, 5, 9]
    for sequence, path in zip([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4], [1, 2, 3], [9]], made.paths, strict=True):
        assert [made.ids[place] for place in path.tolist()] == sequence
        assert [made.positions[place] for place in path.tolist()] == list(range(len(sequence)))
        seen = made.seen()
        for number, place in enumerate(path.tolist()):
            assert seen[place].nonzero().flatten().tolist() == sorted(path[: number + 1].tolist())


def alone(model, pixels, answered: Answered) -> torch.Tensor:
    """Log-probability of one answer, its sequence computed by itself, in nats."""
    ids = torch.tensor([answered.ids])
    logits = model(input_ids=ids, pixel_values=pixels[None]).logits[0, answered.begin - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, answered.begin :, None]).sum()


def test_an_answer_weighs_what_it_weighs_alone(small, data, tmp_path):
    work = work_of(small(), data)
    trainer = make_trainer(work, tmp_path / "run", tmp_path / "trace", progress=False)
    for places in ([0, 6, 1], [5], [3, 9, 4, 0]):
        batch = work.collator([{"place": place} for place in places])
        batch.pop("pairs")
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        model = work.checkpoint.model()
        for number, place in enumerate(places):
            pixels = work.collator.pixels(data / work.pairs[place].image)
            for found, answered in zip((chosen, rejected), work.collator.encoded(place), strict=True):
                assert found[number].item() == pytest.approx(alone(model, pixels, answered).item(), rel=1e-6)


# --- equality with trl ----------------------------------------------------------------------------------------------


def stock(work, out: Path, **settings):
    """trl's DPOTrainer as it comes, on the same network, pairs and order."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from stllava_train.training import plan, trained_model

    recipe = work.recipe
    rows = []
    for place, _ in plan(groups(work.pairs), recipe):
        pair = work.pairs[place]
        question = [{"type": "image"}, {"type": "text", "text": pair.question}]
        rows.append(
            {
                "images": [str(work.collator.folder / pair.image)],
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
        )
    dataset = Dataset.from_list(rows).with_transform(
        lambda rows: rows | {"images": [[Image.open(file) for file in files] for files in rows["images"]]}
    )
    arguments = DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch // recipe.micro_batch,
        learning_rate=1e-3,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        train_sampling_strategy="sequential",
        max_length=None,
        max_grad_norm=recipe.max_grad_norm,
        weight_decay=0.0,
        warmup_steps=0,
        lr_scheduler_type="cosine",
        num_train_epochs=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        disable_dropout=False,
        loss_type=list(recipe.loss),
        loss_weights=list(recipe.loss_weights),
        beta=recipe.beta,
        label_smoothing=recipe.label_smoothing,
        ld_alpha=recipe.ld_alpha,
        **settings,
    )
    trainer = DPOTrainer(
        model=trained_model(work), args=arguments, train_dataset=dataset, processing_class=work.checkpoint.processor()
    )
    losses: list[float] = []
    inner = trainer._compute_loss
    trainer._compute_loss = lambda *given: (found := inner(*given), losses.append(found.item()))[0]
    trainer.train()
    steps = recipe.batch // recipe.micro_batch
    return trainer, [sum(losses[at : at + steps]) / steps for at in range(0, len(losses), steps)]


CASES = {
    "sigmoid": {},
    "ipo": {"loss": ["ipo"]},
    "robust": {"loss": ["robust"], "label_smoothing": 0.1},
    "sigmoid and sft": {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "sigmoid_norm": {"loss": ["sigmoid_norm"]},
    "LD-DPO": {"ld_alpha": 0.3},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "cached": {"reference": "cached"},
    "cached, gradient checkpointing": {"reference": "cached", "gradient_checkpointing": True},
    "cached, LD-DPO": {"reference": "cached", "ld_alpha": 0.3},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_and_weights_are_those_of_trl(small, data, tmp_path, case):
    same = {"learning_rate": 1e-3}
    parts = {name: {**SMALL[name], **same} for name in ("language_model", "vision_tower", "projector")}
    work = work_of(small(**case, **parts, warmup=0.0, epochs=4), data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl's of its own future
        theirs, losses = stock(work, tmp_path / "theirs")
    train(work, tmp_path / "run", progress=False)
    lines = read_trace(tmp_path / "run" / "losses.jsonl")
    assert len(lines) == len(losses) == work.steps == 10
    for line, loss in zip(lines, losses, strict=True):
        assert line["loss"] == pytest.approx(loss, abs=1e-5)
    assert abs(losses[-1] - losses[0]) > 1e-3
    ours, start = (open_checkpoint(name).model().state_dict() for name in (str(tmp_path / "run"), work.recipe.start))
    apart, moved = 0.0, 0.0
    for name, value in theirs.model.merge_and_unload().state_dict().items():
        apart += (ours[name] - value).square().sum().item()
        moved += (ours[name] - start[name]).square().sum().item()
    assert (apart / moved) ** 0.5 < 2e-3  # AdamW makes a whole step of a gradient that is nothing but rounding
