"""Downloads from a hub, against a small server that speaks as much of its protocol as huggingface_hub asks for."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from author_layouts import make, original_names, write_flat_config, write_tower
from safetensors.torch import save_file

from stllava_eval.errors import one_line

SHA = "0" * 40


@pytest.fixture
def hub(tmp_path):
    """An endpoint, the folder whose subfolders are its repositories (owner/name), and the paths that were fetched."""
    repositories, fetched = tmp_path / "hub", []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(body=True)

        def do_HEAD(self):
            self.reply(body=False)

        def reply(self, body: bool) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                folder = repositories / parts[2] / parts[3]
                if not folder.is_dir():
                    return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
                names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
                if parts[4:5] == ["tree"]:
                    rows = [{"type": "file", "path": name, "size": 1, "oid": SHA} for name in names]
                    return self.send(200, json.dumps(rows).encode(), body)
                info = {"id": "/".join(parts[2:4]), "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
                return self.send(200, json.dumps(info).encode(), body)
            file = repositories / parts[0] / parts[1] / "/".join(parts[4:])
            if not file.is_file():
                return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            data = file.read_bytes()
            if body:
                fetched.append("/".join(parts[4:]))
            etag = hashlib.sha256(data).hexdigest()
            return self.send(200, data, body, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA})

        def send(self, code: int, data: bytes, body: bool, headers: dict | None = None) -> None:
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", repositories, fetched
    server.shutdown()
    server.server_close()


def convert(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "stllava_eval.cli", "convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_hub_id_and_the_tower_that_it_names_are_downloaded_and_pickles_only_where_needed(hub, tmp_path):
    endpoint, repositories, fetched = hub
    model = make()
    folder = repositories / "someone" / "a-model"
    write_flat_config(folder, model, mm_vision_tower="someone/a-tower")
    write_tower(repositories / "someone" / "a-tower", model)
    weights = {name: one.contiguous() for name, one in original_names(model).items() if "vision_tower" not in name}
    save_file(weights, folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "picture.png").write_bytes(b"not wanted")
    done = convert(endpoint, tmp_path / "cache", "someone/a-model", "--out", str(tmp_path / "out"), "--prototypes", "3")
    assert done.returncode == 0, done.stderr
    assert sorted(fetched) == ["config.json", "config.json", "model.safetensors", "pytorch_model.bin"]  # the tower's
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["source"] == "someone/a-model"


def test_an_id_that_the_hub_does_not_have_is_one_line(hub, tmp_path):
    endpoint, _, _ = hub
    done = convert(endpoint, tmp_path / "cache", "no/body", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no/body: no such folder, and not to be had from the hub" in done.stderr
    assert "Please make sure you specified the correct `repo_id`" in done.stderr  # what the hub's library says, whole


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("It is gone.\nLook elsewhere.", "It is gone. Look elsewhere"),
        ("a " * 99 + "b.", "a " * 99 + "b"),
        ("One sentence is said. " * 20, "One sentence is said. " * 12 + "One sentence is said"),
        ("four words of some length ", "four words of some length"),
        ("words " * 100, "words " * 50 + "..."),
        ("wording " * 100, "wording " * 37 + "..."),
        ("", "ValueError"),
    ],
)
def test_what_a_library_says_is_one_line_that_ends_with_a_sentence_or_a_word(said, line):
    assert one_line(ValueError(said)) == line
    assert len(line) <= 304


WITHOUT_TORCH = """
import sys
from stllava_eval.cli.main import main
code = main(sys.argv[1:])
print("loaded", sorted({"torch", "transformers", "lmms_eval"} & set(sys.modules)))
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("nowhere", "nowhere: no such folder. Pass a folder or a hub id"),
        ("no/body", "no/body: no such folder, and not to be had from the hub (LocalEntryNotFoundError: Cannot find an"),
        ("file.txt", "file.txt is a file. Pass the folder that it is in"),
        ("empty", "empty is not a checkpoint: it has no config.json"),
        ("broken", "config.json: not a JSON object"),
    ],
)
def test_a_wrong_checkpoint_is_refused_before_torch_is_loaded(named, says, tmp_path):
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "STLLAVA_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", WITHOUT_TORCH, "run", "--checkpoint", named]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == "loaded []\n"
