from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the random BERT that adapters are trained on, without a head, once."""
    # Imported here, so that tests which need no model do not wait for `transformers`.
    from doors import save_base

    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter_path(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an adapter with three labels, once: copy it before you change it."""
    from doors import train

    folder = tmp_path_factory.mktemp("adapter")
    trainer = train(base_path, folder / "run", "wrapped")
    trainer.model.save_pretrained(folder / "adapter")
    return folder / "adapter"
