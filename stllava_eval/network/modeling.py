"""Pixels + tokens -> logits: LLaVA with the paper's prototype extractor between vision tower and language model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel, initialization
from transformers.models.llava.modeling_llava import (
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)

from stllava_eval.network.configuration import StllavaMedConfig


class PrototypeExtractor(nn.Module):
    """Tokens of an image -> the same tokens, each drawn towards the prototype that is most like it.

    The prototypes are centres of the image's own tokens: pooled windows, refined by a soft clustering. Each token is
    then given to its most similar centre, and the mean of what a centre was given is added to the token.

    Args:
        width: D, the channels of a token.
        num_prototypes: N, the centres.
        iterations: Times the centres are updated.
        in_float32: Compute in float32 at least, with autocast off; False computes in the input's dtype.

    Source: section 3.1 of the paper and `Clustering` in the authors' multimodal_projector/cluster.py. That code builds
    two (batch, N, tokens, D) tensors, 604 MB each in float32 at the real sizes; the largest one here is (batch, N,
    tokens). Results are equal up to rounding, see docs/evaluate/checkpoints.md. Kept from it on purpose: the values are
    normalised over the image's tokens, channel by channel, and the choice is made after the sigmoid, so that a negative
    scale chooses the least similar centre. Its layer `ln_1` took no part in the result and is not here.
    """

    def __init__(self, width: int, num_prototypes: int, iterations: int, in_float32: bool = True) -> None:
        super().__init__()
        self.num_prototypes, self.iterations, self.in_float32 = num_prototypes, iterations, in_float32
        self.center = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.feature = nn.Linear(width, width)
        self.similarity_scale = nn.Parameter(torch.ones(1))
        self.similarity_shift = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (batch, L, D) tokens of the same dtype."""
        with torch.autocast(tokens.device.type, enabled=False) if self.in_float32 else nullcontext():
            return self._extract(tokens).to(tokens.dtype)

    def _extract(self, tokens: Tensor) -> Tensor:
        """Compute the class's steps; norms are divided out of the products, so that no normalised copy is kept.

        With x the tokens (L, D), c, v and f the three linear layers, and rows of C the N centres:

        1. C = pool(x); V = v(x) / |v(x)| over the tokens; F = f(x)
        2. `iterations` times: C = c(C); A = softmax over the centres of (C / |C|) V^T; C = A F
        3. S = sigmoid(shift + scale * cos(C, x)); token l is given to its centre a(l) = argmax_n S[n, l]
        4. P[n] = (sum over tokens l of centre n of S[n, l] F[l] + pool(F)[n]) / (number of these tokens + 1)
        5. y[l] = x[l] + S[a(l), l] P[a(l)]

        They are `Clustering.forward` of the authors' cluster.py, which section 3.1 of the paper describes. The order of
        the lines keeps few (batch, L, D) tensors alive at a time.
        """
        x = tokens.to(torch.promote_types(tokens.dtype, torch.float32)) if self.in_float32 else tokens
        # step 1; pooled over the token axis, 576 tokens in raster order -> 256 windows of 3: (batch, N, D)
        centers = functional.adaptive_avg_pool1d(x.mT, self.num_prototypes).mT.contiguous()
        values = functional.normalize(_linear(self.value, x), dim=1)  # (batch, L, D), over the tokens of each channel
        features = _linear(self.feature, x)  # (batch, L, D)
        for _ in range(self.iterations):  # step 2
            centers = _linear(self.center, centers)
            # (batch, N, L) weights, softmax over the N centres of each token; @ (batch, L, D) -> (batch, N, D)
            centers = (centers @ values.mT / _length(centers)).softmax(1) @ features
        del values
        cosine = centers @ x.mT / (_length(centers) * _length(x).mT)  # step 3: (batch, N, L)
        scale, shift = self.similarity_scale.to(x.dtype), self.similarity_shift.to(x.dtype)
        similarity, chosen = (shift + scale * cosine).sigmoid().max(1, keepdim=True)  # (batch, 1, L) both, over the N
        given = torch.zeros_like(cosine).scatter(1, chosen, similarity)  # (batch, N, L), one entry per token
        # (batch, N, 1): how many tokens each centre was given
        count = torch.zeros_like(cosine).scatter(1, chosen, 1.0).sum(-1, keepdim=True)
        del centers, cosine
        pooled = functional.adaptive_avg_pool1d(features.mT, self.num_prototypes).mT  # step 4: (batch, N, D)
        prototypes = (given @ features + pooled) / (count + 1)
        del features, pooled
        # step 5: x + (batch, L, N) @ (batch, N, D); a row of given.mT has one entry, the token's similarity
        return torch.baddbmm(x, given.mT, prototypes)


def _length(rows: Tensor) -> Tensor:
    """Return the (batch, rows, 1) L2 norms of the rows, at least 1e-12, as `functional.normalize` has it."""
    return rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """Return `layer(x)`, (..., D), in x's dtype, whatever that of its weights.

    Raises:
        ValueError: The layer is wrapped, as by an adapter, and in another dtype: its own forward could not be kept.
    """
    if layer.weight.dtype == x.dtype:
        return layer(x)
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"{type(layer).__name__} in {layer.weight.dtype} in the prototype extractor, which computes in {x.dtype}. "
            "Leave `prototypes` out of target_modules (modules_to_save trains it whole), or hold it in float32."
        )
    return functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class PrototypeProjector(nn.Module):
    """(batch, L, D) tokens of the vision tower -> (batch, L, O) tokens of the language model, through prototypes.

    `linear_2(QuickGELU(linear_1(PrototypeExtractor(tokens))))`; QuickGELU, unlike LLaVA-1.5's projector.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.prototypes = PrototypeExtractor(
            width, config.num_prototypes, config.prototype_iterations, config.prototype_in_float32
        )
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, image_features: Tensor) -> Tensor:
        """See the class."""
        hidden = self.linear_1(self.prototypes(image_features).to(self.linear_1.weight.dtype))
        return self.linear_2(hidden * torch.sigmoid(1.702 * hidden))  # QuickGELU (OpenAI's CLIP), 1.702 its constant


class StllavaMedPreTrainedModel(LlavaPreTrainedModel):
    """How both networks below start: as transformers does, the prototype extractor as the authors do."""

    config: Any  # StllavaMedConfig, whose parts have no type
    config_class = StllavaMedConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PrototypeExtractor):
            initialization.ones_(module.similarity_scale)
            initialization.zeros_(module.similarity_shift)
            for layer in (module.center, module.value, module.feature):  # torch's own, which the authors kept
                initialization.kaiming_uniform_(layer.weight, a=math.sqrt(5))
                initialization.uniform_(layer.bias, -1 / math.sqrt(layer.in_features), 1 / math.sqrt(layer.in_features))


class StllavaMedModel(StllavaMedPreTrainedModel, LlavaModel):
    """The vision tower, the projector and the language model, without its head."""

    def __init__(self, config: Any) -> None:
        super(LlavaModel, self).__init__(config)  # not LlavaModel's own, which builds LLaVA's projector
        self.vision_tower = AutoModel.from_config(config.vision_config)
        make: Any = PrototypeProjector if config.projector_type == "prototype" else LlavaMultiModalProjector
        self.multi_modal_projector = make(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **others: Any,
    ) -> tuple | LlavaModelOutputWithPast:
        """As LLaVA's, except that the image token's id may lie beyond the embedding's rows."""
        if input_ids is None or inputs_embeds is not None:
            return super().forward(input_ids, pixel_values, inputs_embeds=inputs_embeds, **others)
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("pixel_values and mm_encoder_outputs are both given. Pass one of them.")
        at_image = input_ids == self.config.image_token_id  # (batch, tokens)
        # (batch, tokens, width); the image token gets token 0's row for now
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(at_image, 0))
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is None and pixel_values is not None:
            encoded = self.get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=others.pop("vision_feature_layer", None),
                vision_feature_select_strategy=others.pop("vision_feature_select_strategy", None),
                return_dict=True,
            )
        if encoded is not None:
            # (images, L, width) in one (images * L, width) table, scattered in order over the image tokens
            features = torch.cat(list(encoded.pooler_output)).to(embeddings.device, embeddings.dtype)
            mask = self.get_placeholder_mask(input_ids, embeddings, features)  # type: ignore[arg-type]
            embeddings = embeddings.masked_scatter(mask, features)
        outputs = super().forward(inputs_embeds=embeddings, **others)
        if encoded is not None and isinstance(outputs, LlavaModelOutputWithPast):
            if hasattr(outputs, "image_outputs"):  # from transformers 5.24 on; image_hidden_states is read from it
                outputs.image_outputs = encoded
            else:
                outputs.image_hidden_states = features
        return outputs


class StllavaMedForConditionalGeneration(StllavaMedPreTrainedModel, LlavaForConditionalGeneration):
    """The whole network; it takes and gives what transformers' `LlavaForConditionalGeneration` does."""

    def __init__(self, config: Any) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # not its own, which builds LLaVA's network
        self.model = StllavaMedModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


__all__ = ["StllavaMedForConditionalGeneration", "StllavaMedModel", "StllavaMedPreTrainedModel"]
