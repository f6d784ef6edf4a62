"""A recipe of stage 2 for the small network of the tests, and what an answer weighs by itself."""

import torch

from stllava_train.training.trees import PromptAnswer

LORA = {"train": "lora", "learning_rate": 2e-3, "rank": 4, "alpha": 8, "dropout": 0.0}


SMALL = {
    "start_vision_tower": None,
    "template": "v1",
    "loss": ["sigmoid"],
    "loss_weights": [1.0],
    "beta": 0.1,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "reference": "live",
    "epochs": 2,
    "batch": 4,
    "micro_batch": 2,
    "max_tokens": 600,
    "warmup": 0.1,
    "weight_decay": 0.0,
    "betas": [0.9, 0.999],
    "max_grad_norm": 1.0,
    "dtype": "float32",
    "four_bit": False,
    "gradient_checkpointing": False,
    "save_every": 2,
    "seed": 0,
    "evaluate_on": [],
    "evaluate_every": 2,
    "evaluate_questions": 4,
    "stop_unparsed": 1.0,
    "language_model": LORA,
    "vision_tower": {**LORA, "rank": 2, "alpha": 4, "learning_rate": 1e-3},
    "projector": {"train": "full", "learning_rate": 5e-4},
}


def alone(model, pixels, answered: PromptAnswer) -> torch.Tensor:
    """Log-probability of one answer, its sequence computed by itself, in nats."""
    ids = torch.tensor([answered.ids])
    logits = model(input_ids=ids, pixel_values=pixels[None]).logits[0, answered.begin - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, answered.begin :, None]).sum()
