"""Stage 1: what is trained, in which order, with which loss; and that a run that was broken off goes on exactly."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import free_port, write_checkpoint
from PIL import Image
from rounding import FLOAT32, apart, assert_same
from safetensors.torch import load_file

from stllava_eval.data.splits import read_rows, write_split
from stllava_eval.errors import InputError
from stllava_eval.inference.answerer import Answerer
from stllava_eval.network.checkpoint import open_checkpoint
from stllava_eval.storage import write_json
from stllava_train.data.encoding import asked, in_epoch
from stllava_train.training.card import draw_curves, kept_step, write_card
from stllava_train.training.parts import part_of, plan, set_trainable, steps_of
from stllava_train.training.recipes import SftRecipe, read_recipe
from stllava_train.training.resume import last_whole, read_trace
from stllava_train.training.run import _save, parameters
from stllava_train.training.sft import PreparedSft, make_trainer, prepare_run, report, train
from stllava_train.training.validation import ValidationCallback, _means, questions

LORA = {"train": "lora", "learning_rate": 2e-3, "rank": 4, "alpha": 8, "dropout": 0.0}
SMALL = {
    "start_vision_tower": None,
    "template": "v1_sq",
    "sq_r": 0.5,
    "answer_weight": 1.0,
    "question_weight": 1.0,
    "epochs": 2,
    "batch": 4,
    "micro_batch": 2,
    "max_tokens": 600,
    "augment": True,
    "warmup": 0.1,
    "weight_decay": 0.0,
    "betas": [0.9, 0.999],
    "max_grad_norm": 1.0,
    "dtype": "float32",
    "four_bit": False,
    "gradient_checkpointing": False,
    "save_every": 2,
    "evaluate_on": [],
    "evaluate_every": 2,
    "evaluate_questions": 4,
    "stop_unparsed": 1.0,
    "seed": 0,
    "language_model": LORA,
    "vision_tower": {**LORA, "rank": 2, "alpha": 4, "learning_rate": 1e-3},
    "projector": {"train": "full", "learning_rate": 5e-4},
}
FULL = {name: {"train": "full", "learning_rate": 1e-3} for name in ("language_model", "vision_tower", "projector")}


@pytest.fixture(autouse=True)
def one_thread(home):
    """And no prepared test split."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten conversations, two of them about no image."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(10):
        turns = []
        for turn in range(3):
            tag = "<image>\n" if turn == 0 and number % 5 else ""
            turns.append({"from": "human", "value": f"{tag}Is part {turn} of {number} a lung?"})
            turns.append({"from": "gpt", "value": "yes" if (turn + number) % 2 else "no, it is a heart"})
        record = {"id": f"c{number}", "conversations": turns, "unordered": number == 3}
        if number % 5:
            Image.new("RGB", (30, 20), (20 * number, 255 - 20 * number, 90)).save(folder / f"{number}.png")
            record["image"] = f"{number}.png"
        records.append(record)
    (folder / "data.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    return folder / "data.json"


@pytest.fixture
def small(recipe_file):
    return lambda **changes: read_recipe(str(recipe_file(**changes)))


def work_of(recipe: SftRecipe, data: Path):
    return prepare_run(recipe, [data], progress=False)


def sft(
    recipe: Path, data: Path, out: Path, *more: str, processes: int = 1, timeout: float | None = None
) -> subprocess.CompletedProcess:
    """The command, as a user runs it."""
    called = command(recipe, data, out, *more, processes=processes)
    return subprocess.run(called, capture_output=True, text=True, timeout=timeout)


def train_here(recipe: Path, data: Path, out: Path) -> None:
    """The command in this process, with one thread as torchrun gives; it spares a start."""
    from stllava_train.cli.main import main

    torch.set_num_threads(1)
    assert main(["sft", "--recipe", str(recipe), "--data", str(data), "--out", str(out)]) == 0


def command(recipe: Path, data: Path, out: Path, *more: str, processes: int = 1) -> list[str]:
    launcher = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m"]  # torchrun's own default; sums hang on the number
    if processes > 1:
        launcher += ["torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", free_port(), "-m"]
    given = ["--recipe", str(recipe), "--data", str(data), "--out", str(out)]
    return [*launcher, "stllava_train.cli", "sft", *given, *more]


TEN = [[place] for place in range(10)]


# --- the order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (0.5, 2), (4, 10)])
def test_the_plan_shows_every_conversation_once_an_epoch_in_full_steps(small, epochs, steps):
    recipe = small(epochs=epochs)
    due = plan(TEN, recipe)
    assert len(due) == steps * recipe.batch == steps_of(10, recipe) * recipe.batch
    for epoch in range(int(epochs)):
        assert sorted(place for place, of in due if of == epoch) == list(range(10))
    assert [epoch for _, epoch in due] == sorted(epoch for _, epoch in due)
    assert due == plan(TEN, recipe)
    assert due != plan(TEN, small(epochs=epochs, seed=1))


def test_epochs_differ_in_order_and_questions(small, data):
    work = work_of(small(), data)
    due = plan(TEN, work.recipe)
    assert [place for place, epoch in due if epoch == 0] != [place for place, epoch in due if epoch == 1]
    asks = [[work.collator.encoded(place, epoch).kinds for place in range(10)] for epoch in range(2)]
    assert asks[0] != asks[1]
    with_image = next(place for place, one in enumerate(work.conversations) if one.image)
    one, other = (work.collator([{"place": with_image, "epoch": epoch}])["pixel_values"] for epoch in range(2))
    assert not torch.equal(one, other)
    assert (one - other).abs().mean() < 0.6  # another shade, the same picture


# --- the batch ------------------------------------------------------------------------------------------------------


def test_a_batch_holds_the_conversations_padded_on_the_right(small, data):
    work = work_of(small(augment=False), data)
    entries = [{"place": place, "epoch": 0} for place in (0, 1, 7)]  # the first is about no image
    batch = work.collator(entries)
    assert batch["pixel_values"].shape == (2, 3, 28, 28)
    assert batch["places"].tolist() == [0, 1, 7]
    image = work.collator.encoder.image_token
    for row, entry in enumerate(entries):
        encoded = work.collator.encoded(entry["place"], entry["epoch"])
        length = len(encoded.ids)
        assert batch["input_ids"][row, :length].tolist() == encoded.ids
        assert encoded.ids.count(image) == (0 if entry["place"] == 0 else 4)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        labels = [token if kind else -100 for token, kind in zip(encoded.ids, encoded.kinds, strict=True)]
        assert batch["labels"][row, :length].tolist() == labels
        assert (batch["labels"][row, length:] == -100).all()


def test_rounds_of_an_unordered_conversation_count_as_if_each_stood_alone(small, data, tmp_path):
    """The losses of the packed row are those of its threads, each a conversation by itself."""
    recipe = small(augment=False, sq_r=0.4)
    work = work_of(recipe, data)
    trainer = make_trainer(work, tmp_path, tmp_path / "trace", progress=False)
    trainer.create_optimizer_and_scheduler(1)
    rounds = tuple((f"Is part {number} a lung?", f"no, {number}") for number in range(7))
    one = dataclasses.replace(work.conversations[1], rounds=rounds, unordered=True)
    work.conversations[1] = one
    threads = set()
    for epoch in range(4):
        shown = in_epoch(one, recipe.seed, epoch)
        asks = asked(shown, recipe.seed, epoch, recipe.sq_r)
        packed = work.collator([{"place": 1, "epoch": epoch}, {"place": 2, "epoch": epoch}])
        starts = [number for number, ask in enumerate(asks) if not ask]
        threads.add(len(starts))
        parts = [work.collator([{"place": 2, "epoch": epoch}])]
        for start, end in zip(starts, [*starts[1:], len(asks)], strict=True):
            encoded = work.collator.encoder(dataclasses.replace(shown, rounds=shown.rounds[start:end]), asks[start:end])
            kinds = torch.tensor([encoded.kinds])
            parts.append(
                {
                    "input_ids": torch.tensor([encoded.ids]),
                    "attention_mask": torch.ones_like(kinds),
                    "labels": torch.tensor([encoded.ids]).masked_fill(kinds == 0, -100),
                    "kinds": kinds,
                    "places": torch.tensor([1]),
                    "pixel_values": packed["pixel_values"][:1],
                }
            )
        one_by_one = sum(trainer.compute_loss(trainer.model, part, num_items_in_batch=1.0).item() for part in parts)
        loss = trainer.compute_loss(trainer.model, packed, num_items_in_batch=1.0).item()
        assert loss == pytest.approx(one_by_one, rel=FLOAT32)
    assert len(threads) > 1


def test_the_loss_of_masked_answers_and_own_system_texts_is_that_of_a_mask_made_by_hand(small, data, tmp_path):
    file = data.parent / "masked.json"
    records = json.loads(data.read_text())
    records[1]["conversations"][1]["loss"] = False
    records[1]["conversations"][5]["weight"] = 0
    records[2]["system"] = "Be brief."
    file.write_text(json.dumps(records))
    recipe = small(augment=False, sq_r=0.0)
    work, plain = work_of(recipe, file), work_of(recipe, data)
    assert "\n2 answers not learnt, by loss or weight 0\n1 with a system text of their own" in report(work)
    trainer = make_trainer(work, tmp_path, tmp_path / "trace", progress=False)
    trainer.create_optimizer_and_scheduler(1)
    tokenizer = work.collator.encoder.tokenizer

    def loss(batch) -> float:
        return trainer.compute_loss(trainer.model, batch, num_items_in_batch=1.0).item()

    batch, usual = (one.collator([{"place": 1, "epoch": 0}]) for one in (work, plain))
    ends = (usual["input_ids"][0] == tokenizer.eos_token_id).nonzero().flatten().tolist()  # of the three answers
    assert len(ends) == 3
    by_hand = {key: value.clone() for key, value in usual.items()}
    by_hand["labels"][0, : ends[0] + 1] = -100
    by_hand["labels"][0, ends[1] + 1 :] = -100
    whole = loss({key: value.clone() for key, value in usual.items()})
    assert loss(dict(batch)) == pytest.approx(loss(by_hand), rel=FLOAT32)
    assert loss(dict(batch)) < 0.7 * whole

    own, usual = (one.collator([{"place": 2, "epoch": 0}]) for one in (work, plain))
    texts = [tokenizer.decode(one["input_ids"][0][one["labels"][0] >= 0]) for one in (own, usual)]
    assert texts[0] == texts[1]
    written = tokenizer.decode(usual["input_ids"][0]).replace("<image><image><image><image>", "<image>")
    system = written[written.index("A chat") : written.index(" USER:")]
    ids = tokenizer(written.replace(system, "Be brief."), add_special_tokens=False).input_ids
    assert [token for token in own["input_ids"][0].tolist() if token != work.collator.encoder.image_token] == [
        token for token in ids if token != work.collator.encoder.image_token
    ]


def test_a_conversation_that_is_too_long_is_refused_with_its_line(small, data):
    with pytest.raises(InputError, match=r"data\.json:2: c0: \d+ tokens, more than max_tokens 50\. Raise it, or leave"):
        work_of(small(max_tokens=50), data)


def test_the_call_in_the_message_finds_what_was_refused(small, data, tmp_path, monkeypatch, capsys):
    from stllava_train.cli.main import main

    file = Path(shutil.copy(data, tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        prepare_run(small(max_tokens=50), [file], data.parent, progress=False)
    call = re.search("`stllava-train (.*)`", str(caught.value))[1]
    assert call.startswith(f"check {file} --images {data.parent} --checkpoint ")
    assert main(shlex.split(call)) == 1
    assert re.search(r"data\.json:2: c0: it has \d+ tokens, and at most 50 are read", capsys.readouterr().out)
    assert json.loads((tmp_path / "FILE").read_text()) == []


def test_an_image_that_is_gone_or_broken_is_named(small, data, tmp_path):
    work = work_of(small(), data)
    with pytest.raises(InputError, match=r"none\.png: cannot be read \(No such file"):
        work.collator.pixels(tmp_path / "none.png")
    (tmp_path / "none.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"none\.png: "):
        work.collator.pixels(tmp_path / "none.png")


def test_conversations_that_nothing_can_be_learnt_from_are_refused(small, data):
    recipe = small(language_model={"train": "frozen"})
    with pytest.raises(InputError, match=r"data\.json:2: c0: it has no image, and only parts that look at one are"):
        work_of(recipe, data)


@pytest.mark.parametrize("layout", ["LLaMA-Factory", "Qwen", "image_path"])
def test_the_same_conversations_are_learnt_alike_in_every_layout(small, data, layout):
    written = []
    for record in json.loads(data.read_text()):
        image = record.pop("image", None)
        texts = [turn["value"].replace("<image>\n", "") for turn in record["conversations"]]
        if layout == "image_path":
            for turn, text in zip(record["conversations"], texts, strict=True):
                turn["value"] = text
            written.append(record | {"image_path": image})
            continue
        contents: list = list(texts)
        if image and layout == "Qwen":
            contents[0] = [{"type": "image", "image": image}, {"type": "text", "text": texts[0]}]
        elif image:
            contents[0] = f"<image>{texts[0]}"
        roles = ("user", "assistant")
        turns = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
        others = {"id": record["id"], "unordered": record["unordered"], "images": [image] * bool(image)}
        written.append(
            {"messages": turns} | {key: others[key] for key in others if layout != "Qwen" or key != "images"}
        )
    file = data.parent / f"{layout}.json"
    file.write_text(json.dumps(written))
    batches = [
        work_of(small(), one).collator([{"place": place, "epoch": 0} for place in range(10)]) for one in (data, file)
    ]
    assert batches[0]["pixel_values"].shape[0] == 8
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    assert batches[0].keys() == batches[1].keys()


def test_a_file_with_a_problem_is_refused(small, tmp_path):
    file = tmp_path / "bad.json"
    record = {"id": "a", "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": ""}]}
    file.write_text(json.dumps([record, record]))
    with pytest.raises(InputError, match=r"bad\.json:1: a: turn 2 is empty\..* \(1 more: `stllava-train check .*`\)"):
        work_of(small(), file)
    with pytest.raises(InputError, match=r"\(1 more: `stllava-train check \S+bad\.json --images \S+`\)"):
        prepare_run(small(), [file], tmp_path, progress=False)


# --- what is trained ------------------------------------------------------------------------------------------------


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_on_both_towers_and_the_whole_projector(small, data):
    recipe = small(vision_tower={**LORA, "rank": 2, "alpha": 16, "dropout": 0.2})
    model = set_trainable(work_of(recipe, data).checkpoint.model(), recipe)
    found = trainable(model)
    assert {part_of(name) for name in found} == set(recipe.parts())
    language = [name for name in found if part_of(name) == "language_model"]
    assert len(language) == 2 * 7 * 2  # layers, matrices, A and B
    assert all(f".language_model.layers.{layer}." in "".join(language) for layer in (0, 1))
    vision = [name for name in found if part_of(name) == "vision_tower"]
    assert len(vision) == 1 * 6 * 2  # features come from the last layer but one, so the last gets none
    assert all(".encoder.layers.0." in name for name in vision)
    assert {found[name].shape[0] for name in language if "lora_A" in name} == {4}
    assert {found[name].shape[0] for name in vision if "lora_A" in name} == {2}
    scaling = {name: module.scaling["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {scale for name, scale in scaling.items() if "vision_tower" in name} == {8.0}
    assert {scale for name, scale in scaling.items() if "language_model" in name} == {2.0}
    dropouts = {
        module.p
        for name, module in model.named_modules()
        if "vision_tower" in name and isinstance(module, torch.nn.Dropout)
    }
    assert dropouts == {0.2}
    projector = [name for name in found if part_of(name) == "projector"]
    assert projector
    assert all("modules_to_save" in name for name in projector)


def test_every_trained_weight_gets_a_gradient_and_no_other_one(small, data, tmp_path):
    for number, changes in enumerate(({}, FULL, {"gradient_checkpointing": True})):
        work = work_of(small(**changes), data)
        trainer = make_trainer(work, tmp_path / str(number), tmp_path / "trace", progress=False)
        trainer.create_optimizer_and_scheduler(1)
        batch = work.collator([{"place": place, "epoch": 0} for place in (1, 2)])
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1)).backward()
        found = trainable(trainer.model)
        assert [name for name, one in found.items() if one.grad is None] == []
        # a LoRA's B starts at zero, so that A's gradient is zero in the first step
        assert [name for name, one in found.items() if not one.grad.any() and "lora_A" not in name] == []


def test_nothing_goes_back_through_a_frozen_tower(small, data, tmp_path):
    work = work_of(small(vision_tower={"train": "frozen"}, gradient_checkpointing=True), data)
    trainer = make_trainer(work, tmp_path, tmp_path / "trace", progress=False)
    trainer.create_optimizer_and_scheduler(1)
    found = []
    tower = trainer.model.get_base_model().model.vision_tower
    tower.register_forward_hook(lambda module, given, made: found.append(made.last_hidden_state.requires_grad))
    trainer.compute_loss(trainer.model, work.collator([{"place": 1, "epoch": 0}]), num_items_in_batch=1)
    assert found == [False]


def test_a_part_alone_is_trained_without_an_adapter(small, data):
    recipe = small(language_model={"train": "frozen"}, vision_tower={"train": "frozen"})
    model = set_trainable(work_of(small(), data).checkpoint.model(), recipe)
    assert {part_of(name) for name in trainable(model)} == {"projector"}
    assert not hasattr(model, "peft_config")


def test_what_is_trained_is_held_in_float32_and_the_rest_in_16_bits(small, data, tmp_path):
    work = work_of(small(dtype="bfloat16"), data)
    model = make_trainer(work, tmp_path, tmp_path / "trace", progress=False).model
    assert {one.dtype for one in trainable(model).values()} == {torch.float32}
    assert {one.dtype for one in model.parameters() if not one.requires_grad} == {torch.bfloat16}


def test_each_part_has_its_learning_rate(small, data, tmp_path):
    trainer = make_trainer(work_of(small(), data), tmp_path, tmp_path / "trace", progress=False)
    groups = trainer.create_optimizer().param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("language_model", 2e-3),
        ("projector", 5e-4),
        ("vision_tower", 1e-3),
    ]
    assert sum(len(group["params"]) for group in groups) == len(trainable(trainer.model))


def test_the_counts_of_weights_are_those_of_the_model(small, data):
    for changes in ({}, FULL):
        work = work_of(small(**changes), data)
        model = set_trainable(work.checkpoint.model(), work.recipe)
        expected = dict.fromkeys(work.recipe.parts(), 0)
        for name, parameter in trainable(model).items():
            expected[part_of(name)] += parameter.numel()
        assert {name: trained for name, (_, trained) in parameters(work).items()} == expected


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.25), (0.0, 2.0)])
def test_the_loss_is_the_weighted_mean_over_all_tokens_learnt(small, data, tmp_path, weights):
    recipe = small(answer_weight=weights[0], question_weight=weights[1], augment=False)
    work = work_of(recipe, data)
    trainer = make_trainer(work, tmp_path, tmp_path / "trace", progress=False)
    trainer.create_optimizer_and_scheduler(1)
    batch = work.collator([{"place": place, "epoch": 0} for place in range(6)])
    model = work.checkpoint.model()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    scores = model(**inputs).logits[:, :-1].log_softmax(-1)
    labels, kinds = batch["labels"][:, 1:], batch["kinds"][:, 1:]
    nats = -scores.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    count = int((labels != -100).sum())
    expected = sum(weight * nats[kinds == kind].sum().item() for weight, kind in zip(weights, (1, 2), strict=True))
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(count))
    assert (kinds == 2).any()
    assert loss.item() == pytest.approx(expected / count, rel=FLOAT32)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_records(small, data, tmp_path):
    work = work_of(small(), data)
    trainer = make_trainer(work, tmp_path, tmp_path / "trace", progress=False)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.fill_(float("nan"))
    first = [work.conversations[place] for place, _ in plan(TEN, work.recipe)[:2]]
    names = ", ".join(f"{one.id} ({one.location})" for one in first)
    with pytest.raises(InputError) as told:
        trainer.train()
    assert str(told.value) == (
        f"step 1: the loss is nan for {names}. Look at these records, or lower the learning rates and train again with "
        "another --out."
    )


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_gradient_that_is_no_number_stops_the_run_before_it_is_saved(small, data, tmp_path, factor):
    work = work_of(small(save_every=1), data)
    trainer = make_trainer(work, tmp_path, tmp_path / "trace", progress=False)
    next(iter(trainable(trainer.model).values())).register_hook(lambda gradient: gradient * factor)
    with pytest.raises(
        InputError, match=r"step 1: the gradient is (nan|inf)\. Lower the learning rates and train again"
    ):
        trainer.train()
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "trace").exists()


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(checkpoint, data, tmp_path_factory):
    """A finished run of five steps, and its recipe."""
    folder = tmp_path_factory.mktemp("unbroken")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SMALL | {"start": str(checkpoint)}))
    train_here(recipe, data, folder / "run")
    return recipe, folder / "run"


def weights(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_trace_curves_card_and_manifest(unbroken):
    recipe, run = unbroken
    trace = read_trace(run / "losses.jsonl")
    assert [line["step"] for line in trace] == [1, 2, 3, 4, 5]
    for line in trace:
        answers = line["answer_tokens"] * line["answer_loss"]
        questions = line["question_tokens"] * line["question_loss"] if line["question_tokens"] else 0
        assert line["loss"] == pytest.approx((answers + questions) / (line["answer_tokens"] + line["question_tokens"]))
    assert trace[0]["learning_rate_language_model"] == 0  # the warm-up starts
    assert trace[1]["learning_rate_language_model"] == pytest.approx(2e-3)
    assert trace[1]["learning_rate_projector"] == pytest.approx(5e-4)
    with Image.open(run / "curves.png") as picture:
        assert picture.size == (960, 540)
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["recipe"] == read_recipe(str(recipe)).as_dict()
    assert manifest["steps"] == 5
    assert manifest["trained_on"] == []  # its conversations are of no known data set
    assert manifest["data"][0]["conversations"] == 10
    card = (run / "README.md").read_text()
    for part in ("Research only; not for clinical use.", "10 conversations about 8 images, 30 rounds", "sq_r: 0.5"):
        assert part in card
    assert list((run / "tensorboard").glob("events*"))


def test_the_folder_is_a_checkpoint_with_what_was_learnt(unbroken, data, small, tmp_path):
    _, run = unbroken
    assert json.loads((run / "adapter_config.json").read_text())["inference_mode"] is True
    loaded = open_checkpoint(str(run))
    before = open_checkpoint(str(small().start)).model()
    work = work_of(small(augment=False), data)
    trainer = make_trainer(work, tmp_path, tmp_path / "trace", progress=False)
    trainer._load_from_checkpoint(str(last_whole(run / "checkpoints")))
    batch = work.collator([{"place": 1, "epoch": 0}])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.inference_mode():
        in_training = trainer.model.eval()(**inputs).logits
        assert_same(loaded.model()(**inputs).logits, in_training)
        assert apart((before(**inputs).logits, in_training)) > 0.01
    assert loaded.processor().chat_template.keys() == {"default", "v1", "v1_sq"}


def tower_of(checkpoint: Path):
    """Its vision tower, with other weights."""
    from transformers import LlavaForConditionalGeneration

    tower = LlavaForConditionalGeneration.from_pretrained(checkpoint).model.vision_tower
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(2)
    return tower


def test_an_adapter_comes_back_on_the_vision_tower_it_was_trained_on(small, data, checkpoint, tmp_path, monkeypatch):
    tower_of(checkpoint).save_pretrained(tmp_path / "tower")
    monkeypatch.chdir(tmp_path)
    work = work_of(small(start_vision_tower="tower", epochs=0.4), data)
    train(work, tmp_path / "run", progress=False)
    before = dict(work.checkpoint.weights())
    monkeypatch.chdir("/")
    loaded = dict(open_checkpoint(str(tmp_path / "run")).weights())
    name = "model.vision_tower.embeddings.patch_embedding.weight"
    assert torch.equal(loaded[name], before[name])
    assert not torch.equal(loaded[name], dict(open_checkpoint(str(checkpoint)).weights())[name])


def test_merging_gives_one_whole_checkpoint(unbroken, tmp_path):
    from stllava_train.cli.main import main

    _, run = unbroken
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    merged, apart = open_checkpoint(str(tmp_path / "merged")), open_checkpoint(str(run))
    one, other = dict(merged.weights()), dict(apart.weights())
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def killed_at(call: list[str], trace: Path, lines: int) -> None:
    """Run the command until the trace has so many lines, then kill it with its children."""
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (trace.exists() and trace.read_text().count("\n") >= lines):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.002)
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        os.kill(one.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_a_random_step_goes_on_exactly(unbroken, data, tmp_path, chance, processes):
    recipe, whole = unbroken
    run = tmp_path / "run"
    at = chance.randint(1, 4)
    trace = run / "losses.jsonl"
    killed_at(command(recipe, data, run, processes=processes), trace, at)
    again = sft(recipe, data, run, "--resume", processes=processes)
    assert again.returncode == 0, again.stderr
    assert trace.read_bytes() == (whole / "losses.jsonl").read_bytes(), f"killed after step {at}"
    assert weights(run) == weights(whole)


def test_two_processes_learn_from_batches_without_an_image_and_equal_one(recipe_file, data, tmp_path):
    """DDP waits for the gradient of every weight that it was not told may have none."""
    recipe = recipe_file(**FULL, gradient_checkpointing=True, micro_batch=1, epochs=0.8)
    runs = [tmp_path / str(processes) for processes in (1, 2)]
    train_here(recipe, data, runs[0])
    done = sft(recipe, data, runs[1], processes=2, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = ([line["loss"] for line in read_trace(run / "losses.jsonl")] for run in runs)
    assert one == pytest.approx(two, rel=1e-4)  # gradients are added in another order


def test_a_half_written_folder_is_not_gone_on_from(tmp_path):
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_whole(tmp_path) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / "whole.json").write_text('{"files": {"trainer_state.json": 2}}')
    assert last_whole(tmp_path) == tmp_path / "checkpoint-10"


def test_a_fully_trained_network_goes_on_exactly_too(small, data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    work = work_of(small(**FULL), data)
    train(work, whole, progress=False)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(*_, **__):
        raise Stop

    trainer_module = sys.modules["stllava_train.training.sft"]
    original = trainer_module.SftTrainer.training_step
    calls = []

    def training_step(self, *arguments, **named):
        calls.append(1)
        return stop() if len(calls) > 6 else original(self, *arguments, **named)  # two micro-batches a step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.SftTrainer, "training_step", training_step)
        with pytest.raises(Stop):
            train(work, broken, progress=False)
    train(work, broken, resume=True, progress=False)
    assert (broken / "losses.jsonl").read_bytes() == (whole / "losses.jsonl").read_bytes()
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert open_checkpoint(str(broken)).layout == "stllava-med"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(broken / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]  # the broken run had taken step 3
    expected = [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in read_trace(whole / "losses.jsonl")]
    assert shown == expected


def test_a_run_killed_after_its_last_step_is_not_taken_for_finished(unbroken, data, tmp_path, monkeypatch):
    recipe, whole = unbroken
    work = work_of(read_recipe(str(recipe)), data)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stllava_train.training.run.draw_curves", stop)
        with pytest.raises(KeyboardInterrupt):
            train(work, tmp_path / "run", progress=False)
    train(work, tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run" / "losses.jsonl").read_bytes() == (whole / "losses.jsonl").read_bytes()
    assert weights(tmp_path / "run") == weights(whole)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(["sq_r=0.3"], r"recipe: sq_r: the run in it has 0\.5, this call 0\.3\. Call it as", id="recipe"),
        pytest.param([], r"the run in it is finished\. Nothing is left to do", id="finished"),
    ],
)
def test_another_run_is_not_gone_on_with(unbroken, data, changes, message):
    recipe, run = unbroken
    work = work_of(read_recipe(str(recipe), changes), data)
    with pytest.raises(InputError, match=message):
        train(work, run, resume=True)


def test_a_run_whose_images_have_changed_is_not_gone_on_with(data, small, tmp_path):
    shutil.copytree(data.parent, tmp_path / "data")
    train(work_of(small(), data), tmp_path / "run", progress=False)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["machine"]["processes"] == manifest["machine"]["threads"] == 1
    write_json(tmp_path / "run" / "run.json", manifest | {"finished": False})
    changed = tmp_path / "data" / "1.png"
    Image.new("RGB", (30, 20), (0, 0, 1)).save(changed)
    with pytest.raises(InputError, match=r"run: images: the run in it has [0-9a-f]{64}, this call [0-9a-f]{64}\. Call"):
        train(work_of(small(), tmp_path / "data" / "data.json"), tmp_path / "run", resume=True)


def test_a_folder_with_something_in_it_is_not_overwritten(unbroken, data, tmp_path):
    recipe, run = unbroken
    work = work_of(read_recipe(str(recipe)), data)
    with pytest.raises(InputError, match=r"it is not empty\. Pass --resume to continue the run in it"):
        train(work, run)
    with pytest.raises(InputError, match=r"no run to continue .*Leave --resume out"):
        train(work, tmp_path / "new", resume=True)


@pytest.mark.parametrize(
    ("out", "resume", "message"),
    [
        ("file", False, r"--out \S+file: \S+file is a file\. Choose another folder\."),
        ("file/run", False, r"--out \S+file/run: \S+file is a file\. Choose another folder\."),
        ("notes", False, r"notes: it is not empty and holds no run\. Choose another --out\."),
        (
            "notes",
            True,
            r"notes: no run to continue \(it has no run\.json\)\. Leave --resume out, or name the folder",
        ),
        ("file", True, r"file: no run to continue \(it has no run\.json\)"),
        ("broken", True, r"broken: no run to continue \(its run\.json cannot be read: it is damaged\)"),
        ("lacking", True, r"lacking: no run to continue \(its run\.json has no recipe\)"),
    ],
)
def test_a_folder_that_is_no_place_for_the_run_is_refused_before_data_is_read(
    recipe_file, tmp_path, capsys, out, resume, message
):
    from stllava_train.cli.main import main

    (tmp_path / "file").write_text("")
    for name, file, text in (("notes", "x", ""), ("broken", "run.json", "{"), ("lacking", "run.json", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    call = ["sft", "--recipe", str(recipe_file()), "--data", "none.json", "--out", str(tmp_path / out)]
    assert main([*call, *(["--resume"] if resume else [])]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_start_that_is_not_there_is_named_with_the_option_that_names_another(small, data):
    with pytest.raises(InputError, match=r"start: none: no such folder\..* Name it with start=DIR\.$"):
        work_of(small(start="none"), data)
    with pytest.raises(InputError, match=r"start=DIR\. `stllava-train tiny` makes the one that stage 1 of the recipe"):
        work_of(small(start="tiny-start"), data)


def test_a_run_on_shared_weights_ends_with_a_whole_checkpoint(small, data, tmp_path, monkeypatch):
    """Without GPUs accelerate knows no FSDP; what transformers asks its plugin for is tested."""
    from types import SimpleNamespace

    from accelerate import FullyShardedDataParallelPlugin

    work = work_of(small(epochs=0.4), data)
    trainer = make_trainer(work, tmp_path, tmp_path / "trace", progress=False)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(
        state=state,
        is_main_process=True,
        unwrap_model=lambda model, **_: model,
        get_state_dict=lambda model: model.state_dict(),
    )
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setattr(trainer, "accelerator", accelerator)
    _save(trainer, work, tmp_path / "run")
    assert open_checkpoint(str(tmp_path / "run")).layout.startswith("adapter on")


def test_a_batch_that_cannot_be_dealt_is_refused_and_nothing_written(small, data, tmp_path):
    with pytest.raises(InputError, match="batch 4: it cannot be dealt to 1 process of micro_batch 3"):
        train(work_of(small(micro_batch=3), data), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="batch 4: it cannot be dealt"):
        work_of(small(micro_batch=3), tmp_path / "none.json")  # before data is read


def test_a_run_of_no_step_is_refused(small, data):
    with pytest.raises(InputError, match=r"epochs 1e-06: too few for one step of batch 65536\. Raise it\."):
        work_of(small(epochs=1e-6, batch=65536), data)


def test_several_gpus_need_several_processes(small, data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match=r"4 GPUs are visible to one process\. Start one for each .*DEVICES=0"):
        make_trainer(work_of(small(), data), tmp_path, tmp_path / "trace")


def test_half_written_folders_do_not_push_out_whole_ones(small, data, tmp_path, monkeypatch):
    """Of the folders to resume from two are kept, by age, whether whole or not."""
    work, run = work_of(small(epochs=1.2, save_every=1), data), tmp_path / "run"
    original, wholes = write_json, []

    def write(path, value):
        if path.name == "whole.json":
            wholes.append(last_whole(run / "checkpoints"))  # before this one is
            if value["step"] == 3:
                raise KeyboardInterrupt
        original(path, value)

    monkeypatch.setattr("stllava_train.training.trainer.write_json", write)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(work, run, resume=run.exists(), progress=False)
    (run / "checkpoints" / "checkpoint-9").mkdir()
    with pytest.raises(KeyboardInterrupt):
        train(work, run, resume=True, progress=False)
    assert [one and one.name for one in wholes] == [None, "checkpoint-1", *["checkpoint-2"] * 3]
    assert {one.name for one in (run / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-3"}


def test_test_images_are_refused_unless_allowed(small, data, prepared):
    from stllava_eval.data.splits import read_rows

    leaked = data.parent / "leaked.png"
    leaked.write_bytes(read_rows("vqarad", "test")[0].image)
    file = data.parent / "leak.json"
    record = {"id": "a", "image": "leaked.png", "conversations": json.loads(data.read_text())[1]["conversations"]}
    file.write_text(json.dumps([record]))
    with pytest.raises(InputError, match=r"leak\.json:1: a: its image is test image vqarad/.* --allow-test-images\."):
        prepare_run(small(), [file], progress=False)
    assert prepare_run(small(), [file], allow_test_images=True, progress=False).test_images == 1


def test_a_dry_run_says_tokens_steps_weights_memory_and_validation(small, data, validation):
    text = report(work_of(small(), data))
    for part in (
        "10 conversations about 8 images (2 about none), 30 rounds",
        "5 steps of 4 conversations: 2 epochs",
        "projector: full, 6,272 of 6,272 weights trained",
        "by arithmetic, on one device: 0.0 GiB",
    ):
        assert part in text
    again = report(work_of(small(epochs=1, evaluate_on=["slake"], evaluate_every=2), data))
    assert "conversations: 1 epoch\n" in again
    assert again.endswith("of slake each, before the first step, every 2 steps and after the last")
    assert "validation" not in text


def test_a_wrong_call_is_one_line_and_trains_nothing(data, tmp_path, recipe_file):
    done = sft(recipe_file(), data, tmp_path / "run", "epohs=3")
    assert done.returncode == 2
    assert done.stderr.startswith("stllava-train: ")
    assert done.stderr.count("\n") == 1
    assert "epohs: unknown. Did you mean epochs?" in done.stderr
    assert not (tmp_path / "run").exists()


# --- hostile and clumsy calls ---------------------------------------------------------------------------------------


def test_a_file_that_is_named_twice_is_refused(data, tmp_path, recipe_file, monkeypatch, capsys):
    from stllava_train.cli.main import main

    monkeypatch.chdir(data.parent)
    call = ["sft", "--recipe", str(recipe_file()), "--out", str(tmp_path / "run"), "--dry-run"]
    for again in ("data.json", "./data.json", str(data)):
        assert main([*call, "--data", "data.json", "--data", again]) == 2
        assert capsys.readouterr().err == "stllava-train: a data file comes twice. Name each once.\n"


def test_conversations_that_stand_in_two_files_are_refused(small, data, tmp_path):
    copy = data.parent / "copy_data.json"
    copy.write_bytes(data.read_bytes())
    with pytest.raises(
        InputError, match=r"copy_data\.json:2: c0: its id, image and rounds are those of .*data\.json:2\..* \(9 more: "
    ):
        prepare_run(small(), [data, copy], progress=False)


@pytest.mark.parametrize("broken", [b"no image", None], ids=["another file", "cut short"])
def test_an_image_that_cannot_be_decoded_is_refused_before_training(small, data, broken):
    (data.parent / "broken.png").write_bytes(broken or (data.parent / "1.png").read_bytes()[:60])
    record = json.loads(data.read_text())[1] | {"image": "broken.png"}
    file = data.parent / "broken.json"
    file.write_text(json.dumps([record, record | {"id": "other"}]))
    with pytest.raises(
        InputError, match=r"broken\.json:1: c1: its image .*broken\.png: .* leave the record out\. \(1 more"
    ):
        work_of(small(), file)


def test_a_rank_in_the_environment_does_not_switch_the_search_for_test_images_off(small, data, monkeypatch):
    for rank in ("1", "", "x"):
        monkeypatch.setenv("RANK", rank)
        test_an_image_that_cannot_be_decoded_is_refused_before_training(small, data, b"no image")


@pytest.mark.parametrize("changes", [{"micro_batch": 3}, {"four_bit": True}])
def test_a_run_that_cannot_start_leaves_nothing(small, data, tmp_path, changes, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError):
        train(work_of(small(**changes), data), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_one_line(small, data, tmp_path):
    with pytest.raises(InputError, match=r"no folder can be made there \(File name too long\)\. Choose another"):
        train(work_of(small(), data), tmp_path / ("run" * 100), progress=False)


@pytest.fixture(scope="module")
def broken_off(checkpoint, data, tmp_path_factory):
    """The work of a run of five steps, its folder as Ctrl-C in step 5 leaves it, and beside it the run not broken."""
    from stllava_train.training import sft as module

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("broken-off")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SMALL | {"start": str(checkpoint)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STLLAVA_HOME", str(folder / "home"))
        work = work_of(read_recipe(str(folder / "recipe.yaml")), data)
        train(work, folder / "whole", progress=False)
        original = module.SftTrainer.training_step

        def training_step(self, *arguments, **named):
            if self.state.global_step == 4:
                raise KeyboardInterrupt
            return original(self, *arguments, **named)

        patch.setattr(module.SftTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            train(work, folder / "run", progress=False)
    return work, folder / "run"


HALF = object()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param(
            "optimizer.pt",
            None,
            r"checkpoint-4: optimizer\.pt: missing, or changed .* delete this folder",
            id="optimizer",
        ),
        pytest.param("optimizer.pt", HALF, r"checkpoint-4: optimizer\.pt: missing, or changed", id="half an optimizer"),
        pytest.param("rng_state.pth", None, r"rng_state\.pth: missing, or changed", id="random numbers"),
        pytest.param("scheduler.pt", None, r"scheduler\.pt: missing, or changed", id="scheduler"),
        pytest.param("trainer_state.json", b"[]", r"trainer_state\.json: missing, or changed", id="state"),
        pytest.param(
            "adapter_model.safetensors", HALF, r"adapter_model\.safetensors: missing, or changed", id="weights"
        ),
        pytest.param("whole.json", b"{", r"whole\.json: missing, or changed", id="mark"),
        pytest.param(
            "../../losses.jsonl",
            None,
            r"losses\.jsonl:1: the losses of step 1 are missing, .* step 4\. Restore",
            id="no trace",
        ),
        pytest.param(
            "../../losses.jsonl", b"\xff\n", r"losses\.jsonl:1: the losses of step 1 are missing", id="binary trace"
        ),
        pytest.param(
            "../../losses.jsonl", b"{}\n1\n", r"losses\.jsonl:1: the losses of step 1 are missing", id="another trace"
        ),
        pytest.param(
            "../../losses.jsonl", HALF, r"losses\.jsonl:3: the losses of step 3 are missing", id="half a trace"
        ),
        pytest.param("../../run.json", b"[]", r"no run to continue .* Leave --resume out", id="manifest"),
        pytest.param("../../run.json", b"[" * 99999, r"no run to continue", id="deep manifest"),
    ],
)
def test_a_run_does_not_go_on_from_what_was_damaged(broken_off, tmp_path, name, content, message):
    """Without the optimizer's state, say, it would go on and end elsewhere, without a word."""
    work, folder = broken_off
    run = shutil.copytree(folder, tmp_path / "run")
    file = run / "checkpoints" / "checkpoint-4" / name
    if content is None:
        file.unlink()
    else:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content is HALF else content)
    with pytest.raises(InputError, match=message) as caught:
        train(work, run, resume=True, progress=False)
    assert "\n" not in str(caught.value)


def test_garbage_of_the_right_size_is_one_line(broken_off, tmp_path):
    work, folder = broken_off
    run = shutil.copytree(folder, tmp_path / "run")
    file = run / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(InputError, match=r"its files cannot be written or read \(.* delete a broken folder under"):
        train(work, run, resume=True, progress=False)


def test_without_the_damaged_folder_the_run_goes_on_from_the_one_before(broken_off, tmp_path):
    work, folder = broken_off
    run = shutil.copytree(folder, tmp_path / "run")
    (run / "checkpoints" / "checkpoint-4" / "whole.json").unlink()  # as a kill while it is written leaves it
    (run / "checkpoints" / "checkpoint-abc").mkdir()
    (run / "checkpoints" / "checkpoint-abc" / "whole.json").write_text("{}")
    train(work, run, resume=True, progress=False)
    assert weights(run) == weights(folder.parent / "whole")
    assert (run / "losses.jsonl").read_bytes() == (folder.parent / "whole" / "losses.jsonl").read_bytes()


def test_a_start_may_be_named_in_another_way_when_a_run_goes_on(broken_off, data, tmp_path, monkeypatch):
    """What counts is what lies in the folder: another network is refused, whatever its name."""
    work, folder = broken_off
    run = shutil.copytree(folder, tmp_path / "run")
    start = Path(work.recipe.start)
    write_checkpoint(tmp_path / "other", seed=1)
    tower_of(start).save_pretrained(tmp_path / "tower")
    for key, other in (("start", "other"), ("start_vision_tower", "tower")):
        changed = work_of(dataclasses.replace(work.recipe, **{key: str(tmp_path / other)}), data)
        with pytest.raises(
            InputError, match=rf"run: recipe: {key}: the run in it has \S+, this call \S+{other}\. Call"
        ):
            train(changed, run, resume=True)
    monkeypatch.chdir(start.parent)
    train(work_of(dataclasses.replace(work.recipe, start=start.name), data), run, resume=True, progress=False)
    assert weights(run) == weights(folder.parent / "whole")


def test_a_run_that_was_broken_off_is_neither_merged_nor_described(broken_off, tmp_path, capsys):
    from stllava_train.cli.main import main

    _, run = broken_off
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 2
    assert "run is not a checkpoint: it has no config.json. It is a training run that is not" in capsys.readouterr().err
    assert main(["card", str(run)]) == 2
    assert "run: the run in it is not finished. Finish it first: its own call with" in capsys.readouterr().err


def test_two_calls_give_the_same_bytes(broken_off, tmp_path):
    work, folder = broken_off
    whole = folder.parent / "whole"
    train(work, tmp_path / "whole", progress=False)
    for name in ("adapter_model.safetensors", "adapter_config.json", "losses.jsonl", "curves.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (whole / name).read_bytes(), name
    cards = [(one / "README.md").read_text().replace(str(one), "") for one in (whole, tmp_path / "whole")]
    assert cards[0] == cards[1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=["write", "torch.save", "tokenizers"],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(broken_off, tmp_path, monkeypatch, error):
    from stllava_train.training import sft as module

    def full(self, *_):
        raise error

    monkeypatch.setattr(module.SftTrainer, "_save_checkpoint", full)
    with pytest.raises(InputError, match=r"its files cannot be written or read \(.*\)\. Free some space, or"):
        train(broken_off[0], tmp_path / "run", progress=False)
    assert len(read_trace(tmp_path / "run" / "losses.jsonl")) == 2


def test_ctrl_c_is_one_line_and_exit_code_130(data, tmp_path, recipe_file, monkeypatch, capsys):
    from stllava_train.cli.main import main
    from stllava_train.training import sft as module

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "prepare_run", stopped)
    assert main(["sft", "--recipe", str(recipe_file()), "--data", str(data), "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == (
        "stllava-train: stopped. The same call continues; those of `sft` and `dpo` with --resume.\n"
    )


def test_a_world_without_a_launcher_is_one_line(data, tmp_path, recipe_file):
    call = command(recipe_file(), data, tmp_path / "run")
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"})
    assert done.returncode == 2
    assert re.search("stllava-train: RANK=1, .*WORLD_SIZE=2 in the environment: .* torchrun, or unset", done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_wandb_that_is_not_installed_is_one_line(broken_off, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"--wandb: wandb is not installed\. Run `pip install wandb`"):
        train(broken_off[0], tmp_path / "run", progress=False, wandb=True)
    assert not (tmp_path / "run").exists()


def test_images_that_are_no_folder_are_told_as_such(data, tmp_path, recipe_file, capsys):
    from stllava_train.cli.main import main

    call = ["sft", "--recipe", str(recipe_file()), "--data", str(data), "--out", str(tmp_path / "run")]
    assert main([*call, "--images", str(data)]) == 2
    assert (
        "data.json: no such folder. Pass the one that the records' images are relative to." in capsys.readouterr().err
    )


# --- card and curves ------------------------------------------------------------------------------------------------


def test_the_card_refuses_scores_of_other_weights(unbroken, tmp_path):
    _, run = unbroken
    (tmp_path / "run.json").write_text(json.dumps({"checkpoint": {"sha256": "0" * 64}}))
    with pytest.raises(InputError, match=r"it is of other weights \(0000000000000000, here .*Evaluate .* again\."):
        write_card(run, [tmp_path])
    (tmp_path / "run.json").write_text(json.dumps({"checkpoint": {"sha256": 5}}))
    with pytest.raises(InputError, match=r"it is of other weights \(5, here "):
        write_card(run, [tmp_path])
    with pytest.raises(InputError, match=r"run is not a run folder \(its run\.json has no checkpoint\)\. Pass one of"):
        write_card(run, [run])
    with pytest.raises(InputError, match=r"is no training run \(its run\.json has no stage\)\. Pass a folder of"):
        write_card(tmp_path)
    with pytest.raises(InputError, match=r"none is no training run \(it has no run\.json\)"):
        write_card(tmp_path / "none")


def test_the_same_losses_draw_the_same_bytes(unbroken, tmp_path):
    _, run = unbroken
    draw_curves(run / "losses.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == (run / "curves.png").read_bytes()


def test_curves_are_drawn_where_every_answer_was_empty(tmp_path):
    of = {"f1": 0.0, "recall": 0.0, "closed_accuracy": 0.0, "unparsed": 1.0, "words": 0.0}
    (tmp_path / "losses.jsonl").write_text(json.dumps({"step": 1, "answer_loss": 1.0, "question_loss": None}) + "\n")
    lines = [{"step": step, "slake": of, "score": 0.0, "unparsed": 1.0} for step in (0, 1)]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(tmp_path / "losses.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_names_cannot_break_out_of_the_card(unbroken, tmp_path):
    run = shutil.copytree(unbroken[1], tmp_path / "a b\n# [x](y)\x1b[31m`")
    manifest = json.loads((run / "run.json").read_text())
    evil = "x`\n---\n```\n# [a](b)<i>\x1b"
    manifest["start"]["name"] = manifest["recipe"]["start"] = manifest["data"][0]["file"] = evil
    manifest["versions"]["torch"] = manifest["commit"] = evil
    (run / "run.json").write_text(json.dumps(manifest))
    write_card(run)
    card = (run / "README.md").read_text()
    front = card.split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == evil
    assert "\x1b" not in card
    assert "<i>" not in card.replace(front, "")
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## Data", "## Scores", "## Losses", "## Recipe"]
    assert sum(line.lstrip().startswith("```") for line in card.splitlines()) == 4
    assert "--model_args 'pretrained=" in card


@pytest.mark.parametrize("line", ["{}", "[1]", '{"step": 1, "answer_loss": "x", "question_loss": null}'])
def test_a_card_of_a_damaged_run_is_one_line(unbroken, tmp_path, line):
    run = shutil.copytree(unbroken[1], tmp_path / "run")
    (run / "losses.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"losses\.jsonl: cannot be read"):
        write_card(run)
    (run / "run.json").write_text('{"stage": "sft"}')
    with pytest.raises(InputError, match="is no training run"):
        write_card(run)


def test_a_run_knows_its_data_sets_by_the_ids_that_data_writes():
    from types import SimpleNamespace

    ids = ("vqarad-synpic1.jpg", "vqarad-synpic2.jpg", "pathvqa-pathvqa-sample-train-a-1", "pmc-7", "slake-sample.png")
    work = SimpleNamespace(conversations=[SimpleNamespace(id=id) for id in ids])
    assert PreparedSft.sets(work) == {"vqarad", "pathvqa sample", "slake"}


# --- evaluations on the way -----------------------------------------------------------------------------------------


def examined(monkeypatch, **planned) -> None:
    """Evaluations with these figures in their order, `score` or `unparsed`, in place of those that come out."""
    rows = [dict(zip(planned, figures, strict=True)) for figures in zip(*planned.values(), strict=True)]
    left, inner = iter(rows), ValidationCallback._scores
    monkeypatch.setattr(ValidationCallback, "_scores", lambda self, policy: inner(self, policy) | next(left))


@pytest.mark.parametrize(
    ("parts", "file"),
    [pytest.param({}, "adapter_model.safetensors", id="lora"), pytest.param(FULL, "model.safetensors", id="full")],
)
def test_stage_1_keeps_the_best_step_on_validation_questions(
    small, data, tmp_path, validation, monkeypatch, parts, file
):
    examined(monkeypatch, score=[0.5, 0.7, 0.7, 0.1])
    out = tmp_path / "run"
    train(work_of(small(evaluate_on=["vqarad", "slake"], **parts), data), out, progress=False)
    lines = read_trace(out / "evaluations.jsonl")
    assert [(line["step"], line["score"]) for line in lines] == [(0, 0.5), (2, 0.7), (4, 0.7), (5, 0.1)]
    assert all({"f1", "recall", "closed_accuracy", "unparsed", "words"} <= line["vqarad"].keys() for line in lines)
    kept = json.loads((out / "run.json").read_text())["kept"]
    assert kept == {"step": 2, "score": 0.7, "start": 0.5, "last": 0.1, "stopped": False}
    best, saved = load_file(out / "checkpoints" / "best-2.safetensors"), load_file(out / file)
    names = {name.replace(".default", ""): value for name, value in best.items()}
    shared = saved.keys() & names.keys()
    assert len(shared) > 10
    assert all(torch.equal(saved[name], names[name]) for name in shared)
    (kept_line,) = kept_step(out)
    assert kept_line.startswith("The weights of step 2 were kept.")
    assert kept_line.endswith(": 50.0 at the start, 70.0 at step 2, 10.0 at the end.")
    assert kept_line in (out / "README.md").read_text()
    with Image.open(out / "curves.png") as picture:
        assert picture.size == (1320, 1080)  # a panel of scores and one of words more


@pytest.mark.parametrize("parts", [{}, FULL], ids=["lora", "full"])
def test_the_scores_on_the_way_are_those_of_the_checkpoint_that_is_kept(small, data, tmp_path, validation, parts):
    out = tmp_path / "run"
    recipe = small(evaluate_on=["slake"], evaluate_every=5, **parts)
    train(work_of(recipe, data), out, progress=False)
    kept = read_trace(out / "evaluations.jsonl")[-1]
    assert kept["step"] == 5
    assert _means(Answerer(str(out), dtype="float32"), questions(recipe)["slake"]) == pytest.approx(kept["slake"])


def test_a_network_in_16_bits_whose_trained_weights_have_32_answers(small, data, tmp_path, validation):
    recipe = small(evaluate_on=["slake"], evaluate_every=5, dtype="bfloat16")
    train(work_of(recipe, data), tmp_path / "run", progress=False)
    assert [line["step"] for line in read_trace(tmp_path / "run" / "evaluations.jsonl")] == [0, 5]


def test_evaluations_change_nothing_of_what_stage_1_learns(small, data, tmp_path, validation):
    dropped = {**LORA, "dropout": 0.3}
    for name, sets in (("without", []), ("with", ["slake"])):
        recipe = small(language_model=dropped, evaluate_on=sets, evaluate_every=1)
        train(work_of(recipe, data), tmp_path / name, progress=False)
    one, other = ((tmp_path / name / "losses.jsonl").read_bytes() for name in ("without", "with"))
    assert one == other


def test_stage_1_stops_where_yes_and_no_are_unlearnt(small, data, tmp_path, validation, monkeypatch):
    examined(monkeypatch, unparsed=[0.1, 0.25, 0.31])
    recipe = small(evaluate_on=["slake"], evaluate_every=1, stop_unparsed=0.2)
    train(work_of(recipe, data), tmp_path / "run", progress=False)
    assert [line["step"] for line in read_trace(tmp_path / "run" / "losses.jsonl")] == [1, 2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["kept"]["stopped"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Training stopped early" in card
    assert "2 steps; nats per token" in card  # of five


def test_a_split_that_stage_1_asks_and_that_is_not_prepared_is_named(small, data, home):
    with pytest.raises(InputError, match=r"slake validation is not prepared.*to `all`: sft\.evaluate_on=\[\]"):
        work_of(small(evaluate_on=["slake"]), data)


@pytest.fixture
def evaluated(recipe_file, data, tmp_path, validation):
    """A finished run with an evaluation every step, and its recipe."""
    recipe = recipe_file(evaluate_on=["slake"], evaluate_every=1)
    train(work_of(read_recipe(str(recipe)), data), tmp_path / "whole", progress=False)
    return recipe, tmp_path / "whole"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_with_evaluations_killed_anywhere_ends_in_the_same_bytes(evaluated, data, tmp_path, chance, processes):
    """The kill comes just behind a line of the evaluations: its step's weights and checkpoint are not written yet."""
    recipe, whole = evaluated
    run = tmp_path / "run"
    at = chance.randint(1, 6)
    killed_at(command(recipe, data, run, processes=processes), run / "evaluations.jsonl", at)
    again = sft(recipe, data, run, "--resume", processes=processes)
    assert again.returncode == 0, again.stderr
    for name in ("losses.jsonl", "evaluations.jsonl", "adapter_model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), f"{name}, killed after line {at}"
    kept = [json.loads((one / "run.json").read_text())["kept"] for one in (run, whole)]
    assert kept[0] == kept[1]


def test_the_same_seed_gives_the_same_evaluations(evaluated, data, tmp_path):
    recipe, whole = evaluated
    train(work_of(read_recipe(str(recipe)), data), tmp_path / "again", progress=False)
    for name in ("evaluations.jsonl", "adapter_model.safetensors", "curves.png"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_does_not_go_on_with_other_questions(evaluated, data):
    recipe, whole = evaluated
    work = work_of(read_recipe(str(recipe)), data)
    ValidationCallback(work.recipe, work.steps, whole, 4)
    rows = [dataclasses.replace(row, reference="heart") for row in read_rows("slake", "validation")]
    facts = {"edition": "t", "official": False, "sample": True, "source": "t", "licence": "t"}
    write_split("slake", "validation", rows, **facts)
    with pytest.raises(InputError, match=r"evaluations.jsonl: it was evaluated on other questions than"):
        ValidationCallback(work.recipe, work.steps, whole, 4)


def test_weights_of_earlier_best_steps_are_kept_where_a_run_can_go_on_from_them(
    small, data, tmp_path, validation, monkeypatch
):
    examined(monkeypatch, score=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    train(work_of(small(evaluate_on=["slake"], evaluate_every=1), data), tmp_path / "run", progress=False)
    assert sorted(file.name for file in (tmp_path / "run" / "checkpoints").iterdir() if file.is_file()) == [
        f"best-{step}.safetensors" for step in (2, 4, 5)
    ]
    assert {file.name for file in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")} == {
        "checkpoint-4",
        "checkpoint-5",
    }


def test_validation_images_that_are_trained_on_are_counted(small, tmp_path, validation, caplog):
    row = read_rows("slake", "validation")[0]
    (tmp_path / "a.png").write_bytes(row.image)
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "left"}]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    work_of(small(evaluate_on=["slake"], batch=2), file)
    assert (
        f"evaluate_on: slake validation: 1 of the 2 images that are asked about are trained on, such as {row.image_id},"
        in caplog.text
    )
