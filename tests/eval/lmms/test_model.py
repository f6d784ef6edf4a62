import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, write_checkpoint, write_small_sets
from fault_server import FaultServer, refuses
from harness import TASKS, answers_of, evaluate, run_folders

from stllava_eval.inference.answerer import Answerer
from stllava_eval.inference.engine import Engine
from stllava_eval.inference.types import Answer
from stllava_eval.lmms.model import StllavaMed, StllavaMedSimple, _AskedQuestion, _keys_by_process


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many questions each call of the answering engine was given."""
    seen: list[int] = []
    original = Answerer.answer

    def answer(self, questions, *args, **kwargs):
        seen.append(len(questions))
        return original(self, questions, *args, **kwargs)

    monkeypatch.setattr(Answerer, "answer", answer)
    return seen


def test_open_questions_get_open_scores_and_closed_ones_closed(prepared, checkpoint):
    results = evaluate(StllavaMed(str(checkpoint)))
    for task in TASKS:
        assert [len(results["samples"][task]), results["n-samples"][task]["effective"]] == [8, 8]
        kinds = {sample["target"]: {"recall", "closed_accuracy"} & set(sample) for sample in results["samples"][task]}
        assert sorted(map(sorted, kinds.values())) == [["closed_accuracy"], ["recall"]]


def test_lmms_evals_own_standard_error_is_clustered_by_image(prepared, checkpoint, monkeypatch):
    def answer(self, questions, progress):
        # two questions on each of four images; answers of 1, 1, 3, 3, 1, 1, 3, 3 words
        for place, question in enumerate(questions):
            image = int(question.image_key[-1].split("-")[1][0])
            yield place, Answer("yes" if image % 2 == 0 else "it is so", 1, True)

    monkeypatch.setattr(Answerer, "answer", answer)
    results = evaluate(StllavaMed(str(checkpoint)), ["vqarad"])["results"]["vqarad"]
    assert results["words,none"] == 2
    # Miller's equation 4: (8 / 7) / 8 for the questions + 4 images x 2 x 1 / 8^2 for the pairs on one image
    assert results["words_stderr_clustered,none"] == pytest.approx((1 / 7 + 1 / 8) ** 0.5)
    assert results["words_stderr_clt,none"] == pytest.approx((1 / 7) ** 0.5)


def test_chat_and_simple_ask_the_same_and_answers_do_not_depend_on_the_batch(prepared, checkpoint):
    for lm in (StllavaMed(str(checkpoint)), StllavaMedSimple(str(checkpoint), 3), StllavaMed(str(checkpoint), "16")):
        evaluate(lm)
    first, *others = [answers_of(folder) for folder in run_folders(prepared)]
    assert len(first) == 24
    assert len(set(first.values())) > 3
    assert others == [first, first]


def test_the_same_model_object_answers_again(prepared, checkpoint):
    lm = StllavaMed(str(checkpoint))
    for _ in range(2):
        evaluate(lm, ["vqarad"])
    one, two = run_folders(prepared)
    assert answers_of(one) == answers_of(two)


def test_other_images_change_answers_and_black_ones_make_them_blind(prepared, checkpoint):
    for images in ("own", "other", "black"):
        evaluate(StllavaMed(str(checkpoint), 8, images=images), ["vqarad"])
    own, other, black = (answers_of(folder) for folder in run_folders(prepared))
    # four images, so the other one is two further on
    shift = {f"test-{image}-{number}": f"test-{(image + 2) % 4}-{number}" for image in range(4) for number in range(2)}
    assert {name: other["vqarad", name] for name in shift} == {name: own["vqarad", far] for name, far in shift.items()}
    assert len({black["vqarad", name] for name in shift}) <= 2


def test_a_run_folder_says_what_decided_its_answers(prepared, checkpoint):
    evaluate(StllavaMed(str(checkpoint), 4), ["vqarad_short", "slake"])
    (folder,) = run_folders(prepared)
    run = json.loads((folder / "run.json").read_text())
    assert run["checkpoint"]["name"] == str(checkpoint)
    assert len(run["checkpoint"]["sha256"]) == 64
    assert {task: run["tasks"][task]["prompt"] for task in run["tasks"]} == {"slake": "bare", "vqarad_short": "short"}
    assert run["tasks"]["slake"]["data"]["sample"] is True
    assert (run["dtype"], run["device"], run["batch_size"]) == ("float32", "cpu", 4)


def test_a_run_folder_holds_the_scores_that_lmms_eval_prints(prepared, checkpoint):
    results = evaluate(StllavaMed(str(checkpoint), 4))["results"]
    (folder,) = run_folders(prepared)
    rows = [row for row in json.loads((folder / "scores.json").read_text())["scores"] if row["category"] == "all"]
    ours = {(row["task"], row["metric"]): row["value"] for row in rows}
    theirs = {
        (task, key.split(",")[0]): value
        for task in TASKS
        for key, value in results[task].items()
        if "," in key and "_stderr" not in key
    }
    assert ours == pytest.approx(theirs)
    assert len(ours) == len(theirs) > 30


def test_the_cache_serves_the_same_weights_images_and_prompts_only(prepared, checkpoint, tmp_path, calls):
    cache = str(tmp_path / "cache")
    weights = tmp_path / "weights"
    shutil.copytree(checkpoint, weights)

    def ask(tasks=("vqarad",), **options):
        calls.clear()
        evaluate("stllava_med", tasks, model_args=f"pretrained={weights}", use_cache=cache, **options)
        return sum(calls)

    assert ask() == 8
    assert ask() == 0, "nothing has changed"
    one, two = run_folders(prepared)
    assert answers_of(one) == answers_of(two), "a run from the cache is recorded whole"
    assert ask(["vqarad_short"]) == 8, "another prompt"
    write_checkpoint(weights, seed=1)
    assert ask() == 8, "other weights at the same path"
    write_small_sets(shade=1)
    assert ask() == 8, "other images under the same names"
    assert ask(limit=3) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"images": "none"}, "images=none: unknown", id="images"),
        pytest.param({"temprature": 1}, "temprature: unknown", id="an unknown argument"),
        pytest.param({"extract": "last"}, "extract=last: unknown. Pass one of final, none", id="extract"),
        pytest.param({"max_new_tokens": 0}, "max_new_tokens=0: pass a whole number from 1", id="no tokens"),
        pytest.param({"temperature": "hot"}, "temperature=hot: pass a number from 0 to 100", id="temperature"),
        pytest.param({"temperature": 1, "top_p": 0}, "top_p=0: pass a number from 1e-06 to 1", id="top_p"),
        pytest.param({"top_k": 5}, "top_k: nothing is sampled at temperature 0", id="sampling without temperature"),
        pytest.param({"draws": 3}, "draws=3: greedy replies are all alike", id="draws without temperature"),
        pytest.param({"min_pixels": 9, "max_pixels": 4}, "min_pixels=9: more than max_pixels=4", id="pixels"),
        pytest.param({"enable_thinking": "maybe"}, "enable_thinking=maybe: pass True or False", id="thinking"),
        pytest.param({"system": "@nowhere.txt"}, "system=@nowhere.txt: cannot be read", id="no system prompt"),
        pytest.param({"system": "''"}, "system: it is empty", id="an empty system prompt"),
        pytest.param({"system": "@/dev/null"}, "system=@/dev/null: /dev/null: no regular file", id="a device"),
        pytest.param({"system": "@~noone/a"}, "~noone/a: no such user", id="the file of a user that there is not"),
        pytest.param({"system": "@."}, "system=@.: cannot be read (Is a directory)", id="a folder as a system prompt"),
        pytest.param({"temperature": 1, "draws": 10**8}, "draws=100000000: pass a whole number from 1 to", id="draws"),
        pytest.param({"dtype": "int8"}, "dtype 'int8' is unknown", id="dtype"),
        pytest.param({"device": "tpu"}, "device 'tpu' cannot be used", id="device"),
        pytest.param({"batch_size": "0"}, "--batch_size 0", id="batch size"),
        pytest.param({"batch_tokens": 0}, "batch_tokens=0: pass a whole number", id="batch tokens"),
        pytest.param({"backend": "vllm"}, "backend=vllm: unknown. Pass one of transformers, openai", id="backend"),
        pytest.param({"backend": "openai_server"}, "pretrained: unknown with backend=openai_server", id="two models"),
        pytest.param({"backend": "openai_server", "pretrained": None}, "needs base_url=http", id="no address"),
        pytest.param({"base_url": "http://a/v1"}, "base_url: unknown with backend=transformers", id="two back ends"),
        pytest.param(
            {"backend": "openai_server", "pretrained": None, "base_url": "http://a/v1", "batch_size": "4"},
            "--batch_size 4: a server makes its own batches",
            id="a server's batch size",
        ),
        pytest.param({"pretrained": "./nowhere"}, "./nowhere: no such folder", id="no checkpoint"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(prepared, checkpoint, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        StllavaMed(**{"pretrained": str(checkpoint)} | options)
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2
    assert message in error
    assert "\n" not in error


def test_a_run_never_overwrites_another(prepared, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STLLAVA_RUN", str(tmp_path / "run"))
    evaluate(StllavaMed(str(checkpoint)), ["vqarad"])
    with pytest.raises(SystemExit) as exit_:
        StllavaMed(str(checkpoint))
    assert exit_.value.code == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["max_new_tokens=abc", "max_new_tokens=-5", "max_new_tokens=2.5", "until=5"])
def test_a_wrong_limit_of_a_task_is_one_line(prepared, checkpoint, capsys, given):
    with pytest.raises(SystemExit) as exit_:
        evaluate(StllavaMed(str(checkpoint)), ["vqarad"], gen_kwargs=given)
    assert exit_.value.code == 2
    assert f"stllava_med: vqarad: generation_kwargs {given}: pass a" in capsys.readouterr().err


def test_sampling_is_refused_rather_than_ignored(prepared, checkpoint, capsys):
    with pytest.raises(SystemExit) as exit_:
        evaluate(StllavaMed(str(checkpoint)), ["vqarad"], gen_kwargs="temperature=0.7,do_sample=True")
    assert exit_.value.code == 2
    assert "answers greedily" in capsys.readouterr().err


def test_a_bug_while_answering_ends_the_process_though_lmms_eval_would_exit_0(
    prepared, checkpoint, capsys, monkeypatch
):
    monkeypatch.setattr(Engine, "_step", lambda self: 1 / 0)
    with pytest.raises(SystemExit) as exit_:
        evaluate(StllavaMed(str(checkpoint)), ["vqarad"])
    assert exit_.value.code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_checkpoint_without_some_of_its_weights_is_refused(prepared, checkpoint, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = load_file(broken / "model.safetensors")
    lost = next(name for name in weights if "vision" in name)
    del weights[lost]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as exit_:
        StllavaMed(str(broken))
    assert exit_.value.code == 2
    assert "1 missing (model.vision_tower.embeddings.class_embedding)" in capsys.readouterr().err


FOREIGN = """
task: foreign
dataset_path: parquet
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_visual: !function foreign.image
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_a_foreign_task_with_a_column_image_id_is_asked_and_its_images_are_opened_as_ours(
    prepared, tmp_path, monkeypatch
):
    import io

    import datasets
    import numpy as np
    from PIL import Image

    deep = io.BytesIO()
    Image.fromarray(np.linspace(0, 4000, 64, dtype=np.uint16).reshape(8, 8)).save(deep, "PNG")  # 12 of 16 bits
    rows = {"question": ["What?"], "answer": ["x"], "image_id": ["1"], "picture": [{"bytes": deep.getvalue()}]}
    table = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    table.to_parquet(tmp_path / "foreign.parquet")
    (tmp_path / "foreign.yaml").write_text(FOREIGN.replace("FILE", str(tmp_path / "foreign.parquet")))
    (tmp_path / "foreign.py").write_text("def image(doc):\n    return [doc['picture']]\n")
    with FaultServer(reply=lambda request: "x") as server:
        lm = StllavaMed(backend="openai_server", base_url=server.url)
        results = evaluate(lm, ["foreign"], include_path=str(tmp_path))
    (request,) = server.requests
    url = request["messages"][-1]["content"][0]["image_url"]["url"]
    import base64

    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
    assert shown.shape == (8, 8, 3)
    assert (shown.min(), shown.max()) == (0, 255)
    assert 100 < shown.mean() < 155  # white all over, where 16 bits are cut to 8
    assert results["results"]["foreign"]["exact_match,none"] == 1
    assert not (prepared / "runs").exists()


LETTERED = """
include: TEMPLATE
task: vqarad_lettered
process_docs: !function stllava_eval.lmms.tasks.vqarad_test
doc_to_text: !function lettered.text
"""


def test_letters_name_the_options_of_the_text_that_was_asked_in_both_tables(prepared, tmp_path):
    template = ROOT / "tasks" / "_template"
    (tmp_path / "_base").write_text(template.read_text().replace("stub.json", str(template.parent / "stub.json")))
    (tmp_path / "vqarad_lettered.yaml").write_text(LETTERED.replace("TEMPLATE", "_base"))
    (tmp_path / "lettered.py").write_text(
        "def text(doc, kwargs=None):\n    return doc['question'] + '\\nA. no\\nB. yes\\nC. the left lung'\n"
    )
    with FaultServer(reply=lambda request: "<think>A?</think>B") as server:
        lm = StllavaMed(backend="openai_server", base_url=server.url)
        results = evaluate(lm, ["vqarad_lettered"], include_path=str(tmp_path))["results"]["vqarad_lettered"]
    (folder,) = run_folders(prepared)
    rows = json.loads((folder / "scores.json").read_text())["scores"]
    values = {row["metric"]: row["value"] for row in rows if row["category"] == "all"}
    assert values["closed_accuracy"] == results["closed_accuracy,none"] == 1
    assert values["recall"] == results["recall,none"] == 0


@pytest.mark.parametrize("words", [["--num_fewshot", "2"], ["--num_fewshot=2"], ["--num_few", "2"]])
def test_examples_are_refused_since_no_chat_model_sees_them(prepared, checkpoint, capsys, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *words])
    with pytest.raises(SystemExit) as exit_:
        StllavaMed(str(checkpoint))
    assert exit_.value.code == 2
    assert "--num_fewshot 2: stllava_med is asked without examples" in capsys.readouterr().err


def test_examples_asked_for_from_python_are_no_traceback(prepared, checkpoint):
    results = evaluate(StllavaMed(str(checkpoint)), ["vqarad"], num_fewshot=2)
    assert results["n-shot"]["vqarad"] == 0


def test_repeats_of_lmms_eval_are_refused_since_they_would_be_alike(prepared, checkpoint, capsys):
    with pytest.raises(SystemExit) as exit_:
        evaluate(StllavaMed(str(checkpoint)), ["vqarad"], repeats=3)
    assert exit_.value.code == 2
    assert "repeats are not read. Pass --model_args temperature=...,draws=3" in capsys.readouterr().err


def test_a_run_says_how_it_was_asked(prepared, tmp_path):
    (tmp_path / "system.txt").write_text("You are a radiologist, and careful.\n")
    with FaultServer() as server:
        arguments = {"system": f"@{tmp_path / 'system.txt'}", "max_new_tokens": 8, "enable_thinking": False}
        ask_server(server, **arguments, max_pixels=100)
    (request, *_) = server.requests
    assert request["messages"][0] == {"role": "system", "content": "You are a radiologist, and careful.\n"}
    assert (request["max_tokens"], request["chat_template_kwargs"]) == (8, {"enable_thinking": False})
    run = json.loads((run_folders(prepared)[0] / "run.json").read_text())
    of_task = run["tasks"]["vqarad"]
    assert (run["system"], run["enable_thinking"], run["max_pixels"], run["min_pixels"]) == (
        "You are a radiologist, and careful.\n",
        False,
        100,
        None,
    )
    assert (of_task["max_new_tokens"], of_task["until"], of_task["extract"]) == (8, ["</s>"], "final-v1")


def test_half_of_the_replies_empty_is_one_warning_at_the_end_and_on_the_board(prepared, caplog):
    from stllava_eval.reports.board_formats import board_text
    from stllava_eval.reports.board_rows import board

    with FaultServer(reply=lambda request: "" if "mass" in str(request["messages"]) else "lung") as server:
        ask_server(server)
    warned = [record.getMessage() for record in caplog.records if "of 8 replies 4 empty" in record.getMessage()]
    assert len(warned) == 1
    assert "of 8 replies 4 empty: these scores may say little" in board_text(board(run_folders(prepared)))


def ask_server(server: FaultServer, tasks=("vqarad",), **options):
    return evaluate(StllavaMed(backend="openai_server", base_url=server.url, **options), tasks)


def test_a_server_answers_and_a_request_that_failed_for_good_is_unanswered(prepared):
    with FaultServer({"What organ is shown?": [refuses(400, "too large")]}) as server:
        results = ask_server(server, concurrency=1)
    (folder,) = run_folders(prepared)
    run = json.loads((folder / "run.json").read_text())
    assert (run["backend"], run["base_url"], run["dtype"]) == ("openai_server", server.url, "server")
    (failed,) = run["tasks"]["vqarad"]["unanswered"]
    found = answers_of(folder)
    assert sum(answer.startswith("Is there a mass? (") for answer in found.values()) == 4
    assert found["vqarad", failed] == "[LMMS_EVAL_REQUEST_FAILED after 1 attempts] HTTP 400: too large"
    rows = json.loads((folder / "scores.json").read_text())["scores"]
    n = {row["metric"]: row["n"] for row in rows if row["category"] == "all"}
    assert (n["recall"], n["closed_accuracy"]) == (3, 4)
    assert "recall" not in next(
        sample for sample in results["samples"]["vqarad"] if sample["filtered_resps"][0].startswith("[LMMS")
    )


def test_a_server_that_answers_nothing_is_one_line_and_no_run(prepared, capsys):
    faults = {number: [refuses(400, "no images here")] for number in range(8)}
    with FaultServer(faults) as server, pytest.raises(SystemExit) as exit_:
        ask_server(server)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert f"{server.url}: none of 8 questions was answered: HTTP 400: no images here. When that is put right" in said
    assert not (prepared / "runs").exists()


def test_answers_before_a_used_up_quota_are_kept_for_the_next_run(prepared, capsys):
    with FaultServer({5: [refuses(429, "insufficient_quota")]}) as server:
        with pytest.raises(SystemExit) as exit_:
            ask_server(server, concurrency=1)
        assert exit_.value.code == 2
        assert "quota is used up" in capsys.readouterr().err
        ask_server(server, concurrency=1)
    assert len(server.requests) == 6 + 3
    assert len(answers_of(run_folders(prepared)[0])) == 8


def test_lmms_evals_cache_keeps_no_failed_request(prepared, tmp_path):
    with FaultServer({"What organ is shown?": [refuses(400, "too large")]}) as server:
        options = {
            "model_args": f"backend=openai_server,base_url={server.url}",
            "use_cache": str(tmp_path / "cache"),
        }
        evaluate("stllava_med", ["vqarad"], **options)
        assert len(server.requests) == 8
        evaluate("stllava_med", ["vqarad"], **options)
        assert len(server.requests) == 9
    assert json.loads((run_folders(prepared)[1] / "run.json").read_text())["tasks"]["vqarad"]["unanswered"] == []


def asked(image: str, number: int) -> _AskedQuestion:
    return _AskedQuestion(f"{image}-{number}", "vqarad", "test", number, "Why?", image, 8, (), True)


def test_whole_images_are_dealt_so_that_processes_end_together():
    counts = {"a": 17, "b": 11, "c": 3, "d": 3, "e": 1, "f": 1, "g": 1}
    questions = [asked(image, number) for image, count in counts.items() for number in range(count)]
    for processes in (1, 2, 3):
        dealt = _keys_by_process(questions, processes)
        assert sorted(key for keys in dealt for key in keys) == sorted(one.key for one in questions)
        images = [{key[0] for key in keys} for keys in dealt]
        assert sum(map(len, images)) == len(counts)  # none at two processes
        costs = [640 * len(of) + 32 * len(keys) for of, keys in zip(images, dealt, strict=True)]
        assert max(costs) - min(costs) <= 640 + 32 * 3  # at most one small image
    assert _keys_by_process([], 2) == [[], []]


TWO = """
import json, os, sys
from lmms_eval.__main__ import cli_evaluate
from stllava_eval.inference.engine import Engine
filled, fill = [], Engine._fill
Engine._fill = lambda self, prompt: filled.append(prompt.key) or fill(self, prompt)
sys.argv[1:] = f"--model stllava_med --tasks vqarad,slake,pathvqa --model_args pretrained={sys.argv[1]}".split()
cli_evaluate()
print("FILLED", os.environ["RANK"], json.dumps(sorted(filled)))
"""


def test_two_processes_give_the_answers_of_one_and_share_no_image(prepared, checkpoint):
    evaluate(StllavaMed(str(checkpoint)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    driver = prepared / "driver.py"
    driver.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(driver)]
    done = subprocess.run([*command, str(checkpoint)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = run_folders(prepared)
    assert (one / "answers.jsonl").read_bytes() == (two / "answers.jsonl").read_bytes()
    assert (one / "scores.json").read_bytes() == (two / "scores.json").read_bytes()
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    filled = [json.loads(line.split(" ", 2)[2]) for line in done.stdout.splitlines() if line.startswith("FILLED")]
    assert [len(images) for images in filled] == [6, 6]
    assert len({str(image) for images in filled for image in images}) == 12
