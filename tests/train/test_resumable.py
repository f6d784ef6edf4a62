"""Rows that are appended, and what a kill, another call or another process does to them."""

import json

import pytest

from stllava_eval.errors import InputError
from stllava_train.resumable import ResumableJsonl, read_manifest, read_rows


def ledger(path, **decided_by) -> ResumableJsonl:
    return ResumableJsonl(path, lambda row: row["id"], {"seed": 0} | decided_by)


def test_rows_are_on_the_disk_when_they_have_been_added(tmp_path):
    with ledger(tmp_path / "a.jsonl") as one:
        one.add([{"id": "x", "text": "hé"}, {"id": "y", "text": "two\u2028lines"}])
        assert (tmp_path / "a.jsonl").read_text().count("\n") == 2
    assert read_rows(tmp_path / "a.jsonl") == [{"id": "x", "text": "hé"}, {"id": "y", "text": "two\u2028lines"}]
    assert read_manifest(tmp_path / "a.jsonl") == {"format": 1, "seed": 0, "finished": False}


def test_a_line_that_a_kill_has_cut_is_written_again_and_the_others_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    with ledger(path) as one:
        one.add([{"id": "x"}, {"id": "y"}])
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with ledger(path) as again:
            kept = list(again.rows)
            assert kept == ["x", "y"][: whole[:length].count(b"\n")]
            again.add([{"id": id} for id in ("x", "y") if id not in kept])
        assert path.read_bytes() == whole


def test_the_end_puts_rows_in_order_and_a_later_row_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "a.jsonl"
    with ledger(path) as one:
        one.add([{"id": "y", "of": 1}, {"id": "z", "of": 1}])
        one.add([{"id": "x", "of": 1}, {"id": "y", "of": 2}])
        one.finish(["x", "not there", "y"], counts={"rows": 3})
    assert read_rows(path) == [{"id": "x", "of": 1}, {"id": "y", "of": 2}, {"id": "z", "of": 1}]
    assert read_manifest(path) == {"format": 1, "seed": 0, "counts": {"rows": 3}, "finished": True}


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"seed": 1}, {"seed": 2}, "seed: the rows in it were made with 1, and this call has 2"),
        (
            {"of": {"a": 1, "b": 1}},
            {"of": {"a": 1, "b": 2}},
            "of.b: the rows in it were made with 1, and",
        ),
        ({}, {"new": "x" * 200}, 'new: the rows in it were made with null, and this call has "xxx'),
    ],
)
def test_rows_of_another_job_are_not_gone_on_with(tmp_path, then, now, said):
    path = tmp_path / "a.jsonl"
    with ledger(path, **then) as one:
        one.add([{"id": "x"}])
    with pytest.raises(InputError) as error:
        ledger(path, **now)
    assert str(error.value).startswith(f"{path}: {said}")
    assert str(error.value).endswith("Call it as before, or choose another --out.")


def test_a_call_that_failed_before_its_first_row_does_not_bind_the_next(tmp_path):
    ledger(tmp_path / "a.jsonl", seed=1).close()
    ledger(tmp_path / "a.jsonl", seed=2).close()
    assert read_manifest(tmp_path / "a.jsonl")["seed"] == 2


def test_two_processes_do_not_write_one_file(tmp_path):
    with ledger(tmp_path / "a.jsonl"), pytest.raises(InputError, match="another process is writing it"):
        ledger(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("rows", "manifest", "said"),
    [
        ('{"id": "x"}\n', None, r"a\.jsonl: its manifest a\.json is not beside it"),
        ('{"id": "x"}\n', "[]", r"a\.json: no manifest of a\.jsonl"),
        ('{"id": "x"}\n', '{"format": 2}', r"a\.json: no manifest of a\.jsonl \(ValueError\('format 2'\)\)"),
        ('[1]\n{"id": "x"}\n', '{"format": 1, "seed": 0}', r"a\.jsonl:1: no row \(b'\[1\]'\)\. Delete the line"),
    ],
)
def test_files_that_are_not_of_a_job_are_refused(tmp_path, rows, manifest, said):
    (tmp_path / "a.jsonl").write_text(rows)
    if manifest is not None:
        (tmp_path / "a.json").write_text(manifest)
    with pytest.raises(InputError, match=said):
        ledger(tmp_path / "a.jsonl")


def test_a_name_without_jsonl_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.json: rows go to a file named \.jsonl"):
        ledger(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"cannot be written \(File name too long\)"):
        ledger(tmp_path / f"{'a' * 300}.jsonl")


def test_values_come_back_from_the_manifest_as_they_are_compared(tmp_path):
    ledger(tmp_path / "a.jsonl", pair=(1, 2)).close()
    ledger(tmp_path / "a.jsonl", pair=(1, 2)).close()
    assert json.loads((tmp_path / "a.json").read_text())["pair"] == [1, 2]
