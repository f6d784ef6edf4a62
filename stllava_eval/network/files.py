"""Open the weight files of a checkpoint without running code from them or reading all of them."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stllava_eval.errors import InputError, one_line
from stllava_eval.hub import find_folder, local_folder, read_json
from stllava_eval.storage import file_sha256


class WeightFile:
    """An opened file of weights: shapes and dtypes by key, tensors on demand. Code in a pickle never runs.

    Attributes:
        entries: Shape and dtype by key.
        get: The tensor of a key, read from the file now.

    Raises:
        InputError: On entering: the file is cut short, no file of weights, or a pickle with more than tensors in it.
    """

    get: Callable[[str], Tensor]

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> WeightFile:
        try:
            stored = self._open()
        except pickle.UnpicklingError as error:
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"code ({code[1]})" if code else "more than tensors"
            raise InputError(
                f"{self.file}: its pickle holds {what} and was not loaded. Ask for the weights as safetensors."
            ) from error
        except Exception as error:  # zip, torch and safetensors raise many kinds about a file that is cut short
            raise InputError(
                f"{self.file}: cannot be read ({one_line(error)}). It is cut short or holds no weights; copy it again."
            ) from error
        if stored is not None:
            tensors = isinstance(stored, dict) and all(
                isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided
                and value.device.type == "cpu"
                for key, value in stored.items()
            )  # fmt: skip
            if not tensors:
                raise InputError(f"{self.file}: not a table of named tensors. Copy it again.")
            self.get = stored.__getitem__
            self.entries = {key: (tuple(value.shape), value.dtype) for key, value in stored.items()}
        return self

    def _open(self) -> Any:
        """Return what a pickle holds; None for safetensors, which give their tensors one at a time."""
        if self.file.suffix != ".safetensors":
            self._safe: Any = None
            with warnings.catch_warnings():  # of pickle protocols, about files that are then refused
                warnings.simplefilter("ignore")
                return torch.load(self.file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.file))
        self._safe = safe_open(self.file, "pt")
        opened = self._safe.__enter__()
        self.get = opened.get_tensor
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        self.entries = {
            key: (tuple(part.get_shape()), SAFETENSORS_DTYPES.get(part.get_dtype(), torch.uint8))
            for key, part in slices.items()
        }
        return None

    def __exit__(self, *error: Any) -> None:
        if self._safe is not None:
            self._safe.__exit__(*error)
        del self.get


def cached_file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file, which is read again only if inode, size or time of the file changed."""
    status = file.stat()
    return _sha256(file, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _sha256(file: Path, *_: int) -> str:
    return file_sha256(file)


WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # others need scales
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def has_weights(folder: Path) -> bool:
    """Return whether the folder holds weights of a whole model, or a part of them."""
    return any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model, safetensors before pickles, every shard that the index names.

    Raises:
        InputError: There are none, or a shard is not there.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, whole = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file() and whole.is_file():  # transformers reads the one, other loaders the other
            raise InputError(f"{folder}: it holds {whole.name} and {index.name}. Move the one that is not meant away.")
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise InputError(f"{index}: no weight_map of names. Copy it again.")
            names = sorted(set(weight_map.values()))
            for name in names:
                if Path(name).name != name:
                    raise InputError(f"{index}: shard {name!r} is outside the folder. Use an index that stays inside.")
            if lost := [name for name in names if not (folder / name).is_file()]:
                raise InputError(
                    f"{folder}: {len(lost)} of {len(names)} shards are missing ({first_few(lost)}). Copy them too."
                )
            for name in names:  # a tensor that is also in another shard would be read from the wrong one
                with WeightFile(folder / name) as shard:
                    promised = {key for key, shard_name in weight_map.items() if shard_name == name}
                    if differing := sorted(promised ^ set(shard.entries)):
                        raise InputError(
                            f"{index}: {name} does not hold what it says ({first_few(differing)}). Copy it again."
                        )
            return [folder / name for name in names]
        if whole.is_file():
            return [whole]
    raise InputError(
        f"{folder}: no weights (model.safetensors, pytorch_model.bin or an index of shards). Copy them too."
    )


def located(named: Any, folders: Sequence[Path], part: str, revision: Any = None) -> Path:
    """Return the folder, or the hub's copy of `revision`, that a checkpoint in `folders` names as its `part`.

    Raises:
        InputError: It names none, or there is none.
    """
    words = part.replace("-", " ")
    key = part.replace("-", "_")
    how = f"--{part} to `stllava-eval convert`, or {key}= in --model_args"
    other = "; or write its place into adapter_config.json" if part == "base" else ""
    if not isinstance(named, str) or not named:
        raise InputError(f"{folders[0]}: it does not name its {words}. Pass {how}.")
    if folder := find_folder(named, folders):
        return folder
    try:
        return local_folder(named, revision if isinstance(revision, str) else None)
    except InputError as error:
        raise InputError(f"{folders[0]} names {named!r} as its {words}: {error} Or pass {how}{other}.") from error


@contextmanager
def refused(location: object, what: str) -> Iterator[None]:
    """Turn whatever a library raises about a broken file, or about a package that it misses, into one line.

    Raises:
        InputError: `location`: `what` (the library's reason).
    """
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        named = error.name if isinstance(error, ModuleNotFoundError) else None
        hint = re.search(r"pip install (?:-\S+ )*([\w.\[\]-]+)", str(error)) or re.search(r"`([\w.-]+)`", str(error))
        package = named.partition(".")[0] if named else hint[1] if hint else ""
        run = f"Run `pip install {package}`" if package else "Install what it names"
        raise InputError(f"{location}: a package that it needs is not installed ({one_line(error)}). {run}.") from error
    except Exception as error:  # their own classes of errors, dozens of them
        raise InputError(f"{location}: {what} ({one_line(error)}). Copy it again.") from error


def first_few(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names, with an ellipsis if there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
