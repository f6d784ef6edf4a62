"""Stage 2: batches as trees, equality with trl and with the authors' values, a run that no kill harms."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import free_port, png
from PIL import Image
from rounding import FLOAT32, apart
from small_dpo import LORA, SMALL, alone

from stllava_eval.errors import InputError
from stllava_eval.network.checkpoint import open_checkpoint
from stllava_train.preferences.pairs import Pair
from stllava_train.training.dpo import groups, make_trainer, prepare_run, report, train
from stllava_train.training.recipes import DpoRecipe, read_dpo_recipe
from stllava_train.training.resume import read_trace
from stllava_train.training.trees import PromptAnswer, pack, share_prefixes, tree

FULL = {name: {"train": "full", "learning_rate": 1e-3} for name in ("language_model", "vision_tower", "projector")}
# our choice: of losses after some steps, whose rounding AdamW has amplified; twenty times the worst of three processors
TRAINED = 1e-4
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
def small(recipe_file):
    return lambda **changes: read_dpo_recipe(str(recipe_file(**changes)))


def work_of(recipe: DpoRecipe, data: Path):
    return prepare_run(recipe, data / "pairs.jsonl", data, progress=False)


# --- trees ----------------------------------------------------------------------------------------------------------


def test_a_tree_holds_every_shared_beginning_once():
    made = tree([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4], [1, 2, 3], [9]])
    assert sorted(made.ids) == [1, 2, 3, 4, 5, 9]
    for sequence, path in zip([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4], [1, 2, 3], [9]], made.paths, strict=True):
        assert [made.ids[place] for place in path.tolist()] == sequence
        assert [made.positions[place] for place in path.tolist()] == list(range(len(sequence)))
        seen = made.attention_mask()
        for number, place in enumerate(path.tolist()):
            assert seen[place].nonzero().flatten().tolist() == sorted(path[: number + 1].tolist())


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
                assert found[number].item() == pytest.approx(alone(model, pixels, answered).item(), rel=FLOAT32)


# --- equality with trl ----------------------------------------------------------------------------------------------


def stock(work, out: Path, **settings):
    """trl's DPOTrainer as it comes, on the same network, pairs and order."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from stllava_train.training.parts import plan
    from stllava_train.training.run import trained_model

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
        assert line["loss"] == pytest.approx(loss, rel=TRAINED)
    assert abs(losses[-1] - losses[0]) > 1e-3
    ours, start = (open_checkpoint(name).model().state_dict() for name in (str(tmp_path / "run"), work.recipe.start))
    apart, moved = 0.0, 0.0
    for name, value in theirs.model.merge_and_unload().state_dict().items():
        apart += (ours[name] - value).square().sum().item()
        moved += (ours[name] - start[name]).square().sum().item()
    assert (apart / moved) ** 0.5 < 2e-3  # AdamW makes a whole step of a gradient that is nothing but rounding


# --- a weight per pair ----------------------------------------------------------------------------------------------


def weighted(data: Path, tmp_path: Path, weights: list[float]) -> Path:
    """A folder with the images, and the pairs with these weights."""
    folder = tmp_path / "weighted"
    folder.mkdir()
    for image in data.glob("*.png"):
        (folder / image.name).write_bytes(image.read_bytes())
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    rows = [row | {"weight": weight} for row, weight in zip(rows, weights, strict=True)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


WEIGHTS = [0.8, 0.2, 0.0, 1.0, 0.5, 0.3, 0.9, 0.1, 1.0, 0.4]


@pytest.mark.parametrize(
    "case",
    [
        {"reference": "live"},
        {"reference": "cached"},
        {"reference": "cached", "loss": ["ipo"]},
        {"loss": ["robust"], "label_smoothing": 0.1, "ld_alpha": 0.3},
        {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        FULL,
    ],
    ids=["live", "cached", "ipo", "robust, LD-DPO", "sigmoid and sft", "full"],
)
def test_the_loss_is_the_weighted_mean_of_the_losses_of_the_pairs(small, data, tmp_path, case):
    """Of each pair alone, as trl computes it, in value and gradient; the weights are divided by their mean, 0.52."""
    work = work_of(small(**case), weighted(data, tmp_path, WEIGHTS))
    trainer = make_trainer(work, tmp_path / "run", tmp_path / "trace", progress=False)
    torch.manual_seed(0)
    learnt = [value for value in trainer.model.parameters() if value.requires_grad]
    with torch.no_grad():
        for value in learnt:
            value.add_(torch.randn_like(value) * 0.02)  # otherwise every answer is as likely as in the reference

    def loss(places: list[int], weights: list[float] | None) -> tuple[float, torch.Tensor]:
        batch = work.collator([{"place": place} for place in places])
        batch.pop("weights")
        if weights is not None:
            batch["weights"] = torch.tensor(weights)
        value = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        gradients = torch.autograd.grad(value, learnt, allow_unused=True)
        return value.item(), torch.cat([one.flatten() for one in gradients if one is not None])

    places = [0, 6, 2, 3]
    batch = work.collator([{"place": place} for place in places])
    given = [WEIGHTS[place] / (sum(WEIGHTS) / 10) for place in places]
    assert batch["weights"].tolist() == pytest.approx(given, rel=1e-6)
    alone = [loss([place], None) for place in places]
    value, gradient = loss(places, given)
    assert len({round(one, 4) for one, _ in alone}) == 4
    assert value == pytest.approx(sum(w * one for w, (one, _) in zip(given, alone, strict=True)) / 4, rel=1e-4)
    expected = sum(w * one for w, (_, one) in zip(given, alone, strict=True)) / 4
    assert (gradient - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(("reference", "weights"), [("live", None), ("cached", WEIGHTS)], ids=["plain", "weights"])
def test_the_margin_of_the_judges_is_the_offset_of_odpo(small, data, tmp_path, reference, weights):
    """-log sigmoid(beta * delta - log(margin)), in value and gradient, of every answer computed by itself."""
    folder = weighted(data, tmp_path, weights or [1.0] * 10)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    margins = [1.0, 0.5, 2.5, 9.0]
    for place, row in enumerate(rows):
        row["margin"] = margins[place] if place < 4 else 3.0
        if weights is None:
            del row["weight"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = work_of(small(loss=["odpo"], loss_weights=[0.5], reference=reference), folder)
    trainer = make_trainer(work, tmp_path / "run", tmp_path / "trace", progress=False)
    torch.manual_seed(0)
    learnt = [value for value in trainer.model.parameters() if value.requires_grad]
    with torch.no_grad():
        for value in learnt:
            value.add_(torch.randn_like(value) * 0.02)
    batch = work.collator([{"place": place} for place in range(4)])
    assert batch["offsets"].tolist() == pytest.approx([0, -math.log(2), math.log(2.5), math.log(9)], rel=1e-6)
    value = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    gradient = torch.autograd.grad(value, learnt, allow_unused=True)
    start, losses = work.checkpoint.model(), []
    for place, pair in enumerate(work.pairs[:4]):
        pixels = work.collator.pixels(folder / pair.image)
        both = work.collator.encoded(place)
        with torch.no_grad():
            before = [alone(start, pixels, one) for one in both]
        ratios = [alone(trainer.model, pixels, one) - known for one, known in zip(both, before, strict=True)]
        each = -torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1]) - math.log(margins[place]))
        losses.append(each if weights is None else each * weights[place] / (sum(weights) / 10))
    expected = 0.5 * torch.stack(losses).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = torch.autograd.grad(expected, learnt, allow_unused=True)
    apart = sum((a - b).square().sum() for a, b in zip(gradient, theirs, strict=True) if a is not None) ** 0.5
    assert apart < 1e-3 * sum(one.square().sum() for one in theirs if one is not None) ** 0.5
    figures = trainer._metrics["train"]  # trl's, without the offset
    assert len(figures["rewards/margins"]) == 4


def test_a_run_with_the_margin_of_the_judges_learns(small, data, tmp_path):
    work = work_of(small(loss=["odpo"]), data)
    assert "margins from 2 to 2; the offset of a pair in the loss is their logarithm" in report(work)
    train(work, tmp_path / "run", progress=False)
    steps = read_trace(tmp_path / "run" / "losses.jsonl")
    assert steps[0]["loss"] == pytest.approx(math.log(1 + 2.0), rel=1e-3)  # -log sigmoid(-log 2): every margin is 2
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.parametrize(
    ("margin", "message"), [(None, "it has no margin"), (0, "it has a margin of 0")], ids=["null", "0"]
)
def test_a_pair_without_a_margin_is_refused_with_odpo(small, data, tmp_path, margin, message):
    file = changed(data, tmp_path, margin=margin)
    with pytest.raises(InputError, match=f"changed.jsonl:3: 2.png#2: {message}, and the loss odpo takes its logarithm"):
        prepare_run(small(loss=["odpo"]), file, data, progress=False)


def test_equal_weights_of_any_size_train_as_none_do(small, data, tmp_path):
    losses = {}
    for name, folder in (
        ("none", data),
        ("equal", weighted(data, tmp_path, [0.3] * 10)),
    ):
        train(work_of(small(), folder), tmp_path / name, progress=False)
        losses[name] = read_trace(tmp_path / name / "losses.jsonl")
    for one, other in zip(losses["none"], losses["equal"], strict=True):
        for key in ("loss", "margin", "chosen_logps", "rejected_reward", "accuracy"):
            assert one[key] == pytest.approx(other[key], rel=TRAINED, abs=1e-5), key


def test_a_loss_made_of_several_pairs_is_refused_with_weights(small, data, tmp_path):
    with pytest.raises(InputError, match=r"its pairs have weights, and the loss aot is made of several pairs at once"):
        work_of(small(loss=["aot"]), weighted(data, tmp_path, WEIGHTS))


def test_a_dry_run_names_the_weights(recipe_file, data, tmp_path, capsys):
    from stllava_train.cli.main import main

    folder = weighted(data, tmp_path, WEIGHTS)
    call = ["dpo", "--recipe", str(recipe_file()), "--pairs", str(folder / "pairs.jsonl"), "--images", str(folder)]
    assert main([*call, "--out", str(tmp_path / "run"), "--dry-run", "evaluate_on=[]"]) == 0
    assert "weights from 0 to 1; in the loss each is divided by their mean, 0.52\n" in capsys.readouterr().out


# --- files of other tools -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["trl", "authors", "llama-factory", "ms-swift"])
def test_what_we_write_for_others_is_learnt_from_as_our_own_file_is(small, data, tmp_path, format):
    from stllava_train.preferences.pair_formats import write_pairs
    from stllava_train.preferences.pair_selection import select_pairs
    from stllava_train.preferences.pairs import PairSet, read_pairs

    folder = weighted(data, tmp_path, WEIGHTS)
    pairs = read_pairs(folder / "pairs.jsonl")
    written = write_pairs(select_pairs(PairSet(pairs, {})), tmp_path / "out.jsonl", {}, [format], folder)
    file = next(file for file in written[1:] if file.name != "dataset_info.json")
    work = prepare_run(small(), file, folder, progress=False)
    assert work.pairs == [dataclasses.replace(pair, margin=None, judges=()) for pair in pairs]
    assert work.counts == work_of(small(), folder).counts


def test_trl_trains_on_the_file_that_we_write_for_it(small, data, tmp_path):
    """Its own trainer, on the file as `datasets` reads it; the first loss is log 2."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    from stllava_train.preferences.pair_formats import write_pairs
    from stllava_train.preferences.pair_selection import select_pairs
    from stllava_train.preferences.pairs import PairSet, read_pairs

    work = work_of(small(), weighted(data, tmp_path, WEIGHTS))
    folder = tmp_path / "weighted"
    made = select_pairs(PairSet(read_pairs(folder / "pairs.jsonl"), {}))
    *_, file = write_pairs(made, tmp_path / "out.jsonl", {}, ["trl"], folder)
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    settings = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-3,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        max_length=None,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    from stllava_train.training.run import trained_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl's of its own future
        trainer = DPOTrainer(
            model=trained_model(work), args=settings, train_dataset=rows, processing_class=work.checkpoint.processor()
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-4)
    assert losses[1] != losses[0]


# --- the authors' values --------------------------------------------------------------------------------------------


def test_log_probabilities_and_losses_are_the_authors_with_a_reference_of_its_own(shared, tmp_path):
    """Their reference took image features of the policy: the values without that mistake are the target."""
    import golden
    from safetensors.torch import load_file
    from trl.trainer.utils import add_fused_lm_head

    folder = shared / "golden"
    values = load_file(folder / "d_dpo" / "dpo_tiny_model.safetensors")
    written = json.loads((folder / "d_dpo" / "dpo.json").read_text())["values"]
    models = {
        "policy": open_checkpoint(str(folder / "e_checkpoints" / "full_merged"), prototypes=16).model(),
        "reference": open_checkpoint(
            str(golden.write_original(tmp_path / "reference", folder, "cluster")), prototypes=16
        ).model(),
    }
    answers = []
    for name in ("chosen", "reject"):
        ids, mask, labels = golden.spliced(
            *(values[f"in.{name}_{part}"] for part in ("input_ids", "attention_mask", "labels"))
        )
        for row, kept, wanted in zip(ids.tolist(), mask.tolist(), labels.tolist(), strict=True):
            length = sum(kept)
            begin = next(place for place, label in enumerate(wanted) if label != -100)
            assert all(label != -100 for label in wanted[begin:length])
            answers.append(PromptAnswer(tuple(row[:length]), begin))
    batch = pack(answers, [0, 1] * 2, 0) | {"pixel_values": values["in.images"]}
    found = {}
    for who, model in models.items():
        add_fused_lm_head(share_prefixes(model))
        inputs = {key: value for key, value in batch.items() if key != "completion_mask"}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad():
            sums = model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1)
        found[f"{who}_chosen"], found[f"{who}_rejected"] = sums.chunk(2)
    for name, key in (
        ("policy_chosen", "policy_chosen_logps"),
        ("policy_rejected", "policy_rejected_logps"),
        ("reference_chosen", "reference_chosen_logps.corrected"),
        ("reference_rejected", "reference_rejected_logps.corrected"),
    ):
        assert found[name].tolist() == pytest.approx(written[key], rel=FLOAT32), name
    ratios = (found["policy_chosen"] - found["policy_rejected"]) - (
        found["reference_chosen"] - found["reference_rejected"]
    )
    losses = -torch.nn.functional.logsigmoid(0.1 * ratios)
    # small differences of those sums, of which they have the rounding
    assert losses.tolist() == pytest.approx(written["losses.corrected"], rel=1e-4)
    assert losses.mean().item() == pytest.approx(written["loss.corrected"][0], rel=1e-4)
    assert losses.mean().item() != pytest.approx(written["loss.original_bug"][0], abs=1e-3)


def test_the_reference_stays_what_training_started_from(small, data, tmp_path):
    """Its projector and vision tower too, which the authors' did not."""
    work = work_of(small(epochs=4), data)
    trainer = make_trainer(work, tmp_path / "run", tmp_path / "trace", progress=False)
    batch = work.collator([{"place": place} for place in range(4)])
    batch.pop("pairs")
    before = [one.tolist() for one in trainer.compute_ref_log_probs(trainer.model, batch)]
    projector = trainer.model.model.model.multi_modal_projector.modules_to_save["default"].linear_1.weight
    start = projector.detach().clone()
    trainer.train()
    assert not torch.equal(projector, start)
    assert [one.tolist() for one in trainer.compute_ref_log_probs(trainer.model, batch)] == before


# --- a run ----------------------------------------------------------------------------------------------------------


def weights(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_trace_curves_card_and_manifest(small, data, tmp_path):
    work = work_of(small(), data)
    out = tmp_path / "run"
    train(work, out, progress=False)
    lines = read_trace(out / "losses.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    first = lines[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=FLOAT32)
    assert first["chosen_reward"] == first["kl"] == 0
    assert first["chosen_logps"] < 0
    chosen, rejected = lines[-1]["chosen_reward"], lines[-1]["rejected_reward"]
    rounding = FLOAT32 * max(abs(chosen), abs(rejected))  # of the parts, which may be larger than what is left of them
    assert lines[-1]["margin"] == pytest.approx(chosen - rejected, abs=rounding)
    assert lines[-1]["kl"] == pytest.approx(
        -(chosen + rejected) / 2 / work.recipe.beta, abs=rounding / work.recipe.beta
    )
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["stage"] == "dpo"
    assert manifest["finished"]
    assert manifest["counts"]["pairs"] == 10
    with Image.open(out / "curves.png") as image:
        assert image.size == (1320, 1080)
    card = (out / "README.md").read_text()
    assert "Research only; not for clinical use." in card
    assert "10 pairs about 6 images" in card
    opened = open_checkpoint(str(out))
    start = open_checkpoint(work.recipe.start).model().state_dict()
    changed = [name for name, value in opened.model().state_dict().items() if not torch.equal(value, start[name])]
    assert any("multi_modal_projector" in name for name in changed)
    assert any("vision_tower" in name for name in changed)
    assert not (out / "ref").exists()


# --- what a run builds on ---------------------------------------------------------------------------------------------


@pytest.fixture
def stages(recipe_file, checkpoint, data, tmp_path) -> tuple[Path, Path, Path]:
    """A base, an adapter on it and an adapter on that one, each in a folder of its own."""
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    shutil.copytree(checkpoint, base)
    for start, out in ((base, first), (first, second)):
        recipe = read_dpo_recipe(str(recipe_file(start=str(start), epochs=0.4)))
        train(work_of(recipe, data), out, progress=False)
    return base, first, second


def train_again(recipe_file, data: Path, start: Path, out: Path) -> None:
    """The run in `out`, with another seed."""
    shutil.rmtree(out)
    train(work_of(read_dpo_recipe(str(recipe_file(start=str(start), epochs=0.4, seed=5))), data), out, progress=False)


def on_other_weights(folder: Path, base: Path) -> str:
    return rf"{folder}: it was trained on {base} with other weights than {base} has now"


def test_an_adapter_is_not_loaded_on_a_start_that_was_trained_again(stages, recipe_file, data, tmp_path, capsys):
    from stllava_eval.cli.main import main as evaluate
    from stllava_train.cli.main import main

    base, first, second = stages
    open_checkpoint(str(second))
    train_again(recipe_file, data, base, first)
    open_checkpoint(str(first))
    with pytest.raises(InputError, match=on_other_weights(second, first)) as error:
        open_checkpoint(str(second))
    assert "\n" not in str(error.value)
    recipe = str(recipe_file(start=str(second)))
    pairs = ["--pairs", str(data / "pairs.jsonl"), "--images", str(data)]
    for call, arguments in (
        (main, ["merge", str(second), "--out", str(tmp_path / "merged")]),
        (main, ["dpo", "--recipe", recipe, *pairs, "--out", str(tmp_path / "third")]),
        (main, ["candidates", "--checkpoint", str(second), "--images", str(data), "--out", str(tmp_path / "c.jsonl")]),
        (evaluate, ["convert", str(second), "--out", str(tmp_path / "converted")]),
    ):
        capsys.readouterr()
        assert call(arguments) == 2
        told = capsys.readouterr().err
        assert f"{second}: it was trained on {first} with other weights" in told
        assert "Traceback" not in told
    assert not any((tmp_path / name).exists() for name in ("merged", "third", "c.jsonl", "converted"))


def test_the_harness_does_not_answer_with_an_adapter_on_a_changed_start(stages, recipe_file, data):
    from stllava_eval.inference.answerer import Answerer

    base, first, second = stages
    train_again(recipe_file, data, base, first)
    with pytest.raises(InputError, match=on_other_weights(second, first)):
        Answerer(str(second), device="cpu")


def test_a_base_below_an_adapter_below_is_compared_too(stages):
    from safetensors.torch import load_file, save_file

    base, first, second = stages
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "mlp.up_proj" in name)
    save_file(tensors | {name: tensors[name] * 1.5}, base / "model.safetensors", metadata={"format": "pt"})
    for run in (first, second):
        with pytest.raises(InputError, match=on_other_weights(first, base)):
            open_checkpoint(str(run))


def test_an_older_run_without_a_hash_of_weights_is_compared_by_the_one_it_has(stages, recipe_file, data):
    base, first, second = stages
    manifest = json.loads((second / "run.json").read_text())
    del manifest["start"]["weights_sha256"]
    (second / "run.json").write_text(json.dumps(manifest))
    open_checkpoint(str(second))
    train_again(recipe_file, data, base, first)
    with pytest.raises(InputError, match=on_other_weights(second, first)):
        open_checkpoint(str(second))


def test_what_changes_no_weight_of_the_start_is_no_other_start(stages, tmp_path):
    """Its place, its tokenizer's files and the version of transformers; an adapter has a tokenizer of its own."""
    base, first, second = stages
    before = {name: value.clone() for name, value in open_checkpoint(str(second)).weights()}
    shutil.move(base, tmp_path / "moved")
    settings = json.loads((first / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "moved")
    (first / "adapter_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((first / "tokenizer_config.json").read_text())
    (first / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"note": "of another transformers"}))
    after = dict(open_checkpoint(str(second)).weights())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_run_on_an_adapter_says_what_plain_peft_leaves_out(stages, recipe_file, data, tmp_path, capsys):
    """PEFT takes the whole model below both, and loads; what `merge` writes is the network that was trained."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

    from stllava_train.cli.main import main

    base, first, _ = stages
    third = tmp_path / "third"
    recipe = str(recipe_file(start=str(first), epochs=0.4))
    pairs = ["--pairs", str(data / "pairs.jsonl"), "--images", str(data)]
    assert main(["dpo", "--recipe", recipe, *pairs, "--out", str(third)]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    merge = f"stllava-train merge {third} --out DIR"
    assert f"leave out the adapter in {first}, and say nothing" in told
    assert told.endswith(merge)
    card = (third / "README.md").read_text()
    assert merge in card
    assert f"they leave out the adapter in {first}" in card
    below = (first / "README.md").read_text()
    assert "stllava-train merge" in below
    assert "leave out" not in below

    assert main(["merge", str(third), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    ours = dict(open_checkpoint(str(third)).weights())
    assert all(torch.equal(merged[name], value) for name, value in ours.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), third)
    theirs = plain.merge_and_unload().state_dict()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert apart((theirs[name], ours[name])) > 100 * FLOAT32


def test_the_cache_serves_runs_of_other_settings_and_gives_the_same_bytes(small, data, tmp_path, home):
    train(work_of(small(reference="cached"), data), tmp_path / "a", progress=False)
    (file,) = (home / "reference").glob("*.jsonl")
    rows = file.read_bytes()
    assert len(rows.splitlines()) == 10
    train(work_of(small(reference="cached"), data), tmp_path / "b", progress=False)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    train(work_of(small(reference="cached", beta=0.3), data), tmp_path / "c", progress=False)
    assert file.read_bytes() == rows
    lines = rows.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:20])  # as a kill leaves it
    train(work_of(small(reference="cached"), data), tmp_path / "d", progress=False)
    assert weights(tmp_path / "a") == weights(tmp_path / "d")
    assert sorted(file.read_bytes().splitlines()) == sorted(rows.splitlines())
    train(work_of(small(reference="cached", ld_alpha=0.5), data), tmp_path / "e", progress=False)
    assert len(list((home / "reference").glob("*.jsonl"))) == 2


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_all_weights_can_be_trained(small, data, tmp_path, reference):
    train(work_of(small(reference=reference, **FULL), data), tmp_path / "run", progress=False)
    lines = read_trace(tmp_path / "run" / "losses.jsonl")
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=FLOAT32)
    assert lines[-1]["loss"] < 0.69
    assert "stllava_tree" not in (tmp_path / "run" / "config.json").read_text()


def command(recipe: Path, data: Path, out: Path, *more: str, processes: int = 1) -> list[str]:
    ours = ["-m", "stllava_train.cli", "dpo", "--recipe", str(recipe), "--pairs", str(data / "pairs.jsonl")]
    ours += ["--images", str(data), "--out", str(out), *more]
    if processes == 1:
        return [sys.executable, *ours]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", free_port()]
    return [sys.executable, *launcher, *ours]


@pytest.mark.parametrize(("processes", "reference"), [(1, "live"), (2, "cached")])
def test_a_run_killed_at_a_random_step_goes_on_exactly(recipe_file, data, tmp_path, chance, processes, reference):
    from stllava_train.cli.main import main

    dropped = {**LORA, "dropout": 0.2 if processes == 1 else 0.0}
    recipe = recipe_file(epochs=8, reference=reference, language_model=dropped)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command(recipe, data, whole)[3:]) == 0
    running = subprocess.Popen(
        command(recipe, data, broken, processes=processes),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wanted = chance.randint(2, 12)
    while len(read_trace(broken / "losses.jsonl")) < wanted:
        assert running.poll() is None
        time.sleep(0.002)
    for one in (*psutil.Process(running.pid).children(recursive=True), running):
        os.kill(one.pid, signal.SIGKILL)
    running.wait()
    assert not (broken / "README.md").exists()
    done = subprocess.run(
        command(recipe, data, broken, "--resume", processes=processes), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:2000]
    keys = ("step", "loss", "chosen_logps", "rejected_logps", "margin")
    one, other = ([[line[key] for key in keys] for line in read_trace(run / "losses.jsonl")] for run in (whole, broken))
    if processes == 1:
        assert one == other
        assert weights(whole) == weights(broken)
    else:  # means over processes are added in another order
        for key, mine, theirs in zip(keys, zip(*one, strict=True), zip(*other, strict=True), strict=True):
            assert apart((torch.tensor(mine), torch.tensor(theirs))) <= TRAINED, key


def test_fsdp_at_the_level_of_torch_gives_the_same_gradients(checkpoint, data, tmp_path, recipe_file):
    program = tmp_path / "fsdp.py"
    program.write_text(FSDP)
    arguments = [str(recipe_file(micro_batch=4)), str(data), str(tmp_path / "home")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "STLLAVA_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [sys.executable, *launcher, str(program), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal gradients of" in done.stdout


FSDP = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rounding import FLOAT32, apart
from small_dpo import LORA, SMALL, alone
from torch.distributed.fsdp import fully_shard
from trl.trainer.utils import add_fused_lm_head

from stllava_train.training.dpo import prepare_run
from stllava_train.training.recipes import read_dpo_recipe
from stllava_train.training.run import trained_model
from stllava_train.training.trees import share_prefixes

torch.set_num_threads(1)
recipe, data = read_dpo_recipe(sys.argv[1]), Path(sys.argv[2])
work = prepare_run(recipe, data / "pairs.jsonl", data, progress=False)
mesh = None


def gradients(shard):
    model = share_prefixes(trained_model(work))
    add_fused_lm_head(model.get_base_model())
    if shard:
        network = model.get_base_model().model
        for layer in [*network.language_model.layers, *network.vision_tower.encoder.layers]:
            fully_shard(layer)
        fully_shard(model)
    rank, world = (dist.get_rank(), dist.get_world_size()) if shard else (0, 1)
    places = range(4)[rank::world] if shard else range(4)
    batch = work.collator([{"place": place} for place in places])
    batch.pop("pairs")
    mask = batch.pop("completion_mask")
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    sums = model(**batch, labels=labels, fused_lm_head=True).log_probs.sum(1)
    chosen, rejected = sums.chunk(2)
    (-torch.nn.functional.logsigmoid(0.01 * (chosen - rejected))).mean().backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {name: one.full_tensor() if hasattr(one, "full_tensor") else one for name, one in found.items()}


from accelerate import PartialState

PartialState(cpu=True)
sharded, whole = gradients(True), gradients(False)
assert sharded.keys() == whole.keys(), sharded.keys() ^ whole.keys()
assert apart(*((sharded[name], gradient) for name, gradient in whole.items())) <= FLOAT32
if dist.get_rank() == 0:
    print("equal gradients of", len(whole))
dist.destroy_process_group()
"""


# --- evaluations on the way -----------------------------------------------------------------------------------------


def test_evaluations_on_the_way_keep_the_best_step(small, data, tmp_path, validation, monkeypatch):
    from stllava_train.training.validation import ValidationCallback

    planned = iter([0.5, 0.2, 0.7, 0.7, 0.1])
    inner = ValidationCallback._scores

    def scores(self, policy):
        made = inner(self, policy)
        assert set(made) == {"vqarad", "slake", "score", "unparsed"}
        assert {"f1", "recall", "closed_accuracy", "unparsed", "words"} <= set(made["slake"])
        return made | {"score": next(planned)}

    monkeypatch.setattr(ValidationCallback, "_scores", scores)
    work = work_of(small(evaluate_on=["vqarad", "slake"], evaluate_every=2, epochs=3), data)
    assert work.steps == 8
    train(work, tmp_path / "run", progress=False)
    lines = read_trace(tmp_path / "run" / "evaluations.jsonl")
    assert [(line["step"], line["score"]) for line in lines] == [(0, 0.5), (2, 0.2), (4, 0.7), (6, 0.7), (8, 0.1)]
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["kept"]
    assert kept == {"step": 4, "score": 0.7, "start": 0.5, "last": 0.1, "stopped": False}
    from safetensors.torch import load_file

    best = load_file(tmp_path / "run" / "checkpoints" / "best-4.safetensors")
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    names = {name.replace(".default", ""): value for name, value in best.items()}
    shared_names = [name for name in saved if name in names]
    assert shared_names
    assert all(torch.equal(saved[name], names[name]) for name in shared_names)
    assert "The weights of step 4 were kept" in (tmp_path / "run" / "README.md").read_text()


def test_examining_changes_nothing_of_what_is_learnt(small, data, tmp_path, validation):
    dropped = {**LORA, "dropout": 0.3}
    train(work_of(small(language_model=dropped), data), tmp_path / "without", progress=False)
    recipe = small(language_model=dropped, evaluate_on=["slake"], evaluate_every=1)
    train(work_of(recipe, data), tmp_path / "with", progress=False)
    one, other = (read_trace(tmp_path / name / "losses.jsonl") for name in ("without", "with"))
    assert one == other


def test_a_network_in_16_bits_whose_trained_weights_have_32_answers(small, data, tmp_path, validation):
    recipe = small(evaluate_on=["slake"], evaluate_every=5, dtype="bfloat16")
    train(work_of(recipe, data), tmp_path / "run", progress=False)
    assert [line["step"] for line in read_trace(tmp_path / "run" / "evaluations.jsonl")] == [0, 5]


def test_training_stops_where_yes_and_no_are_unlearnt(small, data, tmp_path, validation, monkeypatch):
    from stllava_train.training.validation import ValidationCallback

    planned = iter([0.1, 0.25, 0.31, 0.9])
    inner = ValidationCallback._scores
    monkeypatch.setattr(
        ValidationCallback, "_scores", lambda self, policy: inner(self, policy) | {"unparsed": next(planned)}
    )
    recipe = small(evaluate_on=["slake"], evaluate_every=1, epochs=3, stop_unparsed=0.2)
    train(work_of(recipe, data), tmp_path / "run", progress=False)
    assert [line["step"] for line in read_trace(tmp_path / "run" / "losses.jsonl")] == [1, 2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["kept"]["stopped"]
    assert "Training stopped early" in (tmp_path / "run" / "README.md").read_text()


def test_splits_for_evaluations_have_to_be_there(small, data, home):
    with pytest.raises(InputError, match="slake validation is not prepared"):
        work_of(small(evaluate_on=["slake"]), data)


def test_both_kinds_are_asked_however_few_questions(small, validation):
    from stllava_train.training.validation import questions

    for most in (2, 3, 4, 9):
        rows = questions(small(evaluate_on=["slake"], evaluate_questions=most))["slake"]
        assert len(rows) == min(most, 4)
        assert {row.kind for row in rows} == {"open", "closed"}


@pytest.fixture
def halfway(small, data, tmp_path, validation, monkeypatch):
    """A run with evaluations that was broken off behind step 4 of 8, and how it is called to go on."""
    work = work_of(small(evaluate_on=["slake"], evaluate_every=2, epochs=3), data)
    out = tmp_path / "halfway"
    with monkeypatch.context() as patch:
        from stllava_train.training.dpo import DpoTrainer

        inner, calls = DpoTrainer.training_step, []

        def training_step(self, *given, **named):
            calls.append(1)
            if len(calls) > 10:
                raise KeyboardInterrupt
            return inner(self, *given, **named)

        patch.setattr(DpoTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            train(work, out, progress=False)
    return out, lambda: train(work, out, resume=True, progress=False)


def test_a_run_with_evaluations_goes_on_exactly(halfway, small, data, tmp_path):
    out, resume = halfway
    resume()
    whole = tmp_path / "whole"
    train(work_of(small(evaluate_on=["slake"], evaluate_every=2, epochs=3), data), whole, progress=False)
    for name in ("losses.jsonl", "evaluations.jsonl", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda text: "", id="empty"),
        pytest.param(lambda text: '{"step": 0}\n{"step": 2}\n{"step": 4}\n', id="no scores"),
        pytest.param(lambda text: text.replace('"score": 0', '"score": NaN, "x": 0'), id="no numbers"),
        pytest.param(lambda text: "".join(text.splitlines(keepends=True)[:2]), id="one missing"),
    ],
)
def test_damaged_evaluations_are_told_before_the_run_goes_on(halfway, damage):
    out, resume = halfway
    file = out / "evaluations.jsonl"
    file.write_text(damage(file.read_text()))
    with pytest.raises(InputError, match=r"evaluations.jsonl: an evaluation up to step 4 is missing or damaged"):
        resume()


def test_a_run_does_not_go_on_with_evaluations_of_another_version_of_the_scores(halfway):
    out, resume = halfway
    file = out / "evaluations.jsonl"
    file.write_text(file.read_text().replace("closed_accuracy|v2", "closed_accuracy|v1"))
    with pytest.raises(
        InputError, match=r"evaluations.jsonl: scored by other versions \(.*closed_accuracy\|v1.*\) than"
    ):
        resume()


@pytest.mark.parametrize("content", [None, b"garbage"], ids=["gone", "garbage"])
def test_lost_weights_of_the_best_step_are_told_before_the_run_goes_on(halfway, content):
    out, resume = halfway
    for file in (out / "checkpoints").glob("best-*"):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
    with pytest.raises(InputError, match=r"the weights of the best step cannot be read .* train again"):
        resume()
    assert len(read_trace(out / "losses.jsonl")) == 4


def test_a_stopped_run_that_was_broken_off_at_its_end_takes_no_further_step(
    small, data, tmp_path, validation, monkeypatch
):
    from stllava_train.training import run as training_run
    from stllava_train.training.validation import ValidationCallback

    planned = iter([0.1, 0.9, 0.1, 0.1])
    inner = ValidationCallback._scores
    monkeypatch.setattr(
        ValidationCallback, "_scores", lambda self, policy: inner(self, policy) | {"unparsed": next(planned)}
    )
    work = work_of(small(evaluate_on=["slake"], evaluate_every=2, epochs=3, stop_unparsed=0.2), data)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(work, out, progress=False)
    train(work, out, resume=True, progress=False)
    assert len(read_trace(out / "losses.jsonl")) == 2
    assert json.loads((out / "run.json").read_text())["kept"]["stopped"]


def test_two_processes_do_not_write_one_run(small, data, tmp_path):
    from stllava_eval.storage import alone

    with alone(tmp_path / "run"), pytest.raises(InputError, match="another process is writing it"):
        train(work_of(small(), data), tmp_path / "run", progress=False)


@pytest.mark.parametrize("value", ["NaN", '"x"', "null"])
def test_a_damaged_cache_is_named(small, data, tmp_path, home, value):
    train(work_of(small(reference="cached"), data), tmp_path / "a", progress=False)
    (file,) = (home / "reference").glob("*.jsonl")
    first, *others = file.read_text().splitlines(keepends=True)
    file.write_text(json.dumps(json.loads(first) | {"chosen": "?"}).replace('"?"', value) + "\n" + "".join(others))
    with pytest.raises(InputError, match=rf"{file}: pair .* for log-probabilities. Delete the file"):
        train(work_of(small(reference="cached"), data), tmp_path / "b", progress=False)


# --- what is refused ------------------------------------------------------------------------------------------------


def changed(data: Path, tmp_path: Path, **changes) -> Path:
    """The pairs with the third one changed, beside the images."""
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    rows[2] |= changes
    file = tmp_path / "changed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": "word " * 700}, "changed.jsonl:3: 2.png#2: .* tokens, more than max_tokens 600"),
        ({"image": "none.png"}, "changed.jsonl:3: 2.png#2: its image none.png is not in"),
        ({"image": "a" * 5000}, r"changed.jsonl:3: 2.png#2: its image a{60}\.\.\. is not in"),
        ({"image_sha256": "0" * 64}, "changed.jsonl:3: 2.png#2: its image 2.png has other pixels"),
        ({"img": "2.png"}, "changed.jsonl:3: img is no key of a pair"),
        ({"id": "1.png#1"}, "changed.jsonl:3: id 1.png#1 appears twice"),
        ({"rejected": "</s>"}, "changed.jsonl:3: </s> in rejected"),
    ],
    ids=["long", "gone", "long name", "other pixels", "column", "twice", "token"],
)
def test_a_wrong_pair_is_refused_with_its_line(small, data, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        prepare_run(small(), changed(data, tmp_path, **changes), data, progress=False)


def test_a_loss_that_is_no_number_names_the_pairs(small, data, tmp_path):
    work = work_of(small(batch=2), data)
    trainer = make_trainer(work, tmp_path / "run", tmp_path / "trace", progress=False)
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight[5] = float("nan")
    with pytest.raises(InputError, match=r"step 1: the loss is nan for pair .*png#"):
        trainer.train()


def test_test_images_are_refused_unless_allowed(small, data, tmp_path, prepared):
    from stllava_eval.data.splits import read_rows
    from stllava_eval.images import decode, pixel_hash

    row = read_rows("slake", "test")[0]
    (tmp_path / "leak.png").write_bytes(row.image)
    file = changed(data, tmp_path, image="leak.png", image_sha256=pixel_hash(decode(row.image)))
    for image in data.glob("*.png"):
        (tmp_path / image.name).write_bytes(image.read_bytes())
    with pytest.raises(InputError, match="1 of 10 pairs show test images"):
        prepare_run(small(), file, tmp_path, progress=False)
    assert prepare_run(small(), file, tmp_path, allow_test_images=True, progress=False).test_images == 1


def test_a_dry_run_tells_pairs_tokens_steps_and_memory(recipe_file, data, tmp_path, capsys):
    from stllava_train.cli.main import main

    call = ["dpo", "--recipe", str(recipe_file()), "--pairs", str(data / "pairs.jsonl"), "--images", str(data)]
    assert main([*call, "--out", str(tmp_path / "run"), "--dry-run", "evaluate_on=[]"]) == 0
    shown = capsys.readouterr().out
    assert "10 pairs about 6 images" in shown
    assert "5 steps of 4 pairs: 2 epochs" in shown
    assert "GiB" in shown
    assert not (tmp_path / "run").exists()


def test_pairs_of_an_image_are_learnt_from_together():
    pairs = [Pair(str(n), image, "0" * 64, "q", "a", "b", None, ()) for n, image in enumerate("abacb")]
    assert groups(pairs) == [[0, 2], [1, 4], [3]]


def test_a_recipe_is_equal_to_what_it_writes(recipe_file, tmp_path):
    recipe = read_dpo_recipe(str(recipe_file(loss=["sigmoid", "sft"], loss_weights=[1, 0.5], ld_alpha=0.5)))
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(recipe.as_dict()))
    assert read_dpo_recipe(str(file)) == recipe
    assert dataclasses.replace(recipe, seed=1) != recipe
