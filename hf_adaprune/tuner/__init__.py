"""The PEFT tuner: masked layers, the model around them, and the task head that belongs to an adapter."""
