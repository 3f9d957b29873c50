"""Training of masks: the `Trainer` callback, the `Pruner` behind it, the schedule, learning rates and checkpoints."""
