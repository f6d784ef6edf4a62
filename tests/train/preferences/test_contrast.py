"""Image-contrast pairs: which region is noised and how, the files that hold them, and the loss they are learnt by."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_dpo import SMALL, alone

from stllava_eval.errors import InputError
from stllava_eval.images import decode, pixel_hash
from stllava_train.cli.main import main
from stllava_train.preferences.check_pairs import pair_problems
from stllava_train.preferences.contrast import Box, contrast_pairs, noised, read_boxes, region
from stllava_train.preferences.pair_formats import write_pairs
from stllava_train.preferences.pair_layouts import pairs_to_learn, read_published
from stllava_train.preferences.pair_selection import select_pairs
from stllava_train.preferences.pairs import Pair, PairSet, read_pairs, row_of
from stllava_train.training.dpo import make_trainer, prepare_run, report, train
from stllava_train.training.recipes import read_dpo_recipe
from stllava_train.training.reference import reference_key
from stllava_train.training.resume import read_trace

BOXES = {
    "x1": [{"Liver": [2.0, 3.0, 10.0, 8.0]}, {"Liver Cancer": [4, 4, 3, 2]}],
    "x2": [{"Left Lung": [20, 0, 20, 30]}, {"Right Lung": [0, 0, 20, 30]}],
    "x3": [],
}
ROUNDS = {
    "x1": [("Where is the cancer?", "In the liver"), ("Is there a liver?", "Yes"), ("Which plane?", "Axial")],
    "x2": [("Do the lungs look healthy?", "Yes"), ("What is on the left?", "Left lung")],
    "x3": [("Is it a lung?", "Yes")],
}


def picture(seed: int) -> Image.Image:
    """Of 40 x 30 pixels, none of them as dark as the noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(100, 256, (30, 40, 3), np.uint8))


@pytest.fixture
def boxes(tmp_path, home) -> Path:
    """A folder in SLAKE's layout."""
    torch.set_num_threads(1)
    for number, (name, found) in enumerate(BOXES.items()):
        (tmp_path / "imgs" / name).mkdir(parents=True)
        picture(number).save(tmp_path / "imgs" / name / "source.png")
        (tmp_path / "imgs" / name / "detection.json").write_text(json.dumps(found))
    return tmp_path / "imgs"


@pytest.fixture
def data(tmp_path, boxes) -> Path:
    """Conversations about these images, as `stllava-train data slake` writes them, and one about no image."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    records = []
    for name, rounds in ROUNDS.items():
        (folder / "images" / f"{name}_source.png").write_bytes((boxes / name / "source.png").read_bytes())
        said = [{"from": who, "value": text} for one in rounds for who, text in zip(("human", "gpt"), one, strict=True)]
        said[0]["value"] = f"<image>\n{said[0]['value']}"
        records.append({"id": name, "image": f"images/{name}_source.png", "conversations": said, "unordered": True})
    records.append({"id": "t", "conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes"}]})
    (folder / "slake.json").write_text(json.dumps(records))
    return folder


def made(data: Path, boxes: Path, **settings) -> list[Pair]:
    return contrast_pairs(data / "slake.json", read_boxes(boxes, False), data, progress=False, **settings).pairs


@pytest.fixture
def file(data, boxes) -> Path:
    return write_pairs(select_pairs(PairSet(made(data, boxes), {})), data / "contrast.jsonl", {})[0]


# --- regions and noise ----------------------------------------------------------------------------------------------

HEAD = [Box("Brain Edema", 0, 0, 1, 1), Box("Brain Enhancing Tumor", 0, 0, 1, 1), Box("Brain Stem", 0, 0, 1, 1)]
CHEST = [Box(label, 0, 0, 1, 1) for label in ("Left Lung", "Right Lung", "Heart", "Mass")]


@pytest.mark.parametrize(
    ("given", "question", "answer", "regions", "labels"),
    [
        pytest.param(HEAD, "Where is the edema?", "Left lobe", "named", ["Brain Edema"], id="a lesion"),
        pytest.param(HEAD, "What is seen?", "Brain Tumor", "named", ["Brain Enhancing Tumor"], id="in the answer"),
        pytest.param(HEAD, "Any abnormalities?", "Yes", "named", ["Brain Edema", "Brain Enhancing Tumor"], id="plural"),
        pytest.param(HEAD, "Where is the lesion?", "Left", "named", [box.label for box in HEAD[:2]], id="all lesions"),
        pytest.param(CHEST, "Where is the mass?", "In the left lung", "named", ["Mass"], id="before organs"),
        pytest.param(CHEST, "Are the lungs healthy?", "Yes", "named", ["Left Lung", "Right Lung"], id="both sides"),
        pytest.param(CHEST, "Is the left lung healthy?", "Yes", "named", ["Left Lung"], id="one side"),
        pytest.param(CHEST, "Which plane is it?", "Axial", "named", [], id="nothing"),
        pytest.param(CHEST, "Which plane is it?", "Axial", "lesions", ["Mass"], id="MMedPO: whatever is asked"),
    ],
)
def test_the_region_is_what_question_and_answer_name(given, question, answer, regions, labels):
    assert [box.label for box in region(given, question, answer, regions)] == labels


def test_noise_fills_the_boxes_and_nothing_else_and_is_drawn_from_the_id():
    before = np.array(picture(0))
    boxes = [Box("a", 2.5, 3, 10, 8), Box("b", 39, 29, 1, 1)]
    after = np.array(noised(picture(0), boxes, "7"))
    inside = np.zeros((30, 40), bool)
    inside[3:11, 2:13] = inside[29, 39] = True
    assert (after[~inside] == before[~inside]).all()
    noise = after[inside]
    # of a normal distribution with mean 0 and deviation 10, clipped at 0 and cut to whole numbers: a half is 0, or less
    # than 1, which makes 0.54; 89 values of 267, whose standard error is 0.03
    assert noise.max() < 60
    assert (noise == 0).mean() == pytest.approx(0.54, rel=0.2)
    assert noise[noise > 0].mean() == pytest.approx(8.0, rel=0.2)
    assert (np.array(noised(picture(0), boxes, "7")) == after).all()
    assert (np.array(noised(picture(0), boxes, "8")) != after).any()
    # the draw is numpy's legacy one, which does not change
    assert after[3, 2:5].tolist() == [[0, 9, 20], [0, 19, 0], [4, 0, 0]]


# --- what is made and what is left out ------------------------------------------------------------------------------


def test_the_answer_is_chosen_about_the_image_and_rejected_about_its_noised_copy(data, boxes):
    pairs = made(data, boxes)
    assert [one.id for one in pairs] == ["x1#0", "x1#1", "x2#0", "x2#1"]
    first = pairs[0]
    assert (first.question, first.chosen, first.rejected) == ("Where is the cancer?", "In the liver", "In the liver")
    assert first.images == ("images/x1_source.png", first.rejected_image)
    copy = np.array(decode((data / first.rejected_image).read_bytes()))
    moved = (copy != np.array(picture(0))).any(2)
    assert moved[4:6, 4:7].all()
    assert moved.sum() == 6
    for one in pairs:
        for name, sha256 in one.pictures.items():
            assert pixel_hash(decode((data / name).read_bytes())) == sha256


def test_the_same_call_writes_the_same_bytes_and_the_command_lists_what_is_left_out(data, boxes, capsys):
    call = ["pairs", "--contrast", str(data / "slake.json"), "--boxes", str(boxes), "--out", str(data / "c.jsonl")]
    assert main(call) == 0
    shown = capsys.readouterr().out
    assert "left out, question and answer name nothing that has a box: 1: x1#2\n" in shown
    assert "left out, image without a box: 1: x3\n" in shown
    assert "left out, no image: 1: t\n" in shown
    assert "4 pairs to learn from, 0 held out" in shown
    written = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert main(call) == 0
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == written
    assert json.loads((data / "c.json").read_text())["counts"]["left_out"]["image without a box"] == 1
    assert main([*call[:-1], str(data / "d.jsonl"), "--regions", "lesions"]) == 0
    assert "left out, image without a lesion's box: 1: x2\n" in capsys.readouterr().out
    assert [one.id for one in read_pairs(data / "d.jsonl")] == ["x1#0", "x1#1", "x1#2"]


def test_later_rounds_of_a_conversation_that_builds_on_itself_are_left_out(data, boxes):
    records = json.loads((data / "slake.json").read_text())
    for record in records:
        record.pop("unordered", None)
    (data / "slake.json").write_text(json.dumps(records))
    found = contrast_pairs(data / "slake.json", read_boxes(boxes, False), data, progress=False)
    assert [one.id for one in found.pairs] == ["x1#0", "x2#0"]
    assert found.skipped["question that may build on an earlier one"] == ["x1#1", "x1#2", "x2#1"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([{"Liver": [2, 3, 39, 8]}], r"detection\.json: Liver\b.*\[2, 3, 39, 8\].*leaves.*40 x 30\b.*original"),
        ([{"Liver": [-1, 3, 4, 8]}], "leaves its image"),
        ([{"Liver": [2, 3, 0, 8]}], "leaves its image"),
        ([{"Liver": [2, 3, 4]}], r"Liver: \[2, 3, 4\].*no box.*\[x, y, width, height\]"),
        ([{"Liver": [2, 3, 4, True]}], "is no box"),
        ([{"Liver": [2, 3, 4, float("nan")]}], "is no box"),
        ({"Liver": [2, 3, 4, 8]}, "not a list of"),
        (["Liver"], "not a list of"),
    ],
)
def test_boxes_that_are_none_or_leave_their_image_are_refused_in_one_line(boxes, found, message):
    (boxes / "x1" / "detection.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=message) as refused:
        read_boxes(boxes, False)
    assert "\n" not in str(refused.value)
    assert str(boxes / "x1" / "detection.json") in str(refused.value)


def test_boxes_of_another_image_are_refused(data, boxes):
    picture(0).resize((20, 15)).save(data / "images" / "x1_source.png")
    with pytest.raises(InputError, match=r"slake\.json:1: x1\b.*x1_source\.png\b.*other pixels.*boxes.*copy"):
        made(data, boxes)
    picture(1).save(boxes / "x1" / "source.png")
    with pytest.raises(InputError, match=r"x2/detection\.json.*image.*/x1\b.*other boxes.*Delete"):
        read_boxes(boxes, False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--contrast FILE and --boxes FOLDER go together"),
        (["--boxes", "DATA"], "no detection.json is in it"),
        (["--boxes", "BOXES", "--from", "x.json"], "pass two files, CANDIDATES and JUDGED, or one with --from, or one"),
        (["--boxes", "BOXES", "--format", "trl"], "--format trl: its chosen and rejected answers are about two images"),
    ],
)
def test_wrong_calls_are_one_line(data, boxes, capsys, more, message):
    more = [{"DATA": str(data), "BOXES": str(boxes)}.get(word, word) for word in more]
    call = ["pairs", "--contrast", str(data / "slake.json"), "--out", str(data / "c.jsonl")]
    assert main([*call, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (data / "contrast").exists()


def test_images_of_test_splits_are_left_out(data, boxes, prepared):
    from stllava_eval.data.splits import read_rows

    row = read_rows("slake", "test")[0]
    for image in (data / "images" / "x2_source.png", boxes / "x2" / "source.png"):
        image.write_bytes(row.image)
    found = contrast_pairs(data / "slake.json", read_boxes(boxes, False), data, progress=False)
    assert found.skipped["image of a test split"] == ["x2"]
    assert len(made(data, boxes, allow_test_images=True)) == 4


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_file_of_contrast_pairs_is_read_back_and_split_by_the_true_image(data, boxes, file):
    pairs = made(data, boxes)
    assert read_pairs(file) == pairs
    assert read_published(file, data, progress=False) == PairSet(pairs, {})
    assert row_of(replace(pairs[0], rejected="Right.", rejected_image=None, rejected_image_sha256=None)).keys() == {
        *("id", "image", "image_sha256", "question", "chosen", "rejected", "margin", "judges")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected_image_sha256": ...}, r"rejected_image and rejected_image_sha256.*together.*both"),
        ({"rejected_image": ...}, r"rejected_image and rejected_image_sha256.*together.*both"),
        ({"rejected_image": "../a.png"}, r"rejected_image\b.*\"\.\./a\.png\".*relative.*[Ff]ix"),
        ({"rejected_image_sha256": "SAME"}, r"image and rejected_image\b.*same pixels.*delete"),
        ({"rejected_image": ..., "rejected_image_sha256": ...}, "chosen equals rejected"),
    ],
)
def test_a_row_with_half_a_second_image_is_refused(file, changes, message):
    row = json.loads(file.read_text().splitlines()[0])
    changed = {key: row["image_sha256"] if value == "SAME" else value for key, value in (row | changes).items()}
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}) + "\n")
    with pytest.raises(InputError, match=f"contrast.jsonl:1: {message}"):
        read_pairs(file)


def test_ms_swift_holds_two_images_and_is_read_back(data, boxes):
    pairs = [replace(one, weight=0.5) for one in made(data, boxes)]
    _, export = write_pairs(select_pairs(PairSet(pairs, {})), data / "pairs.jsonl", {}, ["ms-swift"], data)
    record = json.loads(export.read_text().splitlines()[0])
    assert record["rejected_messages"] == record["messages"]
    assert record["rejected_images"] == [str((data / pairs[0].rejected_image).resolve())]
    assert read_published(export, data, progress=False) == PairSet(pairs, {})
    assert pairs_to_learn(export, data, progress=False) == pairs
    del record["rejected_messages"]  # ms-swift needs one of the two
    export.write_text(json.dumps(record))
    assert read_published(export, data, progress=False).pairs == pairs[:1]


@pytest.mark.parametrize("format", ["trl", "authors", "llama-factory"])
def test_formats_with_one_image_refuse_a_pair_with_two_before_anything_is_written(data, boxes, format):
    before = {*data.rglob("*")} | {data / "contrast"}
    kept = select_pairs(PairSet(made(data, boxes), {}))
    with pytest.raises(
        InputError, match=rf"x1#0: --format {format}\b.*chosen and rejected.*two images.*--format ms-swift"
    ):
        write_pairs(kept, data / "pairs.jsonl", {}, [format], data)
    assert {path for path in data.rglob("*") if path.parent.name != "contrast"} == before


def test_mmedpo_s_records_with_a_noised_image_are_read(data, boxes):
    one = made(data, boxes)[0]
    said = [{"from": "human", "value": f"<image>\n{one.question}"}, {"from": "gpt", "value": one.chosen}]
    images = {"image": one.image, "rejected_image": one.rejected_image}
    record = {"id": one.id, "weighted_score": 0.7, "conversations": said, "rejected_conversations": said} | images
    file = data / "mmedpo.json"
    file.write_text(json.dumps([record, record | {"rejected_image": one.image}]))
    assert read_published(file, data, progress=False) == PairSet(
        [replace(one, weight=0.7)], {"chosen equals rejected": 1}
    )
    copy = data / "copy.png"
    copy.write_bytes((data / one.image).read_bytes())
    file.write_text(json.dumps([record, record | {"rejected_image": "copy.png"}]))
    assert read_published(file, data, progress=False).skipped == {"the two images have the same pixels": 1}


def test_check_looks_at_both_images_and_takes_no_pair_for_its_own_opposite(data, file):
    assert pair_problems(file, data, progress=False) == []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    swapped = {"image": rows[0]["rejected_image"], "image_sha256": rows[0]["rejected_image_sha256"]} | {
        "rejected_image": rows[0]["image"],
        "rejected_image_sha256": rows[0]["image_sha256"],
    }
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | swapped | {"id": "8"}]))
    (data / rows[1]["rejected_image"]).write_bytes((data / rows[0]["image"]).read_bytes())
    (data / rows[2]["rejected_image"]).unlink()
    found = [(one.location.rpartition(":")[2], one.kind) for one in pair_problems(file, data, progress=False)]
    assert found == [("2", "image"), ("3", "image"), ("5", "contradiction")]


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(checkpoint, tmp_path):
    def read(**changes):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(SMALL | {"start": str(checkpoint)} | changes))
        return read_dpo_recipe(str(recipe))

    return read


def mixed(data: Path, file: Path) -> Path:
    """The contrast pairs, and among them a pair of two answers about one image of theirs."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    plain = {key: value for key, value in rows[0].items() if not key.startswith("rejected_image")}
    rows.insert(1, plain | {"id": "plain", "rejected": "In the spleen"})
    mixed = data / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return mixed


@pytest.mark.parametrize(("reference", "weighted"), [("live", False), ("cached", True)], ids=["plain", "weights"])
def test_the_loss_is_that_of_two_forwards_with_two_images(small, data, file, tmp_path, reference, weighted):
    """Value and gradient, of contrast pairs among another one, against every answer computed by itself."""
    pairs = mixed(data, file)
    if weighted:
        rows = [json.loads(line) for line in pairs.read_text().splitlines()]
        weights = [0.2, 1.0, 0.5, 0.3, 0.5]
        rows = [row | {"weight": weight} for row, weight in zip(rows, weights, strict=True)]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = prepare_run(small(reference=reference), pairs, data, progress=False)
    trainer = make_trainer(work, tmp_path / "run", tmp_path / "trace", progress=False)
    learnt = [value for value in trainer.model.parameters() if value.requires_grad]
    torch.manual_seed(0)
    with torch.no_grad():
        for value in learnt:
            value.add_(torch.randn_like(value) * 0.02)
    batch = work.collator([{"place": place} for place in range(5)])
    assert len(batch["pixel_values"]) == 6  # two true images and four noised copies
    value = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    gradient = torch.autograd.grad(value, learnt, allow_unused=True)

    start = work.checkpoint.model()

    def log_ratio(image: str, answered) -> torch.Tensor:
        pixels = work.collator.pixels(data / image)
        with torch.no_grad():
            before = alone(start, pixels, answered)
        return alone(trainer.model, pixels, answered) - before

    losses = []
    for place, pair in enumerate(work.pairs):
        chosen, rejected = work.collator.encoded(place)
        delta = log_ratio(pair.images[0], chosen) - log_ratio(pair.images[1], rejected)
        losses.append(-torch.nn.functional.logsigmoid(0.1 * delta) * ((pair.weight or 0.5) / 0.5))
    expected = torch.stack(losses).mean()
    assert len({round(one.item(), 5) for one in losses}) == 5
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = torch.autograd.grad(expected, learnt, allow_unused=True)
    apart = sum((a - b).square().sum() for a, b in zip(gradient, theirs, strict=True) if a is not None) ** 0.5
    assert apart < 1e-3 * sum(one.square().sum() for one in theirs if one is not None) ** 0.5


def test_the_reference_of_a_noised_copy_is_kept_apart(data, boxes):
    one, other = made(data, boxes)[:2]
    plain = replace(one, rejected="x", rejected_image=None, rejected_image_sha256=None)
    keys = {reference_key(pair, None) for pair in (one, other, plain, replace(plain, rejected=one.chosen))}
    assert len(keys) == 4


def test_the_contrast_is_learnt_by_the_tiny_network_of_the_tests(small, data, file, tmp_path):
    """The loss begins at ln 2 and goes down; the card and the dry run say how many pairs have two images."""
    work = prepare_run(small(epochs=8, batch=4, micro_batch=4, warmup=0.0, beta=0.5), file, data, progress=False)
    assert "4 pairs about 2 images" in report(work)
    assert "4 pairs have another image for the rejected answer" in report(work)
    train(work, tmp_path / "run", progress=False)
    steps = read_trace(tmp_path / "run" / "losses.jsonl")
    assert steps[0]["loss"] == pytest.approx(0.6931, rel=1e-3)
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert (steps[-1]["accuracy"], steps[-1]["margin"] > 0) == (1.0, True)
    assert "4 of them have another image for the rejected answer" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda image: image.unlink(), r"contrast\.jsonl:1: x1#0\b.*contrast/.*png is not in.*--images"),
        (lambda image: picture(9).save(image), r"contrast\.jsonl:1: x1#0\b.*contrast/.*png\b.*other pixels.*back"),
        (lambda image: image.write_bytes(b"x"), r"contrast\.jsonl:1: x1#0\b.*png: 1 bytes.*JPEG.*back"),
    ],
    ids=["gone", "changed", "broken"],
)
def test_dpo_looks_at_the_noised_copy_too(small, data, boxes, file, spoil, message):
    spoil(data / made(data, boxes)[0].rejected_image)
    with pytest.raises(InputError, match=message):
        prepare_run(small(), file, data, progress=False)
