"""The PEFT tuner: masked layers and their scores, the selection of masks, and the task head of an adapter."""
