"""Advice on inference speed, shared by model cards and the command line."""

from ..config import AdaPruneConfig


def speed_advice(config: AdaPruneConfig) -> str:
    """Return advice on whether the masks of an adapter make a model faster, and on what does.

    Args:
        config (`AdaPruneConfig`): The adapter's configuration.
    """
    if config.is_structured:
        what = " and ".join(f"{kind}s" for kind in config.removable_kinds)
        return (
            "Merged, the model computes as much as its base: expect no speed-up. `hf_adaprune.compact(model)` removes "
            f"the pruned {what} and returns a smaller dense model, which computes less. `hf-adaprune speed` measures "
            "how much faster it is on your machine."
        )
    if config.n_of_m == (2, 4):
        return (
            "Expect no speed-up on a CPU: dense kernels multiply by zeros too. On an NVIDIA GPU of compute capability "
            "8.0 or later, in half precision, `hf_adaprune.to_semi_structured(model)` uses the 2:4 pattern. Whether "
            "that is faster depends on the shapes: measure it."
        )
    return (
        "An unstructured mask makes no model faster: expect no speed-up on dense kernels. For a faster model, train "
        'masks of `granularity="neuron+head"` and remove what they prune with `hf_adaprune.compact`.'
    )
