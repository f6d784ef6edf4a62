import shutil

import pytest
import torch
from conftest import QUESTIONS, png

from stllava_eval.data.catalog import DATASETS, Row
from stllava_eval.data.splits import write_split
from stllava_eval.errors import InputError
from stllava_eval.images import decode
from stllava_eval.inference.answerer import Answerer
from stllava_eval.inference.types import Question
from stllava_train import tiny


def rows(images: int = 3) -> dict[str, list[Row]]:
    return {
        name: [
            Row(
                id=f"{image}-{number}",
                image=png((80 * image, 255 - 80 * image, 40)),
                image_id=f"{image}.png",
                question=question,
                reference=reference,
                kind=kind,
                categories=dict.fromkeys(DATASETS[name].categories, f"concept {number}"),
            )
            for image in range(images)
            for number, (question, reference, kind) in enumerate(questions)
        ]
        for name, questions in QUESTIONS.items()
    }


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The network after a few dozen steps, and their losses."""
    out = tmp_path_factory.mktemp("tiny") / "start"
    torch.set_num_threads(1)
    return out, tiny.write_start(rows(), out, effort=0.1, progress=False)


def test_both_towers_learn(start):
    _, losses = start
    assert {name: len(found) for name, found in losses.items()} == {"vision": 70, "text": 30}
    for name, share in (("vision", 0.9), ("text", 0.6)):  # an image's facts are few and partly contradict each other
        assert sum(losses[name][-3:]) / 3 < share * losses[name][0], name


def test_stage_1_teaches_it_to_answer_and_to_ask(start, tmp_path, home):
    """The demo's way from rows to answers, on three images, each step through its own command's function."""
    from stllava_train.data.export import write_vqa
    from stllava_train.training.recipes import read_recipe
    from stllava_train.training.resume import read_trace
    from stllava_train.training.sft import prepare_run, train

    about = {"edition": "for tests", "official": False, "sample": True, "source": "tests", "licence": "CC0-1.0"}
    for name, of_set in rows().items():
        write_split(name, "train", of_set, **about)
    written = [write_vqa(name, tmp_path / "data") for name in rows()]
    changes = [f"start={start[0]}", "epochs=40", "batch=6", "micro_batch=6", "augment=false"]
    recipe = read_recipe("tiny", changes)
    work = prepare_run(recipe, [one.path for one in written], progress=False)
    train(work, tmp_path / "run", progress=False)
    losses = [line["question_loss"] for line in read_trace(tmp_path / "run" / "losses.jsonl")]
    first, *_, last = [loss for loss in losses if loss is not None]
    assert last < 0.5 * first
    answerer = Answerer(str(tmp_path / "run"))
    taught = rows()["vqarad"]
    questions = [Question(row.question, lambda row=row: decode(row.image), 16) for row in taught]
    answers = dict(answerer.answer(questions, progress=False))
    assert [answers[place].text for place in range(len(taught))] == [row.reference for row in taught]
    history = ((taught[0].question, taught[0].reference),)
    asked = Question(None, lambda: decode(taught[0].image), 32, history=history)
    ((_, question),) = answerer.answer([asked], progress=False)
    assert question.text in {row.question for row in taught}


def test_the_language_model_is_told_the_true_facts_of_an_image_in_words():
    class Words:  # a tokenizer whose ids are the places of these words
        known = ("axial", "coronal", "upside", "down", "<image>")

        def get_vocab(self):
            return {word: place for place, word in enumerate(self.known)}

        def __call__(self, text, add_special_tokens):
            from types import SimpleNamespace

            return SimpleNamespace(input_ids=[self.known.index(word) for word in text.split()])

    answers = [("plane", "axial"), ("plane", "coronal"), ("upside down", "no"), ("upside down", "yes")]
    facts = [[(0, True), (1, False), (2, True)], [(1, True), (3, True)], []]
    told = tiny._fact_words(tiny.Album(torch.zeros(0), [], facts, answers), Words())
    assert told.tolist() == [[1, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("question", "reference", "fact"),
    [
        pytest.param("In which plane is it?", "axial", (0, True), id="an open answer is true"),
        pytest.param("Is the plane coronal?", "yes", (1, True), id="yes to a value"),
        pytest.param("Is the plane axial?", "no", (0, False), id="no to a value"),
        pytest.param("Is it so?", "no", None, id="names no value"),
    ],
)
def test_the_facts_that_a_row_states(question, reference, fact):
    row = Row("1", b"", "1.png", question, reference, "open", {"question_type": "plane"})
    assert tiny.read_fact(row, [("plane", "axial"), ("plane", "coronal")]) == fact


def test_the_folder_is_a_network_with_the_prototype_extractor(start):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import stllava_eval.network  # noqa: F401  registers the classes

    out, _ = start
    processor = AutoProcessor.from_pretrained(out)
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.config.projector_type == "prototype"
    inputs = processor(images=decode(png((10, 20, 30))), text="USER: <image>\nWhy? ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == tiny.IMAGE_TOKENS
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    torch.set_num_threads(1)
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny.write_start(rows(1), tmp_path / name, seed=seed, effort=0.004, progress=False)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.parametrize(
    ("out", "seed", "message"),
    [
        ("file", 0, r"file: no folder can be made there \(File exists\)\. Choose another --out"),
        ("file/start", 0, r"file/start: no folder can be made there \(Not a directory\)"),
        ("notes", 0, r"notes: it is not empty and holds no tiny start\. Choose another --out"),
        ("run", 0, r"run: it is not empty and holds no tiny start"),
        ("new", -1, r"seed -1: it is from 0 to 4294967295\."),
        ("new", 2**32, r"seed 4294967296: it is from 0"),
    ],
)
def test_a_place_or_a_seed_that_cannot_be_is_refused_before_any_training(start, tmp_path, out, seed, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("{}")
    run = shutil.copytree(start[0], tmp_path / "run")
    (run / "run.json").write_text("{}")
    with pytest.raises(InputError, match=message):
        tiny.write_start(rows(1), tmp_path / out, seed=seed, effort=0.004, progress=False)
    assert not (tmp_path / "new").exists()


def test_a_tiny_start_is_made_again_in_its_own_folder(tmp_path):
    for seed in (0, 1):
        tiny.write_start(rows(1), tmp_path, seed=seed, effort=0.004, progress=False)
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.iterdir()} == tiny.FILES


def test_training_on_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="none"):
        tiny.write_start({"vqarad": []}, tmp_path)
