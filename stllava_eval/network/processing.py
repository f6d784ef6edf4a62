"""Images + conversations -> pixels and token ids, as the authors' stack made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlavaProcessor, TokenizersBackend
from transformers.image_utils import is_pil_image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.tokenization_utils_base import BatchEncoding
from transformers.utils.generic import PaddingStrategy

from stllava_eval.errors import InputError
from stllava_eval.images import rgb

# conversation.py of the authors: template v1 (= vicuna_v1), and v1_sq, which has no space between its two parts
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_SQ = (
    f"{SYSTEM}Also, the artificial intelligence assistant is a curious virtual user. The virtual user asks complex "
    "questions that are relevant to the content in the image, for example, asking about background knowledge of the "
    "objects in the image, asking to discuss about events happening in the image, etc. Again, do not ask about "
    "uncertain details."
)
# A message's image comes first, on a line of its own, wherever its tag stood: `preprocess_multimodal` of the authors.
_CONTENT = """\
{%- macro content(message) -%}
  {%- if message['content'] is string and '<image>' in message['content'] -%}
    {{- ('<image>\\n' + message['content'].replace('<image>', '').strip()).strip() -}}
  {%- elif message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""
# What stands in generation marks is what a model learns: answers and, where a user's message says `ask`, its question
_TURNS = """\
{{- (bos_token or '') + SYSTEM_TEXT + ' ' -}}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' + content(message) + eos_token -}}{%- endgeneration -%}
  {%- elif message.get('ask') -%}
    {{- 'VUSER:' -}}{%- generation -%}{{- ' ' + content(message) + eos_token -}}{%- endgeneration -%}{{- ' ' -}}
  {%- else -%}
    {{- 'USER: ' + content(message) + ' ' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'VUSER:' if ask else 'ASSISTANT:' -}}{%- endif -%}
"""
# conv_mistral_instruct of LLaVA's conversation.py, which LLaVA-Med v1.5 is asked with
_MISTRAL_TURNS = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- ' ' + content(message) + ' ' + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- '[INST] ' + content(message) + ' [/INST]' -}}
  {%- endif -%}
{%- endfor -%}
"""


def _template(turns: str, system: str = "") -> str:
    return _CONTENT + turns.replace("SYSTEM_TEXT", '"' + system + '"')


V1, V1_SQ = _template(_TURNS, SYSTEM), _template(_TURNS, SYSTEM_SQ)
MISTRAL_INSTRUCT = _template(_MISTRAL_TURNS)


class StllavaMedImageProcessor(LlavaImageProcessorPil):
    """Images of any mode and size -> (images, 3, side, side) pixels, normalised as CLIP's.

    With `do_pad` (the default, and what training does) an image is first centred on a square of CLIP's mean colour, so
    that nothing of it is lost; without, the middle square is cut out, as most of the authors' evaluation scripts do.
    Resized with PIL: bit-exact to the authors' stack, which torchvision's resizing is not.
    """

    do_pad = True

    def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> np.ndarray:
        """Return the RGB array of a Pillow image by `stllava_eval.images.rgb`; of an array, as transformers does."""
        if is_pil_image(image):
            return np.array(rgb(image))
        return super().convert_to_rgb(image, input_data_format=input_data_format)


class StllavaMedTokenizer(TokenizersBackend):
    """LLaMA's SentencePiece tokenizer with the ids of transformers 4.31's slow class, which every original model saw.

    Each stretch of text between special tokens is encoded by itself, with SentencePiece's leading space. With
    `legacy=False` the space is taken off the first piece after an end token, unless the text itself starts with one.
    """

    @property
    def legacy(self) -> bool:
        """Return whether the space before a stretch of text after `</s>` stays; `legacy` of tokenizer_config.json."""
        return bool(self.init_kwargs.get("legacy", True))

    @classmethod
    def from_pieces(cls, ids: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> StllavaMedTokenizer:
        """Return the tokenizer of these pieces (see `read_pieces`), with `<image>` added behind them."""
        core = {token: number for token, number in ids.items() if token not in ("<image>", "<pad>")}
        backend = Tokenizer(models.BPE(core, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core["<s>"])]
        )
        return cls(
            tokenizer_object=backend,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<unk>",  # the authors' tokenizer.pad_token = tokenizer.unk_token
            extra_special_tokens={"image_token": "<image>"},
            clean_up_tokenization_spaces=False,
            **options,
        )

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, **options: Any
    ) -> BatchEncoding:
        if self.legacy:
            return super()._encode_plus(text, text_pair, **options)
        asked = {name: options.pop(name, None) for name in ("return_tensors", "return_offsets_mapping")}
        layout = ("padding_strategy", "max_length", "pad_to_multiple_of", "padding_side")
        layout_of = {name: options.pop(name) for name in layout if name in options}
        cut = options.pop("truncation_strategy", None)
        if getattr(cut, "value", cut) not in (None, False, "do_not_truncate"):
            raise ValueError("a tokenizer with legacy=False cannot truncate. Cut the ids yourself.")
        encoded = super()._encode_plus(text, text_pair, return_offsets_mapping=True, **options)
        batched = bool(encoded["input_ids"]) and isinstance(encoded["input_ids"][0], list)
        texts = text if batched else [text]
        columns = {name: list(rows) if batched else [rows] for name, rows in encoded.items()}
        for index, row_text in enumerate(texts):
            row = self._without_space({name: rows[index] for name, rows in columns.items()}, row_text)
            for name, values in row.items():
                columns[name][index] = values
        if not asked["return_offsets_mapping"]:
            del columns["offset_mapping"]
        result = {name: rows if batched else rows[0] for name, rows in columns.items()}
        strategy = layout_of.pop("padding_strategy", PaddingStrategy.DO_NOT_PAD)
        if not batched and asked["return_tensors"]:
            result = {name: [row] for name, row in result.items()}
        return self.pad(result, padding=strategy, return_tensors=asked["return_tensors"], **layout_of)

    def _without_space(self, row: dict[str, list], text: str) -> dict[str, list]:
        """Return `row` with the leading space taken off each first piece after an end token."""
        keep, ids = [], list(row["input_ids"])
        for position, (token, (start, _)) in enumerate(zip(row["input_ids"], row["offset_mapping"], strict=True)):
            piece = str(self.convert_ids_to_tokens(token))
            after_end = position > 0 and row["input_ids"][position - 1] == self.eos_token_id
            if after_end and piece.startswith("▁") and text[start : start + 1] != " ":
                if piece == "▁":
                    continue
                ids[position] = self.convert_tokens_to_ids(piece[1:])
            keep.append(position)
        row["input_ids"] = ids
        return {name: [values[position] for position in keep] for name, values in row.items()}


def read_pieces(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    """Read pieces and merges of a tokenizer of LLaMA's kind (BPE with byte fallback); None if it is of another kind.

    From `tokenizer.model`, else from `tokenizer.json`, whose normalisation differs between versions and is not used.
    """
    if (folder / "tokenizer.model").is_file():
        # the sentencepiece package's own reader needs a newer protobuf than lmms-eval installs
        from transformers.utils import sentencepiece_model_pb2_new as proto

        model: Any = proto.ModelProto()  # type: ignore[attr-defined]
        try:
            model.ParseFromString((folder / "tokenizer.model").read_bytes())
        except Exception as error:  # protobuf's own class
            raise InputError(f"{folder / 'tokenizer.model'}: no SentencePiece model. Copy it again.") from error
        if model.trainer_spec.model_type != 2 or not model.trainer_spec.byte_fallback:
            return None
        return {piece.piece: number for number, piece in enumerate(model.pieces)}, _merges(model.pieces)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        return None
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return model["vocab"], [(left, right) for left, right in pairs]


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Return the pairs that make each piece, in the order in which SentencePiece joins them: by the piece's score."""
    known = {piece.piece for piece in pieces}
    ranked = sorted(
        (-piece.score, left, piece.piece)
        for piece in pieces
        if piece.type == 1  # an ordinary piece, neither a byte nor a control token
        for left in range(1, len(piece.piece))
        if piece.piece[:left] in known and piece.piece[left:] in known
    )
    return [(whole[:left], whole[left:]) for _, left, whole in ranked]


class StllavaMedProcessor(LlavaProcessor):
    """Images and conversations -> what the network takes. Chat templates `default`, `v1` and `v1_sq`.

    A user's message marked `"ask": True` is rendered as VUSER, the questioner; `ask=True` beside
    `add_generation_prompt=True` makes the prompt end in `VUSER:`, so that the model asks the next question.
    """


def make_processor(tokenizer: Any, side: int, patch: int, strategy: str = "default", do_pad: bool = True) -> Any:
    """Return the processor of a network whose tower takes `side` x `side` px in patches of `patch` px.

    `strategy` is `vision_feature_select_strategy` of the configuration: `default` drops CLS's token, `full` keeps it.
    """
    size = {"height": side, "width": side}
    return StllavaMedProcessor(
        image_processor=StllavaMedImageProcessor(size={"shortest_edge": side}, crop_size=size, do_pad=do_pad),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template={"default": V1, "v1": V1, "v1_sq": V1_SQ},
    )


__all__ = ["StllavaMedImageProcessor", "StllavaMedProcessor", "StllavaMedTokenizer"]
