"""Allowed values of configuration fields, and the presets."""

from typing import Any


FORMAT_VERSION = 1
ESTIMATORS = ("straight_through", "sigmoid")
SCORE_INITS = ("wanda", "magnitude", "normal", "constant")
GRANULARITIES = ("weight", "neuron", "head", "neuron+head")
MAX_PATTERN = 256  # the largest m of n:m: ranks within a pattern are stored as uint8
SCOPES = ("module", "kind", "global")
SELECTIONS = ("topk", "threshold")
AUTO = "auto"
HEADS = ("model", "layer_average")

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "selection": "threshold",
        "scope": "global",
        "estimator": "sigmoid",
        "forward_temperature": 1e5,
        "backward_temperature": 1.0,
        "score_init": "normal",
        "score_lr_ratio": 1.0,
        "head_lr_ratio": 1.0,
        # The paper's gammas sum to 0.0008 over a run, too little to bring a score of 0.01 to zero.
        "drift": 0.012,
        "settle": False,
        "dropout": None,
        "mask_embeddings": True,
        "head": "layer_average",
    },
}
