"""Run folders, published rows -> boards as text, Markdown, CSV, JSON and LaTeX."""

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import png
from small_runs import always, right, small_run

from stllava_eval.cli import main
from stllava_eval.errors import InputError
from stllava_eval.leaderboard import (
    BEST,
    EQUAL,
    board,
    board_csv,
    board_json,
    board_latex,
    board_markdown,
    board_text,
    latex,
    markdown,
)

PAPER = {"vqarad": (37.12, 10.83, 60.35), "slake": (46.69, 11.46, 57.69), "pathvqa": (11.92, 2.72, 52.90)}
HOSTILE = "<script>alert(1)</script>|`x`\\end{document}&%$#_^~*[a](b) \x1b[31m"


@pytest.fixture
def official(home):
    """Test splits of a few made-up rows that are marked as official."""
    from stllava_eval.datasets import Row, write_split

    for name in PAPER:
        rows = [
            Row(
                id=f"{image}-{kind}",
                image=png((9 * image, 0, 200)),
                image_id=f"{image}.png",
                question="Is there a mass?" if kind == "closed" else "What is seen?",
                reference="yes" if kind == "closed" else "left lung",
                kind=kind,
                categories={},
            )
            for image in range(20)
            for kind in ("open", "closed")
        ]
        write_split(name, "test", rows, edition="official test", official=True, sample=False, source="", licence="")
    return home


def test_rows_stand_in_groups_by_what_the_system_has_learnt(prepared, tmp_path):
    learnt = {
        name: {"checkpoint": {"name": name, "sha256": name, "trained_on": sets}}
        for name, sets in {"tuned": ["vqarad sample"], "elsewhere": ["vqarad"], "unknown": None}.items()
    }
    runs = [small_run(tmp_path / name, right, **decided) for name, decided in learnt.items()]
    runs.append(small_run(tmp_path / "dark", always("yes"), images="black", **learnt["tuned"]))
    rows = {row.system: row for row in board(runs)}
    assert {name: rows[name].group for name in ("tuned", "elsewhere", "unknown")} == {
        "tuned": "measured, fine-tuned",
        "elsewhere": "measured, zero-shot",
        "unknown": "measured, training not recorded",
    }
    assert rows["dark (black images)"].group == "image-blind" == rows['always "no"'].group
    assert list(rows)[:3] == ["elsewhere", "tuned", "unknown"]  # zero-shot first


def test_the_best_is_marked_and_so_is_what_the_questions_cannot_tell_from_it(official, tmp_path):
    def nearly(row):
        return "no" if row["id"] == "3-closed" else row["reference"]

    runs = [small_run(tmp_path / name, say) for name, say in {"a": right, "b": nearly, "c": always("no lung")}.items()]
    marks = {row.system: row.marks for row in board(runs) if row.kind == "measured"}
    assert marks["a"]["closed_accuracy"] == BEST
    assert marks["b"]["closed_accuracy"] == EQUAL
    assert "closed_accuracy" not in marks["c"]  # 20 of 20 images: p = 2 / 10,001
    assert marks["a"]["recall"] == marks["b"]["recall"] == BEST  # the same score


def test_systems_of_other_groups_and_prompts_are_not_ranked_together(official, tmp_path):
    tuned = {"checkpoint": {"name": "t", "sha256": "t", "trained_on": ["vqarad"]}}
    runs = [small_run(tmp_path / "a", right), small_run(tmp_path / "b", always("no"), **tuned)]
    assert not any(row.marks for row in board(runs))


def test_reported_rows_are_the_papers_and_only_of_official_data(official, tmp_path):
    runs = [small_run(tmp_path / "a", right, ("vqarad", "slake", "pathvqa"))]
    found = {
        (row.task, row.system): row
        for row in board(runs, published=True)
        if row.kind == "reported" and row.about["table"] == "Table 2"
    }
    for task, figures in PAPER.items():
        scores = found[task, "STLLaVA-Med"].scores
        assert [round(100 * scores[name].value, 2) for name in scores] == list(figures)
        assert all(score.n == 0 and score.low is None for score in scores.values())
    assert "no share of 272" in found["vqarad", "STLLaVA-Med"].notes["closed_llavamed"]
    assert not any(row.kind == "reported" for row in board(runs))


def test_every_cell_of_the_papers_tables_is_reported_as_printed(official, tmp_path, shared):
    printed = json.loads((shared / "data" / "papers" / "stllava_med_tables.json").read_text(encoding="utf-8"))
    runs = [small_run(tmp_path / "a", right, ("vqarad", "slake", "pathvqa"))]
    found = {
        (row.about["table"], row.about["row"], row.task): row
        for row in board(runs, published=True)
        if row.kind == "reported"
    }
    names = {"recall": "recall_llavamed", "f1": "f1_llavamed", "closed": "closed_llavamed"}
    for table, label in (("table_2", "Table 2"), ("table_4", "Table 4")):
        for row in printed[table]:
            for task, cells in row["scores"].items():
                scores = found[label, row["row"], task].scores
                assert {name: round(100 * scores[names[name]].value, 2) for name in cells} == cells
    groups = {key[1]: row.group for key, row in found.items() if key[0] == "Table 2"}
    assert groups["GPT-4o"] == "reported, zero-shot, without Med-IM"
    assert groups["STLLaVA-Med"] == "reported, zero-shot, with Med-IM"


def test_a_run_that_left_out_open_questions_is_a_rival_in_closed_ones(prepared, tmp_path):
    def half_right(row):
        return "no" if row["kind"] == "closed" and row["id"].startswith("test-0") else row["reference"]

    def closed_only(row):
        return row["reference"] if row["kind"] == "closed" else None

    rows = board([small_run(tmp_path / "all", half_right), small_run(tmp_path / "closed", closed_only)])
    marks = {row.system: row.marks for row in rows if row.kind == "measured"}
    assert marks["closed"]["closed_accuracy"] == "best"
    assert marks["all"].get("closed_accuracy") != "best"
    assert "recall" not in marks["all"]  # nobody to compare it with


@pytest.mark.parametrize(("lacking", "compared"), [(1, True), (2, False)])
def test_a_row_that_lacks_one_in_a_hundred_questions_is_compared_on_the_others(home, tmp_path, lacking, compared):
    from stllava_eval.datasets import Row, write_split

    rows = [
        Row(f"{number}", png((number, 0, 7)), f"{number}.png", "Is there a mass?", "yes", "closed", {})
        for number in range(100)
    ]
    write_split("vqarad", "test", rows, edition="t", official=False, sample=True, source="", licence="")
    whole = small_run(tmp_path / "whole", lambda row: "no" if row["id"] in ("97", "98", "99") else "yes")
    part = small_run(tmp_path / "part", lambda row: None if int(row["id"]) < lacking else "yes")
    marks = {row.system: row.marks for row in board([whole, part]) if row.kind == "measured"}
    assert ("closed_accuracy" in marks["part"]) is compared
    if compared:
        assert marks["part"]["closed_accuracy"] == "best"


def test_sample_data_never_stands_beside_reported_rows(prepared, tmp_path):
    rows = board([small_run(tmp_path / "a", right)], published=True)
    assert not any(row.kind == "reported" for row in rows)
    assert "SAMPLE DATA" in board_text(rows)
    assert "SAMPLE DATA" in board_markdown(rows)


def test_every_published_figure_names_table_row_and_source():
    from importlib.resources import files

    rows = json.loads(files("stllava_eval").joinpath("published.json").read_text())["rows"]
    for row in rows:
        assert all(row[name] for name in ("system", "table", "row", "source"))
        assert row["setting"] in ("zero-shot", "fine-tuned")
        for task, cells in row["scores"].items():
            assert task in PAPER
            assert all(value is None or 0 < value < 100 for value in cells.values())
        assert all(place.split()[1] in row["scores"][place.split()[0]] for place in row["notes"])


def test_closed_figures_are_shares_of_the_official_questions_but_for_the_footnoted_ones():
    from importlib.resources import files

    questions = {"vqarad": 272, "slake": 416, "pathvqa": 3391}
    impossible = []
    for row in json.loads(files("stllava_eval").joinpath("published.json").read_text())["rows"]:
        for task, cells in row["scores"].items():
            for metric, value in cells.items():
                if metric.startswith("closed") and value is not None:
                    of = questions[task]
                    if not any(abs(100 * right / of - value) <= 0.005 + 1e-9 for right in range(of + 1)):
                        impossible.append((row["system"], task))
    assert impossible == [
        ("PMC-VQA (MedVInT)", "pathvqa"),  # cut off, not rounded; their footnotes say so
        ("STLLaVA-Med without DPO", "vqarad"),
        ("STLLaVA-Med", "vqarad"),
        ("LLaVA-Med v1 (from Vicuna)", "vqarad"),
    ]


def test_a_system_that_was_not_shown_other_images_is_named(prepared, tmp_path):
    runs = [small_run(tmp_path / "a", right)]
    assert "Not shown other images" in board_text(board(runs))
    same = {"checkpoint": {"name": "a", "sha256": "a" * 4, "trained_on": None}}
    for images in ("other", "black"):
        runs.append(small_run(tmp_path / images, right, images=images, **same))
    assert "Not shown" not in board_text(board(runs))


def test_the_csv_has_a_line_for_each_score_with_what_it_rests_on(prepared, tmp_path):
    rows = board([small_run(tmp_path / "a", right)])
    lines = list(csv.DictReader(io.StringIO(board_csv(rows))))
    (recall,) = [line for line in lines if line["system"] == "a" and line["metric"] == "recall"]
    assert (recall["value"], recall["n"], recall["sha256"], recall["prompt"]) == ("1.0", "4", "aaaa", "bare")
    assert (
        recall["signature"] == "recall|v1|vqarad test for tests|prompt bare|extract final-v1|images own|decoding greedy"
    )


def test_a_spreadsheet_takes_no_name_for_a_formula(prepared, tmp_path):
    rows = board([small_run(tmp_path / "=1+1", right)])
    assert "'=1+1" in {line["system"] for line in csv.DictReader(io.StringIO(board_csv(rows)))}


def test_the_json_holds_the_board(prepared, tmp_path):
    made = board_json(board([small_run(tmp_path / "a", right)]))
    (row,) = [row for row in made["rows"] if row["system"] == "a"]
    assert row["scores"]["closed_accuracy"]["value"] == 1.0
    assert row["group"] == "measured, training not recorded"
    json.dumps(made)


def test_markdown_shows_signs_as_they_are():
    shown = markdown(HOSTILE)
    assert "<" not in shown
    assert not re.search(r"(?<!\\)[|`*_\[\]~$]", shown)
    assert "@" not in markdown("@team https://a.b")
    assert "://" not in markdown("@team https://a.b")
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a_b & 50 %", r"a\_b \& 50 \%", id="signs that LaTeX reads"),
        pytest.param("\\input{x}", r"\textbackslash{}input\{x\}", id="a command is text"),
        pytest.param("≤ 3", "? 3", id="no Latin sign"),
    ],
)
def test_latex(text, expected):
    assert latex(text) == expected


def test_the_latex_tables_compile(official, tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("needs pdflatex (apt-get install texlive-latex-base texlive-latex-recommended)")
    hostile = {"checkpoint": {"name": HOSTILE, "sha256": "x", "trained_on": None}}
    folder = tmp_path / "a_b%$&#{}~^"
    rows = board([small_run(folder, right, ("vqarad", "slake", "pathvqa"), **hostile)], published=True)
    document = (
        r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}" + board_latex(rows) + r"\end{document}"
    )
    (tmp_path / "board.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "board.tex"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert "Overfull" not in ran.stdout, "it is wider than the page"


def test_latex_has_the_columns_of_the_papers_tables(official, tmp_path):
    rows = board([small_run(tmp_path / "a", right, ("vqarad", "slake", "pathvqa"))], published=True)
    text = board_latex(rows)
    assert r"STLLaVA-Med & 37.12 & 10.83 & 60.35$^{\dagger}$ & 46.69 & 11.46 & 57.69 & 11.92 & 2.72 & 52.90 \\" in text
    assert r"84.19$^{\ddagger}$" in text  # the batch rule, where a source reports that alone
    assert text.count(r"$\ddagger$ By the batch rule") == 1  # in the table that has the sign
    assert r"\emph{reported, fine-tuned}" in text


def test_the_command_writes_the_same_bytes_twice(prepared, tmp_path):
    run = str(small_run(tmp_path / "a", right))
    names = ("board.md", "board.csv", "board.json", "board.tex", "index.html")
    made = []
    for out in ("one", "two"):
        assert main(["leaderboard", run, "--out", str(tmp_path / out)]) == 0
        made.append([(tmp_path / out / name).read_bytes() for name in names])
    assert made[0] == made[1]


def test_two_runs_of_one_name_are_told_apart_by_their_folders(prepared, tmp_path):
    runs = [small_run(tmp_path / name / "eval", right) for name in ("a", "b")]
    assert [row.system for row in board(runs)][:2] == ["a/eval", "b/eval"]


def test_a_run_named_twice_is_refused(prepared, tmp_path, capsys):
    run = small_run(tmp_path / "a", right)
    assert main(["leaderboard", str(run), str(Path(run) / ".." / "a")]) == 2
    assert "named twice" in capsys.readouterr().err


def test_runs_that_answered_other_questions_are_not_ranked_together(official, tmp_path):
    def few(row):
        return row["reference"] if row["id"] in ("1-open", "1-closed") else None

    runs = [small_run(tmp_path / "whole", always("no lung")), small_run(tmp_path / "few", few)]
    assert not any(row.marks for row in board(runs))


@pytest.mark.parametrize("name", ['always "no"', "a (black images)"])
def test_a_run_that_is_named_like_another_row_is_refused(prepared, tmp_path, name):
    runs = [small_run(tmp_path / "a", right, images="black"), small_run(tmp_path / name, right)]
    with pytest.raises(InputError, match="two rows of vqarad would have this name"):
        board(runs)


def test_tasks_are_named_once_and_no_run_is_left_out_in_silence(prepared, tmp_path, capsys):
    run = str(small_run(tmp_path / "a", right))
    assert main(["leaderboard", run, "--tasks", "vqarad,vqarad"]) == 2
    assert "named twice" in capsys.readouterr().err
    assert main(["leaderboard", run, "--tasks", "slake"]) == 2
    assert "it has none of slake" in capsys.readouterr().err


def test_options_of_the_page_without_a_page_are_refused(prepared, tmp_path, capsys):
    assert main(["leaderboard", str(small_run(tmp_path / "a", right)), "--images", "folder"]) == 2
    assert "Pass --out DIR too" in capsys.readouterr().err


def test_a_run_may_be_named_like_a_reported_system(official, tmp_path):
    rows = board([small_run(tmp_path / "GPT-4o", right)], published=True)
    assert [row.kind for row in rows if row.system == "GPT-4o"] == ["measured", "reported"]


def test_a_terminal_takes_nothing_in_a_board_for_a_command(prepared, tmp_path):
    hostile = {"checkpoint": {"name": HOSTILE, "sha256": HOSTILE, "trained_on": None}}
    run = small_run(tmp_path / "a\x1b[31m", right, **hostile)
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(manifest | {"date": "\x1b[2J", "commit": "\x07"}))
    rows = board([run])
    for text in (board_text(rows), board_markdown(rows), board_csv(rows), board_latex(rows)):
        assert "\x1b" not in text
        assert "\x07" not in text


def test_a_system_is_told_once_with_all_that_it_is(prepared, tmp_path):
    tuned = {"checkpoint": {"name": "t", "sha256": "t", "trained_on": ["vqarad sample"]}}
    text = board_text(board([small_run(tmp_path / "a", right, ("vqarad", "slake"), **tuned)]))
    assert "measured, fine-tuned or zero-shot" in text


def test_a_terminal_board_prints_the_signature_of_each_row(prepared, tmp_path):
    how = {"asked": {"max_new_tokens": 8, "until": ["</s>"]}}
    text = board_text(board([small_run(tmp_path / "a", right, **how), small_run(tmp_path / "b", right)]))
    asked = "vqarad test for tests|prompt bare|extract final-v1|images own|decoding greedy"
    assert f'a: {asked}|max_new_tokens 8|until ["</s>"]\n' in text
    assert f"b: {asked}\n" in text
    assert "versions: recall_llavamed v1, f1_llavamed v1, recall v1" in text


def test_a_row_is_named_by_the_system_that_was_given(prepared, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"id": "test-0-0", "answer": "yes"}))
    score = ["score", "--task", "vqarad", "--answers", str(file), "--images", "own"]
    assert main([*score, "--system", "MedVInT", "--out", str(tmp_path / "one")]) == 0
    assert main([*score, "--out", str(tmp_path / "two")]) == 0
    rows = board([tmp_path / "one", tmp_path / "two"])
    assert [row.system for row in rows if row.kind == "measured"] == ["MedVInT", "two"]
    assert main([*score, "--system", "MedVInT", "--out", str(tmp_path / "three")]) == 0
    rows = board([tmp_path / "one", tmp_path / "three"])
    assert [row.system for row in rows if row.kind == "measured"] == ["MedVInT (one)", "MedVInT (three)"]


def test_score_prints_the_overall_means_and_by_details_every_category(prepared, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"id": "test-0-0", "answer": "yes"}))
    score = ["score", "--task", "vqarad", "--answers", str(file)]
    assert main(score) == 0
    short = capsys.readouterr().out
    assert "closed_accuracy" in short
    assert "organ=" not in short
    assert "vqarad test for tests|prompt not recorded|extract final-v1" in short
    assert main([*score, "--details"]) == 0
    assert "organ=organ 0" in capsys.readouterr().out
