"""Push to a Hub, then open by name in a fresh process with an empty cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from doors import DOORS, label_names
from hub_server import HubServer
from hub_user import ADAPTERS, ANSWERS, BASE, NUM_LABELS, PICKLED, RESULTS
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load, load_file


class Visit(NamedTuple):
    """Hold what two users of a Hub have noted: who pushed, and who opened."""

    hub: HubServer
    pushed: dict[str, torch.Tensor]
    opened: dict[str, torch.Tensor]
    answers: dict[str, Any]


def visit(hub: HubServer, action: str, folder: Path, token: str) -> None:
    folder.mkdir()
    environment = os.environ | hub.client_env(folder / "home", token) | {"TRANSFORMERS_VERBOSITY": "error"}
    script = Path(__file__).with_name("hub_user.py")
    command = [sys.executable, "-W", "ignore", str(script), action, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as hub:
        visit(hub, "push", folder / "push", hub.write_token)
        visit(hub, "open", folder / "open", hub.read_token)
        pushed, opened = (load_file(folder / action / RESULTS) for action in ("push", "open"))
        yield Visit(hub, pushed, opened, json.loads((folder / "open" / ANSWERS).read_text()))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_opened_by_name_as_it_was_pushed(visited: Visit, name: str, door: str) -> None:
    assert f"{name} {door}" in visited.opened, visited.answers[f"{name} {door}"]
    assert torch.equal(visited.opened[f"{name} {door}"], visited.pushed[name])


@pytest.mark.parametrize("name", ADAPTERS)
def test_pipeline_knows_the_labels_by_the_name_alone(visited: Visit, name: str) -> None:
    for answers in visited.answers[name]:
        assert {answer["label"] for answer in answers} == set(label_names(NUM_LABELS).values())


@pytest.mark.parametrize("name", ADAPTERS)
def test_masks_and_head_are_all_that_is_pushed(visited: Visit, name: str) -> None:
    files = visited.hub.files(name)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    # The Trainer adds its arguments, as ever.
    assert files.keys() - {"training_args.bin"} <= {
        *(".gitattributes", "adapter_config.json", "adapter_model.safetensors", "README.md", "sparsity.png")
    }
    weights = {key for key, tensor in load(files["adapter_model.safetensors"]).items() if tensor.is_floating_point()}
    assert {key.removeprefix("base_model.model.") for key in weights} == {
        *("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")
    }
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_private_adapter_is_for_its_owner(visited: Visit, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert HfApi(visited.hub.url, token=visited.hub.read_token).model_info(name).private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(visited.hub.url, token=False).model_info(name)


@pytest.mark.parametrize("door", DOORS)
def test_an_adapter_that_is_a_pickle_is_refused(visited: Visit, door: str) -> None:
    assert "adapter_model.bin" in visited.hub.files(PICKLED)
    assert "adapter_model.safetensors" not in visited.hub.files(PICKLED)
    assert f"{PICKLED} {door}" not in visited.opened
    assert "pickle" in visited.answers[f"{PICKLED} {door}"]
