"""A board and its runs -> one page, as a browser shows it."""

import base64
import errno
import gzip
import json
import pydoc
import re
from dataclasses import replace

import PIL.Image
import pytest
from conftest import png
from small_runs import always, right, small_run

from stllava_eval.cli.main import main
from stllava_eval.data.catalog import Row
from stllava_eval.data.splits import write_split
from stllava_eval.errors import InputError
from stllava_eval.reports import page as pages
from stllava_eval.reports.board_rows import board
from stllava_eval.reports.page import page, ranks, write_board

HOSTILE = (
    "<script>document.title='hacked'</script>",
    '"><img src=x onerror="document.title=\'hacked\'">',
    "</script><script>document.title='hacked'</script>",
    "\u202etxt.exe \x1b[31m $data ${script} {{ 7*7 }}",
    "yes " * 400,
)
TASKS = ("vqarad", "slake")
READY = "document.body && document.body.dataset.ready === 'yes'"


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
    browser.wait(READY)
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


def test_the_notices_are_on_the_page(shown):
    text = shown.value("document.body.innerText")
    assert "Research only; not for clinical use." in text
    assert "SAMPLE DATA: these scores say nothing about the official data set." in text


# of the first table, as text: a line's rank, system, prompt and n; a column's figures
LINES = "[...document.querySelectorAll('#scores tbody tr')].map((row) => [...row.cells].map((one) => one.innerText))"


def column(browser, name: str) -> list[float | None]:
    """The figures of a column from top to bottom; None where a row has none."""
    cells = browser.value(
        f"[...document.querySelectorAll('#scores td[data-label]')].filter((one) => one.dataset.label.replace("
        f"/\\u200b/g, '') === {name!r}).map((one) => one.innerText)"
    )
    return [None if cell == "-" else float(cell.split()[0].rstrip("*~†")) for cell in cells]


def press_head(browser, name: str) -> None:
    browser.value(
        "[...document.querySelectorAll('#scores thead button')].find((one) => one.innerText.replace("
        f"/\\u200b/g, '') === {name!r}).focus()"
    )
    browser.press("Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")


def test_rows_are_ordered_by_the_score_that_the_reader_chooses(shown):
    assert column(shown, "recall_llavamed") == sorted(column(shown, "recall_llavamed"), reverse=True)
    assert shown.value("document.querySelector('#scores [aria-sort=descending]').innerText").startswith("recall_")
    choose(shown, "by", "closed_accuracy")
    assert column(shown, "closed_accuracy") == sorted(column(shown, "closed_accuracy"), reverse=True)
    press_head(shown, "f1")
    down = column(shown, "f1")
    assert down == sorted(down, reverse=True)
    assert len(set(down)) > 1
    assert shown.value("document.getElementById('by').value") == "f1"
    press_head(shown, "f1")
    assert column(shown, "f1") == down[::-1] == sorted(down)
    assert "lowest first" in shown.value("document.getElementById('order').innerText")
    assert shown.value("document.activeElement.closest('th').ariaSort") == "ascending"


def test_ranks_are_shown_and_ties_share_one(shown):
    choose(shown, "by", "recall")
    ranks = {line[1].splitlines()[0]: " ".join(line[0].split()) for line in shown.value(LINES)}
    # "stage 1" and "dpo" differ in closed answers alone; "hostile" comes after both
    assert ranks["stage 1"] == ranks["dpo"] == "1 of 3"
    assert ranks["<b>hostile"] == "3 of 3"
    assert ranks['always "yes"'] == "blind"
    choose(shown, "by", "closed_accuracy")
    ranks = {line[1].splitlines()[0]: " ".join(line[0].split()) for line in shown.value(LINES)}
    assert ranks["stage 1"] == "1 of 3"
    press_head(shown, "system")  # another order; the ranks stay
    again = shown.value(LINES)
    assert {line[1].splitlines()[0]: " ".join(line[0].split()) for line in again} == ranks
    names = [line[1].splitlines()[0].lower() for line in again]
    assert names == sorted(names)


def test_prompt_and_n_are_in_the_first_table(shown):
    lines = {line[1].splitlines()[0]: line[2:4] for line in shown.value(LINES)}
    assert lines["dpo"] == ["bare", "4"]
    assert lines['always "yes"'] == ["none", "4"]
    assert shown.value("document.querySelector('#scores tbody td[data-label=\"n, closed\"]').innerText") == "4"


def test_only_who_answered_the_same_questions_is_ranked(home, tmp_path):
    rows = [
        Row(f"{i:03}", png((i % 256, i // 256, 9)), f"{i}.png", f"What is in {i}?", "a lung", "open", {})
        for i in range(200)
    ]
    write_split("vqarad", "test", rows, edition="t", official=False, sample=True, source="", licence="")

    def right_until(first: int, last: int, unanswered: range = range(0)):
        return lambda row: None if int(row["id"]) in unanswered else "lung a" if first <= int(row["id"]) < last else "b"

    runs = [
        small_run(tmp_path / "worse", right_until(0, 100)),
        small_run(tmp_path / "better", right_until(0, 150)),
        small_run(tmp_path / "equal", right_until(50, 200)),
        small_run(tmp_path / "two lacking", right_until(0, 150, range(198, 200))),
        small_run(tmp_path / "half", right_until(0, 200, range(100, 200))),
    ]
    of = ranks(board(runs))["recall"]
    # two questions of 200 may be missing; on the 198 that all four answered, "equal" has 148 right, "better" 150
    assert of["places"] == {"better": (1, 4), "two lacking": (1, 4), "equal": (3, 4), "worse": (4, 4)}
    assert of["notes"] == [
        "measured, training not recorded, prompt bare: recall is ranked on the 198 of 200 questions that all answered."
    ]
    assert "half" not in of["places"]


def test_rows_that_were_asked_with_other_prompts_or_images_are_ranked_apart(prepared, tmp_path):
    rows = [{"id": "test-0-1", "answer": "a"}, {"id": "test-1-1", "answer": "the left lung"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = ["score", "--task", "vqarad", "--answers", str(tmp_path / "a.jsonl")]
    for name, more in {
        "one": ["--prompt", "bare", "--images", "own"],
        "two": ["--prompt", "bare", "--images", "own"],
        "short": ["--prompt", "short", "--images", "own"],
        "unsaid": ["--prompt", "bare"],
    }.items():
        assert main([*score, *more, "--out", str(tmp_path / name)]) == 0
    places = ranks(board([tmp_path / name for name in ("one", "two", "short", "unsaid")]))["recall"]["places"]
    assert places == {"one": (1, 2), "two": (1, 2), "short": (1, 1), "unsaid (images not recorded)": (1, 1)}


def test_who_learnt_from_the_data_set_is_ranked_apart(prepared, tmp_path):
    checkpoints = [
        {"name": "a", "sha256": "1", "trained_on": []},
        {"name": "b", "sha256": "2", "trained_on": ["vqarad sample", "vqarad"]},
        {"name": "c", "sha256": "3", "trained_on": []},
    ]
    runs = [
        small_run(tmp_path / one["name"], right if one["name"] != "c" else always("no"), checkpoint=one)
        for one in checkpoints
    ]
    assert ranks(board(runs))["recall"]["places"] == {"a": (1, 2), "c": (2, 2), "b": (1, 1)}


def test_the_page_opens_on_the_set_with_most_measured_rows(prepared, browser, tmp_path):
    runs = [
        small_run(tmp_path / "a", right, ("vqarad", "slake")),
        small_run(tmp_path / "b", right, ("slake",)),
        small_run(tmp_path / "c", right, ("vqarad",), images="black"),
        small_run(tmp_path / "d", right, ("vqarad",), images="other"),
    ]
    write_board(tmp_path / "out", board(runs))
    browser.open(f"file://{tmp_path}/out/index.html")
    browser.wait(READY)
    assert browser.value("document.getElementById('task').value") == "slake"
    assert browser.value("document.getElementById('counts').textContent").startswith("slake")


def test_words_are_counted_by_kind_and_empty_answers_are_counted(prepared, tmp_path):
    def say(row):
        return "one two three four" if row["kind"] == "open" else "" if row["id"] == "test-0-0" else "yes"

    runs = [small_run(tmp_path / "a", say)]
    rows = board(runs)
    scores = data_of(page(rows))["rows"][0]["scores"]
    assert scores["words_open"][3:5] == [4, "4.0"]
    assert scores["words_closed"][3:5] == [4, "0.8"]
    assert scores["empty"][4] == "1"


def test_every_part_of_the_page_rounds_a_figure_alike(runs, browser, tmp_path):
    """20.414999 is 20.41; rounded to six digits of a share first, it would be 20.42."""
    rows = [
        replace(
            row,
            scores={name: replace(of, value=0.20414999) if name == "recall" else of for name, of in row.scores.items()},
        )
        for row in board(runs)
    ]
    write_board(tmp_path / "out", rows)
    browser.open(f"file://{tmp_path}/out/index.html")
    browser.wait(READY)
    choose(browser, "by", "recall")
    choose(browser, "of", "recall")
    assert set(column(browser, "recall")) == {20.41}
    assert browser.value("document.querySelector('#plot .value b').innerText") == "20.41"
    assert browser.value("document.querySelector('#categories tbody td').innerText") == "20.41"
    assert "20.41" in browser.value("document.getElementById('inspection').innerText")
    for file in ("index.html", "board.md"):
        assert "20.42" not in (tmp_path / "out" / file).read_text()
    assert "20.42" not in browser.value("document.body.innerText")


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
    assert shown.value("document.getElementById('found').innerText").count(f"{count} questions") == 1
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
        browser.wait(READY)
        browser.value("document.getElementById('cards').scrollIntoView()")
        browser.wait("document.querySelector('#cards img')?.naturalWidth > 0")
    assert len(list((tmp_path / "folder" / "images").iterdir())) == 8
    assert (tmp_path / "folder" / "index.html").stat().st_size < (tmp_path / "page" / "index.html").stat().st_size


@pytest.mark.parametrize("dark", [False, True])
def test_the_dark_page_is_dark(runs, browser, tmp_path, dark):
    write_board(tmp_path / "out", board(runs))
    browser.open(f"file://{tmp_path}/out/index.html", dark=dark)
    browser.wait(READY)
    browser.picture(tmp_path / "page.png")
    corner = PIL.Image.open(tmp_path / "page.png").convert("L").getpixel((2, 2))
    assert (corner < 80) is dark


@pytest.fixture
def crowded(home, tmp_path):
    """A board of every kind of row: reported ones, image-blind ones, and runs whose names are long."""
    asked = [(f"Is it {'o' * 60} {i}?", ("yes", "no")[i % 2], "closed", "o" * 60) for i in range(6)]
    asked += [(f"What is {i}?", "a lung", "open", "b") for i in range(6)]
    for name in TASKS:
        for split in ("train", "test"):
            rows = [
                Row(f"{i}", png((i % 6, len(split), 9)), f"{'i' * 90}{i % 6}.png", *question, {"organ": organ})
                for i, (*question, organ) in enumerate(asked)
            ]
            write_split(name, split, rows, edition="o", official=True, sample=False, source="", licence="")
    names = ["short", "L" * 100, "runs-of-a-group-with-a-long-name-epoch-3-of-3-dpo-beta-0.1-learning-rate-5e-7-seed"]
    runs = [small_run(tmp_path / f"{name} {number}", right, TASKS) for number in range(4) for name in names]
    lost = "[LMMS_EVAL_REQUEST_FAILED after 5 attempts] " + "e" * 300
    runs += [
        small_run(tmp_path / "some", lambda row: lost if row["id"] == "11" else "w" * 300, TASKS),
        small_run(tmp_path / f"black {'b' * 90}", always(""), TASKS, images="black"),
        small_run(tmp_path / "closed", lambda row: "yes" if row["kind"] == "closed" else None, TASKS),
    ]
    write_board(tmp_path / "out", board(runs, published=True), images="none")
    return tmp_path / "out" / "index.html"


def test_nothing_sticks_out_at_any_width(crowded, browser):
    for width in (320, 400, 640, 641, 900, 1160, 1280, 1920):
        browser.open(f"file://{crowded}", width=width)
        browser.wait(READY)
        assert len(browser.value(LINES)) > 30
        assert (width, browser.sticking_out()) == (width, [])
        for kind in ("open", "closed"):
            choose(browser, "kind", kind)
            assert (width, kind, browser.sticking_out()) == (width, kind, [])
        choose(browser, "show", "silent")
        browser.value("document.querySelector('#scores tbody button').click()")
        assert (width, "about", browser.sticking_out()) == (width, "about", [])


def test_the_first_table_is_one_at_1280_px_and_blocks_on_a_phone(crowded, browser):
    for width, head in ((1280, True), (400, False)):
        browser.open(f"file://{crowded}", width=width)
        browser.wait(READY)
        assert browser.value("document.querySelector('#scores thead').offsetHeight > 0") is head


@pytest.mark.parametrize("width", [400, 1280])
def test_no_figure_is_left_out_at_any_width(crowded, browser, width):
    """Where rows become blocks, only cells without a figure go."""
    browser.open(f"file://{crowded}", width=width)
    browser.wait(READY)
    hidden = (
        "[...document.querySelectorAll('tbody td')].filter((one) => !one.offsetWidth).map((one) => one.textContent)"
    )
    assert set(browser.value(hidden)) <= {"-"}
    for section in ("scores", "plot", "categories", "inspection", "cards"):
        assert browser.value(f"document.getElementById({section!r}).innerText").strip()


def test_reported_rows_are_ordered_but_not_ranked(crowded, browser):
    browser.open(f"file://{crowded}")
    browser.wait(READY)
    lines = browser.value(LINES)
    reported = [line for line in lines if "reported" in line[1]]
    assert len(reported) > 10
    assert {line[0] for line in reported} <= {"reported", "-"}  # -: it has no such score
    assert {line[3] for line in reported} == {"-"}  # n
    partial = {line[1].splitlines()[0]: line[0] for line in lines if line[0] == "partial"}
    assert partial == {"some": "partial"}  # it lacks one of six
    assert "A row is partial" in browser.value("document.getElementById('ranking').innerText")


@pytest.mark.parametrize("official", [True, False])
def test_images_of_pathvqa_are_shown_only_where_asked(home, tmp_path, official):
    rows = [Row(f"{i}", png((i, 9, 9)), f"{i}.png", "Is it?", "yes", "closed", {}) for i in range(2)]
    write_split("pathvqa", "test", rows, edition="o", official=official, sample=False, source="", licence="")
    runs = [small_run(tmp_path / "a", right, ("pathvqa",))]
    for asked, count in ((False, 0), (True, 2)):
        data = data_of(page(board(runs), "page", asked))
        assert len(data["images"]) == count
        assert all((one["image"] is not None) is asked for one in data["viewer"]["pathvqa"]["questions"])


def test_the_interval_plot_shows_the_score_and_the_order_of_the_first_table(shown):
    choose(shown, "kind", "closed")
    assert shown.value("document.getElementById('metric').value") == "closed_llavamed"
    choose(shown, "metric", "closed_accuracy")
    assert shown.value("document.getElementById('by').value") == "closed_accuracy"
    values = "[...document.querySelectorAll('#plot .value b')].map((one) => parseFloat(one.innerText))"
    assert shown.value(values) == column(shown, "closed_accuracy")


def test_a_page_that_would_be_too_large_keeps_the_questions_on_which_systems_differ(home, tmp_path, monkeypatch):
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


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        pytest.param(None, "not asked", id="not asked"),
        pytest.param(
            "[LMMS_EVAL_REQUEST_FAILED after 0 attempts] a.csv has no answer", "not asked: a.csv has no answer"
        ),
        pytest.param(
            "[LMMS_EVAL_REQUEST_FAILED after 5 attempts] HTTP 503\nbusy", "no answer: HTTP 503\nbusy (5 attempts)"
        ),
        pytest.param("[LMMS_EVAL_REQUEST_FAILED after 3 retries] ", "no answer: no reason is given (3 attempts)"),
        pytest.param("Batch failed", "no answer: Batch failed"),
    ],
)
def test_a_question_without_an_answer_says_why(prepared, browser, tmp_path, reply, shown):
    runs = [small_run(tmp_path / "a", lambda row: reply if row["kind"] == "open" else "yes and no")]
    write_board(tmp_path / "out", board(runs))
    text = (tmp_path / "out" / "index.html").read_text()
    (system, *_) = data_of(text)["viewer"]["vqarad"]["systems"]
    assert set(system["signs"]) == {"-", "U"}  # "yes and no" chooses neither
    browser.open(f"file://{tmp_path}/out/index.html")
    browser.wait(READY)
    choose(browser, "show", "silent")
    said = "[...document.querySelectorAll('#cards .answer')].filter((one) => one.innerText.startsWith('a')).map((one) => one.querySelector('.said').innerText)"  # noqa: E501
    assert set(browser.value(said)) == {shown}
    assert browser.value("document.querySelectorAll('#cards .card').length") == 4
    assert "LMMS_EVAL" not in browser.value("document.body.innerText")


def test_an_empty_answer_is_shown_as_one(prepared, browser, tmp_path):
    runs = [small_run(tmp_path / "a", lambda row: " " if row["kind"] == "open" else "yes")]
    write_board(tmp_path / "out", board(runs))
    browser.open(f"file://{tmp_path}/out/index.html")
    browser.wait(READY)
    choose(browser, "show", "empty")
    assert browser.value("document.querySelectorAll('#cards .card').length") == 4
    assert "empty answer" in browser.value("document.getElementById('cards').innerText")
    assert max(column(browser, "empty")) == 4


def test_a_long_answer_is_cut(prepared, tmp_path):
    runs = [small_run(tmp_path / "a", always("word " * 1000))]
    assert max(map(len, data_of(page(board(runs)))["strings"])) < 500


def test_images_of_an_earlier_page_do_not_stay(runs, tmp_path):
    write_board(tmp_path / "out", board(runs), "folder")
    (tmp_path / "out" / "images" / "mine.jpg").write_bytes(b"")
    write_board(tmp_path / "out", board(runs), "none")
    assert [file.name for file in (tmp_path / "out" / "images").iterdir()] == ["mine.jpg"]


FILES = ("board.md", "board.csv", "board.json", "board.tex", "board.bib", "index.html")


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
    with pytest.raises(InputError, match=r"--out .*file\b.*is a file.*Choose another"):
        write_board(tmp_path / "file", board(runs))
    with pytest.raises(InputError, match=r"no folder can be made there \(File name too long\)"):
        write_board(tmp_path / ("x" * 256), board(runs))


@pytest.mark.parametrize("control", ["kind", "group-0", "by", "metric", "field", "of", "a", "show", "in"])
def test_a_control_keeps_the_focus_when_it_is_used(shown, control):
    shown.value(f"document.getElementById({control!r}).focus()")
    shown.value(f"document.getElementById({control!r}).dispatchEvent(new Event('change'))")
    assert shown.value("document.activeElement.id") == control
