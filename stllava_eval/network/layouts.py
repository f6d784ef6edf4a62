"""Read the weights of a checkpoint in any published layout under the network's own names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stllava_eval.errors import InputError
from stllava_eval.hub import PROJECTOR_FILES, local_folder, read_json, refuse_no_checkpoint
from stllava_eval.network.files import (
    WeightFile,
    first_few,
    has_weights,
    located,
    weight_files,
)
from stllava_eval.network.lora import PREFIX, Adapter, Delta, Network, adapter_file, read_updates

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
        """Return a clause for each kind of fault; an empty list for a checkpoint that can be used."""
        kinds = (
            ("missing", self.missing),
            ("left over", self.left_over),
            ("of the wrong shape or type", self.wrong),
            ("targeted by adapter_config.json and without lora_A and lora_B in its file", self.lacking),
        )
        return [f"{len(names)} {kind} ({first_few(names)})" for kind, names in kinds if names]


@dataclass(frozen=True)
class Start:
    """What an adapter was trained on, `start` in its run.json, and the base and tower that it is loaded on now."""

    folder: Path
    known: Mapping[str, Any]
    base: Path
    tower: Path | None
    transformers: Any  # the version that `known` was written with


@dataclass
class Draft:
    """What the layouts are read into, before it is checked."""

    source: Path
    layout: str
    raw: dict[str, Any]  # config.json: flat in the original layouts, transformers' in the others
    weights: list[tuple[Path, Callable[[str], str | None]]] = field(default_factory=list)  # later ones replace
    adapters: list[Adapter] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)  # where tokenizer and preprocessor are looked for, in order
    vision: Path | None = None  # folder of the vision tower, if it is not in the weights
    starts: list[Start] = field(default_factory=list)  # of the adapters that `stllava-train` has trained

    def add_adapter(self, folder: Path, rename: Callable[[str], str | None], part: str) -> None:
        """Add a LoRA, and whatever whole tensors are in its file."""
        file = adapter_file(folder)
        if any(file.samefile(adapter.file) for adapter in self.adapters):
            raise InputError(f"{folder}: this LoRA is given twice. Leave one of them out.")
        self.adapters.append(Adapter(folder, file, rename, part))

        def whole(key: str) -> str | None:  # of a layer with a LoRA, PEFT saves a vocabulary's own weight as base_layer
            return SAVED_ELSEWHERE if ".lora_" in key else rename(key.replace(".base_layer.", "."))

        self.weights.append((file, whole))

    def add_settings(self, raw: Mapping[str, Any]) -> None:
        """Take what a later stage's config.json says about images; shapes are the base's."""
        self.raw = self.raw | {name: value for name, value in raw.items() if name.startswith(("mm_", "image_"))}

    @property
    def original(self) -> bool:
        """Whether the checkpoint has the layout of the original LLaVA code."""
        return self.layout.endswith("original")

    @property
    def ours(self) -> bool:
        """Whether the checkpoint has our own layout."""
        return self.layout.endswith("stllava-med")


def read_layout(
    folder: Path, source: str, base: str | None = None, vision_tower: str | None = None, above: Sequence[Path] = ()
) -> Draft:
    """Return the parts of the checkpoint in `folder`, in whatever layout; `above`: the folders that build on it."""
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
            draft = Draft(folder, "stllava-med", raw, [(file, _same) for file in weight_files(folder)])
        elif "LlavaForConditionalGeneration" in architectures or isinstance(raw.get("text_config"), dict):
            if raw.get("model_type") != "llava":
                raise InputError(
                    f"{source}: architecture {named} cannot be loaded. "
                    "See docs/evaluate/checkpoints.md for those that can."
                )
            draft = Draft(folder, "llava-hf", raw, [(file, _llava_hf_name) for file in weight_files(folder)])
        elif isinstance(raw.get("hidden_size"), int) and re.search("llama|mistral", named, re.IGNORECASE):
            draft = _read_flat(folder, raw, base, above)
        else:
            raise InputError(
                f"{source}: architecture {named} cannot be loaded. See docs/evaluate/checkpoints.md for those that can."
            )
        draft.folders.insert(0, folder)
        if base and draft.source == folder:
            raise InputError(f"{source}: it is a whole model; base is for adapters and projectors. Leave it out.")
    if vision_tower:
        draft.vision = local_folder(vision_tower)
        draft.weights += [(file, _vision_name) for file in weight_files(draft.vision)]
    return draft


def _read_flat(folder: Path, raw: dict[str, Any], base: str | None, above: Sequence[Path]) -> Draft:
    """Read the original layout: a flat config.json, `model.mm_projector` and perhaps the tower in the weights."""
    projector = next((folder / name for name in PROJECTOR_FILES if (folder / name).is_file()), None)
    if projector is not None and not has_weights(folder):  # projector pre-training: the rest is the base's
        named = base or raw.get("_name_or_path")
        draft = read_layout(located(named, [folder], "base"), str(named), above=above)
        draft.add_settings(raw)
        draft.layout = f"projector on {draft.layout}"
        draft.weights.append((projector, projector_name))
        return draft
    draft = Draft(folder, "original", raw, [(file, flat_name) for file in weight_files(folder)])
    if projector is not None:  # a projector in the weights wins, as in LLaVA's own loader
        draft.weights.insert(0, (projector, projector_name))
    return draft


def _read_adapter(folder: Path, base: str | None, above: Sequence[Path]) -> Draft:
    """Read a PEFT folder, ours or the authors' LoRA stage, on the checkpoint that it names."""
    settings = read_json(folder / "adapter_config.json")
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder  # one that a run resumes from
    manifest = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    start: Any = manifest.get("start")
    named = base or settings.get("base_model_name_or_path")
    if named is None and isinstance(start, dict):
        named = start.get("name")
    base_folder = located(named, [folder], "base", None if base else settings.get("revision"))
    draft = read_layout(base_folder, str(named), above=above)
    if isinstance(start, dict):
        if tower := start.get("vision_tower"):
            draft.vision = located(tower, [folder], "vision-tower")
            draft.weights += [(file, _vision_name) for file in weight_files(draft.vision)]
        if isinstance(start.get("sha256"), str):
            versions = manifest.get("versions")
            version = versions.get("transformers") if isinstance(versions, dict) else None
            draft.starts.append(Start(folder, start, base_folder, draft.vision if tower else None, version))
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
    draft.add_adapter(folder, flat_name, "language")
    draft.weights += [(file, flat_name) for file in whole]
    draft.layout = f"authors' LoRA stage on {draft.layout}"
    if (folder / "config.json").is_file():
        draft.add_settings(read_json(folder / "config.json"))
        if not whole:  # LLaVA's training writes both, and its loader looks for this one too
            raise InputError(
                f"{folder}: no non_lora_trainables.bin, the projector that the LoRA was trained with. Copy it too."
            )
    if (folder / "Vit-lora").is_dir():
        draft.add_adapter(folder / "Vit-lora", flat_name, "vision")
    return draft


def tensors_by_name(draft: Draft, audit: Audit) -> dict[str, tuple[Path, str, tuple[int, ...], torch.dtype]]:
    """Return file, key, shape and dtype of every tensor by the network's name; later files replace earlier ones."""
    tensors: dict[str, tuple[Path, str, tuple[int, ...], torch.dtype]] = {}
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
                old_file, old_key, *_ = tensors.pop(name, (None, None))  # so that it is read where the later file is
                if old_file == file:
                    audit.left_over.append(f"{file.name}: {key} and {old_key} are both {name}")
                elif old_file is not None:
                    audit.dropped.setdefault(f"replaced by {file.name}", []).append(f"{old_file.name}: {old_key}")
                tensors[name] = (file, key, shape, dtype)
    return tensors


def mixed_sources(draft: Draft, tensors: Mapping[str, tuple]) -> list[str]:
    """Return the tensors that the last source of the vision tower or of the projector lacks, and an earlier one has.

    One half of the part would be of one training and the other half of another. Whole tensors in an adapter's file are
    no such source: PEFT replaces them one by one.
    """
    adapters = {adapter.file for adapter in draft.adapters}
    sources = {file: (file.parent, rename) for file, rename in draft.weights if file not in adapters}
    order = list(sources.values())
    lacking = []
    for part in ("model.vision_tower.", "model.multi_modal_projector."):
        file_of = {name: file for name, (file, *_) in tensors.items() if name.startswith(part) and file in sources}
        last = max(file_of.values(), key=lambda file: order.index(sources[file]), default=None)
        if last is not None:
            lacking += [f"{last.name}: {name}" for name, file in file_of.items() if sources[file] != sources[last]]
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
VOCABULARY_ROWS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def weight_updates(draft: Draft, network: Network, sources: Mapping[str, Path], audit: Audit) -> dict[str, list[Delta]]:
    """Return the updates of every adapter, by weight; an adapter's whole tensors have been taken as weights before.

    A weight that a later stage saved whole, in the file of `sources`, has the updates of the earlier ones in it. Only
    the vision tower's own folder is no later stage, wherever it was named.
    """
    deltas: dict[str, list[Delta]] = {}
    order = {file: index for index, (file, rename) in enumerate(draft.weights) if rename is not _vision_name}
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
    """Return the network's name of a key in our own layout."""
    return key if key.startswith(("model.", "lm_head.")) else None


def flat_name(key: str) -> str | None:
    """Return the network's name of a key in the original layout, with or without PEFT's prefix."""
    key = key.removeprefix("base_model.model.").removeprefix("base_model.")
    while key.startswith("model.model."):
        key = key.removeprefix("model.")
    if "mm_projector." in key:
        return projector_name(key)
    if match := re.fullmatch(r"(?:model\.)?(?:vision_tower\.)+vision_model\.(.+)", key):
        return f"model.vision_tower.{match[1]}"
    if match := re.fullmatch(r"model\.((?:embed_tokens|layers|norm)\..+)", key):
        return f"model.language_model.{match[1]}"
    return key if key == "lm_head.weight" else None


def projector_name(key: str) -> str | None:
    """Return the network's name of a projector's key; as in LLaVA's loader, what follows `mm_projector.` decides."""
    part = key.rpartition("mm_projector.")[2]
    for stem, module in (PROTOTYPE_PARTS | MLP_PARTS).items():
        if part == stem or part in (f"{stem}.weight", f"{stem}.bias"):
            return f"model.multi_modal_projector.{module}{part.removeprefix(stem)}"
    return None


def _vision_name(key: str) -> str | None:
    """Return the network's name of a key in a CLIP vision tower's folder, of transformers 4 or 5."""
    key = key.removeprefix("vision_tower.").removeprefix("vision_model.")
    return f"model.vision_tower.{key}" if re.match(r"(embeddings|pre_layrnorm|encoder|post_layernorm)\.", key) else None


def _llava_hf_name(key: str) -> str | None:
    """Return the network's name of a key of transformers' LLaVA, in the layout of its hub copies or of its memory."""
    for pattern, template in (
        (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", "model.vision_tower.{}"),
        (r"(?:model\.)?multi_modal_projector\.(.+)", "model.multi_modal_projector.{}"),
        (r"(?:language_model\.)?(lm_head\..+)", "{}"),
        (r"language_model\.model\.(.+)", "model.language_model.{}"),
        (r"model\.language_model\.(.+)", "model.language_model.{}"),
        (r"language_model\.((?:layers|embed_tokens|norm)\..+)", "model.language_model.{}"),  # of the body alone
    ):
        if match := re.fullmatch(pattern, key):
            return template.format(match[1])
    return None


def _adapter_name(key: str) -> str | None:
    """Return the network's name of a PEFT key of it or of transformers' LLaVA, which changed with 4.52 and with 5."""
    return _llava_hf_name(key.removeprefix(PREFIX))


def _droppable(key: str, rename: Callable[[str], str | None]) -> str | None:
    if rename is _vision_name and re.fullmatch(CLIP_TEXT, key):
        return "CLIP's text side"
    return next((reason for pattern, reason in DROPPABLE if re.fullmatch(pattern, key)), None)


def add_vision_tower(draft: Draft) -> None:
    """Add the tower that config.json names, if the weights hold no tower and none was given."""
    if draft.vision is not None:
        return
    for file, rename in draft.weights:
        with WeightFile(file) as weights:
            if any((rename(key) or "").startswith("model.vision_tower.") for key in weights.entries):
                return
    named = draft.raw.get("mm_vision_tower")
    draft.vision = located(named, draft.folders, "vision-tower")
    draft.weights += [(file, _vision_name) for file in weight_files(draft.vision)]
