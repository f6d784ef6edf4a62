import pytest
import torch
from conftest import QUESTIONS, png

from stllava_eval.answering import Answerer, Question
from stllava_eval.datasets import DATASETS, Row
from stllava_eval.errors import InputError
from stllava_eval.images import decode
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
def trained(tmp_path_factory):
    """A checkpoint of a training of a few dozen steps, and its history."""
    out = tmp_path_factory.mktemp("tiny") / "checkpoint"
    torch.set_num_threads(1)
    return out, tiny.train_tiny(rows(), rows(1), out, effort=0.05, progress=False)


def test_the_loss_falls(trained):
    _, history = trained
    for part in ("text", "joint"):
        losses = history["losses"][part]
        assert sum(losses[-3:]) / 3 < 0.6 * losses[0], part
    assert history["validation"][-1]["all"] > 0.5


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


def test_the_checkpoint_answers_what_it_was_taught(trained):
    out, _ = trained
    answerer = Answerer(str(out))
    taught = rows(1)["vqarad"]
    questions = [Question(row.question, lambda row=row: decode(row.image), 16) for row in taught]
    answers = dict(answerer.answer(questions, progress=False))
    assert [answers[place].text for place in range(len(taught))] == [row.reference for row in taught]


def test_the_folder_is_a_network_with_the_prototype_extractor(trained):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import stllava_eval.network  # noqa: F401  registers the classes

    out, _ = trained
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
        tiny.train_tiny(rows(1), {}, tmp_path / name, seed=seed, effort=0.004, progress=False)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_packed_questions_have_the_logits_that_each_has_alone():
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer(rows())
    model = tiny.make_model(tokenizer).eval()
    prompt, album = tiny.prompt_ids(tokenizer), tiny.read_album(rows(2), tokenizer)
    pixels = album.pixels[:2].float() / 255
    with torch.inference_mode():
        packed = tiny.pack(prompt, album.questions[:2], 0)
        together = model.lm_head(tiny.packed_hidden(model, packed, pixels))
        for image, questions in enumerate(album.questions[:2]):
            for number, (question, answer) in enumerate(questions):
                ids = torch.tensor([prompt + question + answer])
                alone = model(input_ids=ids, pixel_values=pixels[image : image + 1]).logits[0, len(prompt) :]
                of_question = packed.owners[image] == 2 * image + number
                torch.testing.assert_close(together[image, of_question], alone, atol=1e-4, rtol=1e-4)


def test_training_on_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="none"):
        tiny.train_tiny({"vqarad": []}, {}, tmp_path)
