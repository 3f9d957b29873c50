"""The card that a saved adapter carries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftConfig

from .analysis import plot_sparsity, sparsity_report
from .config import AdaPruneConfig


BEGIN, END = "<!-- hf_adaprune: what is between these lines is written anew -->", "<!-- hf_adaprune: end -->"
PICTURE = "sparsity.png"

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
_OPTIONS = (
    *("final_sparsity", "selection", "scope", "pruning_start", "pruning_end", "score_init", "estimator"),
    *("score_lr_ratio", "head_lr_ratio", "drift", "mask_embeddings", "head"),
)


def write_model_card(
    folder: str | Path,
    *,
    name: str | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    picture: bool = True,
) -> ModelCard:
    """Write, or bring up to date, the `README.md` of a saved adapter, and the picture of what it prunes.

    A card that somebody has written keeps its text and metadata: only what stands between our two comment lines is
    replaced, or added at the end if they are missing.

    Args:
        folder (`str` or `Path`): A folder with a saved adapter.
        name (`str`, *optional*): The adapter's name on the Hub; by default the folder's.
        metrics (`Mapping[str, float]`, *optional*):
            Scores to show, and to enter in the card's `model-index`; by default those that it already has.
        dataset (`str`, *optional*): Name of the data set that the scores are for.
        picture (`bool`): Whether to draw `sparsity.png` too.

    Returns:
        `huggingface_hub.ModelCard`: What was written.

    Raises:
        NotPrunedError: If the folder's adapter holds no masks.
        ValueError: If the folder holds no adapter.

    Example:

        >>> write_model_card("sst2-adaprune", metrics={"accuracy": 0.87}, dataset="nyu-mll/glue")
    """
    folder = Path(folder)
    config = PeftConfig.from_pretrained(str(folder))
    if picture:
        plot_sparsity(sparsity_report(config)).savefig(folder / PICTURE, dpi=150)
    drawn = PICTURE if (folder / PICTURE).is_file() else None
    path = folder / "README.md"
    written: Any = ModelCard.load(path, ignore_metadata_errors=True) if path.exists() else None
    if metrics is None and written is not None:
        metrics = {result.metric_type: result.metric_value for result in written.data.eval_results or []}
    card = _render(config, name or folder.resolve().name, dict(metrics or {}), dataset, drawn)
    if written is not None and "[More Information Needed]" not in written.text:
        card = _update(written, card)
    aside = path.with_suffix(".tmp")
    card.save(aside)
    aside.replace(path)
    return card


def _update(written: Any, card: Any) -> ModelCard:
    block = card.text[card.text.index(BEGIN) : card.text.index(END) + len(END)]
    before, begin, rest = written.text.partition(BEGIN)
    _, end, after = rest.partition(END)
    card.text = before + block + after if begin and end else f"{written.text.rstrip()}\n\n{block}\n"
    for field, value in vars(written.data).items():
        if field == "tags":
            card.data.tags = sorted({*(value or []), *card.data.tags})
        elif value and field not in ("library_name", "eval_results", "model_name"):
            setattr(card.data, field, value)
    card.data.eval_results = card.data.eval_results or written.data.eval_results
    return card


def _render(
    config: AdaPruneConfig, name: str, metrics: dict[str, float], dataset: str | None, picture: str | None
) -> ModelCard:
    base, task = config.base_model_name_or_path, str(getattr(config.task_type, "value", config.task_type))
    on_hub = base is not None and not Path(base).exists() and _REPOSITORY.fullmatch(base) is not None
    pipeline = _PIPELINES.get(task)
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=dataset or "custom",
            dataset_name=dataset or "custom",
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in metrics.items()
    ]
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
        library_name="peft",
        model_name=name,
        pipeline_tag=pipeline,
        tags=["adaprune", "pruning", "sparse", "transformers"],
    )
    auto_class = _AUTO_CLASSES.get(task)
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        begin=BEGIN,
        end=END,
        title=name,
        name=name,
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{Path(base or 'a local model').name}`",
        module="transformers" if auto_class else "peft",
        auto_class=auto_class or "AutoPeftModel",
        report=sparsity_report(config),
        metrics=metrics,
        picture=picture,
        combination=config.combination,
        options={option: getattr(config, option) for option in _OPTIONS},
    )
