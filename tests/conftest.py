from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest


if TYPE_CHECKING:
    from hub_server import HubServer


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


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Have this process talk to a Hub of its own, with an empty cache and the token of `"me"` to write."""
    import huggingface_hub.hf_api
    import huggingface_hub.utils._http
    import transformers.utils.hub
    from hub_server import HubServer
    from huggingface_hub import constants

    with HubServer() as hub:
        # The client waits for longer and longer before it tries again.
        monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", hub.write_token)
        yield hub


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return `DataParallel`'s function that replicates a model, with copies in the place of those on other GPUs."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[tensor.clone() for tensor in tensors] for _ in devices],
    )
    return module.replicate
