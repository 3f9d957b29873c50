"""What to expect of a mask at inference, said once: on the cards and on the command line."""

from ..config import AdaPruneConfig


def speed_advice(config: AdaPruneConfig) -> str:
    """Return, in a sentence or two, whether masks like these make a model faster, and what does.

    Args:
        config (`AdaPruneConfig`): The adapter's configuration.
    """
    if config.is_structured:
        what = " and ".join(f"{kind}s" for kind in config.removable_kinds)
        return (
            "Merged, the model computes as much as its base: expect no speed-up. `hf_adaprune.compact(model)` removes "
            f"the pruned {what}; what is left is a smaller dense model, which computes less: `hf-adaprune speed` "
            "measures how much faster that is on your machine."
        )
    if config.n_of_m == (2, 4):
        return (
            "Expect no speed-up on a CPU: dense kernels multiply by zeros too. On an NVIDIA GPU of compute capability "
            "8.0 or later, in half precision, `hf_adaprune.to_semi_structured(model)` uses the 2:4 pattern; whether "
            "that pays depends on the shapes: measure it."
        )
    return (
        "An unstructured mask makes a model exchangeable, not faster: expect no speed-up on dense kernels. For a "
        'faster model train masks of `granularity="neuron+head"` and make it smaller with `hf_adaprune.compact`.'
    )


# The measurement: `python examples/benchmarks/latency.py --threads 1 --cpu_time`.
COMPACT_ADVICE = (
    "Its matrices are smaller and dense: it computes less than its base. A MiniLM-L6 without half of its encoder's "
    "weights, neurons and heads, was measured to be 1.4 to 1.7 times as fast as its base at batch 1 and 1.8 to 2.1 "
    "times at batch 32, on one CPU thread with PyTorch. By how much this one is faster depends on the machine, the "
    "batch and the length; `hf-adaprune speed`, with the adapter, measures it."
)
