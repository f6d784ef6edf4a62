import email.utils
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, png
from PIL import Image
from pmc_server import PmcServer, half_a_reply, hangs_up, link, package, refuses, silence

from stllava_eval.errors import InputError
from stllava_train.cli import main
from stllava_train.data import export, pmc
from stllava_train.data.pmc import Fetched, Figure, fetch_figures, package_url

ARTICLE = "/pub/pmc/oa_package/3f/46/PMC1.tar.gz"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pmc, "BACK_OFF", 0.01)
    with PmcServer() as running:
        monkeypatch.setattr(pmc, "CLOUD", f"{running.url}/cloud")
        yield running


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def figures(server: PmcServer, out: Path, *names: str, article: str = ARTICLE) -> dict[str, Figure]:
    """The figures `PMC1/<name>` of one article; their ids are the names without suffix."""
    return {
        name.removesuffix(".jpg"): Figure(out / "images" / name, server.url + article, f"PMC1/{name}") for name in names
    }


def fetch(server: PmcServer, out: Path, *names: str, **options) -> Fetched:
    return fetch_figures(figures(server, out, *names), out / "manifest.jsonl", **options)


def manifest(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_a_figure_comes_from_its_own_address_and_its_package_is_left_alone(server, tmp_path):
    server.files["/cloud/PMC1.1/a.jpg"] = jpeg(1)
    fetched = fetch(server, tmp_path, "a.jpg")
    assert (tmp_path / "images" / "a.jpg").read_bytes() == jpeg(1)
    assert server.asked == ["/cloud/PMC1.1/a.jpg"]
    assert manifest(tmp_path) == [{"id": "a", "found": True, "why": None, "sha256": fetched.found["a"]}]


def test_figures_that_only_the_package_has_cost_one_download_of_it(server, tmp_path):
    server.files[ARTICLE] = package({"PMC1/a.jpg": jpeg(1), "PMC1/text.xml": b"<xml/>", "PMC1/b.jpg": jpeg(2)})
    fetched = fetch(server, tmp_path, "a.jpg", "b.jpg")
    assert set(fetched.found) == {"a", "b"}
    assert server.asked.count(ARTICLE) == 1
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == ["a.jpg", "b.jpg"]


def test_a_second_run_asks_for_nothing(server, tmp_path):
    server.files[ARTICLE] = package({"PMC1/a.jpg": jpeg(1)})
    first = fetch(server, tmp_path, "a.jpg", "b.jpg")
    asked, lines = len(server.asked), manifest(tmp_path)
    assert fetch(server, tmp_path, "a.jpg", "b.jpg") == first
    assert (len(server.asked), manifest(tmp_path)) == (asked, lines)


@pytest.mark.parametrize(
    ("members", "why"),
    [
        pytest.param(None, "HTTP 404", id="no package"),
        pytest.param({}, "not in the package", id="not in it"),
        pytest.param({"PMC1/a.jpg": b"GIF87a and no more"}, "not a readable image", id="no image"),
        pytest.param({"PMC1/a.jpg": jpeg(1)[:-200]}, "not a readable image", id="a cut image"),
        pytest.param(
            {"PMC1/a.jpg": link("PMC1/a.jpg", "/etc/passwd")}, "a link, not a file, in the package", id="link"
        ),
        pytest.param({"../../a.jpg": jpeg(1)}, "not in the package", id="a member above the archive"),
        pytest.param({"PMC1/a.jpg": b"x" * 2000}, "image too large", id="too large"),
    ],
)
def test_what_is_missing_for_good_says_why_and_is_asked_for_again_only_on_request(
    server, tmp_path, monkeypatch, members, why
):
    monkeypatch.setattr(pmc, "FIGURE_BYTES", 1500)
    if members is not None:
        server.files[ARTICLE] = package(members)
    assert fetch(server, tmp_path, "a.jpg").missing == {"a": why}
    assert list((tmp_path / "images").iterdir()) == []
    asked = len(server.asked)
    assert fetch(server, tmp_path, "a.jpg").missing == {"a": why}
    assert len(server.asked) == asked
    server.files["/cloud/PMC1.1/a.jpg"] = jpeg(1)
    assert set(fetch(server, tmp_path, "a.jpg", retry_missing=True).found) == {"a"}
    assert [line["found"] for line in manifest(tmp_path)] == [False, True]


def test_a_package_that_is_no_archive_or_unpacks_to_too_much_is_missing(server, tmp_path, monkeypatch):
    server.files[ARTICLE] = b"<html>moved</html>"
    assert fetch(server, tmp_path / "1", "a.jpg").missing == {"a": "broken package"}
    server.files[ARTICLE] = package({"PMC1/a.jpg": jpeg(1)})[:-200]
    assert fetch(server, tmp_path / "2", "a.jpg").missing == {"a": "broken package"}
    server.files[ARTICLE] = package({"PMC1/film.mp4": bytes(10**6), "PMC1/a.jpg": jpeg(1)})  # 1 MB, packed to 1 kB
    monkeypatch.setattr(pmc, "PACKAGE_BYTES", 10**5)
    assert fetch(server, tmp_path / "3", "a.jpg").missing == {"a": "package too large"}
    server.files[ARTICLE] = package({"PMC1/film.mp4": os.urandom(2 * 10**5)})
    assert fetch(server, tmp_path / "4", "a.jpg").missing == {"a": "too large"}


def test_a_package_that_says_too_much_of_a_member_is_missing(server, tmp_path, monkeypatch):
    monkeypatch.setattr("stllava_eval.data.archives.LISTING_BYTES", 2**17)
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, 2**20  # it is held in memory, and 1 MB of it is packed to 1 kB
    server.files[ARTICLE] = gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + b" " * 2**20)
    assert fetch(server, tmp_path / "1", "a.jpg").missing == {"a": "broken package"}
    server.files[ARTICLE] = package({"PMC1/a.jpg": jpeg(1), "PMC1/film.mp4": bytes(10**6), "PMC1/b.jpg": jpeg(2)})
    assert set(fetch(server, tmp_path / "2", "a.jpg", "b.jpg").found) == {"a", "b"}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(refuses(429), id="429"),
        pytest.param(refuses(503), id="503"),
        pytest.param(half_a_reply, id="half a reply"),
        pytest.param(hangs_up, id="no reply"),
        pytest.param(silence, id="silence"),
    ],
)
def test_what_passes_is_asked_again(server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(pmc, "SILENCE", 0.3)
    server.files["/cloud/PMC1.1/a.jpg"] = jpeg(1)
    server.faults["/cloud/PMC1.1/a.jpg"] = [fault, fault]
    assert set(fetch(server, tmp_path, "a.jpg").found) == {"a"}
    assert len(server.asked) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(server, tmp_path, form):
    wanted = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)  # 1 to 2 s from now
    server.files["/cloud/PMC1.1/a.jpg"] = jpeg(1)
    server.faults["/cloud/PMC1.1/a.jpg"] = [refuses(429, Retry_After=wanted)]
    started = time.monotonic()
    assert set(fetch(server, tmp_path, "a.jpg").found) == {"a"}
    assert 0.9 < time.monotonic() - started < 4


@pytest.mark.parametrize(
    ("fault", "attempts", "why"),
    [
        pytest.param(refuses(503), 5, "HTTP 503", id="503 for long"),
        pytest.param(refuses(403), 1, "HTTP 403", id="blocked: asking on would not help"),
        pytest.param(refuses(429, Retry_After="86400"), 1, "HTTP 429", id="come back tomorrow"),
        pytest.param(hangs_up, 5, "no connection (RemoteDisconnected)", id="hangs up"),
    ],
)
def test_what_failed_for_now_is_no_line_of_the_manifest_so_the_next_run_asks_again(
    server, tmp_path, fault, attempts, why
):
    path = "/cloud/PMC1.1/a.jpg"
    server.faults[path] = [fault] * attempts
    assert fetch(server, tmp_path, "a.jpg") == Fetched(failed={"a": why})
    assert (server.asked, manifest(tmp_path)) == ([path] * attempts, [])
    server.files[path] = jpeg(1)
    assert set(fetch(server, tmp_path, "a.jpg").found) == {"a"}


def test_with_the_network_gone_the_run_ends_soon_and_says_so(server, tmp_path, monkeypatch):
    monkeypatch.setattr(pmc, "GIVE_UP", 3)
    wanted = {}
    for number in range(200):
        wanted[str(number)] = Figure(tmp_path / f"{number}.jpg", f"{server.url}/{number}.tar.gz", f"PMC{number}/a.jpg")
        server.faults[f"/cloud/PMC{number}.1/a.jpg"] = [refuses(500)] * 5
    with pytest.raises(InputError, match=r"^3 figures.*fetched.*HTTP 500\b.*again"):
        fetch_figures(wanted, tmp_path / "manifest.jsonl", workers=2)
    assert len(server.asked) < 100


def test_an_image_that_lies_there_is_used_and_a_broken_one_replaced(server, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(png((1, 2, 3)))
    (tmp_path / "images" / "b.jpg").write_bytes(jpeg(2)[:-200])
    server.files["/cloud/PMC1.1/b.jpg"] = jpeg(2)
    assert set(fetch(server, tmp_path, "a.jpg", "b.jpg").found) == {"a", "b"}
    assert server.asked == ["/cloud/PMC1.1/b.jpg"]
    assert (tmp_path / "images" / "a.jpg").read_bytes() == png((1, 2, 3))
    assert (tmp_path / "images" / "b.jpg").read_bytes() == jpeg(2)


def test_a_film_is_missing_and_says_so(tmp_path):
    film = io.BytesIO()
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 99)]
    frames[0].save(film, "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(pmc._MissingError, match=r"^an image of several frames$"):
        pmc._keep(film.getvalue(), tmp_path / "a.gif")


def test_an_image_that_was_removed_is_fetched_again(server, tmp_path):
    server.files["/cloud/PMC1.1/a.jpg"] = jpeg(1)
    fetch(server, tmp_path, "a.jpg")
    (tmp_path / "images" / "a.jpg").unlink()
    assert set(fetch(server, tmp_path, "a.jpg").found) == {"a"}
    assert (tmp_path / "images" / "a.jpg").exists()


def test_only_web_addresses_are_opened(tmp_path):
    (tmp_path / "secret.tar.gz").write_bytes(package({"x/a.jpg": jpeg(1)}))
    figure = Figure(tmp_path / "a.jpg", f"file://{tmp_path}/secret.tar.gz", "x/a.jpg")
    assert fetch_figures({"a": figure}, tmp_path / "manifest.jsonl").missing == {"a": "no web address"}


@pytest.mark.parametrize(
    ("published", "today"),
    [
        (
            "ftp://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/3f/46/PMC7236913.tar.gz",
            "https://ftp.ncbi.nlm.nih.gov/pub/pmc/deprecated/oa_package/3f/46/PMC7236913.tar.gz",
        ),
        (  # as LLaVA-Med's file has it: https://github.com/microsoft/LLaVA-Med/issues/58
            "https://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/3f/46/PMC7236913.tar.gz",
            "https://ftp.ncbi.nlm.nih.gov/pub/pmc/deprecated/oa_package/3f/46/PMC7236913.tar.gz",
        ),
        ("https://mirror.example/pub/pmc/oa_package/a.tar.gz", "https://mirror.example/pub/pmc/oa_package/a.tar.gz"),
    ],
)
def test_packages_are_looked_for_where_ncbi_moved_them(published, today):
    assert package_url(published) == today


def test_a_line_that_is_none_is_named(server, tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"id": "a", "found": true, "why": null, "sha256": "00"}\n[]\n')
    with pytest.raises(InputError, match=r"manifest\.jsonl:2\b.*not a line.*Remove"):
        fetch(server, tmp_path, "a.jpg")


def test_two_runs_in_one_folder_do_not_mix(server, tmp_path):
    program = (
        "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); "
        "sys.stdin.read()"
    )
    lock = str(tmp_path / ".manifest.jsonl.lock")
    with subprocess.Popen(
        [sys.executable, "-c", program, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as another_run:
        another_run.stdout.readline()  # it holds the lock
        with pytest.raises(InputError, match="another run writes it"):
            fetch(server, tmp_path, "a.jpg")
        another_run.communicate()


def write_source(server: PmcServer, folder: Path, images: int) -> None:
    """LLaVA-Med's two files about `images` figures of as many articles, and the figures in the cloud."""
    folder.mkdir()
    records, lines = [], []
    for number in range(images):
        turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": f"Figure {number}."}]
        records.append({"id": f"{number}_F1", "image": f"{number}_F1.jpg", "domain": {}, "conversatons": turns})
        address = {"pmc_tar_url": f"{server.url}/{number}.tar.gz", "image_file_path": f"PMC{number}/a.jpg"}
        lines.append(json.dumps({"pair_id": f"{number}_F1", **address}) + "\n")
        server.files[f"/cloud/PMC{number}.1/a.jpg"] = jpeg(number)
    (folder / export.INSTRUCTIONS).write_text(json.dumps(records))
    (folder / export.ADDRESSES).write_text("".join(lines))


def test_a_killed_run_goes_on_without_asking_again_for_what_it_found(server, tmp_path, capsys):
    write_source(server, tmp_path / "source", 40)
    server.pause = 0.05
    out, call = tmp_path / "out", ["data", "med-im", "--from", str(tmp_path / "source"), "--workers", "2", "--out"]
    cloud, arguments = f"pmc.CLOUD = {pmc.CLOUD!r}", [*call, str(out)]
    imports = "from stllava_train.cli.main import main; from stllava_train.data import pmc"
    program = f"{imports}; {cloud}; main({arguments!r})"
    run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    lines = out / "med-im-manifest.jsonl"
    deadline = time.monotonic() + 60
    while not lines.exists() or lines.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    found = [json.loads(line)["id"] for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 5 <= len(found) < 40
    assert not (out / "med-im.json").exists()
    with lines.open("a") as file:
        file.write('{"id": "39_F1", "fou')  # cut in the middle of a line, as a kill may
    (out / "images" / "med-im" / ".39_F1.jpg.1.unfinished").write_bytes(b"half an image")
    server.asked.clear()
    server.pause = 0.0

    assert main.main([*call, str(out)]) == 0
    again = {path.split("/")[2].removeprefix("PMC").removesuffix(".1") + "_F1" for path in server.asked}
    assert not again & set(found)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert sorted(record["id"] for record in records) == sorted(f"{number}_F1" for number in range(40))
    assert len(list((out / "images" / "med-im").iterdir())) == 40
    assert len(json.loads((out / "med-im.json").read_text())) == 40
    assert "med-im: 40 conversations, 40 images, 40 questions, 0 left out" in capsys.readouterr().out


def test_the_two_files_are_downloaded_once_from_an_address(server, tmp_path, capsys):
    write_source(server, tmp_path / "source", 2)
    server.files[f"/med/instruct/{export.INSTRUCTIONS}"] = (tmp_path / "source" / export.INSTRUCTIONS).read_bytes()
    server.files[f"/med/{export.ADDRESSES}"] = (tmp_path / "source" / export.ADDRESSES).read_bytes()
    server.faults[f"/med/{export.ADDRESSES}"] = [half_a_reply]
    call = ["data", "med-im", "--from", f"{server.url}/med/", "--out", str(tmp_path / "out")]
    assert main.main(call) == 0
    assert "not the published file (sha256 " in capsys.readouterr().out
    asked = len(server.asked)
    assert main.main(call) == 0
    assert len(server.asked) == asked


def test_the_published_address_must_give_the_published_files(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "MED_IM", f"{server.url}/med")
    assert main.main(["data", "med-im", "--out", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert (
        f"/med/instruct/{export.INSTRUCTIONS}: cannot be downloaded (HTTP 404). Get {export.INSTRUCTIONS} else" in error
    )
    for path in (f"/med/instruct/{export.INSTRUCTIONS}", f"/med/{export.ADDRESSES}"):
        server.files[path] = b"<html>a page in its place</html>"
    assert main.main(["data", "med-im", "--out", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{export.INSTRUCTIONS} is not the published file" in error
    assert not (tmp_path / "out" / "med-im-source" / export.INSTRUCTIONS).exists()
