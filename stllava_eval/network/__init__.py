"""The STLLaVA-Med network as transformers classes. Importing this registers them with transformers' Auto classes."""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers import AutoTokenizer as _AutoTokenizer

from stllava_eval.network.configuration import StllavaMedConfig
from stllava_eval.network.modeling import (
    PrototypeExtractor,
    StllavaMedForConditionalGeneration,
    StllavaMedModel,
    StllavaMedPreTrainedModel,
)
from stllava_eval.network.processing import (
    StllavaMedImageProcessor,
    StllavaMedProcessor,
    StllavaMedTokenizer,
    make_processor,
)

AutoConfig.register("stllava_med", StllavaMedConfig, exist_ok=True)
AutoModel.register(StllavaMedConfig, StllavaMedModel, exist_ok=True)
AutoModelForImageTextToText.register(StllavaMedConfig, StllavaMedForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(  # PIL's numbers whichever back end is asked for: torchvision's are not the authors'
    StllavaMedConfig,
    image_processor_classes={"pil": StllavaMedImageProcessor, "torchvision": StllavaMedImageProcessor},
    exist_ok=True,
)
_AutoTokenizer.register(StllavaMedConfig, tokenizer_class=StllavaMedTokenizer, exist_ok=True)
AutoProcessor.register(StllavaMedConfig, StllavaMedProcessor, exist_ok=True)
# trl and `transformers serve` look a class up by its name in the package itself
setattr(transformers, "StllavaMedForConditionalGeneration", StllavaMedForConditionalGeneration)  # noqa: B010

__all__ = [
    "PrototypeExtractor",
    "StllavaMedConfig",
    "StllavaMedForConditionalGeneration",
    "StllavaMedImageProcessor",
    "StllavaMedModel",
    "StllavaMedPreTrainedModel",
    "StllavaMedProcessor",
    "StllavaMedTokenizer",
    "make_processor",
]
