"""The commands of docs/evaluate/baselines.md, run as they stand there: on tiny systems, against a server of our own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import author_layouts as layouts
import numpy as np
import pytest
import torch
from conftest import ROOT, write_llama_tokenizer, write_small_sets
from fault_server import FaultServer, refuses, says
from PIL import Image
from transformers import CLIPImageProcessor, LlamaConfig, MistralConfig

from stllava_eval.network.checkpoint import open_checkpoint

DOCS = (ROOT / "docs" / "evaluate" / "baselines.md").read_text(encoding="utf-8")
SYSTEMS = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| (?!system).*", DOCS, re.M)]
BLOCKS = "".join(re.findall(r"^```sh\n(.*?)^```$", DOCS, re.M | re.S)).replace("\\\n", " ")
COMMANDS = [row[1] for row in SYSTEMS] + BLOCKS.splitlines()
LLAVA, SQ, MED = "llava-hf/llava-1.5-7b-hf", "ZachSun/sqllava-lora-7b", "microsoft/llava-med-v1.5-mistral-7b"
TOWER, BASE = (f"Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12{end}" for end in ("", "_vicuna-7b-v1.5"))
ELSEWHERE = [  # answers to vqarad, where "yes" and "the left lung" are right; accuracy, and recall but for the article
    ("med-flamingo", "Yes.", "the left lung", 1, 1),
    ("medvint", "No.", "left", 0, 0.5),
    ("llava-med-v1", "It is normal.", "a lung", 0, 0.5),
    ("umed-lvlm", "Yes.", "liver", 1, 0),
]
DRIVER = """# what the installed programs do, one command after the other, for which lmms-eval is imported once
import contextlib, importlib.metadata, io, json, os, shlex, sys, lmms_eval.__main__, torch
torch.set_num_threads(1)
before = dict(os.environ)
for command in json.load(sys.stdin):
    settings = dict(word.split("=", 1) for word in shlex.split(command) if word.startswith("STLLAVA_"))
    os.environ.clear()
    os.environ.update(before | settings)
    sys.argv = shlex.split(command)[len(settings) :]
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=sys.argv[0])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = script.load()() or 0
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory, checkpoint) -> SimpleNamespace:
    """The folder in which the commands were run, where the hub's names are folders; what each gave; the keys shown."""
    folder = tmp_path_factory.mktemp("baselines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STLLAVA_HOME", str(folder / "home"))
        patch.chdir(folder)
        write_small_sets()
        manifest = Path("home/data/vqarad/test.json")  # reported rows stand beside official splits alone
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"official": True, "sample": False}))
        shutil.copytree(checkpoint, LLAVA)
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(LLAVA)  # as on the hub: no padding
        write_flat(Path(MED), MistralConfig, architectures=["LlavaMistralForCausalLM"], model_type="llava_mistral")
        write_flat(Path(BASE), LlamaConfig, architectures=["Share4VLlamaForCausalLM"], model_type="share4v")
        write_sq_llava(Path(SQ))
        Path("answers").mkdir()
        for name, *texts, _, _ in ELSEWHERE:
            lines = [{"question_id": f"test-{image}-{n}", "text": texts[n]} for image in range(4) for n in (0, 1)]
            Path(f"answers/{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    faults = {
        "Is there a mass?": [says(None, refusal="I cannot judge scans")],
        "What organ is shown?": [refuses(400, "too large")],
        "Are nuclei seen?": [refuses(429)],  # passes
    }
    environment = os.environ | {"STLLAVA_HOME": str(folder / "home"), "OPENAI_API_KEY": "sk-test"}
    with FaultServer(faults, models=["gpt-4o"]) as server:
        local = json.dumps([command.replace("https://api.openai.com/v1", server.url) for command in COMMANDS])
        call = {"capture_output": True, "text": True, "timeout": 300, "cwd": folder, "env": environment}
        ran = subprocess.run([sys.executable, "-c", DRIVER], input=local, **call)
    assert ran.returncode == 0, ran.stderr[-2000:]
    gave = dict(zip(COMMANDS, map(json.loads, ran.stdout.splitlines()), strict=True))
    return SimpleNamespace(folder=folder, gave=gave, keys=server.keys)


def write_flat(folder: Path, text: type, **named) -> None:
    """A whole model in the original layout, whose answers differ and end soon."""
    model = layouts.make("mlp2x_gelu", rows=32000, text=text)
    with torch.no_grad():
        for weight in (one for one in model.parameters() if one.dim() > 1):
            weight.normal_(0, 0.12)
        model.lm_head.weight[2] *= 6
    layouts.write_flat_config(folder, model, mm_vision_tower=TOWER, **named)
    layouts.write_tower(Path(TOWER), model)
    torch.save(layouts.original_names(model), folder / "pytorch_model.bin")
    write_llama_tokenizer(folder)


def write_sq_llava(folder: Path) -> None:
    """A prototype extractor, and LoRAs of language model and tower."""
    names = layouts.original_names(model := layouts.make())
    layouts.write_flat_config(folder, model, mm_vision_tower=TOWER, vocab_size=32000)
    torch.save(layouts.only(names, "mm_projector"), folder / "non_lora_trainables.bin")
    settings = {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "base_model_name_or_path": BASE}
    for place, part in ((folder, "self_attn.o_proj"), (folder / "Vit-lora", "mlp.fc1")):
        place.mkdir(exist_ok=True)
        whole = {name.removeprefix("model.vision_tower."): one for name, one in names.items() if f"{part}.w" in name}
        torch.save(layouts.lora_file(layouts.lora(whole, 4, 1)), place / "adapter_model.bin")
        (place / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": [part]}))


def rows(done, reported: bool = False) -> dict[str, dict]:
    """The board's rows of vqarad by system: those that papers report, or the others, which may have the same names."""
    board = json.loads((done.folder / "board" / "board.json").read_text())
    of_task = [row for row in board["rows"] if row["task"] == "vqarad"]
    return {row["system"]: row for row in of_task if (row["kind"] == "reported") is reported}


def run(done, name: str) -> dict:
    return json.loads((done.folder / "runs" / name / "run.json").read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_docs_ends_well_and_leaves_what_it_names(done, command):
    code, out = done.gave[command]
    assert code == (2 if " gate " in command else 0), out[-2000:]
    assert ("TOO FEW" in out) == (" gate " in command)  # 4 questions decide nothing
    for place in re.findall(r"(?:--out |STLLAVA_RUN=)(\S+)", command):
        assert (done.folder / place / ("index.html" if place == "board" else "run.json")).is_file()


def test_every_system_of_the_docs_names_a_test_that_is_here():
    assert len(SYSTEMS) == 8
    assert {row[3] for row in SYSTEMS} <= set(globals())


def test_llava_v15_is_padded_to_a_square_although_its_own_processor_cuts(done):
    assert run(done, "llava-v1.5")["image_preprocessing"] == "pad to a square, CLIP (PIL), 28 px"
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    own = CLIPImageProcessor.from_pretrained(done.folder / LLAVA)
    square = Image.new("RGB", (40, 40), tuple(int(255 * mean) for mean in own.image_mean))
    square.paste(image, (0, 5))
    padded = (np.asarray(square.resize((28, 28), Image.Resampling.BICUBIC)) / 255 - own.image_mean) / own.image_std
    ours = open_checkpoint(str(done.folder / LLAVA)).processor().image_processor(image)["pixel_values"][0]
    np.testing.assert_allclose(np.moveaxis(np.asarray(ours), 0, -1), padded, atol=1e-5)
    assert np.abs(np.asarray(own(image)["pixel_values"][0]) - np.asarray(ours)).max() > 0.1


def test_failed_requests_to_a_server_are_unanswered_and_in_no_mean(done):
    tasks, row = run(done, "gpt-4o")["tasks"], rows(done)["gpt-4o"]
    assert {name: len(task["unanswered"]) for name, task in tasks.items()} == {"vqarad": 2, "slake": 0, "pathvqa": 0}
    assert row["unanswered"] == 2
    assert [row["scores"][metric]["n"] for metric in ("closed_accuracy", "recall")] == [3, 3]  # of four each
    assert set(done.keys) == {"Bearer sk-test"}
    (board,) = [out for command, (_, out) in done.gave.items() if "leaderboard" in command]
    assert "gpt-4o: scored on 6 of 8 questions, 2 unanswered" in board


@pytest.mark.parametrize(
    ("name", "source", "merged", "prompt"),
    [
        ("sq-llava", SQ, [2, 3], "USER: <image>\n{question} ASSISTANT:"),  # 2 layers, 3 layers
        ("llava-med-v1.5", MED, [], "<s>[INST] <image>\n{question} [/INST]"),
    ],
)
def test_a_published_layout_answers_as_its_own_network(done, monkeypatch, name, source, merged, prompt):
    monkeypatch.chdir(done.folder)
    opened, answered = open_checkpoint(source), run(done, name)
    assert sorted(opened.audit.merged.values()) == merged  # weights with a LoRA of the language model, of the tower
    assert opened.config.projector_type == ("prototype" if merged else "mlp2x_gelu")
    assert answered["checkpoint"]["sha256"] == opened.sha256
    assert answered["prompt"].endswith(prompt)
    lines = (done.folder / "runs" / name / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 24
    assert len({json.loads(line)["answer"] for line in lines}) > 3


@pytest.mark.parametrize(("place", "answers"), list(enumerate(ELSEWHERE, 4)))
def test_answers_made_elsewhere_become_a_run_of_that_system(done, place, answers):
    name, _, _, accuracy, recall = answers
    system = run(done, name)["checkpoint"]["name"]
    assert f"--system {system} --out runs/{name}" in SYSTEMS[place][1]
    scores = rows(done)[system]["scores"]
    assert (scores["closed_accuracy"]["value"], scores["recall"]["value"]) == (accuracy, recall)


def test_measured_reported_and_blind_rows_stand_apart(done):
    groups = {system: row["group"].split(",")[0] for system, row in rows(done).items()}
    elsewhere = [run(done, row[0])["checkpoint"]["name"] for row in ELSEWHERE]
    assert {groups[name] for name in ("llava-v1.5", "gpt-4o", "sq-llava", *elsewhere)} == {"measured"}
    reported = {system: row["group"].split(",")[0] for system, row in rows(done, reported=True).items()}
    assert {reported[name] for name in ("GPT-4o", "LLaVA-Med v1", "LLaVA")} == {"reported"}
    blind = ("llava-v1.5-black (black images)", "llava-v1.5-other (other images)", 'always "no"', "commonest answer")
    assert {groups[name] for name in blind} == {"image-blind"}
