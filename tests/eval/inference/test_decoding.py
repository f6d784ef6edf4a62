import pytest

from stllava_eval.inference.decoding import HARMONY, THOUGHT_MARKS, decoding, mark_ids, special_ids


class Words:
    """As much of a tokenizer as its special tokens; `eos` is one of them."""

    def __init__(self, *special: str, eos: str | None = None) -> None:
        self.all_special_tokens, self.all_special_ids = list(special), list(range(len(special)))
        self.eos_token_id = special.index(eos) if eos else None


@pytest.mark.parametrize(
    ("settings", "turn_end", "ends"),
    [
        ({"eos_token_id": 7}, None, {0, 7}),
        ({"eos_token_id": [7, 8]}, 9, {0, 7, 8, 9}),
        ({"eos_token_id": None}, None, {0}),
        ({}, 0, {0}),
    ],
)
def test_answers_end_with_the_settings_tokens_the_tokenizers_and_the_chat_templates(settings, turn_end, ends):
    assert decoding(settings, Words("</s>", eos="</s>"), 99, turn_end).ends == ends


def test_a_model_may_have_no_end_token():
    assert decoding({}, Words("<pad>"), 99).ends == set()


def test_a_token_that_ends_a_thought_does_not_end_the_answer():
    """gpt-oss ends every message with <|end|>, its thought too, and the answer with <|return|>; Phi ends its answer."""
    tokenizer = Words(*HARMONY)
    end, last = HARMONY.index("<|end|>"), HARMONY.index("<|return|>")
    assert decoding({"eos_token_id": [last, end]}, tokenizer, 99, turn_end=end).ends == {last}
    assert mark_ids(tokenizer) == {*range(len(HARMONY))}
    phi = Words("<|end|>", "<|endoftext|>", eos="<|endoftext|>")
    assert decoding({"eos_token_id": [0]}, phi, 99, turn_end=0).ends == {0, 1}
    assert mark_ids(phi) == set()


@pytest.mark.parametrize("mark", ["<think>", "</think>", "◁/think▷", "<unused95>", "<channel|>", "<seed:think>"])
def test_thought_marks_are_kept_where_they_are_special(mark):
    assert mark in THOUGHT_MARKS
    assert mark_ids(Words("<pad>", mark)) == {1}
    assert special_ids(Words("<pad>", mark)) == {0: "<pad>", 1: mark}


def test_single_tokens_are_kept_out_and_phrases_are_not():
    settings = {"suppress_tokens": [5, 200], "bad_words_ids": [[6], [7], [8, 9], [2]], "eos_token_id": 2}
    found = decoding(settings, Words("<pad>"), rows=100)
    assert found.never == (5, 6, 7)  # 200 is no row of the head, and 2 ends the answer
    assert found.named == "greedy; suppress_tokens [5-7]"
    assert found.left_out == {"bad_words_ids": [[8, 9]]}


def test_only_what_would_change_a_word_is_told():
    neutral = {
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "num_beams": 1,
        "no_repeat_ngram_size": 0,
        "min_length": 0,
        "do_sample": False,
        "renormalize_logits": None,
        "stop_strings": [],
        "max_length": 4096,
        "use_cache": True,
        "_from_model_config": True,
        "transformers_version": "5.0.0",
        "pad_token_id": 0,
    }
    telling = {"top_k": 1, "do_sample": True, "min_new_tokens": 1, "repetition_penalty": 1.05, "chat_format": "x"}
    assert decoding(neutral, Words("<pad>"), 99).left_out == {}
    assert decoding(neutral | telling, Words("<pad>"), 99).left_out == telling


@pytest.mark.parametrize("value", ["x", [["a"]], 3.5, [None], {"a": 1}])
def test_settings_that_are_no_ids_say_nothing(value):
    found = decoding({"suppress_tokens": value, "bad_words_ids": value, "eos_token_id": value}, Words("<pad>"), 99)
    assert (found.ends, found.never) == (set(), ())
