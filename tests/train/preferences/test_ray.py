"""Candidates and verdicts made by two workers of a local Ray cluster are those made by one process."""

import pytest
import torch
from conftest import png
from fault_server import MODEL, FaultServer
from small_judging import FEW, longer

from stllava_train.cli.main import main
from stllava_train.resumable import read_manifest, read_rows

pytest.importorskip("ray", reason="needs Ray: pip install 'stllava-med[ray]'")
pytestmark = [
    # ray 2.60, data/context.py:1274 on, warns of switches that it sets itself
    pytest.mark.filterwarnings("ignore:`.*` .*deprecated:DeprecationWarning:ray.data.context"),
    pytest.mark.filterwarnings("ignore:`.*` is deprecated:UserWarning:ray.data.context"),
]


@pytest.fixture
def cluster(home, monkeypatch):
    """Two cores of this machine."""
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: beside other work they would hardly move
    torch.set_num_threads(1)
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


def test_two_workers_make_the_same_rows_and_verdicts_as_one_process(cluster, checkpoint, tmp_path, monkeypatch):
    from stllava_train.preferences import ray as module

    monkeypatch.setattr(module, "IMAGES", 3)
    monkeypatch.setattr(module, "QUESTIONS", 10)
    (tmp_path / "images").mkdir()
    for number in range(9):
        (tmp_path / "images" / f"{number}.png").write_bytes(png((25 * number, 255 - 25 * number, 20)))
    made = {}
    for engine in ("local", "ray"):
        out = tmp_path / engine / "candidates.jsonl"
        call = ["candidates", "--checkpoint", str(checkpoint), "--images", str(tmp_path / "images"), "--out", str(out)]
        assert main([*call, "--preset", "authors", "--engine", engine, *FEW]) == 0
        judged = tmp_path / engine / "judged.jsonl"
        with FaultServer(reply=longer) as there:
            call = ["judge", str(out), "--judge", f"{MODEL}@{there.url}", "--out", str(judged), "--engine", engine]
            assert main([*call, "--concurrency", "4"]) == 0
            assert there.most_at_once <= 4
        verdicts = [row | {"date": None} for row in read_rows(judged)]
        made[engine] = out.read_bytes(), read_manifest(out), verdicts
    assert made["ray"] == made["local"]
    assert len(made["ray"][2]) == 2 * made["ray"][1]["counts"]["candidates"] > 40


def test_what_a_worker_cannot_do_is_one_line(cluster, checkpoint, tmp_path, capfd):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png((25, 255, 20)))
    out = tmp_path / "candidates.jsonl"
    call = ["candidates", "--checkpoint", str(checkpoint), "--images", str(tmp_path / "images"), "--out", str(out)]
    assert main([*call, "--preset", "authors", "--engine", "ray", *FEW]) == 0
    judged = ["judge", str(out), "--judge", f"{MODEL}@http://127.0.0.1:9/v1", "--out", str(tmp_path / "j.jsonl")]
    capfd.readouterr()
    assert main([*judged, "--engine", "ray"]) == 2
    assert "no OpenAI-compatible server answers there" in capfd.readouterr().err
    assert main([*judged, "--engine", "ray", "--budget", "1"]) == 2
    assert "--engine ray: workers know of no budget" in capfd.readouterr().err
