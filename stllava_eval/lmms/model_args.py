"""Read how a model is to be asked from `--model_args` and from the arguments of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stllava_eval.errors import InputError
from stllava_eval.inference.server import ServerAnswerer
from stllava_eval.inference.types import Sampling
from stllava_eval.storage import expanded, read_text

IMAGES = ("own", "other", "black")
BACKENDS = ("transformers", "openai_server")
SERVER = ("base_url", "model", "concurrency", "retries", "timeout", "reasoning")
CHECKPOINT = (
    *("pretrained", "device", "dtype", "four_bit", "batch_tokens"),
    *("base", "vision_tower", "projector", "vision_lora", "prototypes", "iterations"),
)
SAMPLING = ("temperature", "top_p", "top_k", "seed", "draws")
ASKING = ("extract", "max_new_tokens", "system", "enable_thinking", "min_pixels", "max_pixels", *SAMPLING)
ANSWERING = 2  # raised if equal settings give other answers than before; 2 leaves out a model's own penalties
LONGEST_SYSTEM = 100_000  # largest size of a system prompt's file in bytes (our choice)
# Most sampled replies to a question (our choice): papers report 3 to 64, and all of them are held in memory.
MOST_DRAWS = 1000


def take_whole_number(given: dict[str, Any], name: str, least: int) -> int | None:
    """Take a whole number out of the model's arguments.

    Raises:
        InputError: It is none, or too small.
    """
    value = given.pop(name, None)
    if value is not None and (type(value) is not int or value < least):
        raise InputError(f"--model_args {name}={value}: pass a whole number from {least} on.")
    return value


def take_sampling(given: dict[str, Any]) -> tuple[Sampling | None, int]:
    """Take out how replies are sampled, None for the likeliest tokens, and how many replies a question gets.

    Raises:
        InputError: A number is out of its range, or says how to sample where nothing is sampled.
    """
    if given.get("top_k") == -1:  # vLLM's word for all tokens
        given["top_k"] = 0
    top_k, seed = take_whole_number(given, "top_k", 0), take_whole_number(given, "seed", 0)
    draws = take_whole_number(given, "draws", 1) or 1
    if draws > MOST_DRAWS:
        raise InputError(f"--model_args draws={draws}: pass a whole number from 1 to {MOST_DRAWS}.")
    temperature, top_p = given.pop("temperature", 0), given.pop("top_p", None)
    for name, value, low, high in (("temperature", temperature, 0, 100), ("top_p", top_p, 1e-6, 1)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high
        ):
            raise InputError(f"--model_args {name}={value}: pass a number from {low:g} to {high:g}.")
    if not temperature:
        if wrong := [name for name, value in (("top_p", top_p), ("top_k", top_k), ("seed", seed)) if value is not None]:
            raise InputError(f"--model_args {wrong[0]}: nothing is sampled at temperature 0. Pass temperature=... too.")
        if draws > 1:
            raise InputError(f"--model_args draws={draws}: greedy replies are all alike. Pass temperature=... too.")
        return None, 1
    return Sampling(float(temperature), top_k or 0, 1.0 if top_p is None else float(top_p), seed or 0), draws


def take_prompt_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Take out the arguments that the answerer takes: system, enable_thinking, min_pixels, max_pixels, as far as given.

    Raises:
        InputError: One is not of its type, or a system prompt's file cannot be read.
    """
    made: dict[str, Any] = {name: take_whole_number(given, name, 1) for name in ("min_pixels", "max_pixels")}
    if made["min_pixels"] and made["max_pixels"] and made["min_pixels"] > made["max_pixels"]:
        raise InputError(f"--model_args min_pixels={made['min_pixels']}: more than max_pixels={made['max_pixels']}.")
    if (thinking := given.pop("enable_thinking", None)) is not None:
        if not isinstance(thinking, bool):
            raise InputError(f"--model_args enable_thinking={thinking}: pass True or False.")
        made["enable_thinking"] = thinking
    if (system := given.pop("system", None)) is not None:
        made["system"] = system_prompt(str(system))
    return {name: value for name, value in made.items() if value is not None}


def system_prompt(given: str) -> str:
    """Return a system prompt without the quotes that lmms-eval leaves around a value with commas; read `@FILE`."""
    if given[:1] == given[-1:] and given[:1] in ("'", '"') and len(given) > 1:
        given = given[1:-1]
    source = "system"
    if given.startswith("@"):
        source = f"system={given}"
        try:
            given = read_text(expanded("--model_args system", given[1:]), LONGEST_SYSTEM)
        except InputError as error:
            raise InputError(f"--model_args {source}: {error}") from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(f"--model_args {source}: cannot be read ({reason}). Pass a text file.") from error
    if not given.strip():
        raise InputError(f"--model_args {source}: it is empty. Write a system prompt, or leave it out.")
    return given


def check_arguments(backend: str, names: set[str]) -> None:
    """Check that the backend is known and takes arguments of these names.

    Raises:
        InputError: It is not, or does not.
    """
    if backend not in BACKENDS:
        raise InputError(f"--model_args backend={backend}: unknown. Pass one of {', '.join(BACKENDS)}.")
    takes = SERVER if backend == "openai_server" else CHECKPOINT
    if unknown := sorted(names - {*takes, *ASKING}):
        raise InputError(
            f"--model_args {', '.join(unknown)}: unknown with backend={backend}. "
            f"It takes images, {', '.join((*takes, *ASKING))}."
        )


def check_values(images: str, four_bit: bool, batch_tokens: int | None) -> None:
    """Check that these arguments have values that they can have.

    Raises:
        InputError: One has another.
    """
    if images not in IMAGES:
        raise InputError(f"--model_args images={images}: unknown. Pass one of {', '.join(IMAGES)}.")
    if not isinstance(four_bit, bool):
        raise InputError(f"--model_args four_bit={four_bit}: pass True or False.")
    if batch_tokens is not None and (type(batch_tokens) is not int or batch_tokens < 1):
        raise InputError(f"--model_args batch_tokens={batch_tokens}: pass a whole number of tokens from 1 on.")


def open_server(parts: dict[str, Any], rows: int | None, batch_size: int | str) -> ServerAnswerer:
    """Return an answerer that asks a server.

    Raises:
        InputError: No server is named, or a batch size is given.
    """
    if "base_url" not in parts:
        raise InputError("--model_args backend=openai_server: needs base_url=http://HOST:PORT/v1 too.")
    if rows:
        raise InputError(f"--batch_size {batch_size}: a server makes its own batches. Pass concurrency=N.")
    return ServerAnswerer(**parts)


def rows_at_work(given: int | str | None) -> int | None:
    """Return the largest number of questions at a time; None leaves it to the memory and the engine.

    lmms-eval passes the number 1 if nothing was typed, and a text otherwise.

    Raises:
        InputError: It is no number of questions.
    """
    if given is None or given == "auto" or (type(given) is int and given == 1):
        return None
    rows = int(given) if str(given).isdecimal() else 0
    if rows < 1:
        raise InputError(f"--batch_size {given}: not a batch size. Pass a whole number from 1 on, or auto.")
    return rows


def refuse_fewshot(arguments: Sequence[str]) -> None:
    """Refuse a call of lmms-eval with few-shot examples, because they never reach a chat model.

    Raises:
        InputError: `--num_fewshot` is there, perhaps shortened as argparse allows, with another number than 0.
    """
    for index, word in enumerate(arguments):
        name, _, value = word.partition("=")
        value = value or "".join(arguments[index + 1 : index + 2])
        if name.startswith("--nu") and "--num_fewshot".startswith(name) and value != "0":
            raise InputError(f"--num_fewshot {value}: stllava_med is asked without examples. Leave it out.")
