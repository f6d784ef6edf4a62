"""Read what a PEFT folder's LoRA adds to which weight of the network, and account for every layer that it targets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stllava_eval.errors import InputError
from stllava_eval.hub import read_json
from stllava_eval.network.files import WEIGHT_DTYPES, WeightFile, refused

PREFIX = "base_model.model."  # of every key of a PEFT model
HEAD = "lm_head"
# settings of adapter_config.json that do not change what a LoRA adds to a weight, or that are read here
PLAIN_LORA = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
    "fan_in_fan_out",  # of a Linear or an Embedding PEFT takes no notice of it
}
MERGE_BY_HAND = "Only plain LoRA is merged here. Merge it with PEFT (merge_and_unload) and pass the whole model."


@dataclass(frozen=True)
class Delta:
    """A LoRA update of one weight: weight += scale * B @ A; of an embedding, whose A and B are transposed, A' @ B'."""

    file: Path
    key_a: str
    key_b: str
    scale: float
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """A LoRA: its folder, its file, how its keys are named, and what it is of.

    Attributes:
        folder: Holds adapter_config.json.
        file: Holds the tensors.
        rename: Brings a key of the file, without `PREFIX` or with it, to a weight's name in the network.
        part: `language`, `vision` or `both`.
        naming: Brings a module's name in the network to the one that the configuration's patterns are about; None for
            LLaVA's networks, whose releases are known here.
    """

    folder: Path
    file: Path
    rename: Callable[[str], str | None]
    part: str
    naming: Callable[[str], str] | None = None


@dataclass(frozen=True)
class Network:
    """What an adapter is compared with.

    Attributes:
        shapes: Of every weight that a LoRA may change, by name; as the base's file has them, padded rows and all.
        modules: Every module by name.
        tied: Whether embedding and head are one weight.
        embedding: Name of the embedding's weight.
    """

    shapes: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, nn.Module]
    tied: bool
    embedding: str = "model.language_model.embed_tokens.weight"


@dataclass
class Updates:
    """What one adapter's file comes to; the lists are of names for a message.

    Attributes:
        deltas: By the name of the weight.
        strays: Copies of the vision tower's own LoRA, which are left out.
        left_over: Keys that belong to no weight, or to a layer that the configuration does not target.
        wrong: Pairs of a wrong shape or type.
        lacking: Layers that the configuration targets and the file has no pair for.
    """

    deltas: dict[str, Delta] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Pair:
    """The LoRA of one layer: its name in the file and in the network, the keys of A and B, as far as they are there."""

    stem: str
    name: str
    keys: Mapping[str, str]
    embedding: bool


def merged(weight: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """Add the updates to `weight` in float32; the result is in weight's dtype.

    A weight whose padded rows have been left out takes the rows of the update that it has.
    """
    if not deltas:
        return weight
    wide = weight.to(torch.float32, copy=True)
    for delta in deltas:
        with WeightFile(delta.file) as adapter:  # what is read of a file stays in memory until it is closed
            # (rank, inputs) and (outputs, rank); of an embedding (rank, tokens) and (width, rank)
            a, b = (adapter.get(key).float() for key in (delta.key_a, delta.key_b))
            if delta.embedding:
                a, b = b.T, a.T
            # W += scale * B A (Hu et al., arXiv:2106.09685, eq. 3), over the rows that W has
            wide.addmm_(b[: len(wide)], a, alpha=delta.scale)
    return wide.to(weight.dtype)


def read_updates(adapter: Adapter, network: Network, strays_are_copies: bool) -> Updates:
    """Compare an adapter's file with its configuration and with the network; reads headers, no weights.

    Args:
        adapter: What is read.
        network: What it changes.
        strays_are_copies: The tower has a LoRA of its own, whose copies in the language model's file are left out.

    Raises:
        InputError: It is no plain LoRA, it does not say what it targets, or its file holds no tensors.
    """
    settings = read_settings(adapter.folder)
    updates = Updates()
    with WeightFile(adapter.file) as weights:
        if not weights.entries:
            raise InputError(f"{adapter.file}: an adapter without tensors. Copy it again.")
        pairs, updates.left_over = _pairs(adapter, weights.entries)
        if network.tied:
            _check_tied(adapter, network, pairs, weights.entries)
        naming = _naming(adapter, network, settings.given, pairs, weights.entries)
        _check_whole_tensors(adapter, network, naming, settings.given, weights.entries)
        targeted = _targeted(adapter, network, naming, settings.given)
        known: set[str] = set()
        for pair in pairs:
            layer = pair.name.removesuffix(".weight")
            keys = [f"{adapter.file.name}: {key}" for key in pair.keys.values()]
            stray = adapter.part == "language" and "vision_tower." in pair.stem
            if (
                stray and strays_are_copies
            ):  # saved there by accident, with a rank that adapter_config.json does not know
                updates.strays += keys
            elif stray or layer not in targeted or pair.name in known or pair.name not in network.shapes:
                updates.left_over += keys
            elif len(pair.keys) == 2:
                known.add(pair.name)
                _add_delta(
                    updates, adapter, pair, network.shapes[pair.name], weights.entries, settings.of(naming(layer))
                )
        for key in weights.entries:  # PEFT passes over a weight under the name that it has without a LoRA, or with one
            name = adapter.rename(key.replace(".base_layer.", "."))
            if ".lora_" not in key and (".base_layer." in key) != (name in known):
                updates.left_over.append(f"{adapter.file.name}: {key}")
    lacking = [layer for layer in targeted if f"{layer}.weight" not in known]
    updates.lacking = [f"{adapter.file.name}: {layer}" for layer in lacking]
    return updates


def _check_tied(adapter: Adapter, network: Network, pairs: Sequence[_Pair], keys: Iterable[str]) -> None:
    """Refuse what is of one of two weights that are one in the base: PEFT changes the one, a merged weight is both."""
    vocabulary = {network.embedding, f"{HEAD}.weight"}
    changed = vocabulary & {pair.name for pair in pairs}
    whole = vocabulary & {adapter.rename(key) for key in keys if ".lora_" not in key}
    if changed or len(whole) == 1:
        raise InputError(
            f"{adapter.folder}: it changes {min(changed or whole)}, and the base's config.json ties embedding and head "
            "(tie_word_embeddings): merged, it would change both. Merge it with PEFT into an untied copy of the base "
            "and pass that."
        )


def _pairs(adapter: Adapter, keys: Iterable[str]) -> tuple[list[_Pair], list[str]]:
    """Return the layers of a file, and the keys of a LoRA that belong to none."""
    sides_of_layers: dict[tuple[str, bool], dict[str, str]] = {}
    left_over = []
    for key in keys:
        if match := re.fullmatch(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))", key):
            sides_of_layers.setdefault((match[1], match[2] is None), {})[match[2] or match[3]] = key
        elif ".lora_" in key:
            left_over.append(f"{adapter.file.name}: {key}")
    pairs = [
        _Pair(stem, adapter.rename(f"{stem}.weight") or "", keys_of_sides, embedding)
        for (stem, embedding), keys_of_sides in sides_of_layers.items()
    ]
    return pairs, left_over


def _add_delta(
    updates: Updates,
    adapter: Adapter,
    pair: _Pair,
    shape: tuple[int, ...],
    entries: Mapping[str, Any],
    rank_and_scale: tuple[int, float],
) -> None:
    (a, type_a), (b, type_b) = (entries[pair.keys[side]] for side in "AB")
    rank, scale = rank_and_scale
    sound = len(a) == len(b) == 2 and {type_a, type_b} <= set(WEIGHT_DTYPES)
    changed = (a[1:], b[:1]) if pair.embedding else (b[:1], a[1:])
    if not sound or changed[0] + changed[1] != shape or not a[0] == b[1] == rank:
        updates.wrong.append(
            f"{adapter.file.name}: {pair.stem} is {list(b)} x {list(a)} ({type_a}), not rank {rank} on {list(shape)}"
        )
        return
    updates.deltas[pair.name] = Delta(adapter.file, pair.keys["A"], pair.keys["B"], scale, pair.embedding)


# --- which layers a configuration targets -----------------------------------------------------------------------------


Naming = Callable[[str], str]  # a module's name in the network -> in the model that the adapter was trained on


def _naming(
    adapter: Adapter, network: Network, given: Mapping[str, Any], pairs: Sequence[_Pair], keys: Iterable[str]
) -> Naming:
    """Return the names that the configuration's patterns are of: those of the file, unless only the network's fit."""
    written = adapter.naming or _written_names(adapter, given, [key.removeprefix(PREFIX) for key in keys])
    held = {pair.name.removesuffix(".weight") for pair in pairs if pair.name in network.shapes}
    fits = held <= _targeted(adapter, network, written, given).keys()
    return str if not fits and held <= _targeted(adapter, network, str, given).keys() else written


def _written_names(adapter: Adapter, given: Mapping[str, Any], keys: Sequence[str]) -> Naming:
    """Return the names of modules in the transformers that wrote these keys.

    transformers before 4.52 has `language_model.model.layers`, 4.52 to 4.57 `model.language_model.layers`, both with
    `vision_model.` in the tower; 5 has the network's own. LLaVA's original code has `model.layers`.
    """
    patterns = f"{given.get('target_modules')} {given.get('exclude_modules')}"
    of_tower = any("vision_tower.vision_model." in key for key in keys) or "vision_model" in patterns
    inner = "vision_model." if of_tower else ""
    if adapter.part != "both":
        renamings = [(r"model\.language_model\b", "model"), (r"model\.vision_tower\.", "vision_tower.vision_model.")]
        renamings.append((r"model\.multi_modal_projector\b", "model.mm_projector"))
    elif any(
        re.match(r"language_model\.(layers|embed_tokens|norm)\.", key) for key in keys
    ):  # the network's body alone
        renamings = [(r"model\.vision_tower\.", f"vision_tower.{inner}"), (r"model\.(?=language_model|multi_)", "")]
    elif any(re.match(r"language_model\.|vision_tower\.|multi_modal_projector\.", key) for key in keys):
        renamings = [(r"model\.language_model\b", "language_model.model"), (r"lm_head", "language_model.lm_head")]
        renamings += [(r"model\.vision_tower\.", "vision_tower.vision_model."), (r"model\.(?=multi_)", "")]
    else:
        renamings = [(r"model\.vision_tower\.", f"model.vision_tower.{inner}")]

    def name(module: str) -> str:
        for pattern, written in renamings:
            if re.match(pattern, module):
                return re.sub(rf"^{pattern}", written, module)
        return module

    return name


def _targeted(adapter: Adapter, network: Network, naming: Naming, given: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the layers that PEFT gives a LoRA, by their name in the network, by PEFT's own rule.

    Raises:
        InputError: The configuration does not say, or a pattern in it cannot be used.
    """
    from peft.tuners.tuners_utils import check_target_module_exists  # heavy, and of use to adapters only

    parts = {"language": r"model\.language_model\.|lm_head$", "vision": r"model\.vision_tower\.", "both": ""}
    layers = {
        name: module
        for name, module in network.modules.items()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) and re.match(parts[adapter.part], name)
    }
    targets = given.get("target_modules")
    location = adapter.folder / "adapter_config.json"
    if not targets:
        raise InputError(
            f"{location}: target_modules is {targets!r}: it does not say which layers have a LoRA, so a lost one could "
            "not be noticed. Copy it again."
        )
    if isinstance(targets, str) and targets.lower() == "all-linear":  # the head is no target of this word
        targets = [naming(name) for name, module in layers.items() if isinstance(module, nn.Linear) and name != HEAD]
    rule = SimpleNamespace(
        target_modules=targets,
        target_parameters=None,
        **{name: given.get(name) for name in ("exclude_modules", "modules_to_save", "layers_to_transform")},
        layers_pattern=given.get("layers_pattern"),
    )
    with refused(location, "target_modules, exclude_modules or layers_to_transform is not usable"):
        return {name: module for name, module in layers.items() if check_target_module_exists(rule, naming(name))}


def _check_whole_tensors(
    adapter: Adapter, network: Network, naming: Naming, given: Mapping[str, Any], keys: Iterable[str]
) -> None:
    """Check that every module that is said to be saved whole is in the file, with all its tensors."""
    whole = [key for key in keys if ".lora_" not in key]
    saved = {adapter.rename(key.replace(".base_layer.", ".")) for key in whole}
    for wanted in given.get("modules_to_save") or []:
        if not any(f".{wanted}." in f".{key}" for key in whole):
            raise InputError(
                f"{adapter.folder}: modules_to_save names {wanted}, which is not in its file. Copy it again."
            )
        for name, module in network.modules.items():
            if not name or not naming(name).endswith(wanted):  # as PEFT looks for them
                continue
            lost = [f"{name}.{leaf}" for leaf in module.state_dict() if f"{name}.{leaf}" not in saved]
            if lost:
                raise InputError(
                    f"{adapter.folder}: modules_to_save names {wanted}, of which its file lacks {lost[0]}. Copy it "
                    "again."
                )


# --- adapter_config.json ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says: everything, and rank and scale of the LoRA of a module by its name."""

    given: Mapping[str, Any]
    of: Callable[[str], tuple[int, float]]


def read_settings(folder: Path) -> Settings:
    """Read the adapter_config.json of a plain LoRA.

    Raises:
        InputError: It is no plain LoRA, or a number in it is none.
    """
    from peft.utils.other import get_pattern_key  # heavy, and of use to adapters only

    file = folder / "adapter_config.json"
    given = read_json(file)
    plain: dict[str, tuple] = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "use_rslora": (True, False, None),
        "init_lora_weights": (True, False, None, "gaussian"),  # others change the base's weights as well
    }
    for name, allowed in plain.items():
        value = given.get(name)
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
            raise InputError(f"{file}: {name} is {value!r}. {MERGE_BY_HAND}")
    if changing := sorted(name for name, value in given.items() if value and name not in {*PLAIN_LORA, "bias"}):
        raise InputError(f"{file}: {changing[0]} is {given[changing[0]]!r}. {MERGE_BY_HAND}")
    modules = given.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise InputError(f"{file}: modules_to_save is {modules!r}, not a list of names. Copy it again.")

    def number(name: str, value: Any, kind: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 1e6:
            raise InputError(f"{file}: {name} is {value!r}, not a number above 0. Copy it again.")
        return value

    def of(module: str) -> tuple[int, float]:
        matches = []
        for default, pattern, kind in (("r", "rank_pattern", (int,)), ("lora_alpha", "alpha_pattern", (int, float))):
            patterns = given.get(pattern) or {}
            with refused(file, f"{pattern} is not usable"):
                if not isinstance(patterns, dict):
                    raise TypeError(f"{patterns!r} is no object")
                key = get_pattern_key(list(patterns), module)
                value = patterns[key] if key in patterns else given.get(default)
            matches.append(number(default, value, kind))
        rank, alpha = matches
        # alpha / r (LoRA, section 4.1), or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)
        return rank, alpha / (math.sqrt(rank) if given.get("use_rslora") else rank)

    return Settings(given, of)


def adapter_file(folder: Path) -> Path:
    """Return the file of the adapter in `folder`.

    Raises:
        InputError: There is none.
    """
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: an adapter without adapter_model.safetensors or adapter_model.bin. Copy it again.")
