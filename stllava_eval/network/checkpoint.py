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
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, MistralConfig
from transformers.utils import logging

from stllava_eval import __version__
from stllava_eval.decoding import never_generated
from stllava_eval.errors import InputError
from stllava_eval.hub import PROJECTOR_FILES, beside, local_folder, read_json, refuse_no_checkpoint
from stllava_eval.network.configuration import StllavaMedConfig
from stllava_eval.network.files import (
    WEIGHT_DTYPES,
    WeightFile,
    file_sha256,
    has_weights,
    located,
    refused,
    some,
    weight_files,
)
from stllava_eval.network.lora import PREFIX, Adapter, Delta, Network, adapter_file, merged, read_updates
from stllava_eval.network.modeling import StllavaMedForConditionalGeneration
from stllava_eval.network.processing import (
    MISTRAL_INSTRUCT,
    StllavaMedProcessor,
    StllavaMedTokenizer,
    make_processor,
    read_pieces,
)

PROTOTYPES, ITERATIONS = 256, 2  # authors' multimodal_projector/builder.py; their files store neither

# the authors' names of a projector's parts -> ours
PROTOTYPE_PARTS = {
    "sim_alpha": "prototypes.similarity_scale",
    "sim_beta": "prototypes.similarity_shift",
    "c": "prototypes.center",
    "v": "prototypes.value",
    "f": "prototypes.feature",
    "mlp.0": "linear_1",
    "mlp.2": "linear_2",
}
MLP_PARTS = {"0": "linear_1", "2": "linear_2"}
# tensors that no network of today holds, and why nothing is lost with them
DROPPABLE = (
    (r"(.*\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the configuration"),
    (r"((.*\.)?vision_model\.)?embeddings\.position_ids", "computed from the configuration"),
    (r"(.*\.)?mm_projector\.ln_1\.(weight|bias)", "takes no part in the authors' forward"),
)
CLIP_TEXT = r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale"  # in a tower's own folder
# tokens behind the pieces of LLaMA's tokenizer that only ever stand in a prompt
PROMPT_TOKENS = {"<image>", "<pad>", "[PAD]", "<im_start>", "<im_end>", "<im_patch>"}
NOT_SHAPES = {"architectures", "dtype", "transformers_version", "model_type"}  # what config.json says beside shapes
# the tower of LLaVA-1.5, recognised by its shapes where its own folder is not at hand
VIT_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


@dataclass(frozen=True)
class Taken:
    """One tensor of a file that becomes one of the network: `name`, its first `rows` rows, or all of it."""

    file: Path
    key: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int | None = None


@dataclass
class Audit:
    """What became of every tensor in the source and of every parameter of the network."""

    dropped: dict[str, list[str]] = field(default_factory=dict)  # by reason
    trimmed: list[str] = field(default_factory=list)
    merged: dict[str, int] = field(default_factory=dict)  # weights changed, by adapter file
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)  # layers that an adapter targets and has no LoRA for

    def problems(self) -> list[str]:
        """Empty for a checkpoint that can be used; else a clause for each kind of fault."""
        kinds = (
            ("missing", self.missing),
            ("left over", self.left_over),
            ("of the wrong shape or type", self.wrong),
            ("targeted by adapter_config.json and without lora_A and lora_B in its file", self.lacking),
        )
        return [f"{len(found)} {kind} ({some(found)})" for kind, found in kinds if found]


@dataclass(frozen=True)
class _Start:
    """What an adapter was trained on, `start` in its run.json, and the base and tower that it is loaded on now."""

    folder: Path
    known: Mapping[str, Any]
    base: Path
    tower: Path | None
    transformers: Any  # the version that `known` was written with


@dataclass
class _Draft:
    """What the layouts are read into, before it is checked."""

    source: Path
    layout: str
    raw: dict[str, Any]  # config.json: flat in the original layouts, transformers' in the others
    weights: list[tuple[Path, Callable[[str], str | None]]] = field(default_factory=list)  # later ones replace
    adapters: list[Adapter] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)  # where tokenizer and preprocessor are looked for, in order
    vision: Path | None = None  # folder of the vision tower, if it is not in the weights
    starts: list[_Start] = field(default_factory=list)  # of the adapters that `stllava-train` has trained

    def add_adapter(self, folder: Path, rename: Callable[[str], str | None], part: str) -> None:
        """A LoRA, and whatever whole tensors lie in its file."""
        file = adapter_file(folder)
        if any(file.samefile(adapter.file) for adapter in self.adapters):
            raise InputError(f"{folder}: this LoRA is given twice. Leave one of them out.")
        self.adapters.append(Adapter(folder, file, rename, part))

        def whole(key: str) -> str | None:  # of a layer with a LoRA, PEFT saves a vocabulary's own weight as base_layer
            return SAVED_ELSEWHERE if ".lora_" in key else rename(key.replace(".base_layer.", "."))

        self.weights.append((file, whole))

    def add_settings(self, raw: Mapping[str, Any]) -> None:
        """What a later stage's config.json says about images; shapes are the base's."""
        self.raw = self.raw | {name: value for name, value in raw.items() if name.startswith(("mm_", "image_"))}

    @property
    def original(self) -> bool:
        return self.layout.endswith("original")

    @property
    def ours(self) -> bool:
        return self.layout.endswith("stllava-med")


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
        """Every tensor of the network by name, in the dtype of its file, LoRA merged in float32; one at a time."""
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
        """The network with these weights, for answering. No weight is held twice, whatever the layout.

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
        """Look whether the network can be held in 4 bits, before any work.

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
        """Greedy; ends as the language model does; ids that stand for nothing are never generated."""
        text = self.config.text_config
        rows = text.vocab_size
        known = rows if self.tokenizer is None else len(self.tokenizer)
        settings = self.generation_settings()
        excluded = never_generated(settings)
        never = sorted({one for one in (*range(known, rows), self.config.image_token_id, *excluded) if 0 <= one < rows})
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
            _check_ids("eos_token_id", settings.get("eos_token_id"), self.config.text_config.vocab_size)
        return settings

    def processor(self) -> StllavaMedProcessor:
        """Image processor, tokenizer and chat templates.

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
        place = tokenizer.convert_tokens_to_ids("<image>")
        if place != self.config.image_token_id:
            raise InputError(
                f"{self.name}: its tokenizer has <image> at {place}, its network at {self.config.image_token_id}. "
                "Use the tokenizer that the checkpoint was trained with."
            )

    @cached_property
    def sha256(self) -> str:
        """Hash of every file that decides the answers, and of what the files do not store."""
        return self._hash({})

    def _hash(self, changes: Mapping[str, Any]) -> str:
        """`sha256` where the configuration has these values."""
        configuration = self.config.to_diff_dict() | changes
        digest = hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode())
        for file in self.files:
            digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the files of weights and of their configurations: what an adapter on this checkpoint depends on.

        Unlike `sha256` it stays as it is with another version of transformers, another tokenizer, which an adapter has
        for itself, and another place that an adapter_config.json names for its base.
        """
        digest = hashlib.sha256()
        for file in self.files:
            if file.name == "adapter_config.json":
                given = {name: value for name, value in read_json(file).items() if name not in PLACES}
                digest.update(f"{file.name}\0{json.dumps(given, sort_keys=True)}\n".encode())
            elif file.name == "config.json" or file.suffix in (".safetensors", ".bin"):
                digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
        return digest.hexdigest()

    def was(self, start: Mapping[str, Any], transformers: Any) -> bool:
        """Whether this is the checkpoint that a run started from, by what its run.json says of it: `start`."""
        if "weights_sha256" in start:
            return start["weights_sha256"] == self.weights_sha256
        return start.get("sha256") in (self.sha256, self._hash({"transformers_version": transformers}))

    def report(self) -> dict[str, Any]:
        """The audit as JSON."""
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
                _whole_number(name, number, 10**5)
            except ValueError as error:
                raise InputError(f"{error}.") from error
    draft = _read(local_folder(source), source, base, vision_tower)
    if projector:
        file = Path(projector).expanduser()
        if not file.is_file():
            raise InputError(f"projector {projector}: no such file. Pass a file such as mm_projector.bin.")
        draft.weights.append((file, _projector_name))
    if vision_lora:
        folder = local_folder(vision_lora)
        replaced = [adapter for adapter in draft.adapters if adapter.part == "vision"]
        draft.adapters = [adapter for adapter in draft.adapters if adapter not in replaced]
        files = {adapter.file for adapter in replaced}
        draft.weights = [(file, rename) for file, rename in draft.weights if file not in files]
        draft.add_adapter(folder, _flat_name, "vision")
    checkpoint = _check(source, draft, prototypes, iterations)
    for start in draft.starts:
        _check_start(start)
    return checkpoint


def _check_start(start: _Start) -> None:
    """Whether an adapter's base is what it was trained on: on other weights it is another network.

    Raises:
        InputError: It is not.
    """
    tower = str(start.tower) if start.tower else None
    now = _check(str(start.base), _read(start.base, str(start.base), vision_tower=tower), None, None)
    if not now.was(start.known, start.transformers):
        raise InputError(
            f"{start.folder}: it was trained on {start.known.get('name')} with other weights than {start.base} has now "
            f"(sha256 {str(start.known['sha256'])[:16]} in its run.json, now {now.sha256[:16]}). Put the earlier "
            "weights back, or train it again."
        )


def _read(
    folder: Path, source: str, base: str | None = None, vision_tower: str | None = None, above: Sequence[Path] = ()
) -> _Draft:
    """The parts of the checkpoint in `folder`, whichever layout it has; `above`: the folders that build on it."""
    if folder.resolve() in above:
        raise InputError(f"{source}: it builds on itself. Pass --base with what it was trained on.")
    above = [*above, folder.resolve()]
    if (folder / "adapter_config.json").is_file():
        if has_weights(folder):
            raise InputError(f"{source}: it holds an adapter and a whole model. Move one of them to another folder.")
        draft = _read_adapter(folder, base, above)
    else:
        refuse_no_checkpoint(folder, source)
        raw = read_json(folder / "config.json")
        architectures = raw.get("architectures") or []
        if not isinstance(architectures, list):
            raise InputError(
                f"{folder / 'config.json'}: architectures is {architectures!r}, not a list. Copy it again."
            )
        named = ", ".join(map(str, architectures)) or "not named"
        if raw.get("model_type") == "stllava_med":
            draft = _Draft(folder, "stllava-med", raw, [(file, _same) for file in weight_files(folder)])
        elif "LlavaForConditionalGeneration" in architectures or isinstance(raw.get("text_config"), dict):
            if raw.get("model_type") != "llava":
                raise InputError(
                    f"{source}: architecture {named} cannot be loaded. See docs/checkpoints.md for those that can."
                )
            draft = _Draft(folder, "llava-hf", raw, [(file, _llava_hf_name) for file in weight_files(folder)])
        elif isinstance(raw.get("hidden_size"), int) and re.search("llama|mistral", named, re.IGNORECASE):
            draft = _read_flat(folder, raw, base, above)
        else:
            raise InputError(
                f"{source}: architecture {named} cannot be loaded. See docs/checkpoints.md for those that can."
            )
        draft.folders.insert(0, folder)
        if base and draft.source == folder:
            raise InputError(f"{source}: it is a whole model; base is for adapters and projectors. Leave it out.")
    if vision_tower:
        draft.vision = local_folder(vision_tower)
        draft.weights += [(file, _vision_name) for file in weight_files(draft.vision)]
    return draft


def _read_flat(folder: Path, raw: dict[str, Any], base: str | None, above: Sequence[Path]) -> _Draft:
    """The original layout: one flat config.json, `model.mm_projector` and perhaps the vision tower in the weights."""
    projector = next((folder / name for name in PROJECTOR_FILES if (folder / name).is_file()), None)
    if projector is not None and not has_weights(folder):  # projector pre-training: the rest is the base's
        named = base or raw.get("_name_or_path")
        draft = _read(located(named, [folder], "base"), str(named), above=above)
        draft.add_settings(raw)
        draft.layout = f"projector on {draft.layout}"
        draft.weights.append((projector, _projector_name))
        return draft
    draft = _Draft(folder, "original", raw, [(file, _flat_name) for file in weight_files(folder)])
    if projector is not None:  # a projector in the weights wins, as in LLaVA's own loader
        draft.weights.insert(0, (projector, _projector_name))
    return draft


def _read_adapter(folder: Path, base: str | None, above: Sequence[Path]) -> _Draft:
    """A PEFT folder, ours or the authors' LoRA stage, on the checkpoint that it names."""
    settings = read_json(folder / "adapter_config.json")
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder  # one that a run resumes from
    manifest = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    start: Any = manifest.get("start")
    named = base or settings.get("base_model_name_or_path")
    if named is None and isinstance(start, dict):
        named = start.get("name")
    place = located(named, [folder], "base", None if base else settings.get("revision"))
    draft = _read(place, str(named), above=above)
    if isinstance(start, dict):
        if tower := start.get("vision_tower"):
            draft.vision = located(tower, [folder], "vision-tower")
            draft.weights += [(file, _vision_name) for file in weight_files(draft.vision)]
        if isinstance(start.get("sha256"), str):
            versions = manifest.get("versions")
            version = versions.get("transformers") if isinstance(versions, dict) else None
            draft.starts.append(_Start(folder, start, place, draft.vision if tower else None, version))
    draft.folders.insert(0, folder)
    draft.source = folder
    whole = [folder / name for name in TRAINED_WHOLE if (folder / name).is_file()]
    with WeightFile(adapter_file(folder)) as weights:
        of_llava = any(re.match(rf"{PREFIX}model\.(layers|embed_tokens|norm)\.", key) for key in weights.entries)
        of_head = all(key.startswith(f"{PREFIX}lm_head.") for key in weights.entries)  # has one name in both
    if not of_llava and not (of_head and draft.original):
        draft.add_adapter(folder, _adapter_name, "both")
        draft.weights += [(file, _adapter_name) for file in whole]
        draft.layout = f"adapter on {draft.layout}"
        return draft
    draft.add_adapter(folder, _flat_name, "language")
    draft.weights += [(file, _flat_name) for file in whole]
    draft.layout = f"authors' LoRA stage on {draft.layout}"
    if (folder / "config.json").is_file():
        draft.add_settings(read_json(folder / "config.json"))
        if not whole:  # LLaVA's training writes both, and its loader looks for this one too
            raise InputError(
                f"{folder}: no non_lora_trainables.bin, the projector that the LoRA was trained with. Copy it too."
            )
    if (folder / "Vit-lora").is_dir():
        draft.add_adapter(folder / "Vit-lora", _flat_name, "vision")
    return draft


def _check(source: str, draft: _Draft, prototypes: int | None, iterations: int | None) -> Checkpoint:
    """Name every tensor, settle the configuration, and compare the two."""
    if draft.raw.get("quantization_config"):
        raise InputError(
            f"{source}: its config.json says that the weights are quantised. Use the checkpoint before that."
        )
    if draft.original:
        _add_vision_tower(draft)
    audit = Audit()
    found = _named(draft, audit)
    tokenizer = _tokenizer(draft.folders)
    with refused(f"{draft.source}/config.json", "not a configuration of this network"), _quiet():
        config = _configuration(source, draft, found, prototypes, iterations)
        stored_rows = config.text_config.vocab_size
        if not draft.ours:
            _trim_vocabulary(source, config, tokenizer)
        _check_configuration(config, found)
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        config.image_seq_length = patches + (config.vision_feature_select_strategy == "full")
        network = _network(config)
    tied = set(network.all_tied_weights_keys) if config.tie_word_embeddings else set()
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items() if name not in tied}
    if config.tie_word_embeddings and "lm_head.weight" in found:
        file, key, *_ = head = found.pop("lm_head.weight")
        if _same_values(head, found.get("model.language_model.embed_tokens.weight")):
            audit.dropped.setdefault("tied to the embedding", []).append(f"{file.name}: {key}")
        else:
            audit.wrong.append(f"{file.name}: {key} differs from the embedding that config.json ties it to")
    taken = []
    for name, (file, key, shape, dtype) in found.items():
        if name not in wanted:
            audit.left_over.append(f"{file.name}: {key}")
            continue
        rows = None
        aim = wanted[name]
        if shape != aim and name in VOCABULARY_ROWS and shape[1:] == aim[1:] and shape[0] == stored_rows:
            rows = aim[0]
            audit.trimmed.append(f"{file.name}: {key}, {shape[0]} rows to the {rows} of the tokenizer")
        elif shape != aim and not (math.prod(shape) == math.prod(aim) == 1):  # the authors' scalars are [1, 1, 1]
            audit.wrong.append(f"{file.name}: {key} is {list(shape)}, the network's {name} is {list(aim)}")
        if dtype not in WEIGHT_DTYPES:
            audit.wrong.append(f"{file.name}: {key} is {dtype}, not floating point of 16 bits or more")
        taken.append(Taken(file, key, name, aim, dtype, rows))
    audit.missing = sorted(set(wanted) - set(found)) + _of_two_sources(draft, found)
    stored = {
        name: found[name][2] if name in VOCABULARY_ROWS else shape for name, shape in wanted.items() if name in found
    }
    sources = {one.name: one.file for one in taken}
    deltas = _deltas(draft, Network(stored, dict(network.named_modules()), config.tie_word_embeddings), sources, audit)
    if problems := audit.problems():
        raise CheckpointError(source, draft.layout, problems, audit)
    order = {file: place for place, file in enumerate(dict.fromkeys(file for file, _ in draft.weights))}
    taken.sort(key=lambda one: order[one.file])
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
        assumed={
            name: default
            for name, given, default in (
                ("prototypes", prototypes, PROTOTYPES),
                ("iterations", iterations, ITERATIONS),
            )
            if given is None and draft.original and config.projector_type == "prototype"
        },
    )


def _named(draft: _Draft, audit: Audit) -> dict[str, tuple[Path, str, tuple[int, ...], torch.dtype]]:
    """File, key, shape and dtype of every tensor by the network's name; a later file's replaces an earlier one's."""
    found: dict[str, tuple[Path, str, tuple[int, ...], torch.dtype]] = {}
    for file, rename in draft.weights:
        with WeightFile(file) as weights:
            for key, (shape, dtype) in weights.entries.items():
                name = rename(key)
                if name == SAVED_ELSEWHERE:
                    continue
                if reason := _droppable(key, rename):
                    audit.dropped.setdefault(reason, []).append(f"{file.name}: {key}")
                    continue
                if name is None:
                    audit.left_over.append(f"{file.name}: {key}")
                    continue
                old_file, old_key, *_ = found.pop(name, (None, None))  # so that it is read where the later file is
                if old_file == file:
                    audit.left_over.append(f"{file.name}: {key} and {old_key} are both {name}")
                elif old_file is not None:
                    audit.dropped.setdefault(f"replaced by {file.name}", []).append(f"{old_file.name}: {old_key}")
                found[name] = (file, key, shape, dtype)
    return found


def _of_two_sources(draft: _Draft, found: Mapping[str, tuple]) -> list[str]:
    """Tensors that the last source of the vision tower or of the projector lacks, and an earlier one has.

    One half of the part would be of one training and the other half of another. Whole tensors in an adapter's file are
    no such source: PEFT replaces them one by one.
    """
    adapters = {adapter.file for adapter in draft.adapters}
    sources = {file: (file.parent, rename) for file, rename in draft.weights if file not in adapters}
    order = list(sources.values())
    lacking = []
    for part in ("model.vision_tower.", "model.multi_modal_projector."):
        of = {name: file for name, (file, *_) in found.items() if name.startswith(part) and file in sources}
        last = max(of.values(), key=lambda file: order.index(sources[file]), default=None)
        if last is not None:
            lacking += [f"{last.name}: {name}" for name, file in of.items() if sources[file] != sources[last]]
    return sorted(lacking)


class CheckpointError(InputError):
    """A source whose tensors do not fill the network; `report` lists every one of them."""

    def __init__(self, source: str, layout: str, problems: Sequence[str], audit: Audit) -> None:
        super().__init__(
            f"{source} ({layout}): its tensors are not the network's: {'; '.join(problems)}. "
            "Use a complete checkpoint; nothing is ever filled with random numbers."
        )
        self.report = {
            "format": 1,
            "source": source,
            "layout": layout,
            "missing": audit.missing,
            "left_over": audit.left_over,
            "wrong": audit.wrong,
            "lacking": audit.lacking,
            "dropped": audit.dropped,
        }


# beside an adapter, what was trained whole: of LLaVA's trainer, and of those for transformers' models made after it
TRAINED_WHOLE = ("non_lora_trainables.bin", "non_lora_state_dict.bin")
PLACES = ("base_model_name_or_path", "revision")  # in adapter_config.json, of the base
SAVED_ELSEWHERE = ""  # a name for keys that are read by someone else
MOST_PADDING = 128  # rows behind a vocabulary; llava-hf has 64 (our choice)
VOCABULARY_ROWS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def _check_configuration(config: Any, found: Mapping[str, Any]) -> None:
    """Raise ValueError on what the shapes of the tensors cannot show, or would show only after a long time."""
    vision, text = config.vision_config, config.text_config
    config.validate()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for part, names in ((vision, (*sizes, "image_size", "patch_size")), (text, (*sizes, "vocab_size"))):
        for name in names:
            _whole_number(name, getattr(part, name))
    for name in ("num_prototypes", "prototype_iterations"):
        _whole_number(name, getattr(config, name), 10**5)
    for name, part, pattern in (
        ("vision_config", vision, r"model\.vision_tower\.encoder\.layers\.(\d+)\."),
        ("text_config", text, r"model\.language_model\.layers\.(\d+)\."),
    ):
        layers = {int(match[1]) for key in found if (match := re.match(pattern, key))}
        if part.num_hidden_layers != len(layers):
            raise ValueError(f"{name}: num_hidden_layers is {part.num_hidden_layers}, its weights have {len(layers)}")
    if vision.image_size % vision.patch_size:
        raise ValueError(f"image_size {vision.image_size} is no multiple of patch_size {vision.patch_size}")
    layer, count = config.vision_feature_layer, vision.num_hidden_layers
    if not isinstance(layer, int) or not -count - 1 <= layer <= count:
        raise ValueError(f"vision_feature_layer is {layer!r}; the tower has {count} layers")
    if not isinstance(config.image_token_id, int) or config.image_token_id < 0:
        raise ValueError(f"image_token_index is {config.image_token_id!r}, not a token's id")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        _check_ids(name, getattr(text, name), text.vocab_size)


def _whole_number(name: str, value: Any, most: int = 10**9) -> None:
    """Raise ValueError unless `value` is one, from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}, not a whole number from 1 to {most}")


def _check_ids(name: str, value: Any, rows: int) -> None:
    """Raise ValueError unless `value` is None, an id of the vocabulary or a list of them."""
    for one in value if isinstance(value, list) else [value]:
        if one is not None and (not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < rows):
            raise ValueError(f"{name} is {value!r}, not an id of {rows} tokens")


def _same_values(one: tuple, other: tuple | None) -> bool:
    if other is None or one[2] != other[2]:
        return False
    with WeightFile(one[0]) as first, WeightFile(other[0]) as second:
        return bool(first.get(one[1]).equal(second.get(other[1])))


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' remarks about a configuration, which our own line then repeats."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _network(config: Any) -> Any:
    """The network without weights: names and shapes of everything that it must be given."""
    with torch.device("meta"):
        return StllavaMedForConditionalGeneration(config)


def _deltas(draft: _Draft, network: Network, sources: Mapping[str, Path], audit: Audit) -> dict[str, list[Delta]]:
    """The updates of every adapter, by weight; an adapter's whole tensors have been taken as weights before.

    A weight that a later stage saved whole, in the file of `sources`, has the updates of the earlier ones in it. Only
    the vision tower's own folder is no later stage, wherever it was named.
    """
    deltas: dict[str, list[Delta]] = {}
    order = {file: place for place, (file, rename) in enumerate(draft.weights) if rename is not _vision_name}
    has_vision = any(adapter.part == "vision" for adapter in draft.adapters)
    for adapter in draft.adapters:
        updates = read_updates(adapter, network, strays_are_copies=has_vision)
        for name, delta in updates.deltas.items():
            whole = sources.get(name, adapter.file)
            if order.get(whole, -1) > order[adapter.file] and whole.parent != adapter.folder:
                audit.dropped.setdefault(f"replaced by {whole.name}", []).append(f"{adapter.file.name}: {delta.key_b}")
            else:
                deltas.setdefault(name, []).append(delta)
        if updates.strays:
            audit.dropped.setdefault("copies of the vision tower's own LoRA", []).extend(updates.strays)
        audit.left_over += updates.left_over
        audit.wrong += updates.wrong
        audit.lacking += updates.lacking
        audit.merged[str(adapter.file)] = len(updates.deltas)
    return deltas


# --- names ------------------------------------------------------------------------------------------------------------


def _same(key: str) -> str | None:
    """Our own layout."""
    return key if key.startswith(("model.", "lm_head.")) else None


def _flat_name(key: str) -> str | None:
    """The original layout, with or without PEFT's prefix."""
    key = key.removeprefix("base_model.model.").removeprefix("base_model.")
    while key.startswith("model.model."):
        key = key.removeprefix("model.")
    if "mm_projector." in key:
        return _projector_name(key)
    if match := re.fullmatch(r"(?:model\.)?(?:vision_tower\.)+vision_model\.(.+)", key):
        return f"model.vision_tower.{match[1]}"
    if match := re.fullmatch(r"model\.((?:embed_tokens|layers|norm)\..+)", key):
        return f"model.language_model.{match[1]}"
    return key if key == "lm_head.weight" else None


def _projector_name(key: str) -> str | None:
    """The loader's rule: what follows `mm_projector.`."""
    part = key.rpartition("mm_projector.")[2]
    for stem, ours in (PROTOTYPE_PARTS | MLP_PARTS).items():
        if part == stem or part in (f"{stem}.weight", f"{stem}.bias"):
            return f"model.multi_modal_projector.{ours}{part.removeprefix(stem)}"
    return None


def _vision_name(key: str) -> str | None:
    """The folder of a CLIP vision tower, of transformers 4 or 5."""
    key = key.removeprefix("vision_tower.").removeprefix("vision_model.")
    return f"model.vision_tower.{key}" if re.match(r"(embeddings|pre_layrnorm|encoder|post_layernorm)\.", key) else None


def _llava_hf_name(key: str) -> str | None:
    """transformers' LLaVA, in the layout of its hub copies or of its memory."""
    for pattern, ours in (
        (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", "model.vision_tower.{}"),
        (r"(?:model\.)?multi_modal_projector\.(.+)", "model.multi_modal_projector.{}"),
        (r"(?:language_model\.)?(lm_head\..+)", "{}"),
        (r"language_model\.model\.(.+)", "model.language_model.{}"),
        (r"model\.language_model\.(.+)", "model.language_model.{}"),
        (r"language_model\.((?:layers|embed_tokens|norm)\..+)", "model.language_model.{}"),  # of the body alone
    ):
        if match := re.fullmatch(pattern, key):
            return ours.format(match[1])
    return None


def _adapter_name(key: str) -> str | None:
    """PEFT's name of a weight of this network or of transformers' LLaVA, whose names changed with 4.52 and with 5."""
    return _llava_hf_name(key.removeprefix(PREFIX))


def _droppable(key: str, rename: Callable[[str], str | None]) -> str | None:
    if rename is _vision_name and re.fullmatch(CLIP_TEXT, key):
        return "CLIP's text side"
    return next((reason for pattern, reason in DROPPABLE if re.fullmatch(pattern, key)), None)


# --- configuration ----------------------------------------------------------------------------------------------------


def _configuration(
    source: str, draft: _Draft, found: Mapping[str, Any], prototypes: int | None, iterations: int | None
) -> Any:
    """The network's configuration: from transformers' kind of config.json, or from the original flat one."""
    if draft.original:
        config = _original_configuration(source, draft, found, prototypes, iterations)
    else:
        raw = {name: value for name, value in draft.raw.items() if name not in ("architectures", "model_type")}
        if raw.get("image_token_index", raw.get("image_token_id")) is None:
            raise InputError(f"{draft.source}/config.json: no image_token_index. Use a checkpoint that names it.")
        config = StllavaMedConfig(**(raw if draft.ours else raw | {"projector_type": "mlp2x_gelu"}))
        for name, given in (("num_prototypes", prototypes), ("prototype_iterations", iterations)):
            if given is not None and given != getattr(config, name):
                raise InputError(
                    f"{source}: {name} is {getattr(config, name)} in its config.json, not {given}. Leave the option "
                    "out; it is for the authors' files, which do not store the number."
                )
    return config


def _original_configuration(
    source: str, draft: _Draft, found: Mapping[str, Any], prototypes: int | None, iterations: int | None
) -> Any:
    raw = draft.raw
    if raw.get("mm_use_im_start_end"):
        raise InputError(f"{source}: mm_use_im_start_end is true; images between markers are not supported.")
    aspect = raw.get("image_aspect_ratio", "pad")
    if aspect not in ("pad", "square", None):
        raise InputError(f"{source}: image_aspect_ratio {aspect!r} is not supported. It may be pad or square.")
    vision = _vision_configuration(source, draft, found)
    strategies = {"patch": "default", "cls_patch": "full"}
    mistral = "mistral" in f"{raw.get('model_type')} {raw.get('architectures')}".lower()
    text_class: Any = MistralConfig if mistral else LlamaConfig
    names = {*text_class.__dataclass_fields__, "rope_theta", "rope_scaling"} - NOT_SHAPES
    return StllavaMedConfig(
        **{
            "vision_config": vision.to_dict(),
            "text_config": {name: value for name, value in raw.items() if name in names}
            | {"model_type": text_class.model_type},
            "image_token_index": raw.get("vocab_size"),
            "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": strategies.get(raw.get("mm_vision_select_feature", "patch")),
            "projector_type": _projector_type(source, raw, found),
            "num_prototypes": prototypes or PROTOTYPES,
            "prototype_iterations": iterations or ITERATIONS,
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        }
    )


def _trim_vocabulary(source: str, config: Any, tokenizer: Any) -> None:
    """Leave out the rows behind the tokenizer's pieces, unless a token that can stand in an answer is among them."""
    if tokenizer is None:
        return
    rows, added = config.text_config.vocab_size, tokenizer.get_added_vocab()
    last_piece = max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=0)
    if last_piece >= rows:
        raise InputError(f"{source}: its tokenizer has {last_piece + 1} pieces, its network {rows} rows for them.")
    first = min(number for token, number in added.items() if token in PROMPT_TOKENS)
    behind = {token for token, number in added.items() if number >= first}
    if last_piece < first <= rows and behind <= PROMPT_TOKENS:
        if rows - first > MOST_PADDING:
            raise InputError(f"{source}: its tokenizer has {first} pieces, its network {rows} rows. Copy both again.")
        config.text_config.vocab_size = first
        if (config.text_config.pad_token_id or 0) >= first:
            config.text_config.pad_token_id = 0  # unk: the authors' padding
    if config.image_token_id >= config.text_config.vocab_size:
        config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")


def _projector_type(source: str, raw: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    named = raw.get("mm_projector_type")
    if named is None:
        named = "cluster" if "model.multi_modal_projector.prototypes.similarity_scale" in found else "mlp2x_gelu"
    if named not in ("cluster", "mlp2x_gelu"):
        raise InputError(f"{source}: mm_projector_type {named!r} is not supported. It may be cluster or mlp2x_gelu.")
    return {"cluster": "prototype"}.get(named, named)


def _add_vision_tower(draft: _Draft) -> None:
    """The folder that config.json names, if the weights hold no tower and none was given."""
    if draft.vision is not None:
        return
    for file, rename in draft.weights:
        with WeightFile(file) as weights:
            if any((rename(key) or "").startswith("model.vision_tower.") for key in weights.entries):
                return
    named = draft.raw.get("mm_vision_tower")
    draft.vision = located(named, draft.folders, "vision-tower")
    draft.weights += [(file, _vision_name) for file in weight_files(draft.vision)]


def _vision_configuration(source: str, draft: _Draft, found: Mapping[str, Any]) -> CLIPVisionConfig:
    """From the tower's folder; else from the shapes, which must then be LLaVA-1.5's."""
    named = draft.raw.get("mm_vision_tower")
    folder = draft.vision or (beside(named, draft.folders) if isinstance(named, str) else None)
    if folder is not None and (folder / "config.json").is_file():
        raw = read_json(folder / "config.json")
        raw = raw.get("vision_config") or raw.get("vision_config_dict") or raw
        names = set(CLIPVisionConfig.__dataclass_fields__) - NOT_SHAPES
        draft.folders.append(folder)
        return CLIPVisionConfig(**{name: value for name, value in raw.items() if name in names})
    shape = found.get("model.vision_tower.embeddings.position_embedding.weight", (None, None, ()))[2]
    if shape == (577, 1024):
        return CLIPVisionConfig(**VIT_L_336)
    raise InputError(
        f"{source}: the shape of its vision tower ({named}) is not known. Pass --vision-tower FOLDER, with config.json."
    )


# --- tokenizer and deciding files ------------------------------------------------------------------------------------


def _tokenizer(folders: Sequence[Path]) -> Any:
    """The tokenizer of the first folder that has one, with `<image>` in it; None if none has.

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
        added = {one["content"] for one in (settings.get("added_tokens_decoder") or {}).values()}
        if (folder / "added_tokens.json").is_file():
            added |= set(read_json(folder / "added_tokens.json"))
        if own := added - PROMPT_TOKENS - {"<unk>", "<s>", "</s>"}:
            raise InputError(f"{folder}: tokens added to LLaMA's ({some(sorted(own))}) are not supported.")
        legacy = settings.get("legacy", True)  # as the slow class of transformers 4.31 does
        if legacy not in (True, False, None):
            raise ValueError(f"legacy is {legacy!r}, not true or false")
        return StllavaMedTokenizer.from_pieces(*pieces, legacy=legacy is not False, padding_side="left")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def _deciding_files(draft: _Draft) -> list[Path]:
    """Weights, adapters, configurations, tokenizer and preprocessor, each once."""
    files = [file for file, _ in draft.weights] + [adapter.file for adapter in draft.adapters]
    patterns = ("*config.json", "tokenizer*", "special_tokens_map.json", "*.jinja", "additional_chat_templates/*.jinja")
    for folder in [*draft.folders, *(adapter.folder for adapter in draft.adapters)]:
        files += sorted(file for pattern in patterns for file in folder.glob(pattern))
    return list(dict.fromkeys(files))


def _three_numbers(file: Path, name: str, value: Any) -> list[float]:
    """A mean or a standard deviation of red, green and blue."""
    numbers: list[Any] = value if isinstance(value, list) else []
    if len(numbers) != 3 or not all(isinstance(one, float | int) and math.isfinite(one) for one in numbers):
        raise InputError(f"{file}: {name} is {value!r}, not three numbers. Copy it again.")
    if name == "image_std" and min(numbers) <= 0:
        raise InputError(f"{file}: image_std is {value!r}, not above 0. Copy it again.")
    return numbers
