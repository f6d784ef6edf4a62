"""Recipes: what ours say and where from, and what is refused."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from conftest import png

from stllava_eval.data.catalog import DATASETS, Row
from stllava_eval.data.splits import write_split
from stllava_eval.errors import InputError
from stllava_train.training.recipe_yaml import Part
from stllava_train.training.recipes import (
    RECIPES,
    DpoRecipe,
    SftRecipe,
    TrainingRecipe,
    check_prepared,
    read_dpo_recipe,
    read_recipe,
    recipe_names,
)

STAGES = {"llava-med-curriculum": ("align", "instruct")}
EVERY = [(name, stage) for name in recipe_names() for stage in STAGES.get(name, (None,))]
SOURCE = re.compile(
    r"\b(?:paper|script|README|arithmetic|our choice|from memory|transformers' own|[\w.]+\.py|LLaVA's code|LLaVA-1\.5)"
)


def file_with(folder: Path, text: str | bytes) -> str:
    file = folder / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


@pytest.fixture
def mine(tmp_path):
    """A recipe as a file: ours with a line replaced, or with lines behind it."""

    def write(old: str = "", new: str = "") -> str:
        text = (RECIPES / "sft" / "stllava-med-7b.yaml").read_text()
        assert old in text
        return file_with(tmp_path, text.replace(old, new, 1) if old else text + new)

    return write


# ours ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stage"), EVERY)
def test_ours_come_back_equal_after_being_written(name, stage, tmp_path):
    recipe = read_recipe(name, stage=stage)
    assert read_recipe(file_with(tmp_path, yaml.safe_dump(recipe.as_dict()))) == recipe


@pytest.mark.parametrize(
    "name", [*(f"sft/{one}" for one in recipe_names()), *(f"dpo/{one}" for one in recipe_names(DpoRecipe))]
)
def test_every_value_of_ours_names_its_source(name):
    for number, line in enumerate((RECIPES / f"{name}.yaml").read_text().splitlines(), 1):
        value, _, comment = line.partition("#")
        if value.strip() and not value.rstrip().endswith(":"):
            assert SOURCE.search(comment), f"{name}.yaml:{number}: {line}"


@pytest.mark.parametrize("name", recipe_names(DpoRecipe))
def test_ours_of_stage_2_come_back_equal_after_being_written(name, tmp_path):
    recipe = read_dpo_recipe(name)
    assert read_dpo_recipe(file_with(tmp_path, yaml.safe_dump(recipe.as_dict()))) == recipe


STAGE_2 = {  # original.md 4.5: the script where the paper is silent
    "loss": ("sigmoid",),
    "beta": 0.1,
    "epochs": 1.0,
    "batch": 256,
    "warmup": 0.03,
    "weight_decay": 0.0,
    "dtype": "bfloat16",
    "template": "v1",
    "language_model": Part("lora", 5e-6, 128, 256, 0.05),
    "projector": Part("full", 2e-5),
}


@pytest.mark.parametrize(
    ("name", "tower", "others"),
    [
        ("stllava-med-7b", Part("lora", 5e-6, 32, 64, 0.1), {"micro_batch": 4}),
        ("stllava-med-7b-script", Part("frozen"), {"micro_batch": 4, "reference": "live"}),
        ("stllava-med-7b-qlora", Part("lora", 5e-6, 32, 64, 0.1), {"four_bit": True, "micro_batch": 1}),
    ],
)
def test_stage_2_has_the_numbers_of_paper_and_script(name, tower, others):
    recipe = read_dpo_recipe(name)
    for key, value in (STAGE_2 | others | {"vision_tower": tower}).items():
        assert getattr(recipe, key) == value, key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss=[sigmod]", r"loss: sigmod: unknown\. Choose of sigmoid, hinge"),
        ("loss=sigmoid", "loss: 'sigmoid' is no list"),
        ("loss=[sigmoid, sft]", "give each its weight in loss_weights"),
        ("loss_weights=[0]", "loss_weights: all are 0"),
        ("loss_weights=[-1]", "loss_weights: -1. It is 0 or more"),
        ("loss=[exo_pair]", "label_smoothing: 0, and exo_pair needs more"),
        ("label_smoothing=0.5", "label_smoothing: 0.5. It is 0 or more and below 0.5"),
        ("beta=0", "beta: 0. It is more than 0"),
        ("ld_alpha=2", "ld_alpha: 2. It is from 0 to 1"),
        ("reference=policy", "reference: 'policy'. Choose one of cached, live"),
        ("evaluate_on=[slaek]", "evaluate_on: slaek: unknown. Choose of vqarad, slake, pathvqa"),
        ("evaluate_every=0", "evaluate_every: 0. It is at least 1"),
        ("sq_r=0.5", "sq_r: unknown"),
        ("template=either", "template: 'either'. Choose one of v1, v1_sq"),
    ],
)
def test_wrong_values_of_stage_2_are_named(change, message):
    with pytest.raises(InputError, match=message):
        read_dpo_recipe("stllava-med-7b", [change])


@pytest.mark.parametrize("changes", [["loss=[odpo]", "ld_alpha=0.5"], ["loss=[odpo, sft]", "loss_weights=[1, 1]"]])
def test_odpo_goes_with_no_other_loss(changes):
    assert read_dpo_recipe("stllava-med-7b", ["loss=[odpo]"]).loss == ("odpo",)
    with pytest.raises(InputError, match=r"loss: odpo goes with no other loss and with no ld_alpha. Set loss=\[odpo\]"):
        read_dpo_recipe("stllava-med-7b", changes)


def paper(**others) -> dict:
    """What stage 1 is by both the paper and the script, and `others`."""
    return {
        "template": "v1_sq",
        "sq_r": 0.5,
        "batch": 128,
        "warmup": 0.03,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
        "max_grad_norm": 1.0,
        "answer_weight": 1.0,
        "question_weight": 1.0,
        "max_tokens": 2048 - 1 + 576,
        "dtype": "bfloat16",
        "language_model": Part("lora", 2e-4, 128, 256, 0.05),
        **others,
    }


PAPER = paper(epochs=1.0, vision_tower=Part("lora", 2e-4, 32, 64, 0.2), projector=Part("full", 5e-5))
LLAVA_MED = {"batch": 128, "sq_r": 0.0, "template": "v1", "max_tokens": 2048, "vision_tower": Part("frozen")}


@pytest.mark.parametrize(
    ("name", "stage", "expected"),
    [
        pytest.param("stllava-med-7b", None, PAPER | {"micro_batch": 8, "four_bit": False}, id="paper"),
        pytest.param(
            "stllava-med-7b-script",
            None,
            paper(epochs=3.0, vision_tower=Part("frozen"), projector=Part("full", 2e-5), micro_batch=8),
            id="script",
        ),
        pytest.param("stllava-med-7b-no-questions", None, PAPER | {"sq_r": 0.0}, id="no questions"),
        pytest.param("stllava-med-7b-qlora", None, PAPER | {"micro_batch": 1, "four_bit": True}, id="24 GB"),
        pytest.param("finetuned", None, PAPER, id="Table 4"),
        pytest.param(
            "llava-med-curriculum",
            "align",
            LLAVA_MED | {"epochs": 1.0, "language_model": Part("frozen"), "projector": Part("full", 2e-3)},
            id="LLaVA-Med, captions",
        ),
        pytest.param(
            "llava-med-curriculum",
            "instruct",
            LLAVA_MED | {"epochs": 3.0, "language_model": Part("full", 2e-5), "projector": Part("full", 2e-5)},
            id="LLaVA-Med, instructions",
        ),
    ],
)
def test_ours_have_the_published_numbers(name, stage, expected):
    recipe = read_recipe(name, stage=stage)
    assert {key: getattr(recipe, key) for key in expected} == expected


def test_variants_differ_from_the_papers_in_nothing_else():
    def changed(name: str) -> set[str]:
        ours, other = read_recipe("stllava-med-7b").as_dict(), read_recipe(name).as_dict()
        return {key for key in ours if ours[key] != other[key]}

    assert changed("stllava-med-7b-script") == {"epochs", "vision_tower", "projector"}
    assert changed("stllava-med-7b-no-questions") == {"sq_r"}
    assert changed("stllava-med-7b-qlora") == {"micro_batch", "four_bit"}
    assert changed("finetuned") == set()


# changes ------------------------------------------------------------------------------------------------------------


def test_changes_reach_into_parts_and_the_last_one_wins():
    recipe = read_recipe("stllava-med-7b", ["epochs=2", "epochs=3", "language_model.learning_rate=1e-4", "seed=0"])
    assert (recipe.epochs, recipe.language_model.learning_rate, recipe.seed) == (3.0, 1e-4, 0)
    assert recipe.language_model.rank == 128
    assert read_recipe("stllava-med-7b", ["start=a=b"]).start == "a=b"
    assert read_recipe("stllava-med-7b", ["start_vision_tower="]).start_vision_tower is None


def test_a_part_that_is_frozen_forgets_its_lora(tmp_path):
    recipe = read_recipe("stllava-med-7b", ["vision_tower.train=frozen"])
    assert recipe.vision_tower == Part("frozen")
    assert recipe.as_dict()["vision_tower"] == {"train": "frozen"}
    assert read_recipe(file_with(tmp_path, yaml.safe_dump(recipe.as_dict()))) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochs", r"'epochs': not key=value, such as epochs=3\."),
        ("=3", r"'=3': not key=value"),
        ("epoch=3", r"stllava-med-7b\.yaml with epoch=3: epoch: unknown\. Did you mean epochs\?"),
        ("projector.learning=1", r"projector: learning: unknown\. Did you mean learning_rate\?"),
        ("language_model.lr=1", r"language_model: lr: unknown\. Did you mean learning_rate\?"),
        ("wd=0", r"wd: unknown\. Did you mean weight_decay\?"),
        ("projector=full", r"'projector=full': projector is a mapping\. Change one of its keys"),
        ("stages=1", r"stages: unknown"),
        ("epochs.more=1", r"epochs: \{'more': 1\} is not a number"),
        ("language_model.train.x=1", r"language_model: train: \{'x': 1\}\. Choose one of frozen, lora, full"),
        ("epochs=[1", r"epochs=\[1:1: no YAML"),
        ("epochs=@", r"epochs=@:1: no YAML"),
        ("epochs=*a", r"epochs=\*a:1: no YAML that recipes are written in \(an alias or a tag\)"),
    ],
)
def test_a_wrong_change_is_one_line(change, message):
    with pytest.raises(InputError, match=message):
        read_recipe("stllava-med-7b", [change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochs=three", "epochs: 'three' is not a number"),
        ("epochs='3'", "epochs: '3' is not a number"),
        ("epochs=true", "epochs: True is not a number"),
        ("epochs=null", "epochs: None is not a number"),
        ("epochs=.inf", "epochs: '.inf' is not a number"),
        ("epochs=nan", "epochs: 'nan' is not a number"),
        ("epochs=1e999", "epochs: inf is not a number"),
        ("epochs=1:30", "epochs: '1:30' is not a number"),
        ("batch=8.0", "batch: 8.0 is not a whole number"),
        ("batch=010", "batch: '010' is not a whole number"),
        ("batch=1_000", "batch: '1_000' is not a whole number"),
        ("four_bit=yes", "four_bit: 'yes' is not true or false"),
        ("four_bit=1", "four_bit: 1 is not true or false"),
        ("start=1", "start: 1 is not a text"),
        ("start=", "start: None is not a text"),
        ("start=''", "start: '' is not a text"),
        ("dtype=float16", r"dtype: 'float16'\. Choose one of float32, bfloat16"),
        ("dtype=[float32]", r"dtype: \['float32'\]\. Choose one of"),
        ("betas=0.9", r"betas: 0\.9 are not two numbers"),
        ("betas=[0.9]", r"betas: \[0\.9\] are not two numbers"),
        ("betas=[0.9, x]", "betas: 'x' is not a number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        read_recipe("stllava-med-7b", [change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sq_r=1.1", r"sq_r: 1\.1\. It is from 0 to 1\."),
        ("sq_r=-0.1", r"sq_r: -0\.1\. It is from 0 to 1\."),
        ("epochs=0", r"epochs: 0\. It is more than 0\."),
        ("batch=0", r"batch: 0\. It is at least 1\."),
        ("micro_batch=-1", r"micro_batch: -1\. It is at least 1\."),
        ("max_tokens=0", "max_tokens: 0"),
        ("save_every=0", "save_every: 0"),
        ("warmup=1", r"warmup: 1\. It is 0 or more and below 1\."),
        ("weight_decay=-1", r"weight_decay: -1\. It is 0 or more\."),
        ("max_grad_norm=0", "max_grad_norm: 0"),
        ("betas=[0.9, 1]", r"betas: 1\. It is 0 or more and below 1\."),
        ("seed=-1", "seed: -1"),
        ("seed=4294967296", "seed: 4.29497e"),
        ("seed=" + "9" * 100, r"seed: 1e\+100"),
        ("epochs=" + "9" * 100, r"epochs: 1e\+100"),
        ("epochs=" + "9" * 5000, r"epochs: '999"),
        ("answer_weight=-1", "answer_weight: -1"),
        ("language_model.learning_rate=-1", r"language_model\.learning_rate: -1\. It is 0 or more\."),
        ("language_model.rank=0", r"language_model\.rank: 0\. It is from 1 to 16384\."),
        ("language_model.rank=2147483648", r"language_model\.rank: 2\.14748e\+09\. It is from 1 to 16384\."),
        ("vision_tower.dropout=1", r"vision_tower\.dropout: 1\. It is 0 or more and below 1\."),
    ],
)
def test_a_value_out_of_range_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        read_recipe("stllava-med-7b", [change])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([f"{part}.train=frozen" for part in ("language_model", "vision_tower", "projector")], "every part is frozen"),
        (["projector.train=lora", "projector.rank=8", "projector.alpha=8", "projector.dropout=0"], "choose full or"),
        (["projector.train=lora"], r"projector\.train: lora\. A projector is never a LoRA: choose full or frozen\."),
        (["language_model.train=full"], "one tower is trained lora and the other full"),
        (["language_model.train=full", "vision_tower.train=frozen", "four_bit=true"], "four_bit: .* through a LoRA"),
        (["language_model.train=frozen", "vision_tower.train=frozen", "four_bit=true"], "four_bit: .* a LoRA only"),
        (["answer_weight=0", "sq_r=0"], "answer_weight: 0, and no question is learnt either"),
        (["answer_weight=0", "question_weight=0"], "answer_weight: 0, and no question is learnt either"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        read_recipe("stllava-med-7b", changes)


def test_questions_alone_may_be_learnt():
    assert read_recipe("stllava-med-7b", ["answer_weight=0"]).answer_weight == 0


# files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs: 1 ", "epoch: 1 ", r"mine\.yaml: epoch: unknown\. Did you mean epochs\?"),
        ("epochs: 1 ", "", r"mine\.yaml: epochs is missing\. A recipe gives every number"),
        ("", "epochs: 3\n", r"mine\.yaml:\d+: no YAML .*\(epochs is there twice\)"),
        ("  rank: 32 ", "  alpha: 32 ", r"alpha is there twice"),
        ("  rank: 32 ", "  ", r"vision_tower: rank is missing\. A part trained lora needs"),
        ("  train: full ", "  ", r"projector: train is missing\. Choose frozen, full, lora"),
        ("", "null: 1\n", r"null: unknown"),
        ("", "1: 1\n", r"1: unknown"),
        ("", "? [a]\n: 1\n", r"a key is no text"),
        ("", "? {a: 1}\n: 1\n", r"a key is no text"),
        ("seed: 42", "seed: !!int '42'", "an alias or a tag"),
        ("seed: 42", "seed: !!python/object/apply:os.getcwd []", "an alias or a tag"),
        ("", "---\nseed: 1\n", "found another document"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(mine, old, new, message):
    with pytest.raises(InputError, match=message):
        read_recipe(mine(old, new))


def test_a_part_that_is_null_is_refused(mine):
    text = (RECIPES / "sft" / "stllava-med-7b.yaml").read_text()
    file = mine(text[text.index("projector:\n") :], "projector:\n")
    with pytest.raises(InputError, match=r"projector: None is no mapping\. Give train, learning_rate"):
        read_recipe(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "it holds no keys", id="empty"),
        pytest.param("- 1\n", "it holds no keys", id="a list"),
        pytest.param(b"start: \xff\n", r"cannot be read \(it is not UTF-8\)", id="not UTF-8"),
        pytest.param("start: \0\n", r"no YAML .*\(special characters", id="a control character"),
        pytest.param("a: " + "[" * 9999, "nested too deeply", id="deep"),
        pytest.param("a: &a [x, x]\nb: [*a, *a]\n", r"mine\.yaml:2: no YAML .*\(an alias or a tag\)", id="aliases"),
        pytest.param("a: [1\nb: 2\n", r"mine\.yaml:2: no YAML", id="an open bracket"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        read_recipe(file_with(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_file_with_a_byte_order_mark_reads(mine):
    file = Path(mine())
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_recipe(str(file)) == read_recipe("stllava-med-7b")


def test_a_name_that_is_no_file_gets_the_nearest_of_ours(tmp_path):
    with pytest.raises(InputError, match=r"recipe stllava-med: no such file, .*Did you mean stllava-med-7b\?"):
        read_recipe("stllava-med")
    for name in (str(tmp_path), "", "a\0b", "x" * 5000):  # a folder, nothing, no possible name
        with pytest.raises(InputError, match="no such file"):
            read_recipe(name)


def test_a_file_that_may_not_be_read_is_refused(mine, monkeypatch):
    file = mine()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"mine\.yaml: cannot be read \(Permission denied\)"):
        read_recipe(file)


# stages -------------------------------------------------------------------------------------------------------------


def test_a_stage_overrides_the_keys_beside_it_and_keeps_the_others(mine):
    file = mine(new="stages:\n  one: {epochs: 7, projector: {learning_rate: 1e-3}}\n  two: {}\n")
    ours = read_recipe("stllava-med-7b")
    assert read_recipe(file, stage="one") == dataclasses.replace(ours, epochs=7.0, projector=Part("full", 1e-3))
    assert read_recipe(file, stage="two") == ours
    assert read_recipe(file, ["epochs=9"], stage="one").epochs == 9


@pytest.mark.parametrize(
    ("stages", "stage", "message"),
    [
        ("one: {}", None, r"mine\.yaml: no stage is named\. Choose one with --stage: one\."),
        ("one: {}\n  1: {}", "three", r"stage 'three': it has none of that name\. .*: one, 1\."),
        ("one: {epoch: 2}", "one", r"mine\.yaml, stage one: epoch: unknown\. Did you mean epochs\?"),
        ("one: {projector: null}", "one", r"stage one: projector: None is no mapping"),
        ("one: 3", "one", "give each stage's name and the keys that it changes"),
        ("[one]", "one", "give each stage's name"),
        ("{}", "one", "give each stage's name"),
        ("", "one", "give each stage's name"),
    ],
)
def test_a_wrong_stage_is_one_line(mine, stages, stage, message):
    with pytest.raises(InputError, match=message):
        read_recipe(mine(new=f"stages:\n  {stages}\n"), stage=stage)


def test_a_stage_of_a_recipe_without_any_is_refused():
    with pytest.raises(InputError, match=r"stage 'align': .*stllava-med-7b\.yaml has no stages\. Leave it out\."):
        read_recipe("stllava-med-7b", stage="align")


def test_every_key_is_told_in_the_docstring():
    kinds = TrainingRecipe, SftRecipe, DpoRecipe, Part
    text = " ".join(kind.__doc__ or "" for kind in kinds)
    named = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    left = {"train", "weight_decay", "language_model", "vision_tower", "projector", "seed"}  # their names say it
    assert named - left <= set(re.findall(r"\w+", text))


# evaluations on the way ---------------------------------------------------------------------------------------------


def test_a_validation_split_that_cannot_be_had_is_answered_with_what_can(home):
    def write(name: str, split: str, sample: bool) -> None:
        fields = dict.fromkeys(DATASETS[name].categories, "")
        row = Row("1", png((1, 2, 3)), "a", "Where?", "left", "open", fields)
        write_split(name, split, [row], edition="t", official=not sample, sample=sample, source="t", licence="t")

    def told(*names: str, command: str = "dpo") -> str:
        with pytest.raises(InputError) as refused:
            check_prepared(names, command)
        return str(refused.value)

    sets = "vqarad", "slake", "pathvqa"
    assert told(*sets) == (
        "evaluate_on: vqarad validation is not prepared. Run `stllava-eval prepare vqarad --sample`, or pass "
        "evaluate_on=[] (to `all`: dpo.evaluate_on=[])."
    )
    write("vqarad", "test", sample=False)
    write("slake", "validation", sample=False)
    assert told(*sets) == (
        "evaluate_on: vqarad validation is not prepared. VQA-RAD has none. Pass evaluate_on=[slake] (to `all`: "
        "dpo.evaluate_on=[slake])."
    )
    assert told("slake", "pathvqa") == (
        "evaluate_on: pathvqa validation is not prepared. Run `stllava-eval prepare pathvqa --split validation --from "
        "DIR` or `stllava-eval prepare pathvqa --sample`, or pass evaluate_on=[slake] (to `all`: "
        "dpo.evaluate_on=[slake])."
    )
    assert told("vqarad", command="sft").endswith("(to `all`: sft.evaluate_on=[]).")
    check_prepared(["slake"], "sft")
    check_prepared([], "sft")
