"""Check files of training data in one call, whatever they hold: conversations, or one file of preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from stllava_eval.errors import InputError
from stllava_eval.network.checkpoint import open_checkpoint
from stllava_train.data.check import MAX_TOKENS, Found, problems
from stllava_train.data.encoding import Encoder
from stllava_train.preferences.check_pairs import is_pairs, pair_problems
from stllava_train.preferences.pair_layouts import refuse_other_pairs


def check_files(
    files: Sequence[Path],
    images: Path | None = None,
    checkpoint: str | None = None,
    max_tokens: int = MAX_TOKENS,
    *,
    conversations_only: bool = False,
    progress: bool = True,
    report: Callable[[str], object] = lambda line: None,
) -> list[Found]:
    """List every problem of files of conversations, or of one file of pairs; return them sorted by file and line.

    Args:
        files: JSON or JSONL files of conversations, or one file that `build_pairs` wrote.
        images: Folder that images are relative to (default: that of each file).
        checkpoint: Folder or hub id of the model whose tokenizer counts tokens (default: lengths are not checked).
        max_tokens: Tokens of the longest record, its image's included.
        conversations_only: Whether pairs are refused; `write_sound` writes conversations alone.
        progress: Whether to show bars on stderr.
        report: Receives one line that says how many records were read.

    Raises:
        InputError: A file cannot be read, it has another tool's layout, or it holds pairs and is one of several files
            or `conversations_only`.
    """
    encoder = _encoder(checkpoint) if checkpoint else None
    for file in files:
        refuse_other_pairs(file)
    of_pairs = [file for file in files if is_pairs(file)]
    if of_pairs and (len(files) > 1 or conversations_only):
        raise InputError(f"{of_pairs[0]}: it holds pairs. Check it by itself, without --write.")
    if of_pairs:
        return pair_problems(files[0], images, encoder, max_tokens, progress, report)
    return problems(files, images, encoder, max_tokens, progress, report)


def _encoder(checkpoint: str) -> Encoder:
    """Return the checkpoint's encoder with the template of the authors' stage 1, the longer one, where it has it."""
    opened = open_checkpoint(checkpoint)
    processor = opened.processor()
    template = "v1_sq" if "v1_sq" in (processor.chat_template or ()) else "v1"
    return Encoder(processor, template, opened.config.image_seq_length)
