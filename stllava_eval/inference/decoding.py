"""A model's generation_config.json and chat template -> what ends its answers, and what they never hold.

Greedy means the likeliest token of the model's own logits. A published generation_config.json asks for more: that of
Qwen2.5-VL holds `repetition_penalty: 1.05`, others hold beams, a least length or forced words. None of this is taken
over, neither by the engine nor where `generate` answers: it would make scores depend on who wrote the file. Two things
are taken over, because they belong to the vocabulary: the tokens that end an answer, and single tokens that are never
generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What models of today put around a thought or an answer. Some tokenizers hold these as special tokens, which decoding
# drops as a rule; `<|start|>` and `<|end|>` stand for messages only in the vocabulary of gpt-oss (HARMONY).
_TAGS = (
    *("think", "thinking", "thought", "reason", "reasoning", "rationale", "analysis", "reflection", "seed:think"),
    *("summary", "caption", "answer", "conclusion", "solution"),
)
THOUGHT_MARKS = (
    *(f"<{slash}{tag}>" for tag in _TAGS for slash in ("", "/")),  # Qwen, DeepSeek, Seed-OSS, LLaVA-CoT and most others
    *("◁think▷", "◁/think▷", "[THINK]", "[/THINK]"),  # Kimi-VL, Magistral
    *("<unused94>", "<unused95>", "<|channel>", "<channel|>"),  # MedGemma 1.5, Gemma 4
    *(
        f"<|{side}_of_{what}|>" for what in ("thought", "solution", "box") for side in ("begin", "end")
    ),  # OpenThinker, GLM
    *("<|START_THINKING|>", "<|END_THINKING|>", "<|think|>", "<|/think|>"),  # Command A and others
)
HARMONY = (
    "<|channel|>",
    "<|message|>",
    "<|start|>",
    "<|end|>",
    "<|return|>",
)  # <|end|> may end a thought, <|return|> not

# Of generation_config.json: what says nothing about the words of an answer, and what a question itself decides.
_NO_MATTER = {
    *("transformers_version", "use_cache", "max_length", "max_new_tokens", "num_return_sequences"),
    *("cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "prefill_chunk_size", "low_memory"),
}
_TAKEN = {"eos_token_id", "suppress_tokens", "bad_words_ids"}
_ONE_IS_NEUTRAL = {
    *("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "temperature", "top_p", "typical_p"),
    *("num_beams", "num_beam_groups", "guidance_scale"),
}


@dataclass(frozen=True)
class Decoding:
    """What is applied to the likeliest tokens.

    Args:
        ends: Token ids that end an answer.
        never: Token ids that are never generated, in order.
        left_out: Settings of generation_config.json that are not taken over.
    """

    ends: frozenset[int]
    never: tuple[int, ...] = ()
    left_out: Mapping[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> str:
        """Return what is applied, in words.

        >>> Decoding(frozenset({2})).named
        'greedy'
        >>> Decoding(frozenset({2}), (3, 7, 8, 9)).named
        'greedy; suppress_tokens [3, 7-9]'
        """
        spans: list[list[int]] = []
        for token in self.never:
            if spans and token == spans[-1][1] + 1:
                spans[-1][1] = token
            else:
                spans.append([token, token])
        listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
        return f"greedy; suppress_tokens [{listed}]" if listed else "greedy"


def decoding(settings: Mapping[str, Any], tokenizer: Any, rows: int, turn_end: int | None = None) -> Decoding:
    """Read what a model's settings and its tokenizer say about its answers.

    Args:
        settings: As generation_config.json holds them; None is not set.
        tokenizer: Its end token ends answers too: fine-tuned models often come with their base model's settings.
        rows: Of the model's head.
        turn_end: The special token that its chat template puts behind an answer.
    """
    ends = {*_ids(settings.get("eos_token_id")), *_ids(tokenizer.eos_token_id), *_ids(turn_end)}
    ids = {token: number for number, token in special_ids(tokenizer).items()}
    if {*HARMONY} <= {*ids}:
        ends.discard(ids["<|end|>"])
    never = never_generated(settings)
    left_out = {
        name: value
        for name, value in settings.items()
        if name not in _NO_MATTER | _TAKEN and not name.startswith("_") and not _neutral(name, value)
    }
    if phrases := [word for word in _bad_words(settings) if len(word) > 1]:
        left_out["bad_words_ids"] = phrases
    return Decoding(
        frozenset(ends),
        tuple(sorted(token for token in never - ends if 0 <= token < rows)),
        dict(sorted(left_out.items())),
    )


def never_generated(settings: Mapping[str, Any]) -> set[int]:
    """Return the single tokens that generation_config.json excludes everywhere, such as those of an image."""
    return {*_ids(settings.get("suppress_tokens")), *(word[0] for word in _bad_words(settings) if len(word) == 1)}


def _bad_words(settings: Mapping[str, Any]) -> list[list[int]]:
    words = settings.get("bad_words_ids")
    return [_ids(word) for word in words] if isinstance(words, list) else []


def special_ids(tokenizer: Any) -> dict[int, str]:
    """Return the tokenizer's special tokens by id."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number: str(token) for number, token in added.items() if getattr(token, "special", False)}
    return special | dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))


def mark_ids(tokenizer: Any) -> set[int]:
    """Return the special tokens that stay in a reply's text: they tell its thought from its answer."""
    special = special_ids(tokenizer)
    marks = {*THOUGHT_MARKS, *HARMONY} if {*HARMONY} <= {*special.values()} else {*THOUGHT_MARKS}
    return {number for number, token in special.items() if token in marks}


def _ids(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, list | tuple) else [value]) if type(token) is int]


def _neutral(name: str, value: Any) -> bool:
    """Whether a setting changes nothing."""
    if value is None or value is False or value in ("", [], {}):
        return True
    return value is not True and bool(value == (1 if name in _ONE_IS_NEUTRAL else 0))
