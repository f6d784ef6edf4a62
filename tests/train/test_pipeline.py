"""`all`: which stages are made, skipped, gone on with and made again. The stages themselves are made up here."""

import dataclasses
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from stllava_eval.data.splits import read_rows, write_split
from stllava_eval.errors import InputError
from stllava_eval.storage import file_sha256
from stllava_train import pipeline as module
from stllava_train.pipeline import Pipeline
from stllava_train.training.recipes import RECIPES, PipelineRecipe, read_pipeline, recipe_names

STAGES = ["sft", "eval/sft", *(f"round-1/{name}" for name in ("candidates", "judged", "pairs", "dpo")), "eval/round-1"]


class Made:
    """In place of the commands: writes what they would, made of what they read. `dies` at a stage before its end."""

    def __init__(self, out: Path) -> None:
        self.out, self.calls, self.dies, self.fails = out, [], None, {}
        self.left: list[dict[str, int]] = []  # what each call of the judge leaves

    def __call__(self, command: list[str]) -> int:
        name, options = command[0], dict(itertools.pairwise(command))
        out = Path(options["--out"])
        stage = str(out.relative_to(self.out)).removesuffix(".jsonl")
        self.calls.append(f"{stage} resumed" if "--resume" in command else stage)
        read = [word for word in command if word.endswith((".json", ".jsonl")) and word != str(out)]
        said = [word for word in command if "/" not in word and word != "--resume"]
        told = json.dumps([[Path(word).read_text() for word in read], said])
        if name in ("sft", "dpo", "run"):
            out.mkdir(parents=True, exist_ok=True)
            made = {"finished": self.dies != stage, "of": told}
            if name == "run":
                of = Path(options["--checkpoint"]) / "run.json"
                made = {"checkpoint": {"sha256": file_sha256(of)}, "of": told}
            if not (name == "run" and self.dies == stage):
                (out / "run.json").write_text(json.dumps(made))
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"of": told}) + "\n")
            out.with_suffix(".json").write_text("{}")
            if name == "judge" and self.left:
                left = self.left.pop(0)
                rows = [{"outcome": "scored"}] * left.pop("scored", 1) + [{"cut_at": [1024, 0]}] * left.pop("cut", 0)
                rows += [{"of": told, "left": left}]
                out.write_text("".join(json.dumps(row) + "\n" for row in rows))
                out.with_suffix(".json").write_text(json.dumps({"left": {"m": left}}))
                return int(any(left.values()))
        if self.dies == stage:
            raise KeyboardInterrupt
        return self.fails.get(stage, 0)


@pytest.fixture
def run(tmp_path, monkeypatch, home):
    """Calls the pipeline; returns the stages that were made."""
    data, images, out = tmp_path / "data.json", tmp_path / "images", tmp_path / "run"
    images.mkdir()
    (images / "a.png").write_bytes(b"picture")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    data.write_text(json.dumps([{"id": 1, "image": "images/a.png", "conversations": turns}]))
    made = Made(out)
    monkeypatch.setattr(module, "_evaluate", made)

    def checkpoint(self, name):
        file = Path(name) / "run.json"
        return file_sha256(file) if file.exists() else name

    monkeypatch.setattr(Pipeline, "_checkpoint", checkpoint)

    def call(*changes: str, dies: str | None = None) -> list[str]:
        made.calls, made.dies = [], dies
        changes = ("sft.start=somewhere", *changes)
        pipeline = Pipeline("tiny", [*changes, "dpo.evaluate_on=[]"], [data], images, out, call=made)
        if dies:
            with pytest.raises(KeyboardInterrupt):
                pipeline.run()
        else:
            assert pipeline.run() == 0
        return made.calls

    call.data, call.images, call.out, call.fails, call.left = data, images, out, made.fails, made.left
    return call


def test_every_stage_is_made_once(run, capsys):
    assert run() == STAGES
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert [shlex.split(line)[1] for line in commands] == [
        "stllava-train",
        "stllava-eval",
        *["stllava-train"] * 4,
        "stllava-eval",
    ]
    assert run() == []
    assert capsys.readouterr().out.count("done before, of the same inputs") == len(STAGES)


def test_a_change_is_followed_as_far_as_it_reaches(run):
    run()
    assert run("dpo.beta=0.3") == ["round-1/dpo", "eval/round-1"]
    assert run() == ["round-1/dpo", "eval/round-1"]
    assert run("pairs.balance_verdict=false") == STAGES[-3:]
    assert run("candidates.questions=2", "pairs.balance_verdict=false") == STAGES[2:]
    (run.images / "a.png").write_bytes(b"another picture")
    assert run("candidates.questions=2", "pairs.balance_verdict=false")[0] == "sft"


def test_files_written_again_with_the_same_bytes_change_nothing(run):
    run()
    text = run.data.read_text()
    run.data.unlink()
    run.data.write_text(text)
    assert run() == []


def test_what_was_made_of_something_else_is_kept_aside(run):
    run()
    before = (run.out / "round-1" / "pairs.jsonl").read_text()
    run("pairs.balance_verdict=false")
    assert (run.out / "replaced" / "round-1-pairs-1" / "pairs.jsonl").read_text() == before
    assert (run.out / "replaced" / "round-1-pairs-1" / "pairs.json").exists()
    assert (run.out / "replaced" / "round-1-dpo-1" / "dpo" / "run.json").exists()
    assert not list((run.out / "replaced").glob("round-1-candidates*"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_broken_off_goes_on_and_none_before_it_is_made_again(run, stage):
    run(dies=stage)
    calls = run()
    resumed = f"{stage} resumed" if stage in ("sft", "round-1/dpo") else stage
    assert calls == [resumed, *STAGES[STAGES.index(stage) + 1 :]]
    assert not (run.out / "replaced").exists()


@pytest.mark.parametrize("stage", ["sft", "eval/sft", "round-1/dpo", "eval/round-1"])
def test_a_stage_that_ended_just_before_the_kill_is_not_called_again(run, stage):
    run()
    stages = json.loads((run.out / "stages.json").read_text())
    del stages[stage]["made"]
    (run.out / "stages.json").write_text(json.dumps(stages))
    assert run() == []


def test_a_broken_off_stage_of_other_inputs_begins_again(run):
    run(dies="round-1/dpo")
    assert run("dpo.beta=0.5") == ["round-1/dpo", "eval/round-1"]
    assert (run.out / "replaced" / "round-1-dpo-1" / "dpo" / "run.json").exists()


def test_each_round_starts_from_the_newest_checkpoint_and_asks_again(run, capsys):
    second = [stage.replace("round-1", "round-2") for stage in STAGES[2:]]
    run()
    capsys.readouterr()
    assert run("rounds=2") == second
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    asked, trained = commands[0], commands[3]
    assert asked[asked.index("--checkpoint") + 1] == str(run.out / "round-1" / "dpo")
    assert "seed=1" in asked
    assert f"start={run.out / 'round-1' / 'dpo'}" in trained


def pipeline_of(run, *changes: str) -> Pipeline:
    changes = ("sft.start=somewhere", "dpo.evaluate_on=[]", *changes)
    return Pipeline("tiny", changes, [run.data], run.images, run.out, call=lambda command: 2)


def test_a_failed_stage_stops_the_rest_and_is_called_again(run):
    run.fails["round-1/judged"] = 1  # something has no verdict
    with pytest.raises(AssertionError):
        run()
    assert not (run.out / "round-1" / "pairs.jsonl").exists()
    run.fails.clear()
    assert run() == STAGES[3:]


def test_a_budget_of_nothing_is_handed_on(run, capsys):
    run("budget=0")
    assert "--budget 0" in capsys.readouterr().out
    run("budget=null")
    assert "--budget" not in capsys.readouterr().out


def test_the_run_goes_on_without_what_the_budget_did_not_reach_and_asks_it_when_the_budget_is_raised(run, capsys):
    run.left += [{"failed": 0, "not_asked": 4}]
    assert run("budget=1") == STAGES
    assert "round-1/judged: left out of the pairs: 4 not asked, by the budget" in capsys.readouterr().out
    assert run("budget=1") == []
    run.left += [{"failed": 0, "not_asked": 0}]
    assert run("budget=2") == STAGES[3:]
    assert not list((run.out / "replaced").glob("round-1-judged*"))  # it was continued
    assert run("budget=2") == run("budget=3") == []


def test_room_to_think_is_handed_on_and_asks_again_what_was_cut(run, capsys):
    run.left += [{"failed": 0, "not_asked": 0, "cut": 2}]
    assert run() == STAGES
    assert not {"--max-tokens", "--reasoning"} & set(capsys.readouterr().out.split())
    assert json.loads((run.out / "stages.json").read_text())["round-1/judged"]["bounds"] == {"budget": None}
    assert run() == []
    assert run("judge_max_tokens=2048", "judge_reasoning=true") == STAGES[3:]
    assert "--max-tokens 2048 --reasoning --out" in capsys.readouterr().out
    assert not list((run.out / "replaced").glob("round-1-judged*"))  # it was continued
    assert run("judge_max_tokens=2048", "judge_reasoning=true") == run() == []  # nothing is cut any more


def test_what_fails_again_is_left_out_and_what_succeeds_is_not(run, capsys):
    run.left += [{"failed": 3, "not_asked": 0}, {"failed": 1, "not_asked": 0}, {"failed": 1, "not_asked": 0}]
    assert run() == [*STAGES[:4], "round-1/judged", "round-1/judged", *STAGES[4:]]
    assert "round-1/judged: left out of the pairs: 1 failed twice" in capsys.readouterr().out
    assert run() == []


def test_a_run_in_which_nothing_is_judged_ends(run):
    run.left += [{"failed": 0, "not_asked": 16, "scored": 0}]
    with pytest.raises(InputError, match=r"round-1/judged: nothing is judged \(16 not asked, by the budget\)\. Raise"):
        run("budget=0")


def test_what_a_refused_command_would_have_replaced_is_put_back(run, capsys):
    run()
    before = (run.out / "round-1" / "pairs.jsonl").read_text()
    assert pipeline_of(run, "pairs.rule=authors").run() == 2
    assert (run.out / "round-1" / "pairs.jsonl").read_text() == before
    assert "is back in its place" in capsys.readouterr().out
    assert not (run.out / "replaced").exists()
    assert run() == []


def test_two_processes_do_not_write_one_run(run):
    from stllava_eval.storage import alone

    run()
    with alone(run.out), pytest.raises(InputError, match="another process is writing it"):
        run()


@pytest.mark.parametrize("text", ["{", "[]", '{"sft": 5}', '{"sft": {}}', ""])
def test_a_damaged_record_of_what_is_done_is_no_reason_to_do_it_again(run, text):
    run()
    (run.out / "stages.json").write_text(text)
    with pytest.raises(InputError, match=r"stages.json: damaged"):
        run()
    assert not (run.out / "replaced").exists()


def test_files_that_are_no_images_change_nothing(run):
    run()
    (run.images / "Thumbs.db").write_bytes(b"hi")
    assert run() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("judges=[human:ada]", "a person judges by"),
        ("judges=[gpt-4o]", "needs a key"),
        ("budget=-1", "budget: -1. It is 0 or more"),
        ("judge_max_tokens=0", "judge_max_tokens: 0. It is from 1 to 999,999, or null"),
        ("pairs=[--balance-verdict]", r"pairs is a mapping. Change one of its keys, such as pairs.balance_verdict="),
        ("pairs.nope=1", "pairs: nope: unknown. Did you mean"),
        ("pairs.seed=3", "pairs: seed: unknown"),
        ("pairs.rule=theirs", "pairs: rule: 'theirs'. Choose one of ours, authors"),
        ("pairs.format=[trl, x]", "pairs: format: 'x'. Choose one of trl"),
        ("pairs.min_margin=20", "--min-margin 20.0: points of a scale"),
        ("pairs.held_out=1", "--held-out 1.0: no share"),
        ("pairs.per_image=0", "--per-image 0: no pair"),
        ("tasks=[nope]", "tasks: nope: unknown"),
        ("dpo.recipe=nope", "recipe nope: no such file"),
        ("candidates.recipe=nope", "candidates.recipe: nope: unknown"),
        ("dpo.foo=1", "foo: unknown"),
        ("dpo.loss=[foo]", "loss: foo: unknown"),
        ("candidates.foo=1", "foo: unknown"),
        ("candidates.seed=9", "candidates.seed: seed= is that of every stage"),
        ("sft.seed=9", "sft.seed: seed= is that of every stage"),
        ("dpo.start=elsewhere", "dpo.start: a round starts from the newest checkpoint"),
        ("dpo.evaluate_on=[slake]", r"slake validation is not prepared.*to `all`: dpo\.evaluate_on=\[\]"),
        ("sft.evaluate_on=[slake]", r"slake validation is not prepared.*to `all`: sft\.evaluate_on=\[\]"),
    ],
)
def test_what_is_wrong_with_a_later_stage_is_told_before_the_first(run, monkeypatch, change, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match=message):
        pipeline_of(run, change)
    assert not run.out.exists()


def test_stage_1_is_made_again_where_the_questions_it_is_chosen_by_have_changed(run, validation, capsys):
    assert run("sft.evaluate_on=[slake]") == STAGES
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("$ stllava-train sft"))
    assert "evaluate_on=[slake]" in shlex.split(command)
    assert run("sft.evaluate_on=[slake]") == []
    rows = [dataclasses.replace(row, reference="a heart") for row in read_rows("slake", "validation")]
    facts = {"edition": "t", "official": False, "sample": True, "source": "t", "licence": "t"}
    write_split("slake", "validation", rows, **facts)
    assert run("sft.evaluate_on=[slake]")[0] == "sft"


def test_a_run_in_the_folder_of_images_is_refused(run):
    run.out = run.images / "run"
    with pytest.raises(InputError, match=r"are one inside the other. Choose another folder"):
        pipeline_of(run)


def test_a_folder_of_something_else_is_refused(run):
    run.out.mkdir()
    (run.out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="there is something that is no such run"):
        run()


@pytest.mark.parametrize("name", recipe_names(PipelineRecipe))
def test_our_recipes_name_what_there_is(name):
    from stllava_train.preferences.candidates import PRESETS, check_settings
    from stllava_train.training.recipe_yaml import changed
    from stllava_train.training.recipes import read_dpo_recipe, read_recipe

    whole = read_pipeline(name)
    read_recipe(whole.sft.recipe, whole.sft.changes)
    read_dpo_recipe(whole.dpo.recipe, whole.dpo.changes)
    check_settings(changed(PRESETS[whole.candidates.recipe], whole.candidates.changes))
    assert (RECIPES / "all" / f"{name}.yaml").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rounds=0", "rounds: 0. It is at least 1"),
        ("judge_reasoning=yes", "judge_reasoning: 'yes' is not true or false"),
        ("judge_max_tokens=1.5", "judge_max_tokens: 1.5 is not a whole number"),
        ("images=0", "images: 0. It is at least 1"),
        ("judges=[]", "name at least one of each"),
        ("round=2", "round: unknown. Did you mean rounds?"),
        ("judge_preset=theirs", "judge_preset: 'theirs'. Choose one of ours, authors"),
        ("sft=tiny", "sft is a mapping"),
        ("dpo.recipe=5", "dpo: recipe: 5 is not a text"),
    ],
)
def test_a_wrong_value_is_named(change, message):
    with pytest.raises(InputError, match=message):
        read_pipeline("tiny", [change])


def test_a_recipe_without_room_to_think_is_that_of_earlier_releases(tmp_path):
    lines = (RECIPES / "all" / "tiny.yaml").read_text().splitlines()
    (tmp_path / "old.yaml").write_text("\n".join(line for line in lines if not re.match("judge_(max|reason)", line)))
    assert read_pipeline(str(tmp_path / "old.yaml")) == read_pipeline("tiny")
