"""Masks inside a `SentenceTransformer`: trained by its Trainer, saved and loaded as it saves and loads adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hub_server import HubServer
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, push_adapter, read_adapter, sparsity_report
from hf_adaprune.choices import MaskCodec
from hf_adaprune.deploy.plain_models import save_merged
from hf_adaprune.errors import MergeError
from hf_adaprune.tuner.masked_layers import adaprune_layers


st = pytest.importorskip("sentence_transformers", minversion="5")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

TEXTS = ["w7 w8 w9", "w40 w41", "w10 w20 w30 w40 w50"]


def pairs() -> Dataset:
    first, second = ["w7 w8 w9", "w10 w20", "w11 w12", "w30"], ["w7 w8 w10", "w10 w21", "w31 w12", "w33"]
    return Dataset.from_dict({"sentence1": 4 * first, "sentence2": 4 * second, "score": 4 * [0.9, 0.8, 0.1, 0.2]})


def train(model: Any, folder: Path, callback: Any = AdaPruneCallback, checkpoint: Path | None = None) -> Any:
    """Train a `SentenceTransformer` for four steps, saving after two; return it."""
    args = st.SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        log_level="error",
    )
    trainer = st.SentenceTransformerTrainer(model, args, train_dataset=pairs(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return model


@pytest.mark.parametrize("way", ["add_adapter", "callback class", "callback"])
@pytest.mark.parametrize("mask_codec", ["packed-bits-lsb", "auto"])
def test_what_its_trainer_trains_is_what_it_loads(
    way: str, mask_codec: MaskCodec, base_path: Path, tmp_path: Path
) -> None:
    model, config = st.SentenceTransformer(str(base_path)), AdaPruneConfig(mask_codec=mask_codec)
    before = model.encode(TEXTS)
    if way == "add_adapter":
        model.add_adapter(config)
    train(model, tmp_path / "run", AdaPruneCallback(config) if way == "callback" else AdaPruneCallback)
    embeddings = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "saved"))

    assert not np.array_equal(embeddings, before)
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    # A model without a head has none to save.
    assert all(key.endswith(".adaprune_mask") for key in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    assert np.array_equal(st.SentenceTransformer(str(tmp_path / "saved")).encode(TEXTS), embeddings)
    other = st.SentenceTransformer(str(base_path))
    other.load_adapter(str(tmp_path / "saved"), adapter_name="sts")
    assert np.array_equal(other.encode(TEXTS), embeddings)
    other.disable_adapters()
    assert np.array_equal(other.encode(TEXTS), before)


def test_an_adapter_of_the_bare_model_works_inside(base_path: Path, tmp_path: Path) -> None:
    trained = train(st.SentenceTransformer(str(base_path)), tmp_path / "run")
    for part in (trained.transformers_model, trained.tokenizer):
        part.save_pretrained(tmp_path / "adapter")

    inside = st.SentenceTransformer(str(tmp_path / "adapter"))
    assert np.array_equal(inside.encode(TEXTS), trained.encode(TEXTS))
    bare = PeftModel.from_pretrained(AutoModel.from_pretrained(base_path), tmp_path / "adapter").eval()
    with torch.no_grad():
        hidden = bare(**trained.tokenizer(TEXTS[:1], return_tensors="pt")).last_hidden_state
    assert torch.allclose(hidden.mean(1), torch.from_numpy(inside.encode(TEXTS[:1])), atol=1e-6)


def test_a_resumed_run_takes_nothing_from_another_in_its_folder(base_path: Path, tmp_path: Path) -> None:
    train(st.SentenceTransformer(str(base_path)), tmp_path / "run")
    other = AdaPruneCallback(AdaPruneConfig(final_sparsity=0.9))
    train(st.SentenceTransformer(str(base_path)), tmp_path / "other", other)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.warns(UserWarning, match="The scores behind the masks are lost"):
        resumed = train(st.SentenceTransformer(str(base_path)), tmp_path / "other", checkpoint=checkpoint)
    assert sparsity_report(resumed).sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_resumed_run_equals_an_uninterrupted_one(base_path: Path, tmp_path: Path) -> None:
    whole = train(st.SentenceTransformer(str(base_path)), tmp_path / "run")
    resumed = train(
        st.SentenceTransformer(str(base_path)), tmp_path / "run", checkpoint=tmp_path / "run" / "checkpoint-2"
    )

    for (name, layer), (_, other) in zip(adaprune_layers(resumed), adaprune_layers(whole), strict=True):
        assert torch.equal(layer.adaprune_scores["default"], other.adaprune_scores["default"]), name
        assert torch.equal(layer.mask("default"), other.mask("default")), name
    assert np.array_equal(resumed.encode(TEXTS), whole.encode(TEXTS))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_all_modules_are_pushed(base_path: Path, tmp_path: Path, online: HubServer) -> None:
    transformer = st.SentenceTransformer(str(base_path))[0]
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "cls")
    model = st.SentenceTransformer(modules=[transformer, pooling])
    train(model, tmp_path / "run")
    model.save_pretrained(str(tmp_path / "saved"))
    push_adapter(tmp_path / "saved", "me/sentences")
    assert np.array_equal(st.SentenceTransformer("me/sentences").encode(TEXTS), model.encode(TEXTS))
    card: Any = ModelCard(online.files("me/sentences")["README.md"].decode())
    assert card.data.library_name == "sentence-transformers"
    assert "import hf_adaprune" in card.text
    with pytest.raises(MergeError, match="is a SentenceTransformer, of which only the transformer would be written"):
        save_merged(read_adapter(tmp_path / "saved"), tmp_path / "merged")
