"""Training of masks: the `Trainer` callback, the `Pruner` behind it, scores, schedules, selection and checkpoints."""
