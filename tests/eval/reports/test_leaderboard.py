"""Run folders, published rows -> boards as text, Markdown, CSV, JSON and LaTeX."""

import csv
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, png
from small_runs import always, right, small_run

from stllava_eval.cli.main import main
from stllava_eval.errors import InputError
from stllava_eval.reports.board_formats import (
    board_csv,
    board_files,
    board_json,
    board_latex,
    board_markdown,
    board_text,
)
from stllava_eval.reports.board_rows import BEST, EQUAL, board
from stllava_eval.reports.cells import latex, markdown, mean_text
from stllava_eval.reports.leaderboard import remarks

PAPER = {"vqarad": (37.12, 10.83, 60.35), "slake": (46.69, 11.46, 57.69), "pathvqa": (11.92, 2.72, 52.90)}
HOSTILE = "<script>alert(1)</script>|`x`\\end{document}&%$#_^~*[a](b) \x1b[31m"


@pytest.fixture
def official(home):
    """Test splits of a few made-up rows that are marked as official."""
    from stllava_eval.data.catalog import Row
    from stllava_eval.data.splits import write_split

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
    assert "not a whole number of questions" in found["vqarad", "STLLaVA-Med"].notes["closed_llavamed"]
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
    from stllava_eval.data.catalog import Row
    from stllava_eval.data.splits import write_split

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

    rows = json.loads(files("stllava_eval.reports").joinpath("published.json").read_text())["rows"]
    for row in rows:
        assert all(row[name] for name in ("system", "table", "row", "source"))
        assert row["setting"] in ("zero-shot", "fine-tuned", "training not recorded")
        for task, cells in row["scores"].items():
            assert task in PAPER
            assert all(value is None or 0 < value < 100 for value in cells.values())
        assert all(place.split()[1] in row["scores"][place.split()[0]] for place in row["notes"])


def test_closed_figures_are_shares_of_the_official_questions_but_for_the_footnoted_ones():
    from importlib.resources import files

    questions = {"vqarad": 272, "slake": 416, "pathvqa": 3391}
    impossible = []
    for row in json.loads(files("stllava_eval.reports").joinpath("published.json").read_text())["rows"]:
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
    assert "Not run with other images" in board_text(board(runs))
    same = {"checkpoint": {"name": "a", "sha256": "a" * 4, "trained_on": None}}
    for images in ("other", "black"):
        runs.append(small_run(tmp_path / images, right, images=images, **same))
    assert "Not run with" not in board_text(board(runs))


def test_the_csv_has_a_line_for_each_score_with_what_it_rests_on(prepared, tmp_path):
    rows = board([small_run(tmp_path / "a", right)])
    lines = list(csv.DictReader(io.StringIO(board_csv(rows))))
    (recall,) = [line for line in lines if line["system"] == "a" and line["metric"] == "recall"]
    assert (recall["value"], recall["n"], recall["sha256"], recall["prompt"]) == ("1.0", "4", "aaaa", "bare")
    assert (
        recall["signature"] == "recall|v2|vqarad test for tests|prompt bare|extract final-v1|images own|decoding greedy"
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
        pytest.param('a--b "c" `d', r"a-{}-{}b ``c'' \textasciigrave{}d", id="what would be printed otherwise"),
    ],
)
def test_latex(text, expected):
    assert latex(text) == expected


def compiled(folder: Path, files: dict[str, str], packages: str = "booktabs,graphicx") -> str:
    """The log of pdfLaTeX and BibTeX over a paper that holds board.tex and cites board.bib."""
    if not shutil.which("pdflatex"):
        pytest.skip("needs pdflatex (apt-get install texlive-latex-base texlive-latex-recommended)")
    for name in ("board.tex", "board.bib"):
        (folder / name).write_text(files[name], encoding="utf-8")
    (folder / "paper.tex").write_text(
        rf"\documentclass{{article}}\usepackage{{{packages}}}\begin{{document}}\input{{board}}"
        r"\bibliographystyle{plain}\bibliography{board}\end{document}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    for step in (command, ["bibtex", "paper"], command, command):
        ran = subprocess.run(step, cwd=folder, capture_output=True, text=True, errors="replace")
        assert ran.returncode == 0, ran.stdout[-2000:]
        assert "Warning--" not in ran.stdout, ran.stdout
    return ran.stdout


def test_the_latex_tables_compile_and_cite_what_the_bib_holds(official, tmp_path):
    latin = "".join(map(chr, range(0xA1, 0x100)))
    folder = tmp_path / 'a_b%$&#{}~^--`?`!`"c"'
    hostile = {"checkpoint": {"name": HOSTILE, "sha256": "x", "trained_on": None}, "named": latin}
    runs = [
        small_run(folder, right, ("vqarad", "slake", "pathvqa")),
        small_run(tmp_path / "latin", right, ("vqarad", "slake", "pathvqa"), **hostile),
    ]
    for intervals in (False, True):
        log = compiled(tmp_path, board_files(board(runs, published=True), intervals=intervals))
        assert "Overfull" not in log, "it is wider than the page"
        assert "undefined" not in log, "a cite key that the bib lacks"


def test_every_reported_row_cites_an_entry_of_the_bib():
    from importlib.resources import files

    package = files("stllava_eval.reports")
    entries = re.findall(r"^@\w+\{(\w+),", package.joinpath("published.bib").read_text(), re.M)
    rows = json.loads(package.joinpath("published.json").read_text())["rows"]
    assert {key for row in rows for key in row["cite"]} == set(entries)
    for row in rows:  # the first source of a row is what its key is about
        assert row["cite"]
        assert ("sun2024stllavamed" in row["cite"]) is row["source"].startswith("arXiv:2406.19973")


def test_latex_has_the_columns_of_the_papers_tables(official, tmp_path):
    rows = board([small_run(tmp_path / "a", right, ("vqarad", "slake", "pathvqa"))], published=True)
    text = board_latex(rows)
    cells = r"37.12 & 10.83 & 60.35$^{c}$ & 46.69 & 11.46 & 57.69 & 11.92 & 2.72 & 52.90 \\"
    assert rf"STLLaVA-Med~\cite{{sun2024stllavamed}} & {cells}" in text
    assert r" & \multicolumn{3}{c}{VQA-RAD} & \multicolumn{3}{c}{SLAKE} & \multicolumn{3}{c}{PathVQA} \\" in text
    assert r"84.19$^{\ddagger}$" in text  # the batch rule, where a source reports that alone
    assert text.count(r"$\ddagger$: By the batch rule") == 1  # in the table that has the sign
    assert r"\emph{reported, fine-tuned}" in text
    assert "scriptsize" not in text
    assert r"100.00 {\scriptsize [" in board_latex(rows, intervals=True)


def test_each_mark_of_a_latex_table_has_one_meaning_and_its_caption_says_which(official, tmp_path):
    def part(row):
        return row["reference"] if row["id"] != "3-closed" else "no" if row["kind"] == "closed" else None

    runs = [small_run(tmp_path / name, say) for name, say in {"a": right, "b": part}.items()]
    runs.append(small_run(tmp_path / "c", lambda row: None if row["id"] == "1-open" else "no lung"))
    for table in board_latex(board(runs, published=True)).split(r"\begin{table*}")[1:]:
        body, caption = table.split(r"\caption")
        shown = {one for mark in re.findall(r"\$\^\{([^}]*\}?)\}\$", body) for one in mark.split(",")}
        told = re.findall(r"\$\^?\{?([a-z]|\\sim|\\ddagger)\}?\$:? ", caption)
        assert sorted(shown) == sorted(told)
        assert (r"\textbf" in body) == ("Bold: best" in caption)
    assert "VQA-RAD: scored on 39 of 40 questions, 0 unanswered." in caption


def test_rows_and_columns_of_a_board_can_be_chosen(official, tmp_path, capsys):
    run = str(small_run(tmp_path / "a", right))
    out = tmp_path / "out"
    call = ["leaderboard", run, "--published", "--no-blind", "--out", str(out)]
    rows = ["--rows", "LLaVA-Med v1, its authors' own run, a", "--rows", "STLLaVA-Med (Table 4),reported, zero-shot"]
    assert main([*call, *rows, "--columns", "f1_llavamed,recall,recall_llavamed,words_open"]) == 0
    shown = ["a", "LLaVA-Med v1, its authors' own run", "STLLaVA-Med"]
    made = json.loads((out / "board.json").read_text())["rows"]
    assert [row["system"] for row in made] == shown
    assert list(made[0]["scores"]) == ["f1_llavamed", "recall", "recall_llavamed", "words_open"]
    lines = list(csv.DictReader(io.StringIO((out / "board.csv").read_text())))
    assert list(dict.fromkeys(line["system"] for line in lines)) == shown
    text = (out / "board.tex").read_text()
    assert r" & F1 & recall & recall\_llavamed & Words, open \\" in text  # no two heads are alike
    assert text.count(r"\begin{table*}") == 1
    printed = capsys.readouterr().out
    for output in (printed, (out / "board.md").read_text()):
        assert "image-blind" not in output
        assert "unparsed  " not in output
        assert "GPT-4o" not in output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        pytest.param(["--rows", "a,b"], "--rows b: unknown. Known names: a; always", id="row"),
        pytest.param(["--columns", "recal"], "--columns recal: unknown. Known columns: recall_llavamed, ", id="column"),
        pytest.param(["--columns", "recall,recall"], "appears twice", id="a column twice"),
        pytest.param(["--intervals"], "Pass --out DIR too", id="intervals of nothing"),
        pytest.param(["--rows", 'always "no"', "--no-blind"], '--rows always "no": unknown', id="left out"),
    ],
)
def test_a_wrong_choice_of_rows_or_columns_is_one_line(prepared, tmp_path, capsys, option, message):
    assert main(["leaderboard", str(small_run(tmp_path / "a", right)), *option]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_row_is_chosen_by_the_name_that_its_system_was_given(prepared, tmp_path, capsys):
    """Of a file of answers the board adds that nobody says which images were shown."""
    answers = tmp_path / "a.jsonl"
    answers.write_text('{"id": "test-0-0", "answer": "no"}\n')
    score = [
        "score",
        "--task",
        "vqarad",
        "--answers",
        str(answers),
        "--out",
        str(tmp_path / "run"),
        "--system",
        "Med B",
    ]
    assert main(score) == 0
    capsys.readouterr()
    for name in ("Med B", "Med B (images not recorded)", "training not recorded"):
        assert main(["leaderboard", str(tmp_path / "run"), "--rows", name]) == 0
        shown = capsys.readouterr().out
        assert "Med B (images not recorded)" in shown
        assert "always" not in shown


def test_marks_compare_the_rows_that_are_shown(prepared, tmp_path):
    runs = [small_run(tmp_path / name, say) for name, say in {"a": right, "b": always("no"), "c": right}.items()]
    assert board(runs, chosen=["a,c"])[0].marks["recall"] == BEST
    assert not board(runs, chosen=["b", "image-blind"])[0].marks


def test_a_board_without_blind_rows_says_nothing_of_training_answers(prepared, tmp_path):
    run = small_run(tmp_path / "a", right)
    assert "training split" in board_text(board([run], chosen=['always "no"']))
    assert "training split" not in board_text(board([run], chosen=["a"]))


def test_that_black_images_were_shown_is_known_where_their_row_is_left_out(prepared, tmp_path):
    same = {"checkpoint": {"name": "a", "sha256": "aaaa", "trained_on": None}}
    runs = [small_run(tmp_path / images, right, images=images, **same) for images in ("own", "other", "black")]
    assert "Not run with" not in board_text(board(runs, blind=False))


def test_the_papers_table_is_whole_where_a_set_is_not_prepared(official, tmp_path):
    run = small_run(tmp_path / "a", right)
    for file in (official / "data" / "pathvqa").iterdir():
        file.unlink()
    rows = board([run], ["vqarad", "slake", "pathvqa"], published=True, chosen=["a", "Table 2"])
    of_pathvqa = [row for row in rows if row.task == "pathvqa"]
    assert len(of_pathvqa) == 8
    assert "pathvqa is not prepared here, so it has neither measured nor image-blind rows." in board_text(rows)
    assert r"11.92 & 2.72 & 52.90 \\" in board_latex(rows)
    with pytest.raises(InputError, match=r"pathvqa test\b.*not prepared.*prepare pathvqa"):
        board([run], ["vqarad", "pathvqa"])


def test_the_docs_commands_make_the_papers_table_with_two_measured_rows(official, tmp_path, monkeypatch):
    import blind_run

    text = (ROOT / "docs" / "compare" / "leaderboard.md").read_text(encoding="utf-8")
    block = re.search(r"### A table for a paper.*?```sh\n(.*?)```", text, re.S)[1].replace("\\\n", " ")
    monkeypatch.chdir(tmp_path)
    for file in (official / "data" / "pathvqa").iterdir():
        file.unlink()
    for command in block.splitlines():
        program, *arguments = shlex.split(command)
        if program == "python":
            blind_run.main(arguments[1:])
        else:
            assert main(arguments) == 0
    lines = [
        line for line in Path("paper/board.tex").read_text().splitlines() if line.endswith(r"\\") and " & " in line
    ]
    systems = [line.split("~")[0].split(" & ")[0] for line in lines[2:]]
    assert systems[:2] == ["Commonest answer", "Always no"]
    assert len(systems) == 2 + 8
    assert all(line.count("&") == 9 for line in lines[1:])
    compiled(Path("paper"), {name: Path("paper", name).read_text() for name in ("board.tex", "board.bib")})


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("vqarad_short", "papers ask the bare question, and vqarad_short adds a prompt to it"),
        ("slake", "papers report the official test split, and the prepared split is the sample test"),
    ],
)
def test_a_board_without_reported_rows_says_why(official, tmp_path, task, reason):
    if task == "slake":
        manifest = official / "data" / "slake" / "test.json"
        held = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(held | {"official": False, "sample": True, "edition": "sample test"}))
    run = small_run(tmp_path / "a", right, (task,))
    rows = board([run], published=True)
    assert not any(row.kind == "reported" for row in rows)
    for shown in (board_text(rows), " ".join(remarks(rows)), board_text(board([run], published=True, chosen=["a"]))):
        assert shown.count("No reported row is shown") == 1
        assert reason in shown
    assert "No reported row" not in board_text(board([run]))


def test_umed_lvlms_figures_have_columns_of_their_own(official, tmp_path, shared):
    printed = json.loads((shared / "data" / "papers" / "umed_lvlm_tables.json").read_text())["external"]
    rows = board([small_run(tmp_path / "a", right, ("vqarad", "slake"))], published=True)
    names = {"VQA-RAD": "vqarad", "SLAKE": "slake"}
    cells = 0
    for system in ("MedVInt", "UMed-LVLM"):
        for line in printed:
            title, kind = line["benchmark"].rsplit(" ", 1)
            if title not in names:
                continue
            (row,) = [
                row
                for row in rows
                if row.about.get("row", "").lower() == system.lower()
                and row.task == names[title]
                and row.about["table"] == "external benchmarks"
            ]
            score = row.scores[f"accuracy_{kind}_reported"]
            assert mean_text(score) == str(line[system])
            assert row.group == "reported, training not recorded"
            assert f"{line[system]} on {kind} questions" in " ".join(remarks([row]))
            cells += 1
    assert cells == 6
    text = board_text(rows)
    assert "open_reported" in text
    assert text.count("compared with any of our scores") == 4
    chosen = board_latex(rows, ("accuracy_open_reported",))
    assert chosen.count("compared with any of our scores") == 4
    assert r"UMed-LVLM~\cite{zhou2025umedlvlm} & 74.9$^{c}$ & 90.4$^{d}$ \\" in chosen
    assert "open_reported" not in board_text(board([small_run(tmp_path / "b", right)]))


def test_words_are_counted_by_kind_and_empty_answers_told(prepared, tmp_path):
    def say(row):
        return "" if row["id"] == "test-0-1" else "yes" if row["kind"] == "closed" else "the left lung"

    (row,) = [row for row in board([small_run(tmp_path / "a", say)]) if row.kind == "measured"]
    assert {name: row.scores[name].value for name in ("words", "words_open", "words_closed")} == {
        "words": (4 * 1 + 3 * 3) / 8,
        "words_open": 9 / 4,
        "words_closed": 1,
    }
    assert (row.scores["words_open"].n, row.empty) == (4, 1)
    assert row.scores["words_open"].signature.startswith("words_open|v1|vqarad test")
    for shown in (board_text([row]), board_markdown([row]), board_latex([row])):
        assert "1 answer is empty." in shown
    (line,) = [line for line in csv.DictReader(io.StringIO(board_csv([row]))) if line["metric"] == "words_closed"]
    assert (line["value"], line["empty"]) == ("1.0", "1")
    assert board_json([row])["rows"][0]["empty"] == 1
    assert "empty" not in board_text(board([small_run(tmp_path / "b", right)]))


def test_a_board_of_reported_rows_too_prints_the_versions_of_measured_scores(official, tmp_path):
    text = board_text(board([small_run(tmp_path / "a", right)], published=True))
    assert "versions: recall_llavamed v1, f1_llavamed v1, recall v2" in text


def test_the_command_writes_the_same_bytes_twice(prepared, tmp_path):
    run = str(small_run(tmp_path / "a", right))
    names = ("board.md", "board.csv", "board.json", "board.tex", "board.bib", "index.html")
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
    with pytest.raises(InputError, match=r"two rows of vqarad\b.*name.*Rename"):
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
    assert "versions: recall_llavamed v1, f1_llavamed v1, recall v2" in text


def test_the_versions_below_a_board_are_those_of_its_columns(prepared, tmp_path):
    rows = board([small_run(tmp_path / "a", right)])
    columns = ("recall_v1", "closed_accuracy")
    for text in (board_text(rows, columns), board_latex(rows, columns)):
        assert "versions: recall_v1 v1, closed_accuracy v2\n" in text


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
    assert "empty" not in short
    assert "organ=" not in short
    assert "vqarad test for tests|prompt not recorded|extract final-v1" in short
    assert "versions: v2 of closed_accuracy, unparsed, refused; v1 of the others" in short
    assert main([*score, "--details"]) == 0
    assert "organ=organ 0" in capsys.readouterr().out
    file.write_text(json.dumps({"id": "test-0-0", "answer": " "}))
    assert main(score) == 0
    assert "unanswered: 7, empty: 1\n" in capsys.readouterr().out
