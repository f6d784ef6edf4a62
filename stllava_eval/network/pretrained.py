"""Load an image-text model of another family by transformers, alone or with LoRAs on it, every tensor accounted for.

Such a model is Qwen2.5-VL, Gemma 3, InternVL or any other that `AutoModelForImageTextToText` knows. LLaVA's layouts and
our own are read by `checkpoint`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from stllava_eval.errors import InputError
from stllava_eval.hub import find_folder, local_folder, read_json
from stllava_eval.network.files import WeightFile, first_few, has_weights, refused
from stllava_eval.network.lora import PREFIX, Adapter, Network, Updates, adapter_file, merged, read_updates
from stllava_eval.storage import file_sha256

OURS = ("llava", "stllava_med")  # what network.checkpoint reads
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
DECIDING = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt")  # files that decide the answers


@dataclass(frozen=True)
class Pretrained:
    """The folders of a model.

    Attributes:
        name: Folder or hub id, as it was given.
        base: Folder of the whole model.
        adapters: Folders of the LoRAs on it, in the order in which they are merged.
    """

    name: str
    base: Path
    adapters: tuple[Path, ...] = ()

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return all folders, the one that was named first."""
        return (*reversed(self.adapters), self.base)

    @property
    def sha256(self) -> str:
        """Return the hash of every file that decides the answers."""
        digest = hashlib.sha256()
        for folder in self.folders:
            for file in sorted(folder.iterdir()):
                if file.suffix in DECIDING:
                    digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
        return digest.hexdigest()

    def config(self) -> Any:
        """Return the configuration of the whole model.

        Raises:
            InputError: transformers cannot read it.
        """
        from transformers import AutoConfig

        with _loading(self.name):  # asked about code of their own, transformers would wait for a word from the keyboard
            return AutoConfig.from_pretrained(self.base, trust_remote_code=False)

    def processor(self) -> Any:
        """Return the processor: of the outermost adapter that has one, else the model's.

        Trainers write beside an adapter the whole processor (trl, LLaMA-Factory, unsloth), a tokenizer alone, or
        nothing (ms-swift). A tokenizer alone replaces the model's, with its chat template.

        Raises:
            InputError: transformers cannot load it, or an adapter's tokenizer has other tokens than the model.
        """
        from transformers import AutoProcessor, AutoTokenizer

        with _loading(self.name):
            owner = next(folder for folder in self.folders if _has_processor(folder) or folder == self.base)
            processor = AutoProcessor.from_pretrained(owner, trust_remote_code=False)
            # a fine-tuned model's template is sometimes in tokenizer_config.json alone
            processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
            trained = next((folder for folder in self.adapters[::-1] if _has_tokenizer(folder)), None)
            if trained is None or _has_processor(trained):
                return processor
            tokenizer = AutoTokenizer.from_pretrained(trained, trust_remote_code=False)
        if tokenizer.get_vocab() != processor.tokenizer.get_vocab():
            raise InputError(
                f"{trained}: its tokenizer has {len(tokenizer)} tokens and the model's {len(processor.tokenizer)}, or "
                "they differ. Put the whole processor that the adapter was trained with into its folder."
            )
        processor.chat_template = tokenizer.chat_template or processor.chat_template
        return processor

    def model(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the network on its device, with the adapters merged into its weights.

        Raises:
            InputError: It cannot be loaded whole, or an adapter has a layer that the network lacks, or lacks one.
        """
        from transformers import AutoModelForImageTextToText

        if self.adapters and read_json(self.base / "config.json").get("quantization_config"):
            raise InputError(
                f"{self.name}: its base {self.base} is a quantised copy, into which no adapter can be merged. Pass "
                "base with the 16-bit model that the copy was made from."
            )
        with _loading(self.name):
            load: Any = AutoModelForImageTextToText.from_pretrained
            model, loading = load(self.base, dtype=dtype, output_loading_info=True, trust_remote_code=False)
        if missing := sorted(loading["missing_keys"]):
            tie = ", or set tie_word_embeddings to true in its config.json if its head is the embedding"
            raise InputError(
                f"{self.name}: {len(missing)} of its weights are missing ({first_few(missing)}). Copy it again"
                f"{tie if missing == ['lm_head.weight'] else ''}."
            )
        if unused := sorted(loading["unexpected_keys"]):
            logger.warning(
                "{}: {} of its tensors are not this model's and are not used ({})",
                self.name,
                len(unused),
                first_few(unused),
            )
        for folder in self.adapters:
            _merge_adapter(model, folder)
        return model.to(device).eval()


def open_pretrained(name: str, base: str | None = None) -> Pretrained:
    """Find the folders of a model of another family.

    Args:
        name: Folder or hub id of a whole model, or of a LoRA on one.
        base: What the LoRA is on; None takes what its adapter_config.json names.

    Raises:
        InputError: A folder is not there, or an adapter builds on itself.
    """
    pretrained = _find_folders(name, base)
    if base and not pretrained.adapters:
        raise InputError(f"{name}: it is a whole model; base is for adapters. Leave it out.")
    return pretrained


def _find_folders(name: str, base: str | None) -> Pretrained:
    folder = local_folder(name)
    above: list[Path] = []
    while (folder / "adapter_config.json").is_file():
        if has_weights(folder):
            raise InputError(f"{folder}: it holds an adapter and a whole model. Move one of them to another folder.")
        if folder.resolve() in above:
            raise InputError(f"{name}: it builds on itself. Pass base with what it was trained on.")
        above.append(folder.resolve())
        folder, base = _base_of(folder, base), None
    return Pretrained(name, folder, tuple(reversed(above)))


def _base_of(adapter: Path, given: str | None) -> Path:
    """Return the folder of what an adapter was trained on."""
    settings = read_json(adapter / "adapter_config.json")
    named = given or settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InputError(f"{adapter}: adapter_config.json names no base model. Pass base with a folder or hub id.")
    revision = None if given else settings.get("revision")
    try:
        return find_folder(named, [adapter]) or local_folder(named, revision if isinstance(revision, str) else None)
    except InputError as error:
        raise InputError(f"{adapter}: its base is not to be had ({error}) Or pass base with its folder.") from error


def is_generic(name: str, base: str | None = None) -> bool:
    """Return whether `name` is an image-text model of transformers, or a LoRA on one, that `checkpoint` cannot read.

    Raises:
        InputError: There is neither a folder nor a hub copy, or the model needs code of its own.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    try:
        folder = _find_folders(name, base).base
    except InputError:
        if (local_folder(name) / "adapter_config.json").is_file():
            return False  # network.checkpoint reads more kinds of adapters, and says what is wrong
        raise
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in KNOWN:
        return kind not in OURS
    if kind in OURS or not isinstance(kind, str):
        return False
    # LLaVA's original layout has a type that transformers does not know either; `network.checkpoint` reads it
    flat = isinstance(config.get("hidden_size"), int)
    if flat and re.search("llama|mistral", str(config.get("architectures")), re.IGNORECASE):
        return False
    if config.get("auto_map"):
        raise _own_code(name, f"model_type {kind} is code in the folder (auto_map in config.json)")
    if kind not in CONFIG_MAPPING_NAMES:
        raise _own_code(name, f"transformers does not know model_type {kind}")
    return False


def _own_code(name: str, why: str) -> InputError:
    return InputError(
        f"{name}: {why}, and code that comes with a model is not run here. Serve it (vllm serve {name} "
        "--trust-remote-code) and pass --model_args backend=openai_server,base_url=http://127.0.0.1:8000/v1."
    )


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what transformers raises about a model into one line.

    Raises:
        InputError: The files are broken, or need a package that is not there, or code of their own.
    """
    with refused(name, "transformers cannot load it"):
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" in str(error) or "does not recognize this architecture" in str(error):
                raise _own_code(name, "its files name code of their own") from error
            raise


def _has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


# --- adapters ---------------------------------------------------------------------------------------------------------


def _merge_adapter(model: Any, folder: Path) -> None:
    """Merge the LoRA in `folder` into a model's weights.

    Every tensor of its file must belong to a layer that its configuration targets, and every targeted layer must be in
    the file. Names are those of any release of transformers: its own loader's rules bring them to the model's.

    Raises:
        InputError: It is no plain LoRA, or file, configuration and network do not fit together.
    """
    file = adapter_file(folder)
    parameters = dict(model.named_parameters())
    rename = _renaming(model)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    network = Network(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        dict(model.named_modules()),
        bool(model.config.get_text_config().tie_word_embeddings or model.config.tie_word_embeddings),
        f"{embedding}.weight",
    )
    with WeightFile(file) as weights:
        naming = _written_naming(list(weights.entries), rename)
        whole = {key: rename(key) for key in weights.entries if ".lora_" not in key}
    updates = read_updates(Adapter(folder, file, rename, "both", naming), network, strays_are_copies=False)
    _check_updates(folder, updates, whole, network)
    with torch.no_grad(), WeightFile(file) as weights:
        for key, name in whole.items():  # of modules_to_save
            parameters[name].copy_(weights.get(key))  # type: ignore[index]  # its name has been checked
        for name, delta in updates.deltas.items():
            parameters[name].copy_(merged(parameters[name], [delta]))


def _check_updates(folder: Path, updates: Updates, whole: Mapping[str, str | None], network: Network) -> None:
    """Check that an adapter's file holds what its configuration says, and nothing else."""
    strangers = [key for key, name in whole.items() if name not in network.shapes]
    problems = (
        ("of no layer that adapter_config.json targets", [*updates.left_over, *strangers]),
        ("of another shape", updates.wrong),
        ("targeted by adapter_config.json and without lora_A and lora_B in its file", updates.lacking),
    )
    said = [f"{len(names)} {what} ({first_few(names)})" for what, names in problems if names]
    if said:
        raise InputError(
            f"{folder}: the adapter does not fit its base: {'; '.join(said)}. Pass the base that it was trained on "
            "(base=), or copy the adapter again."
        )


def _renaming(model: Any) -> Callable[[str], str | None]:
    """Return what brings a key of an adapter's file, of any release, to the name of one of the model's parameters."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: Any = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    names = {name: None for name, _ in model.named_parameters()}

    def rename(key: str) -> str | None:
        key = key.removeprefix(PREFIX)
        if key in names:
            return key
        renamed: str = rename_source_key(key, renamings, converters, model.base_model_prefix, names)[0]
        return renamed if renamed in names else None

    return rename


def _written_naming(keys: Sequence[str], rename: Callable[[str], str | None]) -> Callable[[str], str]:
    """Return what brings a module's name in the model to its name in the release that wrote an adapter's file.

    Layers are called alike in both but for their beginning: `model.layers.0.mlp.up_proj` of transformers 4.51 is
    `model.language_model.layers.0.mlp.up_proj` today. The keys show which beginning became which.
    """
    beginnings: dict[str, str] = {}  # of today -> in the file
    for key in keys:
        layer = key.removeprefix(PREFIX)
        layer = re.sub(r"\.(lora_[AB]\.weight|lora_embedding_[AB]|(base_layer\.)?weight)$", "", layer)
        written, name = layer.split("."), (rename(f"{layer}.weight") or "").removesuffix(".weight").split(".")
        whole = ".".join(name), ".".join(written)
        while written and name and written[-1] == name[-1]:
            written.pop()
            name.pop()
        if whole[0] and written != name:
            today, then = (".".join(name), ".".join(written)) if name else whole  # the head has no beginning today
            beginnings[today] = then
    if "model.language_model" in beginnings:  # then, all other parts were at the top: `visual`, `vision_tower`, ...
        beginnings.setdefault("model", "")

    def naming(module: str) -> str:
        fitting = [today for today in beginnings if module == today or module.startswith(f"{today}.")]
        if not fitting:
            return module
        today = max(fitting, key=len)
        return f"{beginnings[today]}{module[len(today) :]}".removeprefix(".")

    return naming
