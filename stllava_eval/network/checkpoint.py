"""A checkpoint in any published layout -> the network's weights, every tensor accounted for.

`open_checkpoint` reads headers only: it finds the parts that a source consists of, names each tensor as the network
does, merges nothing yet, and refuses what does not add up. The result then gives weights, model and processor, or is
written as a folder that `from_pretrained` reads. At no time is more than one tensor in memory beside what is built.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging

from stllava_eval.errors import InputError
from stllava_eval.hub import local_folder, read_json
from stllava_eval.inference.decoding import never_generated
from stllava_eval.network.files import (
    WEIGHT_DTYPES,
    WeightFile,
    cached_file_sha256,
    first_few,
    refused,
)
from stllava_eval.network.layouts import (
    PLACES,
    VOCABULARY_ROWS,
    Audit,
    CheckpointError,
    Draft,
    Start,
    Taken,
    add_vision_tower,
    flat_name,
    mixed_sources,
    projector_name,
    read_layout,
    tensors_by_name,
    weight_updates,
)
from stllava_eval.network.lora import Delta, Network, merged
from stllava_eval.network.modeling import StllavaMedForConditionalGeneration
from stllava_eval.network.processing import (
    MISTRAL_INSTRUCT,
    StllavaMedProcessor,
    StllavaMedTokenizer,
    make_processor,
    read_pieces,
)
from stllava_eval.network.settings import (
    ITERATIONS,
    PROMPT_TOKENS,
    PROTOTYPES,
    check_configuration,
    check_ids,
    equal_tensors,
    read_configuration,
    trim_vocabulary,
    whole_number,
)
from stllava_eval.version import __version__


@dataclass(frozen=True)
class Checkpoint:
    """A source whose tensors fill the network exactly.

    Attributes:
        name: As it was asked for.
        layout: What it was recognised as.
        config: Of the network.
        taken: In the order of the files.
        deltas: LoRA updates by the name of the weight.
        audit: What became of every tensor.
        files: Everything that decides the answers.
        folders: Where tokenizer and preprocessor were looked for.
        tokenizer: None where the source has none.
        pads: Whether images are padded to a square, or cut to one.
        assumed: Numbers of the network that the source does not store and nobody gave.
    """

    name: str
    layout: str
    config: Any  # StllavaMedConfig, whose parts have no type
    taken: tuple[Taken, ...]
    deltas: Mapping[str, tuple[Delta, ...]]
    audit: Audit
    files: tuple[Path, ...]
    folders: tuple[Path, ...]
    tokenizer: Any
    pads: bool
    assumed: Mapping[str, int]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the network by name, in its file's dtype, LoRA merged in float32; one at a time."""
        for file in dict.fromkeys(taken.file for taken in self.taken):
            with WeightFile(file) as source:
                for taken in self.taken:
                    if taken.file == file:
                        tensor = source.get(taken.key)[: taken.rows] if taken.rows else source.get(taken.key)
                        deltas = self.deltas.get(taken.name, ())
                        tensor = merged(tensor.reshape(taken.shape), deltas)
                        if not all(bound.isfinite() for bound in tensor.aminmax()):
                            what = "overflows with its LoRA" if deltas else "holds numbers that are not finite"
                            raise InputError(f"{file.name}: {taken.key} {what}. Use a sound checkpoint.")
                        yield taken.name, tensor

    def model(
        self, device: Any = "cpu", dtype: torch.dtype = torch.float32, four_bit: bool = False
    ) -> StllavaMedForConditionalGeneration:
        """Return the network with these weights, for answering. No weight is held twice, whatever the layout.

        Raises:
            InputError: `four_bit` without bitsandbytes, or for a source that is not one folder of our own layout.
        """
        if four_bit:
            return self._four_bit_model(device, dtype)
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model = StllavaMedForConditionalGeneration(copy.deepcopy(self.config))  # its own: users change it
        for name, tensor in self.weights():
            owner, _, leaf = name.rpartition(".")
            value = tensor.to(device, dtype)
            if value.data_ptr() == tensor.data_ptr():
                value = value.clone()  # not a window on the file
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
        model.tie_weights()
        model.generation_config = self.generation_config()
        return model.to(device).eval()

    def check_four_bit(self) -> None:
        """Check that the network can be held in 4 bits, before any work.

        Raises:
            InputError: bitsandbytes is not installed, or this is no folder of our own layout.
        """
        from importlib.util import find_spec

        if find_spec("bitsandbytes") is None:
            raise InputError("four_bit: bitsandbytes is not installed. Run `pip install 'stllava-med[four-bit]'`.")
        if self.layout != "stllava-med" or {taken.file.parent for taken in self.taken} != {self.folders[0]}:
            raise InputError(
                f"{self.name} ({self.layout}): four_bit needs one folder of our own layout, vision tower and all. Run "
                "`stllava-eval convert` first."
            )

    def _four_bit_model(self, device: Any, dtype: torch.dtype) -> StllavaMedForConditionalGeneration:
        from transformers import BitsAndBytesConfig

        self.check_four_bit()
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )
        load: Any = StllavaMedForConditionalGeneration.from_pretrained
        model = load(self.folders[0], dtype=dtype, quantization_config=quantization, device_map={"": device})
        model.generation_config = self.generation_config()
        return model.eval()

    def generation_config(self) -> GenerationConfig:
        """Return greedy settings: ends of the language model, and ids without a meaning that are never generated."""
        text = self.config.text_config
        rows = text.vocab_size
        known = rows if self.tokenizer is None else len(self.tokenizer)
        settings = self.generation_settings()
        excluded = never_generated(settings)
        never = sorted(
            {token for token in (*range(known, rows), self.config.image_token_id, *excluded) if 0 <= token < rows}
        )
        ends = settings.get("eos_token_id") or text.eos_token_id
        return GenerationConfig(
            do_sample=False,
            bos_token_id=text.bos_token_id,
            eos_token_id=ends,
            pad_token_id=text.pad_token_id if text.pad_token_id is not None else 0,
            suppress_tokens=never or None,
        )

    def generation_settings(self) -> dict[str, Any]:
        """Read the source's own generation_config.json, a part of which `generation_config` applies.

        Raises:
            InputError: Its end tokens are none of the vocabulary's.
        """
        file = next((file for folder in self.folders if (file := folder / "generation_config.json").is_file()), None)
        if file is None:
            return {}
        settings = read_json(file)
        with refused(file, "not usable"):
            check_ids("eos_token_id", settings.get("eos_token_id"), self.config.text_config.vocab_size)
        return settings

    def processor(self) -> StllavaMedProcessor:
        """Return the image processor, tokenizer and chat templates as one processor.

        Raises:
            InputError: The source has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.name}: it has no tokenizer (tokenizer.model or tokenizer.json). Copy one into it.")
        if self.layout.endswith("stllava-med"):
            for folder in self.folders:
                if (folder / "processor_config.json").is_file():
                    with refused(folder / "processor_config.json", "not a processor"):
                        processor = StllavaMedProcessor.from_pretrained(folder)
                    self._check_image_token(processor.tokenizer)
                    return processor
        self._check_image_token(self.tokenizer)
        vision = self.config.vision_config
        processor = make_processor(
            self.tokenizer,
            vision.image_size,
            vision.patch_size,
            self.config.vision_feature_select_strategy,
            do_pad=self.pads,
        )
        files = [folder / "preprocessor_config.json" for folder in self.folders]
        if file := next((file for file in files if file.is_file()), None):
            for name, value in read_json(file).items():
                if name in ("image_mean", "image_std"):
                    setattr(processor.image_processor, name, _three_numbers(file, name, value))
        if self.config.text_config.model_type == "mistral":
            processor.chat_template = {"default": MISTRAL_INSTRUCT, "mistral_instruct": MISTRAL_INSTRUCT}
        return processor

    def _check_image_token(self, tokenizer: Any) -> None:
        image_id = tokenizer.convert_tokens_to_ids("<image>")
        if image_id != self.config.image_token_id:
            raise InputError(
                f"{self.name}: its tokenizer has <image> at {image_id}, its network at {self.config.image_token_id}. "
                "Use the tokenizer that the checkpoint was trained with."
            )

    @cached_property
    def sha256(self) -> str:
        """Return the hash of every file that decides the answers, and of what the files do not store."""
        return self._hash({})

    def _hash(self, changes: Mapping[str, Any]) -> str:
        """Return `sha256` as if the configuration had these values."""
        configuration = self.config.to_diff_dict() | changes
        digest = hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode())
        for file in self.files:
            digest.update(f"{file.name}\0{cached_file_sha256(file)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        """Return the hash of the weights' and configurations' files: what an adapter on this checkpoint depends on.

        Unlike `sha256` it stays as it is with another version of transformers, another tokenizer, which an adapter has
        for itself, and another place that an adapter_config.json names for its base.
        """
        digest = hashlib.sha256()
        for file in self.files:
            if file.name == "adapter_config.json":
                given = {name: value for name, value in read_json(file).items() if name not in PLACES}
                digest.update(f"{file.name}\0{json.dumps(given, sort_keys=True)}\n".encode())
            elif file.name == "config.json" or file.suffix in (".safetensors", ".bin"):
                digest.update(f"{file.name}\0{cached_file_sha256(file)}\n".encode())
        return digest.hexdigest()

    def was(self, start: Mapping[str, Any], transformers: Any) -> bool:
        """Return whether this is the checkpoint that a run started from, by what its run.json says of it: `start`."""
        if "weights_sha256" in start:
            return start["weights_sha256"] == self.weights_sha256
        return start.get("sha256") in (self.sha256, self._hash({"transformers_version": transformers}))

    def report(self) -> dict[str, Any]:
        """Return the audit as JSON."""
        return {
            "format": 1,
            "stllava_med": __version__,
            "source": self.name,
            "layout": self.layout,
            "assumed": dict(self.assumed),
            "files": [str(file) for file in dict.fromkeys(taken.file for taken in self.taken)],
            "parameters_filled": len(self.taken),
            "dtypes": dict(Counter(str(taken.dtype).removeprefix("torch.") for taken in self.taken)),
            "lora_merged": self.audit.merged,
            "trimmed": self.audit.trimmed,
            "dropped": self.audit.dropped,
        }


# --- reading a source -------------------------------------------------------------------------------------------------


def open_checkpoint(
    source: str,
    base: str | None = None,
    vision_tower: str | None = None,
    projector: str | None = None,
    vision_lora: str | None = None,
    prototypes: int | None = None,
    iterations: int | None = None,
) -> Checkpoint:
    """Find out what `source` is, and check that its tensors fill the network exactly. Reads headers, not weights.

    Args:
        source: Folder or hub id: ours; the authors' full model, language model, LoRA stage or projector folder;
            LLaVA-1.5, SQ-LLaVA, LLaVA-Med v1.5 as published; `llava-hf`; a PEFT adapter folder on any of these.
        base: What an adapter or projector folder builds on (default: what it names itself).
        vision_tower: Folder or hub id of the vision tower; wins over a tower in the weights.
        projector: File of a projector (`mm_projector.bin`); wins over one in the weights.
        vision_lora: Folder of a LoRA of the vision tower (default: `Vit-lora` in an adapter folder).
        prototypes: Of the authors' prototype extractor, whose files do not store it (default: 256).
        iterations: Likewise (default: 2).

    Raises:
        InputError: It is no checkpoint, a file is missing, cut short or holds code, or a tensor is missing, left over,
            or of the wrong shape or type. Nothing is ever filled with random numbers.
    """
    for name, number in (("prototypes", prototypes), ("iterations", iterations)):
        if number is not None:
            try:
                whole_number(name, number, 10**5)
            except ValueError as error:
                raise InputError(f"{error}.") from error
    draft = read_layout(local_folder(source), source, base, vision_tower)
    if projector:
        file = Path(projector).expanduser()
        if not file.is_file():
            raise InputError(f"projector {projector}: no such file. Pass a file such as mm_projector.bin.")
        draft.weights.append((file, projector_name))
    if vision_lora:
        folder = local_folder(vision_lora)
        replaced = [adapter for adapter in draft.adapters if adapter.part == "vision"]
        draft.adapters = [adapter for adapter in draft.adapters if adapter not in replaced]
        files = {adapter.file for adapter in replaced}
        draft.weights = [(file, rename) for file, rename in draft.weights if file not in files]
        draft.add_adapter(folder, flat_name, "vision")
    checkpoint = _check(source, draft, prototypes, iterations)
    for start in draft.starts:
        _check_start(start)
    return checkpoint


def _check_start(start: Start) -> None:
    """Check that an adapter's base is what it was trained on: on other weights it is another network.

    Raises:
        InputError: It is not.
    """
    tower = str(start.tower) if start.tower else None
    now = _check(str(start.base), read_layout(start.base, str(start.base), vision_tower=tower), None, None)
    if not now.was(start.known, start.transformers):
        raise InputError(
            f"{start.folder}: it was trained on {start.known.get('name')} with other weights than {start.base} has now "
            f"(sha256 {str(start.known['sha256'])[:16]} in its run.json, now {now.sha256[:16]}). Put the earlier "
            "weights back, or train it again."
        )


def _check(source: str, draft: Draft, prototypes: int | None, iterations: int | None) -> Checkpoint:
    """Name every tensor, settle the configuration, and compare the two."""
    if draft.raw.get("quantization_config"):
        raise InputError(
            f"{source}: its config.json says that the weights are quantised. Use the checkpoint before that."
        )
    if draft.original:
        add_vision_tower(draft)
    audit = Audit()
    tensors = tensors_by_name(draft, audit)
    tokenizer = _tokenizer(draft.folders)
    with refused(f"{draft.source}/config.json", "not a configuration of this network"), _quiet():
        config = read_configuration(source, draft, tensors, prototypes, iterations)
        stored_rows = config.text_config.vocab_size
        if not draft.ours:
            trim_vocabulary(source, config, tokenizer)
        check_configuration(config, tensors)
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        config.image_seq_length = patches + (config.vision_feature_select_strategy == "full")
        network = _network(config)
    taken, stored = _match_tensors(network, config, tensors, stored_rows, audit)
    audit.missing += mixed_sources(draft, tensors)
    sources = {tensor.name: tensor.file for tensor in taken}
    modules = dict(network.named_modules())
    deltas = weight_updates(draft, Network(stored, modules, config.tie_word_embeddings), sources, audit)
    if problems := audit.problems():
        raise CheckpointError(source, draft.layout, problems, audit)
    files = dict.fromkeys(file for file, _ in draft.weights)  # each once, in order
    order = {file: index for index, file in enumerate(files)}
    taken.sort(key=lambda tensor: order[tensor.file])
    assumed = {}
    if draft.original and config.projector_type == "prototype":
        for name, given, default in (("prototypes", prototypes, PROTOTYPES), ("iterations", iterations, ITERATIONS)):
            if given is None:
                assumed[name] = default
    return Checkpoint(
        source,
        draft.layout,
        config,
        tuple(taken),
        {name: tuple(updates) for name, updates in deltas.items()},
        audit,
        tuple(_deciding_files(draft)),
        tuple(draft.folders),
        tokenizer,
        pads=not draft.original or draft.raw.get("image_aspect_ratio", "pad") == "pad",
        assumed=assumed,
    )


def _match_tensors(
    network: Any,
    config: Any,
    tensors: dict[str, tuple[Path, str, tuple[int, ...], torch.dtype]],
    stored_rows: int,
    audit: Audit,
) -> tuple[list[Taken], dict[str, tuple[int, ...]]]:
    """Compare the tensors of a source with the parameters of the network, and record every difference in `audit`.

    Args:
        network: On the meta device.
        config: Of the network.
        tensors: File, key, shape and dtype by name; a head that is tied to the embedding is removed.
        stored_rows: Of the vocabulary in the files, before padding is left out.
        audit: What is recorded.

    Returns:
        The tensors that fill the network, and their shapes by name as an adapter changes them: of the vocabulary's
        weights with the rows in the file, of others as in the network.
    """
    tied = set(network.all_tied_weights_keys) if config.tie_word_embeddings else set()
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items() if name not in tied}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        file, key, *_ = head = tensors.pop("lm_head.weight")
        if equal_tensors(head, tensors.get("model.language_model.embed_tokens.weight")):
            audit.dropped.setdefault("tied to the embedding", []).append(f"{file.name}: {key}")
        else:
            audit.wrong.append(f"{file.name}: {key} differs from the embedding that config.json ties it to")
    taken = []
    stored = {}
    for name, (file, key, shape, dtype) in tensors.items():
        if name not in wanted:
            audit.left_over.append(f"{file.name}: {key}")
            continue
        rows = None
        expected = wanted[name]
        stored[name] = shape if name in VOCABULARY_ROWS else expected
        # (rows, width) of embedding and head: the file may have padding behind the tokenizer's pieces
        if shape != expected and name in VOCABULARY_ROWS and shape[1:] == expected[1:] and shape[0] == stored_rows:
            rows = expected[0]
            audit.trimmed.append(f"{file.name}: {key}, {shape[0]} rows to the {rows} of the tokenizer")
        elif shape != expected and not (math.prod(shape) == math.prod(expected) == 1):  # the authors' are [1, 1, 1]
            audit.wrong.append(f"{file.name}: {key} is {list(shape)}, the network's {name} is {list(expected)}")
        if dtype not in WEIGHT_DTYPES:
            audit.wrong.append(f"{file.name}: {key} is {dtype}, not floating point of 16 bits or more")
        taken.append(Taken(file, key, name, expected, dtype, rows))
    audit.missing += sorted(set(wanted) - set(tensors))
    return taken, stored


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' remarks about a configuration, which our own line repeats."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _network(config: Any) -> Any:
    """Return the network without weights: names and shapes of everything that it must be given."""
    with torch.device("meta"):
        return StllavaMedForConditionalGeneration(config)


# --- tokenizer and deciding files ------------------------------------------------------------------------------------


def _tokenizer(folders: Sequence[Path]) -> Any:
    """Return the tokenizer of the first folder that has one, with `<image>` in it; None if none has.

    Raises:
        InputError: It cannot be read, or has words of its own behind LLaMA's pieces.
    """
    for folder in folders:
        if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
            with refused(folder, "its tokenizer cannot be read"):
                return _read_tokenizer(folder)
    return None


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    pieces = None if settings.get("tokenizer_class") == "StllavaMedTokenizer" else read_pieces(folder)
    if pieces:
        added = {token["content"] for token in (settings.get("added_tokens_decoder") or {}).values()}
        if (folder / "added_tokens.json").is_file():
            added |= set(read_json(folder / "added_tokens.json"))
        if own := added - PROMPT_TOKENS - {"<unk>", "<s>", "</s>"}:
            raise InputError(f"{folder}: tokens added to LLaMA's ({first_few(sorted(own))}) are not supported.")
        legacy = settings.get("legacy", True)  # as the slow class of transformers 4.31 does
        if legacy not in (True, False, None):
            raise ValueError(f"legacy is {legacy!r}, not true or false")
        return StllavaMedTokenizer.from_pieces(*pieces, legacy=legacy is not False, padding_side="left")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def _deciding_files(draft: Draft) -> list[Path]:
    """Return the files of weights, adapters, configurations, tokenizer and preprocessor, each once."""
    files = [file for file, _ in draft.weights] + [adapter.file for adapter in draft.adapters]
    patterns = ("*config.json", "tokenizer*", "special_tokens_map.json", "*.jinja", "additional_chat_templates/*.jinja")
    for folder in [*draft.folders, *(adapter.folder for adapter in draft.adapters)]:
        files += sorted(file for pattern in patterns for file in folder.glob(pattern))
    return list(dict.fromkeys(files))


def _three_numbers(file: Path, name: str, value: Any) -> list[float]:
    """Check and return a mean or a standard deviation of red, green and blue."""
    numbers: list[Any] = value if isinstance(value, list) else []
    if len(numbers) != 3 or not all(isinstance(number, float | int) and math.isfinite(number) for number in numbers):
        raise InputError(f"{file}: {name} is {value!r}, not three numbers. Copy it again.")
    if name == "image_std" and min(numbers) <= 0:
        raise InputError(f"{file}: image_std is {value!r}, not above 0. Copy it again.")
    return numbers
