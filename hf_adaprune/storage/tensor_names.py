"""What modules and tensors are called: in the model itself, in a model with adapters, and in an adapter's file."""

# What PEFT writes before the names of a model's modules, in files and in a `PeftModel`.
PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """Return a module's or a tensor's name as it is in the model itself, whatever adapters have put around it."""
    return unwrapped_name(name).removeprefix(PREFIX)


def unwrapped_name(name: str) -> str:
    """Return a name as it is where no adapter has put a layer of its own around the one that is meant."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def stored_name(key: str, adapter_name: str) -> str:
    """Return the name that a tensor of an adapter's head has in the adapter's file, without PEFT's prefix."""
    return plain_name(key.replace(f".modules_to_save.{adapter_name}.", "."))
