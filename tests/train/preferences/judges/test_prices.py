"""That the cost in a file of verdicts is the bill of the server, whatever comes back, and over kills."""

import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace

import pytest
from conftest import png
from fault_server import (
    PROMPT_TOKENS,
    FaultServer,
    completes,
    half_a_reply,
    hangs_up,
    refuses,
    says,
    sends,
    silence,
    slow_bytes,
    text,
)
from small_judging import OURS, PRICE, asked_of, batched, billed, candidates, cost, fair, run

from stllava_eval.errors import InputError
from stllava_eval.inference import endpoint
from stllava_eval.inference.replies import read_completion
from stllava_eval.inference.server import THOUGHT
from stllava_train.preferences.judges.prices import Price, Purse, estimated_tokens
from stllava_train.preferences.judges.prompt import prompt
from stllava_train.preferences.verdicts import read_verdicts
from stllava_train.resumable import read_rows

THINKS = {"prompt_tokens": 900, "completion_tokens": 1024}  # all of it in a thought that is not shown


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.png").write_bytes(png((50 * number, 10, 20)))
    return tmp_path / "images"


@pytest.fixture
def written(tmp_path):
    (tmp_path / "candidates.jsonl").write_text("{}\n")
    return tmp_path / "candidates.jsonl"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "judged.jsonl"


# --- replies without scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", None, "I think that", "8 1", "<think>8 6"])
def test_a_judge_that_thinks_up_to_its_limit_is_paid_once_and_gets_more_room_when_asked(images, written, out, content):
    some = candidates(4)
    with FaultServer(reply=lambda request: completes({"content": content}, "length", THINKS)) as there:
        assert run(there.url, some, images, written, out, price=PRICE) == {"unparsable": 8}
        assert run(there.url, some, images, written, out, price=PRICE) == {}  # it is final
        assert cost(out) == pytest.approx(billed(there), rel=1e-12) == pytest.approx(8 * PRICE.of(900, 1024))
        assert {one.cut_at for one in read_verdicts(out)} == {(1024, 0)}
        assert "Raise --max-tokens, or give --reasoning" in read_verdicts(out)[0].why
        there.reply = fair
        assert run(there.url, some, images, written, out, price=PRICE, preset=replace(OURS, thought=THOUGHT)) == {
            "scored": 8
        }
        assert cost(out) == pytest.approx(billed(there), rel=1e-12)
    asked = there.requests[-1]
    assert asked["max_completion_tokens"] == 1024 + THOUGHT
    assert not {"max_tokens", "temperature"} & set(asked)


def test_more_tokens_ask_again_what_was_cut_and_nothing_else(images, written, out):
    some = candidates(4)
    cut = {prompt("Side 0?", "left", "right"): [completes({"content": ""}, "length", THINKS)]}
    vague = {prompt("Side 1?", "left", "right"): [completes({"content": "Both."}, "stop", THINKS)]}
    with FaultServer(cut | vague, reply=fair) as there:
        assert run(there.url, some, images, written, out) == {"scored": 6, "unparsable": 2}
        assert run(there.url, some, images, written, out, preset=replace(OURS, max_tokens=2048)) == {"scored": 1}


def test_the_budget_stops_a_judge_that_thinks(images, written, out):
    with FaultServer(reply=lambda request: completes({"content": ""}, "length", THINKS)) as there:
        for _ in range(3):
            run(there.url, candidates(9), images, written, out, price=PRICE, budget=0.1)
        assert cost(out) == pytest.approx(billed(there), rel=1e-12)
        assert 0 < cost(out) < 0.1
        assert len(there.requests) == len(read_rows(out))


def test_after_twenty_replies_without_scores_no_more_are_paid(images, written, out):
    with FaultServer(reply=lambda request: "Both are good.") as there:
        for _ in range(2):
            with pytest.raises(
                InputError, match=r"tiny\b.*\b20 replies.*two scores.*20 unparsable.*--max-tokens.*--out"
            ):
                run(there.url, candidates(30), images, written, out, price=PRICE)
            assert len(there.requests) == 20
    assert cost(out) == pytest.approx(billed(there))


def test_what_a_server_refuses_before_the_first_score_is_asked_again_in_the_same_file_once_its_cause_is_mended(
    images, written, out
):
    with FaultServer(reply=lambda request: refuses(400, "logprobs are on")) as there:
        for calls in (1, 2):
            with pytest.raises(InputError, match=r"20 refused.*HTTP 400: log.*same --out\b"):
                run(there.url, candidates(30), images, written, out, price=PRICE)
            assert len(there.requests) == 20 * calls
        there.reply = fair
        assert run(there.url, candidates(30), images, written, out, price=PRICE) == {"scored": 60}
        assert run(there.url, candidates(30), images, written, out, price=PRICE) == {}
        assert cost(out) == pytest.approx(billed(there), rel=1e-12) == pytest.approx(60 * PRICE.of(PROMPT_TOKENS, 3))


def test_what_a_server_refuses_beside_scores_is_final_and_so_is_what_it_has_billed(images, written, out):
    filtered = {prompt("Side 0?", "left", "right"): [refuses(400, "content management policy")] * 9}
    with FaultServer(filtered, reply=fair) as there:
        assert run(there.url, candidates(3), images, written, out) == {"refused": 1, "scored": 5}
        assert run(there.url, candidates(3), images, written, out) == {}
    other = out.with_name("other.jsonl")
    with FaultServer(reply=lambda request: says("I'm sorry, but I can't help with that.")) as there:
        assert run(there.url, candidates(3), images, written, other, price=PRICE) == {"refused": 6}
        assert run(there.url, candidates(3), images, written, other, price=PRICE) == {}
        assert len(there.requests) == 6


def test_replies_that_become_useless_on_the_way_stop_it_too(images, written, out):
    def tired(request):
        return fair(request) if len(there.requests) < 10 else "Both are good."

    with FaultServer(reply=tired) as there:
        with pytest.raises(InputError, match=r"\b2\d replies.*two scores.*--out"):
            run(there.url, candidates(50), images, written, out, price=PRICE, concurrency=3)
        assert 29 <= len(there.requests) <= 33  # those under way are waited for, and paid
    assert cost(out) == pytest.approx(billed(there))
    assert sum(row["outcome"] == "unparsable" for row in read_rows(out)) >= 20


# --- what a server counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 900, "completion_tokens": 50}, (900, 50)),
        ({"prompt_tokens": "900", "completion_tokens": "50"}, (900, 50)),
        ({"prompt_tokens": 900.0, "completion_tokens": 50.0}, (900, 50)),
        ({"input_tokens": 900, "output_tokens": 50}, (900, 50)),
        ({"prompt_tokens": 900, "completion_tokens": 50, "total_tokens": 950}, (900, 50)),
        ({"prompt_tokens": 900, "completion_tokens": 9, "total_tokens": 1150}, (900, 250)),  # xAI, Google: the thought
        ({"prompt_tokens": 900, "total_tokens": 950}, (900, 50)),
        ({"completion_tokens": 50, "total_tokens": 950}, (900, 50)),
        (
            {"prompt_tokens": 900, "completion_tokens": 50, "completion_tokens_details": {"reasoning_tokens": 40}},
            (900, 50),
        ),
        (
            {"prompt_tokens": 900, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 240}},
            (900, 249),
        ),
        (
            {"prompt_tokens": 900, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 800}},
            (900, 50),
        ),
        ({"prompt_tokens": 900, "completion_tokens": 50, "completion_tokens_details": None}, (900, 50)),
        ({"prompt_tokens": True, "completion_tokens": -5}, (0, 0)),
        ({"prompt_tokens": "many", "completion_tokens": "1e999"}, (0, 0)),
        ({"total_tokens": 950}, (0, 0)),
        ([900, 50], (0, 0)),
        ("950", (0, 0)),
        (None, (0, 0)),
    ],
)
def test_tokens_in_a_reply(usage, counted):
    body = {"choices": [{"message": {"content": "8 6"}, "finish_reason": "stop"}], "usage": usage}
    found = read_completion(body, 1024)
    assert (found.prompt_tokens, found.tokens) == counted


@pytest.mark.parametrize("where", ["the choice (Moonshot)", "x_groq (Groq)"])
def test_tokens_that_are_counted_elsewhere(where):
    usage = {"usage": {"prompt_tokens": 900, "completion_tokens": 50}}
    choice = {"message": {"content": "8 6"}, "finish_reason": "stop"} | (usage if "choice" in where else {})
    found = read_completion({"choices": [choice], "usage": None, "x_groq": None if "choice" in where else usage}, 1024)
    assert (found.prompt_tokens, found.tokens) == (900, 50)


@pytest.mark.parametrize("usage", [None, {}, [], "many", {"prompt_tokens": -5}, {"prompt_tokens": "1" + "0" * 400}])
def test_what_a_server_does_not_count_is_estimated_and_stops_at_the_budget(images, written, out, usage):
    some = candidates(5)
    one = asked_of(some)[0]
    each = PRICE.of(estimated_tokens(one, images), len("2 8\nBecause.") / 4)
    with FaultServer(reply=lambda request: completes({"content": fair(request)}, usage=usage)) as there:
        run(there.url, some, images, written, out, price=PRICE, budget=0.015)
        found = read_verdicts(out)
        assert {(one.cost, one.tokens, one.estimated) for one in found} == {(each, None, each)}
        assert 0 < len(found) == len(there.requests) < 10
        assert cost(out) + PRICE.of(estimated_tokens(one, images), 1024) > 0.015


def test_an_uncounted_reply_that_was_cut_costs_what_it_was_allowed(images, written, out):
    with FaultServer(reply=lambda request: completes({"content": ""}, "length")) as there:
        run(there.url, candidates(1), images, written, out, price=PRICE)
    prompts = [estimated_tokens(one, images) for one in asked_of(candidates(1))]
    assert cost(out) == pytest.approx(sum(PRICE.of(one, 1024) for one in prompts))


def test_a_thought_that_is_sent_and_not_counted_is_estimated_with_the_reply(images, written, out):
    message = {"content": "8 6", "reasoning_content": "x" * 397}
    with FaultServer(reply=lambda request: completes(message)) as there:
        run(there.url, candidates(1), images, written, out, price=PRICE)
    prompts = [estimated_tokens(one, images) for one in asked_of(candidates(1))]
    assert cost(out) == pytest.approx(sum(PRICE.of(one, 100) for one in prompts))


# --- attempts ---------------------------------------------------------------------------------------------------------

BROKE_OFF = completes({"content": "8"}, "error", {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 7})


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(refuses(429), id="429"),
        pytest.param(refuses(500), id="500"),
        pytest.param(silence, id="a time-out"),
        pytest.param(half_a_reply, id="half a reply"),
        pytest.param(hangs_up, id="no reply"),
        pytest.param(slow_bytes, id="slow bytes"),
        pytest.param(sends(b'{"wrong": "JSON"}'), id="wrong JSON"),
        pytest.param(sends(b"half {"), id="no JSON"),
        pytest.param(BROKE_OFF, id="broken off, and counted"),
    ],
)
def test_every_attempt_is_paid_as_the_server_bills_it(images, written, out, fault):
    """A reply that does not come is counted as much as the reply to the same question that comes in the end."""
    first = prompt("Side 0?", "left", "right")
    with FaultServer({first: [fault, fault]}, reply=fair) as there:
        assert run(there.url, candidates(2), images, written, out, price=PRICE, timeout=0.5) == {"scored": 4}
        assert cost(out) == pytest.approx(billed(there), rel=1e-12)
    assert {row["unsettled"] for row in read_rows(out)} == {None}


@pytest.mark.parametrize("status", [504, 524])
def test_a_gateway_that_did_not_wait_for_a_reply_does_not_mean_that_it_is_not_billed(images, written, out, status):
    first = prompt("Side 0?", "left", "right")
    with FaultServer({first: [refuses(status)]}, reply=fair) as there:
        assert run(there.url, candidates(1), images, written, out, price=PRICE) == {"scored": 2}
    assert cost(out) == pytest.approx(3 * PRICE.of(PROMPT_TOKENS, 3), rel=1e-9)


def test_replies_that_never_came_are_held_against_the_budget_and_settled_by_the_next_one(images, written, out):
    first = prompt("Side 0?", "left", "right")
    with FaultServer({first: [silence] * 2}, reply=fair) as there:
        run(there.url, candidates(1), images, written, out, price=PRICE, timeout=0.3, retries=1)
        (failed,) = [one for one in read_verdicts(out) if one.outcome == "failed"]
        assert failed.unsettled == (2, pytest.approx(2 * PRICE.of(PROMPT_TOKENS, 1024), rel=0.8))
        assert failed.cost == failed.estimated == failed.unsettled[1]
        assert cost(out) > billed(there)
        assert run(there.url, candidates(1), images, written, out, price=PRICE) == {"scored": 1}
        assert cost(out) == pytest.approx(billed(there), rel=1e-12)


def test_a_repeated_attempt_that_the_budget_does_not_cover_is_not_made(images, written, out):
    with FaultServer({n: [half_a_reply] for n in range(9)}, reply=fair) as there:
        run(there.url, candidates(1), images, written, out, price=Price(100.0, 100.0), budget=0.3)  # 0.1 to 0.15 each
        assert len(there.requests) == 2
        assert cost(out) <= 0.3


def test_what_failed_and_was_paid_is_not_forgotten_when_it_is_asked_again(images, written, out):
    with FaultServer(reply=lambda request: BROKE_OFF) as there:
        for _ in range(3):
            assert run(there.url, candidates(1), images, written, out, price=PRICE, retries=1) == {"failed": 2}
        there.reply = fair
        assert run(there.url, candidates(1), images, written, out, price=PRICE) == {"scored": 2}
    assert len(there.bill) == 2 * (3 * 2 + 1)
    assert cost(out) == pytest.approx(billed(there), rel=1e-12)
    assert {one.tokens for one in read_verdicts(out)} == {(7 * PROMPT_TOKENS, 6 * 7 + 3)}


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (402, "no", r"quota.*used up.*HTTP \d+.*OPENAI_API_KEY"),
        (429, "insufficient_quota", r"quota.*used up.*HTTP \d+.*OPENAI_API_KEY"),
        (400, "Your credit balance is too low", r"quota.*used up.*HTTP \d+.*OPENAI_API_KEY"),
        (400, "billing_hard_limit_reached", r"quota.*used up.*HTTP \d+.*OPENAI_API_KEY"),
        (400, "API key not valid. Please pass a valid API key.", "the server refuses"),
        (401, "no", "the server refuses"),
        (403, "no", "the server refuses"),
    ],
)
def test_money_that_ends_on_the_way_ends_the_run_and_what_was_under_way_is_paid(
    images, written, out, status, said, message
):
    def ends(request):
        return fair(request) if len(there.requests) <= 7 else refuses(status, said)

    with FaultServer(reply=ends, pause=0.02) as there:
        with pytest.raises(InputError, match=message):
            run(there.url, candidates(9), images, written, out, price=PRICE, concurrency=3)
        assert cost(out) == pytest.approx(billed(there), rel=1e-12)
        assert Counter(one.outcome for one in read_verdicts(out))["scored"] == 7
        assert "refused" not in {one.outcome for one in read_verdicts(out)}
        there.reply = fair
        run(there.url, candidates(9), images, written, out, price=PRICE)
    assert cost(out) == pytest.approx(billed(there), rel=1e-12)


def test_what_a_server_does_not_take_costs_nothing(images, written, out):
    def gpt5(request):
        if "max_tokens" in request:
            return refuses(400, "Unsupported parameter: 'max_tokens' is not supported with this model.")
        return refuses(400, "'temperature' does not support 0.0") if "temperature" in request else fair(request)

    with FaultServer(reply=gpt5) as there:
        assert run(there.url, candidates(3), images, written, out, price=PRICE) == {"scored": 6}
    assert len(there.requests) == 2 + 6
    assert there.requests[-1]["max_completion_tokens"] == 1024 + THOUGHT
    assert cost(out) == pytest.approx(billed(there), rel=1e-12)


def test_asking_whether_a_model_is_served_is_paid_too(images, written, out):
    with FaultServer(reply=lambda request: "hello" if text(request) == "Hello" else fair(request)) as there:
        there.models = lambda handler: handler.sends(200, {"object": "list", "data": [{"id": "other"}]})
        run(there.url, candidates(1), images, written, out, price=PRICE)
    assert len(there.bill) == 3
    assert cost(out) == pytest.approx(billed(there), rel=1e-12)


def test_a_limit_that_the_server_refuses_is_no_fault_of_the_questions(images, written, out):
    said = "'max_tokens' or 'max_completion_tokens' is too large: 1024. This model's maximum context length is 900."
    with FaultServer(reply=lambda request: refuses(400, said)) as there:
        with pytest.raises(InputError, match=r"refuses.*\b1024 tokens.*HTTP 400.*--max-tokens"):
            run(there.url, candidates(3), images, written, out, price=PRICE)
        assert len(there.requests) == 1
        assert cost(out) == 0  # an error is not billed
        there.reply = fair
        assert run(there.url, candidates(3), images, written, out, price=PRICE, preset=replace(OURS, max_tokens=512))


def test_a_server_that_does_not_know_the_limit_of_models_that_think_says_what_to_leave_out(images, written, out):
    said = '[{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"]}]'
    thinks = replace(OURS, thought=THOUGHT)
    without = pytest.raises(InputError, match=r"not take max_completion_tokens\b.*--reasoning")
    with FaultServer(reply=lambda request: refuses(422, said)) as there, without:
        run(there.url, candidates(3), images, written, out, price=PRICE, preset=thinks)
    assert cost(out) == 0


def test_more_room_that_a_judge_had_before_asks_nothing_again(images, written, out):
    """A model that does not take max_tokens had the room of --reasoning already."""

    def gpt5(request):
        if "max_tokens" in request:
            return refuses(400, "Unsupported parameter: 'max_tokens' is not supported with this model.")
        return completes({"content": ""}, "length", THINKS)

    with FaultServer(reply=gpt5) as there:
        assert run(there.url, candidates(2), images, written, out, price=PRICE) == {"unparsable": 4}
        assert (
            run(there.url, candidates(2), images, written, out, price=PRICE, preset=replace(OURS, thought=THOUGHT))
            == {}
        )
        more = replace(OURS, max_tokens=2048)
        assert run(there.url, candidates(2), images, written, out, price=PRICE, preset=more) == {"unparsable": 4}


def test_a_filter_that_leaves_the_message_out_is_final(images, written, out):
    filtered = {"choices": [{"index": 0, "finish_reason": "content_filter"}], "usage": THINKS}
    with FaultServer(reply=lambda request: lambda handler: handler.sends(200, filtered)) as there:
        assert run(there.url, candidates(1), images, written, out, price=PRICE) == {"refused": 2}
        assert run(there.url, candidates(1), images, written, out, price=PRICE) == {}
        assert len(there.requests) == 2
    assert cost(out) == pytest.approx(billed(there), rel=1e-12)


# --- batches ----------------------------------------------------------------------------------------------------------


def halved(there: FaultServer, directly: int) -> float:
    """The server's bill, of which all but the first requests came in a batch."""
    return sum(PRICE.of(*of) * (1 if place < directly else PRICE.batch) for place, of in enumerate(there.bill))


def test_a_batch_is_asked_as_the_server_takes_it(images, written, out):
    def gpt5(request):
        if "max_tokens" in request:
            return refuses(400, "Unsupported parameter: 'max_tokens' is not supported with this model.")
        return fair(request)

    with FaultServer(reply=gpt5) as there:
        assert batched(there.url, candidates(4), images, written, out) == {"scored": 1}
        there.answer_batches()
        assert batched(there.url, candidates(4), images, written, out) == {"scored": 7}
        assert len(there.batches) == 1
    assert cost(out) == pytest.approx(halved(there, 1), rel=1e-12)


@pytest.mark.parametrize("content", ["", None])
def test_a_judge_that_thinks_is_paid_in_a_batch_as_well(images, written, out, content):
    def thinks(request):
        return completes({"content": content}, "length", THINKS) if len(there.requests) > 1 else fair(request)

    with FaultServer(reply=thinks) as there:
        batched(there.url, candidates(4), images, written, out)
        there.answer_batches()
        assert batched(there.url, candidates(4), images, written, out) == {"unparsable": 7}
        assert batched(there.url, candidates(4), images, written, out) == {}
        assert len(there.batches) == 1
    assert cost(out) == pytest.approx(halved(there, 1), rel=1e-12)


def test_what_a_batch_cut_is_asked_again_with_more_room(images, written, out):
    def thinks(request):
        return fair(request) if len(there.requests) <= 1 or request["max_tokens"] > 1024 else cut

    cut = completes({"content": ""}, "length", THINKS)
    more = replace(OURS, max_tokens=4096)
    with FaultServer(reply=thinks) as there:
        batched(there.url, candidates(2), images, written, out)
        there.answer_batches()
        assert batched(there.url, candidates(2), images, written, out, preset=more) == {"unparsable": 3}
        assert {tuple(row["cut_at"]) for row in read_rows(out) if row["cut_at"]} == {(1024, 0)}
        assert batched(there.url, candidates(2), images, written, out, preset=more) == {"scored": 1}
        assert len(there.batches) == 2


def test_a_line_of_a_batch_that_cannot_be_read_may_have_been_paid(images, written, out):
    with FaultServer(reply=fair) as there:
        batched(there.url, candidates(2), images, written, out)
        there.answer_batches()
        file = there.batches["batch-0"]["output_file_id"]
        lines = there.files[file].splitlines()
        there.files[file] = b"\n".join([b'{"custom_id": null}', *lines[:2], lines[2][:-9]])
        assert batched(there.url, candidates(2), images, written, out) == {"scored": 2, "failed": 1}
        assert cost(out) > halved(there, 1)
        assert batched(there.url, candidates(2), images, written, out) == {"scored": 1}


def test_a_reply_that_was_paid_counts_where_a_batch_names_an_error_as_well(images, written, out):
    with FaultServer(reply=fair) as there:
        batched(there.url, candidates(2), images, written, out)
        there.answer_batches()
        batch = there.batches["batch-0"]
        names = [json.loads(line)["custom_id"] for line in there.files[batch["output_file_id"]].splitlines()]
        batch["error_file_id"] = there.keep([{"custom_id": one, "error": {"message": "late"}} for one in names])
        assert batched(there.url, candidates(2), images, written, out) == {"scored": 3}
    assert cost(out) == pytest.approx(halved(there, 1), rel=1e-12)


def test_a_batch_that_is_gone_says_so_and_what_to_do(images, written, out):
    with FaultServer(reply=fair) as there:
        batched(there.url, candidates(2), images, written, out)
        there.batches.clear()
        with pytest.raises(InputError, match=r"batch-0: HTTP 404\b.*take batch-0 out.*batches\.json"):
            batched(there.url, candidates(2), images, written, out)


def test_a_batch_is_so_small_that_its_replies_can_be_read(images, written, out, monkeypatch):
    monkeypatch.setattr(endpoint, "LARGEST_FILE", 3 * (2048 + 6 * 1024))
    with FaultServer(reply=fair) as there:
        batched(there.url, candidates(4), images, written, out)
        monkeypatch.undo()
        assert [there.files[one["input_file_id"]].count(b"custom_id") for one in there.batches.values()] == [3, 3, 1]


def test_a_batch_of_which_every_row_was_refused_is_read_once(images, written, out):
    def refuses_later(request):
        return fair(request) if len(there.requests) <= 1 else refuses(500, "down")

    with FaultServer(reply=refuses_later) as there:
        batched(there.url, candidates(4), images, written, out)
        there.answer_batches()
        assert batched(there.url, candidates(4), images, written, out) == {"failed": 7}
        there.reply = fair
        assert batched(there.url, candidates(4), images, written, out) == {"scored": 1}
        assert len(there.batches) == 2  # a new one, not the old one again
        there.answer_batches()
        assert batched(there.url, candidates(4), images, written, out) == {"scored": 6}


def test_a_kill_between_writing_verdicts_and_noting_the_batch_as_read_pays_nothing_twice(images, written, out):
    broke_off = completes({"content": "8"}, "error", THINKS)

    def sometimes(request):
        return broke_off if "Side 2?" in text(request) and len(there.requests) > 1 else fair(request)

    with FaultServer(reply=sometimes) as there:
        batched(there.url, candidates(4), images, written, out)
        there.answer_batches()
        noted = out.with_suffix(".batches.json").read_text()
        assert batched(there.url, candidates(4), images, written, out) == {"scored": 5, "failed": 2}
        out.with_suffix(".batches.json").write_text(noted)  # as the kill would have left it
        before = cost(out)
        assert before == pytest.approx(halved(there, 1), rel=1e-12)
        there.reply = fair
        assert batched(there.url, candidates(4), images, written, out) == {"scored": 1}
        assert cost(out) - before == pytest.approx(PRICE.of(PROMPT_TOKENS, 3), rel=1e-9)


FULL = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached for m.", "line": None}
WRONG = {"code": "invalid_url", "message": "The URL is wrong.\nLine 1.", "line": 1}


@pytest.mark.parametrize(
    ("errors", "said", "advice"),
    [
        ({"data": [FULL]}, "token_limit_exceeded: Enqueued token limit reached for m.", "with --sample"),
        ({"data": [WRONG] * 3}, "invalid_url: The URL is wrong. Line 1.", "Fix what it names"),
        ([WRONG, FULL], "invalid_url: The URL is wrong. Line 1.; token_limit", "with --sample"),
        ({"data": []}, "it does not say why", "Fix what it names"),
        (None, "it does not say why", "Fix what it names"),
        ("no", "it does not say why", "Fix what it names"),
    ],
)
def test_a_batch_that_was_not_begun_says_why_and_is_not_handed_in_by_the_same_call(
    images, written, out, errors, said, advice
):
    with FaultServer(reply=fair) as there:
        batched(there.url, candidates(4), images, written, out)
        there.batches["batch-0"] |= {"status": "failed", "errors": errors}
        with pytest.raises(InputError) as error:
            batched(there.url, candidates(4), images, written, out)
        assert str(error.value).startswith(f"tiny: batch-0 was not begun ({said}")
        assert advice in str(error.value)
        assert len(there.batches) == 1


def test_no_batch_is_handed_in_where_nobody_could_read_its_replies(images, written, out):
    with FaultServer(reply=lambda request: "Both are good.") as there:
        with pytest.raises(InputError, match=r"\b20 replies.*two scores.*--out"):
            batched(there.url, candidates(30), images, written, out)
        assert not there.batches
    assert cost(out) == pytest.approx(billed(there), rel=1e-12)


# --- kills ------------------------------------------------------------------------------------------------------------


def run_at(url: str, images, written, out, concurrency: int) -> None:
    """In a process of its own, which a test kills."""
    endpoint.FIRST_WAIT = 0.01
    run(url, candidates(20), images, written, out, price=PRICE, concurrency=concurrency, timeout=0.5)


@pytest.fixture
def process(images, written, out, warm_processes):
    def start(url: str, concurrency: int):
        one = warm_processes.Process(target=run_at, args=(url, images, written, out, concurrency))
        one.start()
        return one

    return start


def faults_of_money() -> dict:
    """Each of these is met once by one question and twice by another."""
    kinds = [refuses(429), refuses(500), half_a_reply, hangs_up, silence, sends(b"half {"), BROKE_OFF, says]
    kinds[-1] = completes({"content": ""}, "length", THINKS)
    texts = [prompt(*one.texts()) for one in asked_of(candidates(20))]
    return {text: [kinds[place % 8]] * (1 + place // 8) for place, text in enumerate(texts[:16])}


def test_the_bill_is_the_cost_of_the_file_over_kills_while_a_request_is_under_way(process, out):
    """The server kills its caller, as SIGKILL does, while it answers: the reply was made, and billed, and is lost."""
    moments = set(random.Random(0).sample(range(2, 60), 8))
    victims: list = []

    def deadly(request):
        if len(there.requests) in moments:
            moments.discard(len(there.requests))
            os.kill(victims[-1].pid, signal.SIGKILL)
        return fair(request)

    with FaultServer(faults_of_money(), reply=deadly) as there:
        for _ in range(20):
            victims.append(process(there.url, concurrency=1))
            victims[-1].join()
            if victims[-1].exitcode == 0:
                break
        assert victims[-1].exitcode == 0
        assert len(victims) > 4
        assert cost(out) == pytest.approx(billed(there), rel=1e-9)
    assert Counter(one.outcome for one in read_verdicts(out)) == {"scored": 38, "unparsable": 2}


def test_the_cost_of_the_file_is_never_below_the_bill_at_random_kills(process, out, chance):
    """A kill between a mark and its request counts a request that was not sent: four at a time, at most."""
    each = PRICE.of(PROMPT_TOKENS, 1024)
    kills = 6
    with FaultServer(faults_of_money(), reply=fair, pause=0.03) as there:
        for _ in range(kills):
            victim = process(there.url, concurrency=4)
            time.sleep(0.2 + 0.4 * chance.random())
            victim.kill()
            victim.join()
            lines = out.read_bytes().split(b"\n")[:-1] if out.exists() else []
            rows = {(row["id"], *row["shown"]): row for row in map(json.loads, lines)}
            assert sum(row["cost"] for row in rows.values()) >= billed(there) - 4 * each * kills
        victim = process(there.url, concurrency=4)
        victim.join()
        assert victim.exitcode == 0
        assert billed(there) * (1 - 1e-9) <= cost(out) <= billed(there) + 4 * kills * PRICE.of(PROMPT_TOKENS, 3)


def test_a_purse_holds_back_what_is_under_way():
    purse = Purse(1.0)
    assert purse.holds("a", 0.6)
    assert not purse.holds("b", 0.6)
    assert purse.holds("a", 0.9)  # in place of the 0.6
    purse.pays("a", 0.3)
    assert purse.left == pytest.approx(0.7)
    assert purse.holds("b", 0.7)
    assert Purse(None).holds("a", 1e9)
