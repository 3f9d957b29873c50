"""Convert the names of modules and tensors between the plain model, a model with adapters, and an adapter's file."""

# PEFT's prefix to the names of a model's modules, in files and in a `PeftModel`.
PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """Return the name of a module or tensor in the plain model, without PEFT's prefix and wrappers."""
    return unwrapped_name(name).removeprefix(PREFIX)


def unwrapped_name(name: str) -> str:
    """Return a name without the `base_layer` parts that an adapter's layers add."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def stored_name(key: str, adapter_name: str) -> str:
    """Return the name of a tensor of an adapter's head in the adapter's file, without PEFT's prefix."""
    return plain_name(key.replace(f".modules_to_save.{adapter_name}.", "."))
