import io
import json
from pathlib import Path

import pytest
from conftest import png
from PIL import Image

from stllava_eval.data.catalog import DATASETS, Row
from stllava_eval.data.splits import write_split
from stllava_eval.errors import InputError
from stllava_train.cli import main
from stllava_train.data import export
from stllava_train.data.export import safe_names, write_med_im, write_vqa


def encoded(kind: str, shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def row(id: str, image_id: str, question: str = "What?", answer: str = "A lung.", image: bytes = b"") -> Row:
    image = image or png((len(image_id), 0, 0))
    return Row(id, image, image_id, question, answer, "open", dict.fromkeys(DATASETS["vqarad"].categories, "x"))


def prepare(*rows: Row, name: str = "vqarad", split: str = "train") -> None:
    write_split(name, split, rows, edition="t", official=False, sample=True, source="t", licence="CC0-1.0")


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_questions_of_an_image_become_one_conversation_in_their_order(home, tmp_path):
    prepare(
        row("1", "a.png", "Is it a CT? ", "yes\t"),
        row("2", "b.png", "Where?", "left"),
        row("3", "a.png", "What\tis it?", "a lung"),
    )
    written = write_vqa("vqarad", tmp_path)
    assert (written.conversations, written.images, written.questions, written.skipped) == (2, 2, 3, {})
    assert records(tmp_path / "vqarad.json") == [
        {
            "id": "vqarad-a.png",
            "image": "images/vqarad/a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nIs it a CT?"},
                {"from": "gpt", "value": "yes"},
                {"from": "human", "value": "What\tis it?"},
                {"from": "gpt", "value": "a lung"},
            ],
            "unordered": True,
        },
        {
            "id": "vqarad-b.png",
            "image": "images/vqarad/b.png",
            "conversations": [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "left"}],
            "unordered": True,
        },
    ]


def test_a_conversation_is_a_line_of_the_file(home, tmp_path):
    prepare(row("1", "a", "Was ist\ndas für ein Bild?"), row("2", "b"))
    write_vqa("vqarad", tmp_path)
    first, *lines, last = (tmp_path / "vqarad.json").read_text(encoding="utf-8").split("\n")
    assert (first, last) == ("[", "")
    assert lines[0].startswith('{"id": "vqarad-a", ')
    assert lines[0].endswith("},")
    assert "für" in lines[0]
    assert json.loads(lines[1])["id"] == "vqarad-b"
    assert lines[2:] == ["]"]


def test_long_conversations_are_cut_and_their_ids_stay_unique(home, tmp_path):
    prepare(*(row(str(number), "a", f"Question {number}?") for number in range(5)), row("5", "a-2"))
    write_vqa("vqarad", tmp_path, rounds=2)
    assert [(one["id"], len(one["conversations"]) // 2) for one in records(tmp_path / "vqarad.json")] == [
        ("vqarad-a", 2),
        ("vqarad-a-2", 2),
        ("vqarad-a-3", 1),
        ("vqarad-a-2-2", 1),  # the image called a-2
    ]
    assert all(one["conversations"][0]["value"].startswith("<image>\n") for one in records(tmp_path / "vqarad.json"))
    assert write_vqa("vqarad", tmp_path, rounds=1).conversations == 6


def test_rows_that_would_break_a_conversation_are_left_out_and_listed(home, tmp_path):
    prepare(
        row("good", "a"),
        row("1", "a", " "),
        row("2", "a", answer=""),
        row("3", "a", answer="left</s>"),
        row("4", "b", "<image> What?"),
        row("5", "a", answer="USER: and you?"),
        row("6", "a", answer="VUSER: and you?"),
        row("7", "a", "ASSISTANT: what?"),
        row("8", "a", answer=""),
        row("9", "a", "<|image_pad|>What?"),
    )
    written = write_vqa("vqarad", tmp_path)
    assert written.skipped == {
        "empty question": ["1"],
        "empty answer": ["2", "8"],
        "</s> in the answer": ["3"],
        "<image> in the question": ["4"],
        "USER: in the answer": ["5"],
        "VUSER: in the answer": ["6"],
        "ASSISTANT: in the question": ["7"],
        "<|image_pad|> in the question": ["9"],
    }
    assert (written.images, written.questions) == (1, 1)
    assert [file.name for file in (tmp_path / "images" / "vqarad").iterdir()] == ["a.png"]


def test_a_split_without_a_usable_row_is_refused(home, tmp_path):
    prepare(row("1", "a", ""))
    with pytest.raises(InputError, match=r"vqarad train.*no row.*empty question: 1\b.*Prepare"):
        write_vqa("vqarad", tmp_path)


def test_images_keep_their_bytes_and_are_named_by_what_they_are(home, tmp_path):
    images = {"scan.png": encoded("JPEG"), "scan2": encoded("WEBP"), "c.jpg": encoded("TIFF"), "d.x": encoded("BMP")}
    prepare(*(row(id, id, image=image) for id, image in images.items()))
    write_vqa("vqarad", tmp_path)
    folder = tmp_path / "images" / "vqarad"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "scan.jpg": images["scan.png"],
        "scan2.webp": images["scan2"],
        "c.tif": images["c.jpg"],
        "d.x.bmp": images["d.x"],
    }


def test_no_image_leaves_its_folder(home, tmp_path):
    names = ["../../../up.png", "/etc/x.png", "..", ".hidden", "a/b\\c.png", "图.png", "n\nl", "", "x" * 300]
    prepare(*(row(str(number), name) for number, name in enumerate(names)))
    out = tmp_path / "below" / "out"
    write_vqa("vqarad", out)
    files = [file for file in tmp_path.rglob("*.png") if not file.is_relative_to(home)]
    assert len(files) == len(names)
    assert {file.parent for file in files} == {out / "images" / "vqarad"}
    assert {one["image"] for one in records(out / "vqarad.json")} == {f"images/vqarad/{file.name}" for file in files}


def test_ids_that_would_share_a_name_get_names_of_their_own():
    names = safe_names(["a/b.png", "a_b.jpg", "A_B", "c"])
    assert names["c"] == "c"
    assert len({name.lower() for name in names.values()}) == 4
    assert names == safe_names(["c", "A_B", "a_b.jpg", "a/b.png"])  # whatever their order


def test_the_same_call_gives_the_same_bytes(prepared, tmp_path):
    def written(folder: str) -> dict[str, bytes]:
        assert main.main(["data", "vqarad", "slake", "pathvqa", "--out", str(tmp_path / folder)]) == 0
        files = (file for file in (tmp_path / folder).rglob("*") if file.is_file())
        return {file.relative_to(tmp_path / folder).as_posix(): file.read_bytes() for file in files}

    first = written("a")
    assert first == written("b") == written("a")
    assert len(first) == 3 + 3 * 4


def test_the_command_prints_the_counts_of_each_set_and_says_sample(prepared, tmp_path, capsys):
    assert main.main(["data", "vqarad", "slake", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{name} train (SAMPLE DATA): 4 conversations, 4 images, 8 questions, 0 left out: {tmp_path}/{name}.json"
        for name in ("vqarad", "slake")
    ]


def test_slake_is_english_unless_all_is_asked_for_and_then_languages_do_not_mix(home, tmp_path):
    fields = dict.fromkeys(DATASETS["slake"].categories, "x")
    english = [Row("1", png((1, 0, 0)), "x/source.jpg", "Where?", "left", "open", fields)]
    chinese = [Row(str(n), png((1, 0, 0)), "x/source.jpg", f"哪里 {n}？", "左", "open", fields) for n in (2, 3)]
    prepare(*english, name="slake")
    prepare(*chinese, name="slake", split="train_zh")
    assert write_vqa("slake", tmp_path / "en").questions == 1
    both = write_vqa("slake", tmp_path / "all", language="all")
    assert (both.conversations, both.images, both.questions) == (2, 1, 3)
    assert [one["id"] for one in records(both.path)] == ["slake-x/source.jpg", "slake-x/source.jpg-2"]
    assert records(both.path)[1]["conversations"][1]["value"] == "左"


# med-im -------------------------------------------------------------------------------------------------------------


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


def write_med_im_source(folder: Path, instructions: list[dict], **addresses: str) -> Path:
    folder.mkdir(parents=True)
    (folder / export.INSTRUCTIONS).write_text(json.dumps(instructions))
    lines = [{"pair_id": id, "pmc_tar_url": url, "image_file_path": "nowhere/a.jpg"} for id, url in addresses.items()]
    (folder / export.ADDRESSES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def lay(out: Path, *pairs: str) -> None:
    """Images that were there before."""
    (out / "images" / "med-im").mkdir(parents=True)
    for pair in pairs:
        (out / "images" / "med-im" / f"{pair}.jpg").write_bytes(encoded("JPEG"))


def test_instructions_whose_image_exists_are_written_as_published(tmp_path):
    talk = turns("Describe it.\n<image>", " A scan.\n", "Where?", "Left.")
    domain = {"chest_xray": False, "mri": True, "histology": False, "gross": False, "ct_scan": False}
    source = write_med_im_source(
        tmp_path / "source",
        [
            {"id": "1_F1", "image": "1_F1.jpg", "domain": domain, "conversations": talk},
            {"id": "2_F1", "image": "2_F1.jpg", "domain": domain, "conversatons": turns("<image>\nWhat?", "A cell.")},
            {"id": "3_F1", "image": "3_F1.jpg", "domain": domain, "conversations": talk},
        ],
    )
    lay(tmp_path, "1_F1", "2_F1")
    written, fetched, notes = write_med_im(str(source), tmp_path)
    assert (written.conversations, written.images, written.questions) == (2, 2, 3)
    assert records(tmp_path / "med-im.json") == [
        {"id": "1_F1", "image": "images/med-im/1_F1.jpg", "conversations": talk},
        {"id": "2_F1", "image": "images/med-im/2_F1.jpg", "conversations": turns("<image>\nWhat?", "A cell.")},
    ]
    assert fetched.missing == {"3_F1": "no address known"}
    assert ["not the published file" in note for note in notes] == [True, True]


def test_instructions_that_would_break_training_are_left_out_and_listed(tmp_path):
    good = turns("<image>\nWhat?", "A cell.")
    broken = {
        "turns are not human, gpt, human, gpt, ...": [
            good[:1],
            [good[1], good[0]],
            [],
            ["text"],
            [{"from": "human"}] * 2,
        ],
        "not one <image> in the first question": [turns("What?", "A."), turns("<image><image>\nWhat?", "A.")],
        "<image> in the question": [turns("<image>\nWhat?", "A.", "<image>\nWhere?", "There.")],
        "empty question": [turns("<image>\n", "A.")],
        "empty answer": [turns("<image>\nWhat?", " ")],
        "</s> in the answer": [turns("<image>\nWhat?", "A.</s>")],
        "half a character in the answer": [turns("<image>\nWhat?", "A \ud83d.")],
    }
    instructions = [{"id": "good", "image": "good.jpg", "conversations": good}]
    expected = {}
    for why, talks in broken.items():
        expected[why] = [f"{why} {number}" for number in range(len(talks))]
        instructions += [
            {"id": id, "image": "bad.jpg", "conversations": talk} for id, talk in zip(expected[why], talks, strict=True)
        ]
    lay(tmp_path, "good")
    written, _, _ = write_med_im(str(write_med_im_source(tmp_path / "source", instructions)), tmp_path)
    assert written.skipped == expected
    assert [one["id"] for one in records(written.path)] == ["good"]


def test_a_figure_stays_in_its_folder_whatever_its_name(tmp_path):
    talk = turns("<image>\nWhat?", "A cell.")
    source = write_med_im_source(
        tmp_path / "source", [{"id": "../../x", "image": "../../x.jpg", "conversations": talk}] * 2
    )
    lay(tmp_path, "x")
    written, _, _ = write_med_im(str(source), tmp_path)
    assert [(one["id"], one["image"]) for one in records(written.path)] == [
        ("../../x", "images/med-im/x.jpg"),
        ("../../x-2", "images/med-im/x.jpg"),
    ]


def test_the_command_prints_the_paper_s_counts_and_what_is_missing(tmp_path, capsys):
    talk = turns("<image>\nWhat?", "A cell.")
    source = write_med_im_source(
        tmp_path / "source",
        [{"id": id, "image": f"{id}.jpg", "conversations": talk} for id in ("1", "2", "3", "4")],
        **{"2": "gopher://x"},
    )
    lay(tmp_path, "1")
    assert main.main(["data", "med-im", "--from", str(source), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:4] == [
        f"med-im: 1 conversation, 1 image, 1 question, 0 left out: {tmp_path}/med-im.json",
        "  the paper: 37,452 images, 108,545 questions (arXiv:2406.19973, Table 1; its filter is unpublished)",
        "  missing 2: no address known",
        "  missing 1: no web address",
    ]
    assert "not the published file" in printed[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["vqarad", "--split", "validation"], "vqarad validation is not prepared", id="not prepared"),
        pytest.param(["vqarad", "--rounds", "0"], "--rounds 0: no conversation. Give", id="rounds"),
        pytest.param(["med-im", "--workers", "0"], "--workers 0: nobody to download. Give", id="workers"),
        pytest.param(["vqarad", "--from", "x"], "--from is for med-im", id="from"),
        pytest.param(["vqarad", "--language", "all"], "--language all: only slake", id="language"),
        pytest.param(["slake", "--language", "all"], "slake train_zh is not prepared", id="no Chinese split"),
        pytest.param(["med-im", "--from", "{tmp}"], "it has no llava_med_instruct_60k_inline_mention.json", id="empty"),
        pytest.param(["med-im", "--from", "{tmp}/nojson"], "cannot be read as JSON", id="no JSON"),
        pytest.param(["med-im", "--from", "{tmp}/nolist"], "not a list of conversations", id="no list"),
        pytest.param(["med-im", "--from", "{tmp}/noid"], "record 1: ", id="a record without an id"),
        pytest.param(["med-im", "--from", "{tmp}/noline"], ":1: 'what\\n' has no pair_id", id="a line without an id"),
        pytest.param(
            ["med-im", "--from", "{tmp}/none"], "none of the 1 images could be had (no address", id="no image"
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(prepared, tmp_path, capsys, arguments, message):
    good = [{"id": "1", "image": "1.jpg", "conversations": turns("<image>\nWhat?", "A cell.")}]
    for name, instructions in {
        "nojson": good,
        "nolist": {},
        "noid": [{"image": "x"}],
        "noline": good,
        "none": good,
    }.items():
        write_med_im_source(tmp_path / name, instructions)
    (tmp_path / "nojson" / export.INSTRUCTIONS).write_text("[")
    (tmp_path / "noline" / export.ADDRESSES).write_text("what\n")
    call = ["data", *(argument.format(tmp=tmp_path) for argument in arguments), "--out", str(tmp_path / "out")]
    assert main.main(call) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


def test_an_out_that_cannot_be_written_is_one_line(prepared, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main.main(["data", "vqarad", "--out", str(tmp_path / "file")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in error


@pytest.mark.parametrize(
    ("name", "conversations", "images", "questions"), [("vqarad", 313, 313, 1797), ("slake", 598, 450, 4918)]
)
def test_the_official_training_splits_have_the_documented_counts(
    home, shared, tmp_path, name, conversations, images, questions
):
    from stllava_eval.data.prepare import prepare as prepare_official

    prepare_official(name, "train", shared / "data" / name)
    written = write_vqa(name, tmp_path)
    assert (written.conversations, written.images, written.questions) == (conversations, images, questions)
    assert written.skipped == ({} if name == "vqarad" else {"empty answer": ["1622"]})
