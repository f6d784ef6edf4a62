"""Preference pairs: what verdicts come to, which pairs are written, and in which layouts."""

import json
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import png, write_small_sets
from hypothesis import given
from hypothesis import strategies as st

from stllava_eval.errors import InputError
from stllava_eval.images import decode, pixel_hash
from stllava_train.preferences.pair_formats import FORMATS, exported, write_pairs
from stllava_train.preferences.pair_layouts import read_published
from stllava_train.preferences.pair_selection import PairOptions, largest_margins, length_balanced, select_pairs, split
from stllava_train.preferences.pairs import KEYS, Pair, PairSet, make_pairs, pair_problem, read_pairs
from stllava_train.preferences.rows import Candidate
from stllava_train.preferences.verdicts import AUTHORS_RULE, Rule, Verdict
from stllava_train.resumable import line, read_manifest

SHA = "0123456789abcdef" * 4


def candidate(id: str = "a.png#0", *answers: str, question: str = "Where is it?") -> Candidate:
    return Candidate(id, id.split("#")[0], SHA, question, answers or ("Left.", "Right."))


def verdict(id: str, shown: tuple[int, int], scores: tuple[float, float] | None, judge: str = "j") -> Verdict:
    outcome = "refused" if scores is None else "scored"
    return Verdict(id, "a.png", SHA, judge, shown, 0, outcome, scores, "", None, None, "", None, None, None)


def both_orders(id: str, lower: float, higher: float, judge: str = "j", places=(0, 1)) -> list[Verdict]:
    """A judge who sees no order: the same scores whichever answer is shown first."""
    return [
        verdict(id, places, (lower, higher), judge),
        verdict(id, (places[1], places[0]), (higher, lower), judge),
    ]


def pair(
    id: str = "a#0", *, sha: str = SHA, chosen: str = "Left.", rejected: str = "Right.", margin: float | None = 2.0
):
    return Pair(id, "a.png", sha, "Where?", chosen, rejected, margin, ("j",))


def kept(*pairs: Pair) -> PairSet:
    return PairSet(list(pairs), {})


def row(**changes) -> dict:
    made = {
        "id": "a#0",
        "image": "a.png",
        "image_sha256": SHA,
        "question": "Where?",
        "chosen": "Left.",
        "rejected": "Right.",
        "margin": 2.0,
        "judges": ["j"],
    }
    return {key: value for key, value in (made | changes).items() if value is not ...}


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(map(line, rows)), encoding="utf-8")
    return path


def test_a_call_killed_at_twenty_random_moments_ends_as_an_unbroken_one(tmp_path, chance):
    """The same call again writes what is missing; files appear whole, in the layouts of other trainers too."""
    shas = [f"{number:064x}" for number in range(40)]
    pairs = [pair(f"a#{number}", sha=shas[number % 40], chosen=f"Left {number}.") for number in range(1200)]
    made = select_pairs(kept(*pairs), PairOptions(held_out=0.3))

    def write(folder: Path) -> None:
        write_pairs(made, folder / "pairs.jsonl", {"of": 1}, ["authors"])

    start = time.monotonic()
    write(tmp_path / "whole")
    needed = time.monotonic() - start
    for kill in range(21):
        child = os.fork()
        if child == 0:
            try:
                write(tmp_path / "broken")
            finally:
                os._exit(0)
        if kill < 20:
            time.sleep(chance.random() * needed)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- verdicts to pairs ------------------------------------------------------------------------------------------------


def test_the_better_answer_is_chosen_by_the_mean_margin_of_both_orders():
    verdicts = [verdict("a.png#0", (0, 1), (4, 7)), verdict("a.png#0", (1, 0), (9, 4))]  # by 3, and by 5
    made = make_pairs([candidate()], verdicts, Rule())
    assert made.pairs == [Pair("a.png#0", "a.png", SHA, "Where is it?", "Right.", "Left.", 4.0, ("j",))]
    assert made.skipped == {}


def test_whatever_is_no_pair_is_counted_by_its_fate():
    candidates = [candidate(f"a.png#{number}") for number in range(6)]
    candidates.append(candidate("a.png#6", "Left.", " Left. "))
    candidates.append(candidate("a.png#7", "Left.</s>", "Right."))
    verdicts = [
        *both_orders("a.png#0", 8, 6),
        *both_orders("a.png#1", 6, 6),
        *both_orders("a.png#2", 6.5, 6),
        verdict("a.png#3", (0, 1), (8, 6)),  # the answer shown first, both times
        verdict("a.png#3", (1, 0), (8, 6)),
        verdict("a.png#4", (0, 1), (8, 6)),  # one order alone
        verdict("a.png#5", (0, 1), None),
        verdict("a.png#5", (1, 0), None),
        *both_orders("a.png#6", 8, 6),
        *both_orders("a.png#7", 8, 6),
    ]
    made = make_pairs(candidates, verdicts, Rule())
    assert [one.id for one in made.pairs] == ["a.png#0"]
    assert made.skipped == {
        "tie": 1,
        "small margin": 1,
        "orders disagree": 1,
        "not scored": 2,
        "chosen equals rejected": 1,
        "</s> in chosen": 1,
    }
    assert len(made.pairs) + sum(made.skipped.values()) == len(candidates)


def test_every_two_of_three_answers_are_a_pair_named_by_their_places():
    one = candidate("a.png#0", "best", "worst", "middle")
    verdicts = both_orders("a.png#0", 9, 3, places=(0, 1))
    verdicts += both_orders("a.png#0", 9, 6, places=(0, 2))
    verdicts += both_orders("a.png#0", 3, 6, places=(1, 2))
    made = make_pairs([one], verdicts, Rule()).pairs
    assert [(one.id, one.chosen, one.rejected, one.margin) for one in made] == [
        ("a.png#0:0-1", "best", "worst", 6),
        ("a.png#0:0-2", "best", "middle", 3),
        ("a.png#0:1-2", "middle", "worst", 3),
    ]


def test_a_pair_names_the_judges_who_prefer_its_chosen_answer():
    verdicts = [
        *both_orders("a.png#0", 8, 6, "z"),
        *both_orders("a.png#0", 7, 6, "b"),
        *both_orders("a.png#0", 2, 9, "c"),
        *both_orders("a.png#0", 8, 3, "d"),
    ]
    (made,) = make_pairs([candidate()], verdicts, Rule()).pairs
    assert (made.chosen, made.judges, made.margin) == ("Left.", ("b", "d", "z"), (2 + 1 + 5) / 3)
    (by_one,) = make_pairs([candidate()], verdicts, Rule(), ["c"]).pairs
    assert (by_one.chosen, by_one.judges, by_one.margin) == ("Right.", ("c",), 7)


def test_the_authors_rule_makes_a_pair_of_a_tie():
    (made,) = make_pairs([candidate()], [verdict("a.png#0", (0, 1), (7, 7))], AUTHORS_RULE).pairs
    assert (made.chosen, made.margin, made.judges) == ("Right.", 0, ("j",))


def test_the_order_of_the_verdicts_changes_nothing():
    candidates = [candidate("a.png#0"), candidate("a.png#1")]
    verdicts = both_orders("a.png#0", 8, 6, "x") + both_orders("a.png#1", 3, 6, "y") + both_orders("a.png#1", 3, 6, "x")
    assert make_pairs(candidates, verdicts, Rule()) == make_pairs(candidates, verdicts[::-1], Rule())


@pytest.mark.parametrize(
    "stranger",
    [
        pytest.param(verdict("b.png#0", (0, 1), (8, 6)), id="another candidate"),
        pytest.param(verdict("a.png#0", (0, 2), (8, 6)), id="an answer that is not there"),
        pytest.param(verdict("a.png#0", (1, 1), (8, 6)), id="an answer and itself"),
        pytest.param(replace(verdict("a.png#0", (0, 1), (8, 6)), image_sha256="f" * 64), id="another image"),
    ],
)
def test_verdicts_on_other_candidates_are_refused(stranger):
    with pytest.raises(InputError, match=r"#0: j judged.*answers . and .\b.*image.*Pass the candidates"):
        make_pairs([candidate()], [stranger], Rule())


def test_a_judge_without_verdicts_is_refused():
    with pytest.raises(InputError, match=r"--judge gpt\b.*no verdict.*\ba, b\b"):
        make_pairs(
            [candidate()], both_orders("a.png#0", 8, 6, "b") + both_orders("a.png#0", 8, 6, "a"), Rule(), ["gpt"]
        )


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        pytest.param(("Where?", "Left.", "Right."), None, id="sound"),
        pytest.param(("", "Left.", "Right."), "empty question", id="no question"),
        pytest.param(("Where?", "Left.", ""), "empty rejected", id="no answer"),
        pytest.param(("Where?", "Left.", "Left."), "chosen equals rejected", id="equal"),
        pytest.param(("<image> Where?", "Left.", "Right."), "<image> in question", id="a second image"),
        pytest.param(("Where?", "Left.", "[IMG] Right."), "[IMG] in rejected", id="another family's tag"),
        pytest.param(("Where?", "Left.", "Right.<s>"), "<s> in rejected", id="a token"),
        pytest.param(("Where?", "ASSISTANT: Left.", "Right."), "ASSISTANT: in chosen", id="a role"),
        pytest.param(("Where?", "Left. VUSER: And?", "Right."), "VUSER: in chosen", id="the questioner"),
        pytest.param(("Where?", "Left \ud83d", "Right."), "half a character in chosen", id="half a character"),
    ],
)
def test_trouble(texts, why):
    assert pair_problem(*texts) == why


def test_as_many_pairs_have_yes_chosen_as_no_and_others_stay():
    texts = ["Yes.", "no", "No, it is normal.", "no", "yes, there", "nodule", "No."]
    pairs = [pair(f"a#{n}", chosen=text, rejected="Else.", margin=float(n)) for n, text in enumerate(texts)]
    made = select_pairs(kept(*pairs), PairOptions(balance_verdict=True))
    assert [one.id for one in made.train] == ["a#0", "a#3", "a#4", "a#5", "a#6"]  # the smallest margins of no go
    assert made.skipped == {"balance of yes and no": 2}


# --- files of pairs ---------------------------------------------------------------------------------------------------


def test_written_pairs_are_read_back_and_a_row_holds_its_keys_alone(tmp_path):
    pairs = [pair("a#0", chosen="l'œil gauche\u2028"), pair("a#1", margin=None)]
    pairs[0] = replace(pairs[0], chosen=pairs[0].chosen.strip())
    out = tmp_path / "new" / "pairs.jsonl"
    assert write_pairs(select_pairs(kept(*pairs)), out, {"rule": "ours"}) == [out]
    assert read_pairs(out) == pairs
    assert all(list(json.loads(text)) == list(KEYS) for text in out.read_text(encoding="utf-8").splitlines())
    manifest = read_manifest(out)
    assert (manifest["stage"], manifest["part"], manifest["source"]) == ("pairs", "train", {"rule": "ours"})
    options = {"per_image": None, "balance_length": False, "balance_verdict": False, "held_out": 0.0, "seed": 0}
    assert manifest["options"] == options
    assert manifest["counts"] == {"train": 2, "held_out": 0, "left_out": {}}
    assert manifest["finished"]


def test_the_same_call_again_writes_the_same_bytes_and_another_is_refused(tmp_path):
    out = tmp_path / "pairs.jsonl"
    write_pairs(select_pairs(kept(pair("b"), pair("a"))), out, {})
    before = out.read_bytes()
    write_pairs(select_pairs(kept(pair("b"), pair("a"))), out, {})
    assert out.read_bytes() == before
    with pytest.raises(InputError, match=r"pairs\.jsonl: rows_sha256\b.*--out"):
        write_pairs(select_pairs(kept(pair("b"))), out, {})
    with pytest.raises(InputError, match=r"options\.per_image\b.*\bnull\b.*\b1\b.*--out"):
        write_pairs(select_pairs(kept(pair("b"), pair("a")), PairOptions(per_image=1)), out, {})
    assert out.read_bytes() == before


def test_a_file_of_something_else_is_not_written_over(tmp_path):
    out = write_rows(tmp_path / "candidates.jsonl", {"image": "a.png"})
    with pytest.raises(InputError, match=r"candidates\.jsonl\b.*manifest candidates\.json\b.*not beside.*--out"):
        write_pairs(select_pairs(kept(pair())), out, {})
    assert out.read_text() == '{"image": "a.png"}\n'


FORM = "A pair has id, image, image_sha256, question, chosen, rejected, margin, judges; see docs/preferences/pairs.md."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"rejected": ...}, f"no rejected. {FORM}", id="no rejected"),
        pytest.param({"score": 3}, f"score is no key of a pair. {FORM}", id="another key"),
        pytest.param({"id": ""}, 'id is "", not a text.', id="no id"),
        pytest.param({"image": "../a.png"}, 'image is "../a.png", not a file\'s name relative', id="outside"),
        pytest.param({"image": "/a.png"}, 'image is "/a.png", not a file\'s name relative', id="a whole path"),
        pytest.param({"image": None}, "image is null, not a file's name relative", id="no image"),
        pytest.param({"image_sha256": "12"}, 'image_sha256 is "12", not 64 hex digits.', id="no hash"),
        pytest.param({"question": 3}, "question is 3, not a text.", id="no text"),
        pytest.param({"margin": -1}, "margin is -1, not a number from 0 on, or null.", id="a negative margin"),
        pytest.param({"margin": float("nan")}, "margin is NaN, not a number", id="no number"),
        pytest.param({"margin": True}, "margin is true, not a number", id="true"),
        pytest.param({"judges": "j"}, 'judges is "j", not a list of names.', id="one judge"),
        pytest.param({"chosen": " "}, "empty chosen. Fix the line, or delete it.", id="empty"),
        pytest.param({"chosen": " Right."}, "chosen equals rejected. Fix the line", id="equal"),
        pytest.param({"id": "sound"}, "id sound appears twice. Give each pair one of its own.", id="an id twice"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(tmp_path, changes, message):
    file = write_rows(tmp_path / "pairs.jsonl", row(id="sound"), row(**changes))
    with pytest.raises(InputError) as refused:
        read_pairs(file)
    assert str(refused.value).startswith(f"{file}:2: {message}")


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"pairs\.jsonl\b.*no pair\b.*stllava-train pairs"):
        read_pairs(write_rows(tmp_path / "pairs.jsonl"))


# --- which pairs are written ------------------------------------------------------------------------------------------


def test_the_largest_margins_of_an_image_stay_in_their_order():
    pairs = [
        pair("a#0", margin=1),
        pair("a#1", margin=5),
        pair("a#2", margin=None),
        pair("a#3", margin=2),
        pair("copy of a#0", margin=9),  # another name, the same pixels
        pair("b#0", margin=1, sha="f" * 64),
    ]
    assert [one.id for one in largest_margins(pairs, 2)] == ["a#1", "copy of a#0", "b#0"]
    assert [one.id for one in largest_margins(pairs, 4)] == ["a#0", "a#1", "a#3", "copy of a#0", "b#0"]


def test_of_equal_margins_the_lower_id_stays():
    assert [one.id for one in largest_margins([pair("c"), pair("a"), pair("b")], 2)] == ["a", "b"]


def test_lengths_are_balanced_by_dropping_the_smallest_margins_of_the_more_frequent_kind():
    pairs = [
        pair("long 1", chosen="one two three", margin=5),
        pair("equal", margin=1),
        pair("long 2", chosen="one two", margin=1),
        pair("short", rejected="one two", margin=1),
        pair("long 3", chosen="one two", margin=3),
        pair("long 4", chosen="one two", margin=None),
    ]
    assert [one.id for one in length_balanced(pairs, 0)] == ["long 1", "equal", "short"]
    assert length_balanced(pairs[:2], 0) == [pairs[1]]
    assert length_balanced([], 0) == []


def test_too_many_shorter_ones_are_dropped_too():
    pairs = [pair("s1", rejected="a b", margin=1), pair("s2", rejected="a b", margin=2), pair("l", chosen="a b")]
    assert [one.id for one in length_balanced(pairs, 0)] == ["s2", "l"]


@st.composite
def some_pairs(draw) -> list[Pair]:
    """Of some images, several of which have two names; ids differ."""
    shas = st.sampled_from([f"{number:064x}" for number in range(20)])
    words = st.integers(1, 3).map(lambda number: " ".join(["word"] * number))
    margins = st.none() | st.integers(0, 3).map(float)
    rows = draw(st.lists(st.tuples(shas, words, words, margins), max_size=40))
    return [
        pair(f"{number}", sha=sha, chosen=chosen, rejected=f"no {rejected}", margin=margin)
        for number, (sha, chosen, rejected, margin) in enumerate(rows)
    ]


@given(pairs=some_pairs(), seed=st.integers(0, 9), data=st.data())
def test_no_image_is_both_held_out_and_learnt_from_whatever_the_order_and_the_others(pairs, seed, data):
    train, held_out = split(pairs, 0.4, seed)
    assert sorted([*train, *held_out], key=lambda one: int(one.id)) == pairs
    assert not {one.image_sha256 for one in train} & {one.image_sha256 for one in held_out}
    fewer = data.draw(st.permutations(pairs))[: len(pairs) // 2]
    assert {one.id for one in split(fewer, 0.4, seed)[1]} == {one.id for one in held_out} & {one.id for one in fewer}


@given(pairs=some_pairs(), seed=st.integers(0, 9))
def test_balanced_pairs_are_longer_as_often_as_shorter_and_none_of_the_rarer_kind_is_lost(pairs, seed):
    def kinds(some: list[Pair]) -> Counter:
        lengths = [len(one.chosen.split()) - len(one.rejected.split()) for one in some]
        return Counter((length > 0) - (length < 0) for length in lengths)

    before, after = kinds(pairs), kinds(length_balanced(pairs, seed))
    assert after[1] == after[-1] == min(before[1], before[-1])
    assert after[0] == before[0]
    assert set(length_balanced(pairs[::-1], seed)) == set(length_balanced(pairs, seed))


def test_about_a_tenth_of_the_images_is_held_out_and_more_with_a_larger_share():
    pairs = [pair(f"{number}", sha=f"{number:064x}") for number in range(1000)]
    tenth, fifth = ({one.id for one in split(pairs, share, 0)[1]} for share in (0.1, 0.2))
    assert 70 < len(tenth) < 130  # 100 of 1000, with a deviation of 9.5
    assert tenth < fifth
    assert tenth != {one.id for one in split(pairs, 0.1, 1)[1]}


def test_every_option_says_how_many_it_leaves_out_and_each_file_is_balanced_by_itself(tmp_path):
    pairs = [
        pair(f"{number}#{place}", sha=f"{number:064x}", chosen="one two") for number in range(20) for place in range(3)
    ]
    pairs += [pair(f"{number}#short", sha=f"{number:064x}", rejected="one two", margin=9) for number in range(20)]
    held = {one.image_sha256 for one in split(pairs, 0.3, 0)[1]}
    made = select_pairs(PairSet(pairs, {"tie": 7}), PairOptions(per_image=3, balance_length=True, held_out=0.3, seed=0))
    # of an image's four the short one and two others stay, of those two again one
    assert (len(made.train), len(made.held_out)) == (2 * (20 - len(held)), 2 * len(held))
    assert made.skipped == {"tie": 7, "smaller margin than others of its image": 20, "balance of lengths": 20}
    files = write_pairs(made, tmp_path / "pairs.jsonl", {})
    assert files == [tmp_path / "pairs.jsonl", tmp_path / "pairs-held-out.jsonl"]
    assert {one.image_sha256 for one in read_pairs(files[1])} == held
    assert [read_manifest(file)["part"] for file in files] == ["train", "held-out"]
    counts = {"train": len(made.train), "held_out": len(made.held_out), "left_out": made.skipped}
    assert all(read_manifest(file)["counts"] == counts for file in files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(PairOptions(per_image=0), r"--per-image 0\b.*no pair\b.*from 1\b", id="none of an image"),
        pytest.param(PairOptions(held_out=1.0), r"--held-out 1\.0\b.*share.*from 0\b.*below 1\b", id="all held out"),
        pytest.param(
            PairOptions(held_out=1e-9), r"--held-out 1e-09\b.*nothing.*\b1 images.*larger", id="none held out"
        ),
        pytest.param(
            PairOptions(balance_length=True), r"no pair.*tie: 3\b.*balance of lengths: 1\b.*[Jj]udge more", id="none"
        ),
    ],
)
def test_options_that_leave_a_file_empty_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        select_pairs(PairSet([pair(chosen="one two")], {"tie": 3}), options)


# --- other trainers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png((200, 0, 0)))
    (folder / "b.png").write_bytes(png((0, 200, 0)))
    return folder


def test_trl_prepares_what_we_write(tmp_path, images, processor):
    from datasets import load_dataset
    from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    made = select_pairs(kept(pair("a#0"), replace(pair("b#0", chosen="Left, and more."), image="b.png")))
    *_, file = write_pairs(made, tmp_path / "pairs.jsonl", {}, ["trl"], images)
    assert file.name == "pairs.trl.jsonl"
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(rows.column_names) == ["chosen", "id", "images", "prompt", "rejected"]
    first = rows[0]
    assert first["images"] == [str(images / "a.png")]
    assert is_conversational(first)
    prompt = prepare_multimodal_messages(first["prompt"], images=first["images"])
    texts = apply_chat_template(first | {"prompt": prompt}, processor)
    assert texts["prompt"].endswith("USER: <image>\nWhere? ASSISTANT:")
    assert (texts["chosen"], texts["rejected"]) == (" Left.</s>", " Right.</s>")
    batch = DataCollatorForVisionPreference(processor)([dict(one) for one in rows])
    assert len(batch["pixel_values"]) == 4  # chosen and rejected of two pairs
    learnt = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    answers = [" Left.</s>", " Left, and more.</s>", " Right.</s>", " Right.</s>"]
    assert [processor.tokenizer.decode(ids) for ids in learnt] == answers


def test_the_authors_layout_is_theirs_key_by_key():
    assert exported(pair("0"), "authors", "x.jpg") == {  # as their train_dpo.py:945-975 reads it
        "id": "0",
        "image": "x.jpg",
        "chosen_conversations": [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "Left."}],
        "reject_conversations": [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "Right."}],
    }


def test_ms_swift_gets_messages_and_the_rejected_response():
    assert exported(pair(), "ms-swift", "/images/a.png") == {
        "id": "a#0",
        "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "Left."}],
        "rejected_response": "Right.",
        "images": ["/images/a.png"],
    }


def test_llama_factory_gets_a_folder_with_an_entry_for_each_file(tmp_path, images):
    pairs = [pair(f"{number}", sha=f"{number:064x}") for number in range(20)]
    made = select_pairs(kept(*pairs), PairOptions(held_out=0.3))
    write_pairs(made, tmp_path / "pairs.jsonl", {}, ["llama-factory"], images)
    folder = tmp_path / "pairs.llama-factory"
    entries = json.loads((folder / "dataset_info.json").read_text())
    assert list(entries) == ["pairs", "pairs-held-out"]
    assert entries["pairs"] == {
        "file_name": "pairs.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"},
    }
    rows = [json.loads((folder / entry["file_name"]).read_text()) for entry in entries.values()]
    assert [len(one) for one in rows] == [len(made.train), len(made.held_out)]
    assert rows[0][0] == {
        "id": made.train[0].id,
        "conversations": [{"from": "human", "value": "<image>\nWhere?"}],
        "chosen": {"from": "gpt", "value": "Left."},
        "rejected": {"from": "gpt", "value": "Right."},
        "images": [str(images / "a.png")],
    }


def test_every_format_holds_the_pairs_of_each_file(tmp_path, images):
    pairs = [pair(f"{number}", sha=f"{number:064x}") for number in range(20)]
    files = write_pairs(
        select_pairs(kept(*pairs), PairOptions(held_out=0.3)), tmp_path / "p.jsonl", {}, FORMATS, images
    )
    assert sorted(file.relative_to(tmp_path).as_posix() for file in files) == [
        "p-held-out.authors.json",
        "p-held-out.jsonl",
        "p-held-out.ms-swift.jsonl",
        "p-held-out.trl.jsonl",
        "p.authors.json",
        "p.jsonl",
        "p.llama-factory/dataset_info.json",
        "p.llama-factory/p-held-out.json",
        "p.llama-factory/p.json",
        "p.ms-swift.jsonl",
        "p.trl.jsonl",
    ]
    assert all(file.is_file() for file in files)


def test_a_format_without_its_images_is_refused_before_anything_is_written(tmp_path, images):
    made, out = select_pairs(kept(replace(pair(), image="none.png"))), tmp_path / "out" / "pairs.jsonl"
    with pytest.raises(InputError, match=r"--format trl\b.*paths.*--images"):
        write_pairs(made, out, {}, ["trl"])
    with pytest.raises(InputError, match=r"a#0\b.*none\.png\b.*not in.*--images"):
        write_pairs(made, out, {}, ["ms-swift"], images)
    with pytest.raises(InputError, match=r"--format parquet\b.*unknown.*trl, authors, llama-factory, ms-swift"):
        write_pairs(made, out, {}, ["parquet"], images)
    assert not out.parent.exists()


# --- published pairs --------------------------------------------------------------------------------------------------


def published(id="0", image="a.png", chosen="Left.", rejected="Right.", question="<image>\nWhere?", **others) -> dict:
    conversations = {
        key: [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        for key, answer in (("chosen_conversations", chosen), ("reject_conversations", rejected))
    }
    return {"id": id, "image": image, **conversations, **others}


def write_json_list(path: Path, *rows: dict) -> Path:
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    return path


def read(file: Path, images: Path, **settings) -> PairSet:
    return read_published(file, images, progress=False, **settings)


def test_the_authors_file_that_we_write_is_read_back(tmp_path, images, home):
    sha = pixel_hash(decode((images / "a.png").read_bytes()))
    pairs = [pair("a.png#0:0-2", sha=sha), pair("a.png#1", sha=sha, chosen="l'œil", rejected="two\nlines")]
    *_, file = write_pairs(select_pairs(kept(*pairs)), tmp_path / "pairs.jsonl", {}, ["authors"])
    assert read(file, images) == kept(*(replace(one, margin=None, judges=()) for one in pairs))


def test_the_place_of_the_tag_does_not_matter_and_an_id_that_comes_again_gets_a_number(tmp_path, images, home):
    rows = published(question="Where?\n<image>"), published(question="Where?"), published(id=0)
    made = read(write_json_list(tmp_path / "dpo.json", *rows), images)
    assert [(one.id, one.question) for one in made.pairs] == [("0", "Where?"), ("0-2", "Where?"), ("0-3", "Where?")]


def test_what_makes_no_pair_is_left_out_and_counted(tmp_path, images, home):
    (images / "text.png").write_text("no image")
    file = write_json_list(
        tmp_path / "dpo.json",
        published("0"),
        published("1", chosen="Right."),
        published("2", chosen=""),
        published("3", rejected="Right. USER: and?"),
        published("4", image="none.png"),
        published("5", image="text.png"),
    )
    made = read(file, images)
    assert [one.id for one in made.pairs] == ["0"]
    assert made.skipped == {
        "chosen equals rejected": 1,
        "empty chosen": 1,
        "USER: in rejected": 1,
        "image cannot be read": 2,
    }


def test_pairs_about_test_images_are_left_out_unless_they_are_asked_for(tmp_path, images, home):
    write_small_sets()
    (images / "a.png").write_bytes(png((60, 195, 90)))  # image 1 of each set
    file = write_json_list(tmp_path / "dpo.json", published("0"), published("1", image="b.png"))
    made = read(file, images)
    assert ([one.id for one in made.pairs], made.skipped) == (["1"], {"image of a test split": 1})
    assert len(read(file, images, allow_test_images=True).pairs) == 2


EARLIER = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A lung."}]
LAST = [{"from": "human", "value": "Where?"}]


def rounds(answer: str, earlier: list = EARLIER) -> list[dict]:
    return [*earlier, *LAST, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"chosen_conversations": rounds("Left."), "reject_conversations": rounds("Right.")},
            "1: 2 rounds. A pair has one question: keep the last round,",
            id="earlier rounds",
        ),
        pytest.param(
            {"chosen_conversations": rounds("Left."), "reject_conversations": rounds("Right.", [EARLIER[0], LAST[0]])},
            '1: reject_conversations: turn 2 is from "human", not from gpt.',
            id="no turns",
        ),
        pytest.param(
            {
                "chosen_conversations": rounds("Left."),
                "reject_conversations": rounds("Right.", [EARLIER[0], {"from": "gpt", "value": "A liver."}]),
            },
            "1: chosen and rejected do not answer the same question.",
            id="other earlier answers",
        ),
        pytest.param(
            {"reject_conversations": ...},
            "its keys are id, image, chosen_conversations: no known layout of pairs. `stllava-train pairs --from`",
            id="no rejected",
        ),
        pytest.param({"chosen_conversations": "[{"}, '1: chosen_conversations is "[{", not turns', id="no JSON"),
        pytest.param({"image": "../b.png"}, '1: image is "../b.png", not a file\'s name relative', id="outside"),
        pytest.param(
            {"image": None}, "1: chosen_conversations: turn 1 holds <image> and the record names", id="no image"
        ),
        pytest.param({"id": True}, "id is true. Give the record a text or a whole number.", id="no id"),
    ],
)
def test_a_record_of_another_form_is_refused_with_its_line(tmp_path, images, home, changes, message):
    wrong = {key: value for key, value in (published("1") | changes).items() if value is not ...}
    file = write_json_list(tmp_path / "dpo.json", published("0"), wrong)
    with pytest.raises(InputError) as refused:
        read(file, images)
    assert str(refused.value).startswith(f"{file}:3: {message}")


def test_images_that_are_not_at_hand_are_refused(tmp_path, images, home):
    file = write_json_list(tmp_path / "dpo.json", published(image="none.png"))
    with pytest.raises(InputError, match=r"dpo\.json\b.*together with its image.*--images"):
        read_published(file, None)
    with pytest.raises(InputError, match=r"none\.png\b.*read.*No image.*--images"):
        read(file, images)


def write_parquet(path: Path, *rows: dict) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_parquet_gives_the_same_pairs_as_json_with_turns_as_structs_or_as_text(tmp_path, images, home):
    rows = [published("0"), published("1", image="b.png", chosen="Both.")]
    texts = [one | {key: json.dumps(one[key]) for key in one if key.endswith("conversations")} for one in rows]
    files = [
        write_json_list(tmp_path / "dpo.json", *rows),
        write_parquet(tmp_path / "dpo.parquet", *rows),
        write_parquet(tmp_path / "texts.parquet", *texts),
    ]
    first, *others = [read(file, images) for file in files]
    assert len(first.pairs) == 2
    assert others == [first, first]


def test_images_in_parquet_are_written_into_the_folder_and_nowhere_else(tmp_path, home):
    images = tmp_path / "deep" / "images"
    images.mkdir(parents=True)
    red, green = png((200, 0, 0)), png((0, 200, 0))
    given = [
        (red, "../../evil.png"),
        (green, "../../evil.png"),
        (red, "/etc/evil.jpg"),
        (red, None),
        (b"no image", "x.png"),
    ]
    rows = [published(str(number), {"bytes": data, "path": path}) for number, (data, path) in enumerate(given)]
    made = read(write_parquet(tmp_path / "dpo.parquet", *rows), images)
    names = [one.image for one in made.pairs]
    assert [name.rsplit("-", 1)[0] for name in names] == ["evil", "evil", "etc_evil", "3"]
    assert len(set(names)) == 4  # two images of one name are two files
    assert sorted(path.name for path in images.iterdir()) == sorted(names)
    assert all(pixel_hash(decode((images / one.image).read_bytes())) == one.image_sha256 for one in made.pairs)
    assert {path.name for path in tmp_path.rglob("*evil*")} == {name for name in names if "evil" in name}
    assert made.skipped == {"image cannot be read": 1}


def test_a_wrong_row_of_parquet_is_named_by_its_number(tmp_path, images, home):
    file = write_parquet(tmp_path / "dpo.parquet", published("0"), published("1", image="/a.png"))
    with pytest.raises(InputError, match=r'dpo\.parquet: row 2: 1\b.*image.*"/a\.png".*--images'):
        read(file, images)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"dpo\.parquet\b.*read as parquet.*Download"):
        read(file, images)
