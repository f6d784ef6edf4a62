"""Define the configuration of a STLLaVA-Med network: LLaVA's own, and the projector's."""

from __future__ import annotations

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig


@strict
class StllavaMedConfig(LlavaConfig):
    """LLaVA-1.5's configuration with a choice of projector.

    The image token's id is `image_token_index`. It may lie beyond the vocabulary, as it does for every original
    checkpoint: it then has no row in the embedding or in the head, and so can never be generated.

    Args:
        projector_type: `prototype` (the paper's prototype extractor, `cluster` in the authors' code) or `mlp2x_gelu`
            (LLaVA-1.5's).
        num_prototypes: Centres of the prototype extractor; 256 in the authors' code, which does not store it.
        prototype_iterations: Times the centres are updated; 2 in the authors' code, which does not store it either.
        prototype_in_float32: Compute the clustering in float32 whatever the model's dtype (our choice: in 16 bits the
            assignment of tokens to prototypes is mostly rounding error). False computes in the input's dtype, as the
            authors do.
    """

    model_type = "stllava_med"

    projector_type: Literal["prototype", "mlp2x_gelu"] = "prototype"
    num_prototypes: int = 256
    prototype_iterations: int = 2
    prototype_in_float32: bool = True


__all__ = ["StllavaMedConfig"]
