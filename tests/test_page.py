"""A board and its runs -> one page, as a browser shows it."""

import base64
import errno
import gzip
import json
import pydoc
import re

import PIL.Image
import pytest
from small_runs import always, right, small_run

from stllava_eval import page as pages
from stllava_eval.errors import InputError
from stllava_eval.leaderboard import board
from stllava_eval.page import page, write_board

HOSTILE = (
    "<script>document.title='hacked'</script>",
    '"><img src=x onerror="document.title=\'hacked\'">',
    "</script><script>document.title='hacked'</script>",
    "\u202etxt.exe \x1b[31m $data ${script} {{ 7*7 }}",
    "yes " * 400,
)
TASKS = ("vqarad", "slake")


def data_of(text: str) -> dict:
    packed = re.search(r'id="data">([^<]*)<', text)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.fixture
def runs(prepared, tmp_path):
    def hostile(row):
        return HOSTILE[sum(map(ord, row["id"])) % len(HOSTILE)]

    return [
        small_run(tmp_path / "stage 1", right, TASKS),
        small_run(tmp_path / "dpo", lambda row: "no" if row["reference"] == "yes" else row["reference"], TASKS),
        small_run(tmp_path / "<b>hostile", hostile, TASKS),
    ]


@pytest.fixture
def shown(runs, browser, tmp_path):
    """The page, open in a browser."""
    write_board(tmp_path / "out", board(runs))
    browser.open(f"file://{tmp_path}/out/index.html")
    browser.wait("document.body.dataset.ready === 'yes'")
    return browser


def choose(browser, control: str, value: str) -> None:
    browser.value(
        f"(() => {{ const one = document.getElementById({control!r}); one.value = {value!r};"
        " one.dispatchEvent(new Event('change')); })()"
    )


def test_the_page_holds_no_text_of_a_model_or_data_set_as_it_is(runs):
    text = page(board(runs))
    assert "hacked" not in text
    assert "hostile" not in text
    assert "Content-Security-Policy" in text
    assert "http" not in text.replace("http-equiv", "")  # nothing is fetched


def test_hostile_answers_are_shown_as_text(shown):
    cards = shown.value("document.getElementById('cards').textContent")
    assert "<script>document.title='hacked'</script>" in cards
    assert 'onerror="document.title' in cards
    assert shown.value("document.title") == "Leaderboard"
    assert shown.value("document.querySelectorAll('#cards script, #cards b').length") == 0
    assert "<b>hostile" in shown.value("document.getElementById('scores').textContent")


def test_the_notices_stand_on_the_page(shown):
    text = shown.value("document.body.innerText")
    assert "Research only; not for clinical use." in text
    assert "SAMPLE DATA: these scores say nothing about the official data set." in text


def test_columns_are_sorted_by_a_click_and_by_a_key(shown):
    first = "[...document.querySelectorAll('#scores tbody tr')].map((row) => row.cells[0].innerText)"
    by_group = shown.value(first)
    assert by_group[0] == "measured, training not recorded"
    shown.value("document.querySelectorAll('#scores thead button')[3].focus()")
    shown.press("Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    assert shown.value("document.querySelector('#scores [aria-sort=descending]').innerText").startswith("recall")
    values = "[...document.querySelectorAll('#scores tbody tr')].map((row) => parseFloat(row.cells[3].innerText))"
    down = shown.value(values)
    assert down == sorted(down, reverse=True)
    shown.value("document.querySelectorAll('#scores thead button')[3].click()")
    assert shown.value(values) == sorted(down)


def test_questions_of_one_kind_and_rows_of_a_group_can_be_left_out(shown):
    choose(shown, "kind", "closed")
    heads = shown.value("document.querySelector('#scores thead').innerText")
    assert "closed" in heads
    assert "recall" not in heads
    shown.value("document.querySelectorAll('#board-controls input')[1].click()")
    assert "image-blind" not in shown.value("document.getElementById('scores').innerText")


def test_another_data_set_is_chosen(shown):
    choose(shown, "task", "slake")
    assert shown.value("document.getElementById('counts').textContent").startswith("slake")
    assert "Is this a CT or an MRI?" in shown.value("document.getElementById('cards').textContent")


@pytest.mark.parametrize(
    ("show", "count"),
    [
        pytest.param("all", 8, id="all"),
        pytest.param("ab", 4, id="A right, B wrong: the closed ones"),
        pytest.param("ba", 0, id="B right, A wrong"),
        pytest.param("changed", 4, id="DPO changed the answer"),
        pytest.param("wrong", 0, id="both wrong"),
    ],
)
def test_questions_are_found_by_how_two_systems_answer(shown, show, count):
    choose(shown, "a", "stage 1")
    choose(shown, "b", "dpo")
    choose(shown, "show", show)
    assert shown.value("document.getElementById('pager').innerText").count(f"{count} questions") == 1
    assert shown.value("document.querySelectorAll('#cards .card').length") == count


def test_words_and_categories_find_questions(shown):
    shown.value(
        "(() => { const one = document.getElementById('search'); one.value = 'organ';"
        " one.dispatchEvent(new Event('input')); })()"
    )
    assert shown.value("document.querySelectorAll('#cards .card').length") == 4
    choose(shown, "in", "organ=organ 1")
    assert shown.value("document.querySelectorAll('#cards .card').length") == 2


def test_keys_go_from_question_to_question(shown):
    for key in ("j", "j", "k"):
        shown.press(key)
    place = "[...document.querySelectorAll('#cards .card')].indexOf(document.activeElement)"
    assert shown.value(place) == 0


def test_what_a_row_rests_on_opens_and_closes(shown):
    shown.click("#scores tbody button")
    assert "sha256" in shown.value("document.getElementById('about').innerText")
    shown.value("document.querySelector('#about button').click()")
    assert shown.value("document.getElementById('about').open") is False


def test_images_are_shown_from_the_page_and_from_a_folder(runs, browser, tmp_path):
    for images in ("page", "folder"):
        out = tmp_path / images
        write_board(out, board(runs), images)
        browser.open(f"file://{out}/index.html")
        browser.wait("document.body.dataset.ready === 'yes'")
        browser.value("document.getElementById('cards').scrollIntoView()")
        browser.wait("document.querySelector('#cards img')?.naturalWidth > 0")
    assert len(list((tmp_path / "folder" / "images").iterdir())) == 8
    assert (tmp_path / "folder" / "index.html").stat().st_size < (tmp_path / "page" / "index.html").stat().st_size


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out_and_the_dark_page_is_dark(runs, browser, tmp_path, dark, width):
    write_board(tmp_path / "out", board(runs))
    browser.open(f"file://{tmp_path}/out/index.html", width=width, dark=dark)
    browser.wait("document.body.dataset.ready === 'yes'")
    assert browser.value("document.documentElement.scrollWidth") <= width
    browser.picture(tmp_path / "page.png")
    corner = PIL.Image.open(tmp_path / "page.png").convert("L").getpixel((2, 2))
    assert (corner < 80) is dark


@pytest.mark.parametrize("official", [True, False])
def test_images_of_pathvqa_are_shown_only_where_asked(home, tmp_path, official):
    from conftest import png

    from stllava_eval.datasets import Row, write_split

    rows = [Row(f"{i}", png((i, 9, 9)), f"{i}.png", "Is it?", "yes", "closed", {}) for i in range(2)]
    write_split("pathvqa", "test", rows, edition="o", official=official, sample=False, source="", licence="")
    runs = [small_run(tmp_path / "a", right, ("pathvqa",))]
    for asked, count in ((False, 0), (True, 2)):
        data = data_of(page(board(runs), "page", asked))
        assert len(data["images"]) == count
        assert all((one["image"] is not None) is asked for one in data["viewer"]["pathvqa"]["questions"])


def test_the_interval_plot_shows_the_score_that_its_control_names(shown):
    choose(shown, "kind", "closed")
    named = shown.value("document.getElementById('metric').value")
    shown.value("document.querySelectorAll('#board-controls input')[1].click()")
    first = "document.querySelector('#plot .value b').innerText"
    row = "[...document.querySelectorAll('#scores tbody tr')][1].cells[1].innerText"
    assert named == "closed_llavamed" == shown.value("document.getElementById('metric').value")
    assert shown.value(row).startswith(shown.value(first))


def test_a_page_that_would_be_too_large_keeps_the_questions_on_which_systems_differ(home, tmp_path, monkeypatch):
    from conftest import png

    from stllava_eval.datasets import Row, write_split

    rows = [
        Row(f"{i:03}", png((i % 256, i // 256, 9)), f"{i}.png", f"Is it {i}?", "yes", "closed", {}) for i in range(300)
    ]
    write_split("vqarad", "test", rows, edition="t", official=False, sample=True, source="", licence="")
    noise = {row.id: f"yes {int(row.id) ** 9} " * 9 for row in rows}
    runs = [
        small_run(tmp_path / "a", lambda row: noise[row["id"]]),
        small_run(tmp_path / "b", lambda row: "no" if row["id"] in ("007", "123") else noise[row["id"]]),
    ]
    whole = page(board(runs))
    monkeypatch.setattr(pages, "LIMIT", len(whole) - 1000)
    text = page(board(runs))
    viewer = data_of(text)["viewer"]["vqarad"]
    assert len(text) <= len(whole) - 1000
    assert len(viewer["questions"]) < viewer["of"] == 300
    assert {"007", "123"} <= {one["id"] for one in viewer["questions"]}
    assert [one["id"] for one in viewer["questions"]] == sorted(one["id"] for one in viewer["questions"])


def test_unanswered_questions_are_shown_as_such(prepared, tmp_path):
    runs = [small_run(tmp_path / "a", lambda row: None if row["kind"] == "open" else "yes and no")]
    (system, *_) = data_of(page(board(runs)))["viewer"]["vqarad"]["systems"]
    assert set(system["signs"]) == {"-", "U"}  # "yes and no" chooses neither
    assert -1 in system["answers"]


def test_a_long_answer_is_cut(prepared, tmp_path):
    runs = [small_run(tmp_path / "a", always("word " * 1000))]
    assert max(map(len, data_of(page(board(runs)))["strings"])) < 500


def test_images_of_an_earlier_page_do_not_stay(runs, tmp_path):
    write_board(tmp_path / "out", board(runs), "folder")
    (tmp_path / "out" / "images" / "mine.jpg").write_bytes(b"")
    write_board(tmp_path / "out", board(runs), "none")
    assert [file.name for file in (tmp_path / "out" / "images").iterdir()] == ["mine.jpg"]


FILES = ("board.md", "board.csv", "board.json", "board.tex", "index.html")


@pytest.mark.parametrize("call", [0, 2, 4])
@pytest.mark.parametrize("what", ["os.fsync", "pathlib.Path.rename"])
def test_a_full_disk_leaves_the_whole_old_board(runs, tmp_path, monkeypatch, what, call):
    out = tmp_path / "out"
    write_board(out, board(runs[:1]), "folder")
    before = {file: file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    assert {file.name for file in before} >= {*FILES}
    calls, real = iter(range(1000)), pydoc.locate(what)

    def full(*arguments):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(what, full)
    with pytest.raises(InputError) as refused:
        write_board(out, board(runs), "none")
    assert str(refused.value) == (
        f"{out}: cannot be written (No space left on device). Free some space or choose another folder."
    )
    assert {file: file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()} == before


def test_a_board_goes_to_a_folder_and_its_name_can_be_too_long(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .*file is a file\. Choose another folder"):
        write_board(tmp_path / "file", board(runs))
    with pytest.raises(InputError, match=r"no folder can be made there \(File name too long\)"):
        write_board(tmp_path / ("x" * 256), board(runs))


@pytest.mark.parametrize("control", ["kind", "group-0", "metric", "field", "of", "a", "show", "in"])
def test_a_control_keeps_the_focus_when_it_is_used(shown, control):
    shown.value(f"document.getElementById({control!r}).focus()")
    shown.value(f"document.getElementById({control!r}).dispatchEvent(new Event('change'))")
    assert shown.value("document.activeElement.id") == control
