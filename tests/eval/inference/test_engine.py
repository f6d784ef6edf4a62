import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stllava_eval.errors import InputError
from stllava_eval.inference.answerer import Answerer
from stllava_eval.inference.engine import Engine, Refused
from stllava_eval.inference.sampling import Choice, pixels_sha256, sample_tokens
from stllava_eval.inference.types import Prompt, Sampling

IMAGES = 5
START = (1, 17, 33)  # what a prompt begins with, before the image


@pytest.fixture(scope="module", params=["every head its keys", "two heads share keys"])
def model(request, checkpoint):
    """Four heads of queries, over four or two of keys."""
    model = Answerer(str(checkpoint)).model
    if request.param == "two heads share keys":
        from stllava_eval.network.modeling import StllavaMedForConditionalGeneration

        config = model.config
        config.text_config.num_key_value_heads = 2
        torch.manual_seed(0)
        fewer = StllavaMedForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in fewer.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.12)
            fewer.lm_head.weight[2] *= 2
        fewer.generation_config = model.generation_config
        model = fewer
    return model


def pixels(image: int) -> torch.Tensor:
    return torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(image))


def prompt(image: int, suffix, **options) -> Prompt:
    options = {"max_new_tokens": 12} | options
    prefix = (*START[: 1 + image % 3], 3, 3, 3, 3)  # of three lengths
    return Prompt(image, prefix, lambda: {"pixel_values": pixels(image)}, tuple(suffix), **options)


def engine(model, **options) -> Engine:
    return Engine(model, {2}, [3], **options)


def answers(one: Engine, prompts) -> list[list[int]]:
    for place, of in enumerate(prompts):
        one.add(place, of)
    found = list(one)
    assert sorted(place for place, _ in found) == list(range(len(prompts)))
    return [ids for _, ids in sorted(found)]


def generated(model, of: Prompt) -> list[int]:
    """What transformers' `generate` makes of one prompt."""
    from transformers import GenerationConfig

    ids = torch.tensor([of.prefix + of.suffix])
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=of.max_new_tokens, eos_token_id=2, pad_token_id=0, suppress_tokens=[3]
    )
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy, **of.inputs()
        )
    return output[0, ids.shape[1] :].tolist()


def some_prompts(seed: int, count: int, **options) -> list[Prompt]:
    choose = random.Random(seed)
    return [
        prompt(
            choose.randrange(IMAGES),
            choose.choices(range(4, 300), k=choose.randint(1, 20)),
            **{"max_new_tokens": choose.randint(1, 40)} | options,
        )
        for _ in range(count)
    ]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 24),
    rows=st.sampled_from([1, 2, 3, 7, 256]),
    batch_tokens=st.sampled_from([None, 1, 60, 150, 400]),
)
def test_tokens_are_those_of_generate_one_at_a_time(model, seed, count, rows, batch_tokens):
    prompts = some_prompts(seed, count)
    found = answers(engine(model, rows=rows, batch_tokens=batch_tokens), prompts)
    assert found == [generated(model, of) for of in prompts]


def test_answers_differ_from_image_to_image_and_end_by_themselves(model):
    """Else the test above would not see a mistake."""
    asked = [prompt(image, (40, 50, word)) for image in range(IMAGES) for word in (60, 61, 62)]
    found = answers(engine(model), asked)
    assert len({str(found[3 * image : 3 * image + 3]) for image in range(IMAGES)}) == IMAGES
    ends = [generated(model, of)[-1] == 2 for of in some_prompts(1, 30, max_new_tokens=40)]
    assert sum(ends) > 3


def test_an_answer_stops_where_it_has_said_enough(model):
    asked = max((prompt(0, (40, 50, word)) for word in range(60, 70)), key=lambda of: len(generated(model, of)))
    whole = generated(model, asked)
    stop = whole[3]
    (cut,) = answers(engine(model), [replace(asked, stop=lambda ids: stop in ids)])
    assert cut == whole[: whole.index(stop) + 1]


def test_an_image_is_encoded_once_and_a_prefix_once(model, monkeypatch):
    seen = []
    original = model.model.get_image_features
    monkeypatch.setattr(
        model.model, "get_image_features", lambda *args, **named: seen.append(1) or original(*args, **named)
    )
    prompts = some_prompts(3, 40)
    one = engine(model)
    found = answers(one, prompts)
    images = {of.key for of in prompts}
    assert len(seen) == len(images)
    prefixes = sum(4 + 1 + image % 3 for image in images)
    # the last token of an answer is never fed
    rest = sum(len(of.suffix) + len(ids) - 1 for of, ids in zip(prompts, found, strict=True))
    assert one.work.done == prefixes + rest
    assert one.work.one_by_one == rest + sum(len(of.prefix) for of in prompts)
    assert one.work.generated == sum(map(len, found))
    assert one.work.saved == pytest.approx(1 - one.work.done / one.work.one_by_one)


def test_equal_prompts_are_answered_once(model):
    one = engine(model)
    first, second, other = answers(one, [prompt(0, (40, 50)), prompt(0, (40, 50)), prompt(1, (40, 50))])
    assert first == second == generated(model, prompt(0, (40, 50)))
    assert one.work.done == 5 + 1 + 6 + 1 + len(first) + len(other)


def test_no_more_tokens_are_held_than_given(model, monkeypatch):
    """Also where answers grow further than was thought: the last rows wait again, and nothing of theirs is left."""

    held, back = [], []
    original, put_back = Engine._forward, Engine._put_back

    def forward(self, *args):
        prefixes = len(self._prefixes) * max(prefix.tokens for prefix in self._prefixes)
        rows = len(self._rows) * max(len(row.ids) for row in self._rows)
        held.append((prefixes + rows, len(self._rows)))
        return original(self, *args)

    monkeypatch.setattr("stllava_eval.inference.rows.GROWTH", 1)
    monkeypatch.setattr(Engine, "_forward", forward)
    monkeypatch.setattr(Engine, "_put_back", lambda self, row: back.append(row) or put_back(self, row))
    make_room = Engine._make_room

    def no_idle_prefix_is_left(self):
        before = len(back)
        make_room(self)
        assert len(back) == before or all(prefix.users for prefix in self._prefixes)

    monkeypatch.setattr(Engine, "_make_room", no_idle_prefix_is_left)
    prompts = some_prompts(4, 60, max_new_tokens=90)
    one = engine(model, batch_tokens=300)
    found = answers(one, prompts)
    assert max(tokens for tokens, rows in held if rows > 1) <= 300
    assert max(rows for _, rows in held) > 4
    assert len(back) > 5
    assert (one._prefixes, one._rows, one._waiting, one._images) == ([], [], {}, {})
    assert found == [generated(model, of) for of in prompts]


def test_the_room_of_long_rows_is_given_back(model):
    """Many short prompts, then a few long ones: never a room of many long ones (a quarter more is spare)."""
    one = engine(model, batch_tokens=3000)
    many = [prompt(number % IMAGES, (number % 250 + 4, 7), max_new_tokens=2) for number in range(200)]
    answers(one, [*many, *(prompt(image, range(4, 204), max_new_tokens=9) for image in range(IMAGES))])
    keys = one._own.layers[0][0]
    assert keys.shape[2] > 200
    assert keys.shape[0] * keys.shape[2] <= 3000 * 1.25


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_short_memory_halves_the_batch_and_nothing_is_lost(model, monkeypatch, error):
    sizes = []
    original = Engine._forward

    def forward(self, *args):
        sizes.append(len(self._rows))
        if len(self._rows) > 5:
            raise error
        return original(self, *args)

    monkeypatch.setattr(Engine, "_forward", forward)
    prompts = some_prompts(5, 30)
    assert answers(engine(model), prompts) == [generated(model, of) for of in prompts]
    assert sizes[0] == 30
    failed = [size for size in sizes if size > 5]
    assert failed[:3] == [30, 15, 7]
    assert len(failed) < 6  # twice as many are tried again now and then


def test_after_a_while_more_is_tried_again(model, monkeypatch):
    from stllava_eval.inference import engine as module

    sizes = []
    original = Engine._forward

    def forward(self, *args):
        sizes.append(len(self._rows))
        if len(sizes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *args)

    monkeypatch.setattr(module, "RECOVERED", 3)
    monkeypatch.setattr(Engine, "_forward", forward)
    prompts = some_prompts(9, 60)
    assert answers(engine(model, rows=16), prompts) == [generated(model, of) for of in prompts]
    assert max(sizes[3:6]) <= 8 < max(sizes[6:])


def test_an_image_that_does_not_fit_at_first_does_not_stop_the_run(model, monkeypatch):
    filled = []
    original = Engine._fill

    def fill(self, of):
        filled.append(of)
        if len(filled) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, of)

    monkeypatch.setattr(Engine, "_fill", fill)
    prompts = some_prompts(10, 20)
    one = engine(model)
    assert answers(one, prompts) == [generated(model, of) for of in prompts]
    assert one.most_rows == 128


def test_a_question_that_does_not_fit_alone_is_one_line(model, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(Engine, "_forward", forward)
    with pytest.raises(InputError, match=r"one question at a time does not fit .*2 GiB.*Pass dtype=bfloat16") as caught:
        answers(engine(model), some_prompts(6, 5))
    assert "\n" not in str(caught.value)


def test_another_error_is_not_taken_for_short_memory(model, monkeypatch):
    monkeypatch.setattr(Engine, "_forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers(engine(model), some_prompts(6, 5))


@pytest.mark.parametrize("refused", [{0}, {4}, {1, 2}, set(range(IMAGES))])
def test_prompts_about_a_refused_image_come_back_with_the_reason_and_the_others_are_answered(model, refused):
    def inputs(image: int):
        if image in refused:
            raise Refused(f"no image {image}")
        return {"pixel_values": pixels(image)}

    prompts = [replace(of, inputs=lambda of=of: inputs(of.key)) for of in some_prompts(12, 30)]
    for options in ({}, {"rows": 1}, {"batch_tokens": 60}):
        found = answers(engine(model, **options), prompts)
        for of, outcome in zip(prompts, found, strict=True):
            if of.key in refused:
                assert str(outcome) == f"no image {of.key}"
            else:
                assert outcome == generated(model, of)


def test_the_choice_for_generate_is_the_engines(model):
    """Drawn and likeliest tokens side by side, with a token that is never generated."""
    from transformers import GenerationConfig, LogitsProcessorList

    prompts = [prompt(0, (40, 50, word), sampling=sampling) for word in (60, 61, 62) for sampling in (None, HOT)]
    expected = answers(engine(model), prompts)
    ids = torch.tensor([of.prefix + of.suffix for of in prompts])
    images = torch.cat([of.inputs()["pixel_values"] for of in prompts])
    rows = [(of, pixels_sha256(of.inputs())) for of in prompts]
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=images,
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=0),
            logits_processor=LogitsProcessorList([Choice(rows, ids.shape[1], [3])]),
        )
    found = [row[: row.index(2) + 1] if 2 in row else row for row in output[:, ids.shape[1] :].tolist()]
    assert found == expected


HOT = Sampling(temperature=1.2, top_k=100, top_p=0.95, seed=7)


def test_a_draw_depends_on_seed_image_question_and_number_and_not_on_its_neighbours(model):
    prompts = [
        prompt(image, (40, 50, word), sampling=HOT, sample_index=n)
        for image in (0, 1)
        for word in (60, 61)
        for n in (0, 1)
    ]
    alone = [answers(engine(model), [of])[0] for of in prompts]
    assert len(set(map(tuple, alone))) == len(prompts)
    assert answers(engine(model), prompts) == alone
    assert answers(engine(model, rows=3), prompts[::-1]) == alone[::-1]
    mixed = [one for of in prompts for one in (of, prompt(of.key, (40, 50, 62)))]
    assert answers(engine(model, batch_tokens=120), mixed)[::2] == alone
    again = [prompt(0, (40, 50, 60), sampling=Sampling(1.2, 100, 0.95, seed=8))]
    assert answers(engine(model), again)[0] != alone[0]


def test_draws_of_one_question_share_its_work(model):
    one = engine(model)
    found = answers(one, [prompt(0, (40, 50, 60), sampling=HOT, sample_index=number) for number in range(8)])
    assert one.work.done == 5 + 3 + sum(len(ids) - 1 for ids in found)
    assert len(set(map(tuple, found))) == 8


def test_draws_have_the_probabilities_of_transformers_warpers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2
    count = 20000
    uniform = [(number + 0.5) / count for number in range(count)]
    for temperature, top_k, top_p in [(1.2, 10, 0.9), (0.7, 0, 0.8), (1.0, 0, 1.0), (1.2, 300, 0.95), (1.0, 1, 1.0)]:
        scores = TemperatureLogitsWarper(temperature)(None, logits)
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        expected = scores.softmax(-1)[0]
        counts = Counter(sample_tokens(logits.expand(count, -1), temperature, top_k, top_p, uniform))
        for token in range(50):
            assert counts[token] / count == pytest.approx(expected[token].item(), abs=2 / count)


def test_a_further_round_goes_on_from_the_answer_before(model):
    """Three draws of a second round: none computes the first one again, and they are what a fresh start gives."""
    one = engine(model)
    one.add(0, prompt(0, (40, 50, 60)))
    one.add(1, prompt(1, (41,), max_new_tokens=30))
    found, second = {}, []
    for place, ids in one:
        found[place] = ids
        if place == 0:
            before = one.work.done
            second = [prompt(0, (40, 50, 60, *ids, 70, 71), sampling=HOT, sample_index=draw) for draw in range(3)]
            for number, of in enumerate(second):
                one.add(2 + number, of)
    assert [found[2 + number] for number in range(3)] == answers(engine(model), second)
    of_others = 12 + sum(len(found[place]) for place in (1, 2, 3, 4))
    assert one.work.done - before <= 3 + of_others  # the answer's last token, 70, 71, and what others needed


def test_a_draw_stays_the_same_when_memory_was_short(model, monkeypatch):
    from stllava_eval.inference import sampling as module

    prompts = [prompt(image, (40, 50), sampling=HOT, sample_index=draw) for image in (0, 1) for draw in range(3)]
    expected = answers(engine(model), prompts)
    original, calls = module.sample_tokens, []

    def short(*args):
        calls.append(1)
        if len(calls) in (2, 5):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args)

    monkeypatch.setattr(module, "sample_tokens", short)
    assert answers(engine(model), prompts) == expected


@pytest.mark.parametrize("window", [4096, 8, 2])
def test_keys_outside_a_sliding_window_are_hidden(checkpoint, window):
    from transformers import MistralConfig

    from stllava_eval.network.modeling import StllavaMedForConditionalGeneration

    config = Answerer(str(checkpoint)).model.config
    shapes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = {name: getattr(config.text_config, name) for name in shapes}
    config.text_config = MistralConfig(**text, num_key_value_heads=2, sliding_window=window, eos_token_id=2)
    torch.manual_seed(0)
    mistral = StllavaMedForConditionalGeneration(config).eval()
    asked = some_prompts(8, 6)
    assert answers(engine(mistral), asked) == [generated(mistral, of) for of in asked]


def test_filling_a_prefix_ends_at_the_last_layers_keys_and_values(model, monkeypatch):
    seen = Counter()
    for number, layer in enumerate(model.model.language_model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: seen.update([number]))
    original = Engine._forward

    def forward(self, *args):
        if not seen["steps"]:
            assert seen == {0: 1}  # of two layers
        seen["steps"] += 1
        return original(self, *args)

    monkeypatch.setattr(Engine, "_forward", forward)
    answers(engine(model), [prompt(0, (40, 50, 60))])
    assert seen["steps"]
    for layer in model.model.language_model.layers:
        layer.mlp._forward_hooks.clear()
