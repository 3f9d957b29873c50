"""Allowed values of configuration fields, and the presets."""

from typing import Any, Literal


Estimator = Literal["straight_through", "sigmoid"]
Head = Literal["model", "layer_average"]
MaskCodec = Literal["packed-bits-lsb", "auto"]
Scope = Literal["module", "kind", "global"]
ScoreInit = Literal["wanda", "magnitude", "normal", "constant"]
Selection = Literal["topk", "threshold"]

FORMAT_VERSION = 1
GRANULARITIES = ("weight", "neuron", "head", "neuron+head")
MAX_PATTERN = 256  # the largest m of n:m: ranks within a pattern are stored as uint8
AUTO = "auto"

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
