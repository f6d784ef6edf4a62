"""LLaMA-Factory's dataset_info.json: files whose columns have names of their own are read as those with ours."""

import json
from pathlib import Path

import pytest
from conftest import png

from stllava_eval.errors import InputError
from stllava_eval.images import decode, pixel_hash
from stllava_train.data.check import write_sound
from stllava_train.data.columns import columns_of, data_hash
from stllava_train.data.conversations import Conversation, read_conversations
from stllava_train.preferences.pair_layouts import pairs_to_learn, read_published
from stllava_train.preferences.pairs import Pair

RED = png((200, 0, 0))


@pytest.fixture
def folder(tmp_path, home) -> Path:
    (tmp_path / "x.png").write_bytes(RED)
    return tmp_path


def write(folder: Path, record: dict, entry: dict | None, name: str = "data.json") -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps([record]))
    if entry is not None:
        (folder / "dataset_info.json").write_text(json.dumps({"hub": {"hf_hub_url": "a/b"}, "mine": entry}))
    return folder / name


ALPACA = {"file_name": "data.json", "columns": {"prompt": "ask", "response": "reply"}}
TURNS = [
    {"who": "system", "says": "Be brief."},
    {"who": "doctor", "says": "<image>Where?"},
    {"who": "model", "says": "Left.", "loss": False},
    {"who": "doctor", "says": "Sure?"},
    {"who": "model", "says": "Yes."},
]
TAGS = {
    **{"role_tag": "who", "content_tag": "says", "user_tag": "doctor", "assistant_tag": "model"},
    "system_tag": "system",
}
SHAREGPT = {
    "file_name": "data.json",
    "formatting": "sharegpt",
    "columns": {"messages": "dialog", "images": "shots"},
    "tags": TAGS,
}


@pytest.mark.parametrize(
    ("record", "entry", "rounds"),
    [
        pytest.param({"ask": "Where?", "reply": "Left."}, ALPACA, [("Where?", "Left.")], id="Alpaca"),
        pytest.param(
            {"instruction": "Where?", "input": "Which lobe?", "output": "Left."},
            None,
            [("Where?\nWhich lobe?", "Left.")],
            id="Alpaca's own names",
        ),
        pytest.param(
            {"instruction": "", "input": "Where?", "output": "Left."},
            {"file_name": "data.json"},
            [("Where?", "Left.")],
            id="an entry without columns",
        ),
        pytest.param(
            {"ask": "Sure?", "reply": "Yes.", "before": [["Where?", "Left."]], "more": None},
            ALPACA | {"columns": ALPACA["columns"] | {"history": "before", "query": "more"}},
            [("Where?", "Left."), ("Sure?", "Yes.")],
            id="history",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Left."}]},
            {"file_name": "data.json", "formatting": "openai", "columns": {"messages": "messages"}},
            [("Where?", "Left.")],
            id="OpenAI",
        ),
    ],
)
def test_texts_are_read_by_the_names_of_their_columns(folder, record, entry, rounds):
    ((one,), found) = read_conversations(write(folder, {"id": "a"} | record, entry))
    assert (one.rounds, one.image, found) == (tuple(rounds), None, [])


def test_turns_roles_images_and_system_texts_are_read_by_their_names(folder):
    file = write(folder, {"dialog": TURNS, "shots": ["x.png"]}, SHAREGPT)
    ((one,), found) = read_conversations(file)
    rounds = (("Where?", "Left."), ("Sure?", "Yes."))
    expected = Conversation("record-1", folder / "x.png", rounds, f"{file}:1", False, "Be brief.", (False, True))
    assert (one, found) == (expected, [])
    one = {"ask": "Where?", "reply": "Left.", "prefix": "Be brief.", "scan_file": "x.png"}
    more = {"system": "prefix", "images": "scan_file"}
    ((read,), found) = read_conversations(write(folder, one, ALPACA | {"columns": ALPACA["columns"] | more}))
    assert (read.system, read.image, found) == ("Be brief.", folder / "x.png", [])


@pytest.mark.parametrize("file_name", ["sub/data.json", "sub"])
def test_an_entry_may_name_a_file_or_a_folder_below(folder, file_name):
    file = write(folder, {"ask": "Where?", "reply": "Left."}, ALPACA | {"file_name": file_name}, "sub/data.json")
    assert read_conversations(file)[0][0].rounds == (("Where?", "Left."),)
    assert columns_of(folder / "other.json") is None


@pytest.mark.parametrize(
    ("record", "entry", "expected"),
    [
        pytest.param({"ask": "Q?", "reply": "A."}, None, "its keys are ask, reply, of which none holds", id="no entry"),
        pytest.param({"dialog": TURNS}, None, "dataset_info.json beside the file", id="no entry for turns"),
        pytest.param({"ask": "Q?"}, ALPACA, "its keys are ask, of which none holds", id="a column that lacks"),
        pytest.param(
            {"ask": "Q?", "reply": "A.", "x": ["a"]},
            ALPACA | {"columns": ALPACA["columns"] | {"tools": "x"}},
            r'its tools is \["a"\], which would not be learnt',
            id="tools",
        ),
        pytest.param(
            {"ask": "Q?", "reply": "A.", "x": ["a.mp4"]},
            ALPACA | {"columns": ALPACA["columns"] | {"videos": "x"}},
            "its videos is .*, which names a picture that is not read",
            id="a video",
        ),
        pytest.param(
            {"ask": "Q?", "reply": "A.", "x": "Once upon"},
            ALPACA | {"columns": ALPACA["columns"] | {"history": "x"}},
            r'its history is \["Once upon"\], which would not be learnt',
            id="a history of another form",
        ),
        pytest.param(
            {"ask": "Q?", "reply": "A.", "good": False},
            ALPACA | {"columns": ALPACA["columns"] | {"kto_tag": "good"}},
            "its label is false",
            id="KTO",
        ),
        pytest.param(
            {"ask": "Q?", "good": "A.", "bad": "B."},
            ALPACA | {"ranking": True, "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"}},
            'its chosen is "A.", which would not be learnt. Take it out. `stllava-train pairs --from`',
            id="a pair",
        ),
    ],
)
def test_what_is_not_mapped_or_not_learnt_is_named(folder, record, entry, expected):
    import re

    sound, found = read_conversations(write(folder, record, entry))
    assert not sound
    assert any(re.search(expected, problem.what) for problem in found), found


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"formatting": "chatml"}, r"mine: formatting.*\"chatml\".*alpaca, sharegpt, openai"),
        ({"ranking": "yes"}, r"mine: ranking.*\"yes\".*true or false"),
        ({"columns": {"promt": "ask"}}, r"mine: columns: promt\b.*unknown.*prompt\b"),
        ({"columns": {"prompt": 3}}, r"mine: columns: prompt\b.*\b3\b.*name.*Give"),
        ({"columns": ["prompt"]}, r"mine: columns.*\[\"prompt\"\].*object.*Give"),
        ({"columns": {"response": "reply"}}, r"mine: columns.*none for prompt\b.*alpaca.*Name"),
        ({"formatting": "sharegpt", "tags": {"role": "x"}}, r"mine: tags: role\b.*unknown.*role_tag"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_place(folder, entry, expected):
    file = write(folder, {"ask": "Q?", "reply": "A."}, {"file_name": "data.json"} | entry)
    with pytest.raises(InputError, match=f"dataset_info.json: {expected}"):
        read_conversations(file)


def test_two_entries_that_disagree_and_a_broken_file_are_refused(folder):
    file = write(folder, {"ask": "Q?", "reply": "A."}, ALPACA)
    info = folder / "dataset_info.json"
    info.write_text(json.dumps({"a": ALPACA, "b": ALPACA}))
    assert read_conversations(file)[1] == []
    info.write_text(json.dumps({"a": ALPACA, "b": SHAREGPT}))
    with pytest.raises(InputError, match=r"dataset_info\.json.*a and b\b.*data\.json.*columns.*Keep"):
        read_conversations(file)
    info.write_text("{")
    with pytest.raises(InputError, match=r"dataset_info\.json.*JSON \(.*\).*move"):
        read_conversations(file)


ANSWER = {"who": "model", "says": "Left."}


@pytest.mark.parametrize("suffix", ["json", "parquet"])
@pytest.mark.parametrize(
    ("record", "entry"),
    [
        pytest.param(
            {"ask": "Where?", "good": "Left.", "bad": "Right.", "shot": "x.png"},
            {"columns": {"prompt": "ask", "chosen": "good", "rejected": "bad", "images": "shot"}},
            id="Alpaca",
        ),
        pytest.param(
            {"dialog": TURNS[1:2], "good": ANSWER, "bad": ANSWER | {"says": "Right."}, "shots": ["x.png"]},
            SHAREGPT | {"columns": SHAREGPT["columns"] | {"chosen": "good", "rejected": "bad"}},
            id="ShareGPT",
        ),
    ],
)
def test_pairs_are_read_by_the_names_of_their_columns(folder, record, entry, suffix):
    import pyarrow
    import pyarrow.parquet

    name = f"data.{suffix}"
    file = write(folder, {"id": "a", "weight": 0.5} | record, entry | {"ranking": True, "file_name": name}, name)
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(json.loads(file.read_text())), file)
    pair = Pair("a", "x.png", pixel_hash(decode(RED)), "Where?", "Left.", "Right.", None, (), 0.5)
    assert read_published(file, folder, progress=False).pairs == [pair]
    assert pairs_to_learn(file, folder, progress=False) == [pair]
    (folder / "dataset_info.json").unlink()
    with pytest.raises(InputError, match=r"data\.(json:1|parquet: row 1)\b.*no known layout.*map.*dataset_info\.json"):
        read_published(file, folder, progress=False)


def test_what_is_written_without_its_problems_is_read_without_the_mapping(folder):
    file = write(folder, {"id": "a", "dialog": TURNS, "shots": ["x.png"]}, SHAREGPT)
    assert write_sound([file], [], folder / "sound.json") == 1
    before, after = (read_conversations(one)[0] for one in (file, folder / "sound.json"))
    assert [one.content for one in before] == [one.content for one in after]


def test_the_same_bytes_under_another_mapping_are_other_data(folder):
    file = write(folder, {"ask": "Where?", "reply": "Left."}, None)
    plain = data_hash(file)
    write(folder, {"ask": "Where?", "reply": "Left."}, ALPACA)
    mapped = data_hash(file)
    write(folder, {"ask": "Where?", "reply": "Left."}, ALPACA | {"columns": {"prompt": "reply", "response": "ask"}})
    assert plain.keys() == {"sha256"}
    assert mapped.keys() == {"sha256", "columns"}
    assert mapped["sha256"] == plain["sha256"] == data_hash(file)["sha256"]
    assert data_hash(file)["columns"] != mapped["columns"]
