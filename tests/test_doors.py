"""What was trained is what every door opens, to the last bit, head and labels included."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from doors import (
    DOORS,
    TEXTS,
    TRAINABLE_DOORS,
    WAYS,
    label_names,
    load_base,
    logits_of,
    make_trainer,
    train,
)
from peft import (
    AutoPeftModel,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from tiny import HEADS, make_model, save_model, train_masks
from tiny import logits_of as outputs_of
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, Trainer, pipeline

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, Pruner, read_adapter, sparsity_report
from hf_adaprune.errors import AdapterFileError, AdapterNotFoundError, BaseMismatchError
from hf_adaprune.tuner.masked_layers import adaprune_layers


class Trained(NamedTuple):
    """Hold an adapter's folder, and what the model computed before it was saved."""

    path: str
    num_labels: int
    logits: torch.Tensor
    scores: list[list[dict[str, Any]]]


def classify(model: Any, base: Path) -> list[list[dict[str, Any]]]:
    return pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(base))(
        TEXTS, top_k=None
    )


@pytest.fixture(scope="module", params=[(way, num_labels) for way in WAYS for num_labels in (1, 3, 77)], ids=str)
def trained(request: pytest.FixtureRequest, base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    way, num_labels = request.param
    folder = tmp_path_factory.mktemp("trained")
    model = train(base_path, folder / "run", way, num_labels).model
    model.save_pretrained(folder / "adapter")
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return Trained(str(folder / "adapter"), num_labels, logits_of(model), classify(plain, base_path))


@pytest.mark.parametrize("door", DOORS)
def test_every_door_gives_the_trained_logits_and_label_names(trained: Trained, door: str, base_path: Path) -> None:
    model = DOORS[door](str(base_path), trained.path)
    assert torch.equal(logits_of(model), trained.logits)
    assert trained.logits.shape[1] == model.config.num_labels == trained.num_labels
    assert model.config.id2label == label_names(trained.num_labels)
    assert model.config.label2id == {name: number for number, name in label_names(trained.num_labels).items()}


def test_pipeline_answers_with_the_label_names_and_the_trained_scores(trained: Trained) -> None:
    answers = pipeline("text-classification", model=trained.path)(TEXTS, top_k=None)
    assert answers == trained.scores
    assert {answer["label"] for answer in answers[0]} == set(label_names(trained.num_labels).values())


def save_by_model(trainer: Trainer, folder: Path) -> Path:
    trainer.model.save_pretrained(folder / "saved")
    return folder / "saved"


def save_by_trainer(trainer: Trainer, folder: Path) -> Path:
    trainer.save_model(str(folder / "saved"))
    return folder / "saved"


def save_by_checkpoint(trainer: Trainer, folder: Path) -> Path:
    return folder / "checkpoint-4"


@pytest.mark.parametrize("save", [save_by_model, save_by_trainer, save_by_checkpoint])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_save_gives_one_and_the_same_adapter(
    way: str, save: Any, base_path: Path, tmp_path: Path
) -> None:
    trainer = train(base_path, tmp_path, way, save_strategy="steps", save_steps=4)
    trainer.model.save_pretrained(tmp_path / "reference")
    adapter = save(trainer, tmp_path)
    saved, reference = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "reference"))
    assert saved.keys() == reference.keys()
    assert all(torch.equal(saved[name], reference[name]) for name in reference)
    assert torch.equal(logits_of(DOORS["pipeline"](str(base_path), str(adapter))), logits_of(trainer.model))


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_is_one_bit_a_weight_and_the_head(way: str, base_path: Path, tmp_path: Path) -> None:
    model = train(base_path, tmp_path / "run", way).model
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert names <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    masks = sum(tensor.numel() for tensor in tensors.values() if tensor.dtype == torch.uint8)
    head = {name for name, tensor in tensors.items() if tensor.dtype != torch.uint8}
    assert masks == sum(-(-layer.base_weight.numel() // 8) for _, layer in adaprune_layers(model))
    assert {name.removeprefix("base_model.model.") for name in head} == {
        *("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")
    }


@pytest.mark.parametrize("door", ["PeftModel.from_pretrained", "model.load_adapter"])
def test_a_base_with_a_head_of_its_own_gets_the_adapters(
    door: str, base_path: Path, adapter_path: Path, tmp_path: Path
) -> None:
    # The same body as `base_path`, in a checkpoint that was saved with a head of five outputs.
    make_model("bert", "sequence", num_labels=5).save_pretrained(tmp_path / "base")
    opened = DOORS[door](str(tmp_path / "base"), str(adapter_path))
    assert opened.config.id2label == label_names(3)
    assert torch.equal(logits_of(opened), logits_of(DOORS[door](str(base_path), str(adapter_path))))


@pytest.mark.parametrize("door", DOORS)
def test_the_papers_head_comes_through_every_door(door: str, base_path: Path, tmp_path: Path) -> None:
    model = load_base(base_path, 3)
    config = AdaPruneConfig.from_preset("paper", final_sparsity=0.3, drift=1.0)
    make_trainer(model, tmp_path / "run", AdaPruneCallback(config)).train()
    model.save_pretrained(tmp_path / "adapter")
    opened = DOORS[door](str(base_path), str(tmp_path / "adapter"))
    assert torch.equal(logits_of(opened), logits_of(model))
    assert opened.config.id2label == label_names(3)


AUTO_PEFT = {
    "none": AutoPeftModelForFeatureExtraction,
    "token": AutoPeftModelForTokenClassification,
    "question": AutoPeftModelForQuestionAnswering,
    "masked_lm": AutoPeftModel,
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("head", AUTO_PEFT)
def test_other_heads_come_through_every_door(head: str, wrapped: bool, tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base", head=head), str(tmp_path / "adapter")
    model = HEADS[head].from_pretrained(base)
    if wrapped:
        model = get_peft_model(model, AdaPruneConfig())
    else:
        model.add_adapter(AdaPruneConfig())
    train_masks(model, head=head)
    model.save_pretrained(adapter)
    loaded = HEADS[head].from_pretrained(base)
    loaded.load_adapter(adapter)
    for opened in (
        loaded,
        PeftModel.from_pretrained(HEADS[head].from_pretrained(base), adapter),
        AUTO_PEFT[head].from_pretrained(adapter),
        HEADS[head].from_pretrained(adapter),
    ):
        assert torch.equal(outputs_of(opened, head), outputs_of(model, head))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_two_adapters_with_heads_of_two_sizes_share_a_base(base_path: Path, tmp_path: Path) -> None:
    wanted = {}
    for way, num_labels in (("class", 3), ("wrapped", 77)):
        model = train(base_path, tmp_path / "run", way, num_labels).model
        model.save_pretrained(tmp_path / way)
        wanted[way] = logits_of(model)
    plain = load_base(base_path, 2)
    plain.load_adapter(str(tmp_path / "class"), adapter_name="class")
    plain.load_adapter(str(tmp_path / "wrapped"), adapter_name="wrapped")
    wrapped = PeftModel.from_pretrained(load_base(base_path, 2), str(tmp_path / "class"), adapter_name="class")
    wrapped.load_adapter(str(tmp_path / "wrapped"), adapter_name="wrapped")
    for model in (plain, wrapped):
        for name in ("class", "wrapped", "class"):
            model.set_adapter(name)
            assert torch.equal(logits_of(model), wanted[name])


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning")
def test_one_configuration_serves_for_many_models(base_path: Path, tmp_path: Path) -> None:
    config = AdaPruneConfig(final_sparsity=0.25)
    for num_labels in (3, 77):
        model = load_base(base_path, num_labels)
        make_trainer(model, tmp_path, AdaPruneCallback(config), num_labels=num_labels).train()
        assert logits_of(model).shape == (4, num_labels)
        assert logits_of(get_peft_model(load_base(base_path, num_labels), config)).shape == (4, num_labels)
    # Nor does it keep what it has learnt of one base.
    get_peft_model(make_model("bert", "sequence", seed=1), config)


@pytest.mark.parametrize("door", TRAINABLE_DOORS)
def test_training_goes_on_from_the_mask(door: str, base_path: Path, adapter_path: Path, tmp_path: Path) -> None:
    frozen = DOORS[door](str(base_path), str(adapter_path))
    model = DOORS[door](str(base_path), str(adapter_path), is_trainable=True)
    assert torch.equal(logits_of(model), logits_of(frozen))
    sparsities = []

    class Watch(AdaPruneCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_end(*args, **kwargs)
            sparsities.append(self._running.sparsity)

    make_trainer(model, tmp_path / "run", Watch).train()
    # At no step are there fewer pruned than there were to begin with.
    assert sparsities == [0.5] * 4
    assert not torch.equal(logits_of(model), logits_of(frozen))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(DOORS["pipeline"](str(base_path), str(tmp_path / "adapter"))), logits_of(model))


@pytest.mark.parametrize("door", TRAINABLE_DOORS)
def test_an_adapter_that_is_trained_on_resumes_from_a_checkpoint(
    door: str, base_path: Path, adapter_path: Path, tmp_path: Path
) -> None:
    def make() -> Trainer:
        model = DOORS[door](str(base_path), str(adapter_path), is_trainable=True)
        return make_trainer(model, tmp_path, AdaPruneCallback, save_strategy="steps", save_steps=2)

    (whole := make()).train()
    (resumed := make()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits_of(resumed.model), logits_of(whole.model))


def test_an_adapter_that_is_trained_on_keeps_its_sparsity_in_a_plain_loop(base_path: Path, adapter_path: Path) -> None:
    model = DOORS["PeftModel.from_pretrained"](str(base_path), str(adapter_path), is_trainable=True)
    before = {name: layer.mask("default") for name, layer in adaprune_layers(model)}
    pruner = Pruner(model, total_steps=100)
    pruner.step()
    assert sparsity_report(model).sparsity == 0.5
    # Nothing has moved a score.
    assert all(torch.equal(layer.mask("default"), before[name]) for name, layer in adaprune_layers(model))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_base_that_had_an_adapter_takes_one_of_another_kind(
    base_path: Path, adapter_path: Path, tmp_path: Path
) -> None:
    get_peft_model(load_base(base_path), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    base = load_base(base_path)
    PeftModel.from_pretrained(base, str(adapter_path)).unload()
    base.load_adapter(str(tmp_path))
    assert any("lora" in name for name, _ in base.named_parameters())


def test_the_configuration_of_a_fresh_adapter_makes_another(base_path: Path, tmp_path: Path) -> None:
    made = get_peft_model(load_base(base_path), AdaPruneConfig(final_sparsity=0.25)).peft_config["default"]
    made.save_pretrained(tmp_path)
    again = get_peft_model(load_base(base_path), AdaPruneConfig.from_pretrained(str(tmp_path))).peft_config["default"]
    assert (again.final_sparsity, again.base_fingerprint) == (0.25, made.base_fingerprint)


def test_options_that_the_base_was_loaded_with_must_be_given_again(base_path: Path, tmp_path: Path) -> None:
    options = {"hidden_act": "relu", "hidden_dropout_prob": 0.3, "use_cache": False}
    model = AutoModelForSequenceClassification.from_pretrained(base_path, num_labels=3, **options)
    make_trainer(model, tmp_path, AdaPruneCallback).train()
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    with pytest.warns(UserWarning, match="a base loaded with hidden_act='relu': on this one it computes something"):
        AutoModelForSequenceClassification.from_pretrained(adapter)
    with pytest.raises(BaseMismatchError, match="hidden_act='relu'"):
        read_adapter(adapter).open()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = AutoModelForSequenceClassification.from_pretrained(adapter, hidden_act="relu")
    assert torch.equal(logits_of(again), logits_of(model))
    AutoModel.from_pretrained(base_path, hidden_act="relu").save_pretrained(tmp_path / "base")
    assert torch.equal(logits_of(read_adapter(adapter).open(str(tmp_path / "base"))), logits_of(model))
    wider = save_model(tmp_path / "wider", head="none", intermediate_size=128)
    with pytest.raises(BaseMismatchError, match="were made for other weights"):
        read_adapter(adapter).open(str(wider))


def test_a_head_of_another_size_is_put_into_an_adapter(base_path: Path, adapter_path: Path, tmp_path: Path) -> None:
    model = DOORS["PeftModel.from_pretrained"](str(base_path), str(adapter_path), is_trainable=True)
    logits_of(model)
    base = model.get_base_model()
    base.classifier.modules_to_save["default"] = torch.nn.Linear(32, 2)
    base.config.id2label, base.num_labels = {0: "no", 1: "yes"}, 2
    make_trainer(model, tmp_path, AdaPruneCallback, num_labels=2).train()
    model.save_pretrained(tmp_path / "again")
    for name in ("PeftModel.from_pretrained", "pipeline"):
        again = DOORS[name](str(base_path), str(tmp_path / "again"))
        assert again.config.id2label == {0: "no", 1: "yes"}
        assert torch.equal(logits_of(again), logits_of(model))


def test_a_head_of_ones_own_needs_a_model_that_has_it(base_path: Path, tmp_path: Path) -> None:
    def with_head() -> Any:
        model = load_base(base_path)
        model.classifier = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        return model

    model = with_head()
    make_trainer(model, tmp_path, AdaPruneCallback).train()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="if the head is your own, give it to a model and use `PeftModel"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(with_head(), tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("options", [{"save_peft_format": False}, {"max_shard_size": "1KB"}], ids=str)
def test_an_adapter_is_saved_as_one_file_in_pefts_format(
    options: dict[str, Any], base_path: Path, adapter_path: Path, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(adapter_path)
    model.save_pretrained(tmp_path, **options)
    opened = PeftModel.from_pretrained(load_base(base_path), tmp_path)
    assert torch.equal(logits_of(opened), logits_of(model))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_model_that_has_just_been_opened_is_traced(adapter_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(adapter_path).eval()
    model.config.return_dict = False
    ids = torch.arange(5, 15)[None]
    traced: Any = torch.jit.trace(model, ids, strict=False)
    assert torch.equal(traced(ids)[0], model(ids)[0])


def test_the_tokenizer_of_a_base_is_that_of_its_pinned_revision(
    adapter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(adapter_path, tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    pinned = json.loads(path.read_text()) | {"base_model_name_or_path": "me/base", "revision": "v1"}
    path.write_text(json.dumps(pinned))
    asked: list[tuple[str, str | None]] = []

    def not_there(name: str, **hub: Any) -> None:
        asked.append((name, hub.get("revision")))
        raise OSError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", not_there)
    for base in (None, "me/copy"):
        with pytest.raises(AdapterNotFoundError, match="has a tokenizer"):
            read_adapter(folder).tokenizer(base)
    assert asked[1::2] == [("me/base", "v1"), ("me/copy", None)]
