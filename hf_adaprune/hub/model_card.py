"""The model card of a saved adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import ENDPOINT
from peft import PeftConfig
from transformers.models.auto import modeling_auto

from ..analysis import plot_sparsity, sparsity_report
from ..config import AdaPruneConfig
from ..errors import CardError, NotPrunedError
from ..storage.stored_adapter import is_name_on_hub
from .advice import speed_advice


BEGIN, END = "<!-- hf_adaprune: generated text, overwritten at every save -->", "<!-- hf_adaprune: end -->"
CARD, PICTURE = "README.md", "sparsity.png"

# As the template prints it: the scores on a card are those of this adapter.
_FINGERPRINT = re.compile(r"<!-- fingerprint of masks and head: (\S+) -->")

# In the sentence that transformers adds to the template.
_GENERATED = "This model card has been automatically generated."

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_OPTIONS = (
    "final_sparsity",
    "granularity",
    "selection",
    "scope",
    "pruning_start",
    "pruning_end",
    "score_init",
    "estimator",
    "forward_temperature",
    "backward_temperature",
    "score_lr_ratio",
    "head_lr_ratio",
    "dropout",
    "settle",
    "drift",
    "mask_embeddings",
    "head",
)


def write_model_card(
    folder: str | Path,
    *,
    name: str | None = None,
    subfolder: str | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
    picture: bool = True,
    card: str | Path | None = None,
) -> ModelCard:
    """Write or update the `README.md` of a saved adapter, and the picture of its sparsity.

    An existing card keeps the text and metadata that people wrote: only the part between this package's two comment
    lines is replaced, or added at the end if they are missing.

    Args:
        folder (`str` or `Path`): A folder with a saved adapter.
        name (`str`, *optional*): The adapter's name on the Hub; by default its card's title, or the folder's name.
        subfolder (`str`, *optional*): Its subfolder in the repository of that name.
        metrics (`Mapping[str, float]`, *optional*):
            Scores to show, and to enter in the card's `model-index`; by default those already on the card, unless that
            is the card of another adapter; none if this is empty.
        dataset (`str`, *optional*): The name on the Hub of the data set that the scores are for.
        dataset_config (`str`, *optional*): Its configuration, such as `"sst2"`.
        dataset_split (`str`, *optional*): Its split, such as `"validation"`.
        picture (`bool`): Whether to draw `sparsity.png` too.
        card (`str` or `Path`, *optional*): The card's file, if it is not the folder's `README.md`.

    Returns:
        `huggingface_hub.ModelCard`: The card that was written.

    Raises:
        NotPrunedError: If the folder's adapter has no masks.
        ValueError: If the folder has no adapter, or its configuration lacks `num_parameters`.
        CardError: If a metric is not a number, or the metadata of the existing card is not valid YAML.

    Example:

        >>> data = {"dataset": "nyu-mll/glue", "dataset_config": "sst2", "dataset_split": "validation"}
        >>> write_model_card("sst2-adaprune", metrics={"accuracy": 0.87}, **data)
    """
    given: Mapping[str, Any] = metrics or {}
    not_numbers = {key: value for key, value in given.items() if not isinstance(value, Real)}
    if not_numbers:
        raise CardError(f"`metrics` must be numbers, got {not_numbers}: leave out what has not been measured.")
    folder = Path(folder)
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, AdaPruneConfig):
        raise NotPrunedError(
            f"The adapter in '{folder}' is one of another method, {config.peft_type}: it has no masks."
        )
    if picture:
        plot_sparsity(sparsity_report(config)).savefig(folder / PICTURE, dpi=150)
    drawn = PICTURE if (folder / PICTURE).is_file() else None
    path = Path(card or folder / CARD)
    written = read_card(path)
    kept: list[EvalResult] = []
    if written is not None:
        name = name or _title(written.text)
        if metrics is None and _adapter_of(written.text) in (None, config.adapter_fingerprint):
            kept = written.data.eval_results or []
    if metrics is None:
        metrics = {it.metric_type: it.metric_value for it in kept if isinstance(it.metric_value, (int, float))}
    made: Any = _render(
        config,
        name or folder.resolve().name,
        subfolder,
        dict(metrics),
        (dataset, dataset_config, dataset_split),
        drawn,
    )
    made.data.eval_results = kept or made.data.eval_results or []  # kept ones with their data sets and splits
    return put_card(path, made)


def put_card(path: Path, made: Any) -> ModelCard:
    """Write a card; keep the text and metadata that people wrote in an existing one.

    Scores of the same adapter are kept too, if those of the new card are `None`.
    """
    written = read_card(path)
    if written is not None and not _is_template(written.text):
        made = _update(written, made)
    made.data.eval_results = made.data.eval_results or None
    aside = path.with_suffix(".tmp")
    made.save(aside)
    aside.replace(path)
    return made


def written_by_hand(text: str) -> str:
    """Return the text that people wrote in a card: all except metadata and the parts between our comment lines."""
    body = re.sub(r"\A---\r?\n.*?\n---\s*\n", "", text, flags=re.DOTALL)
    body = re.sub(r"<!-- hf_adaprune: .*?<!-- hf_adaprune: end -->", "", body, flags=re.DOTALL)
    return "" if _is_template(body) else _without_peft_version(body).strip()


def replace_block(text: str, begin: str, end: str, block: str) -> str:
    """Replace the text from one comment line to another; add it at the end if they are missing."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    return before + block + after if found and closed else f"{text.rstrip()}\n\n{block}\n".lstrip()


def _is_template(text: str) -> bool:
    """Return whether a card is the blank template that PEFT and transformers write, so that nothing in it is lost."""
    blank = {*ModelCard.from_template(ModelCardData()).text.splitlines(), ""}
    lines = _without_peft_version(text).splitlines()
    return all(line in blank or line.endswith(_GENERATED) for line in lines)


def _title(text: str) -> str | None:
    title = re.search(rf"{re.escape(BEGIN)}\s*# (.+)", text)
    return title[1].strip() if title else None


def _without_peft_version(text: str) -> str:
    # PEFT adds this to any card that lacks it.
    return re.sub(r"\n+### Framework versions\n+- PEFT \S+\s*\Z", "", text)


def describe_base(base: str | None) -> tuple[str | None, str]:
    """Return the name of a base if it can be on the Hub (else `None`), and how to mention it in a card."""
    on_hub = _on_hub(base)
    text = f"[{base}]({ENDPOINT}/{base})" if on_hub else f"`{Path(base or 'a local model').name}`"
    return base if on_hub else None, text


def pipeline_of(config: AdaPruneConfig) -> str | None:
    """Return the name of the pipeline that an adapter's model is for."""
    if (config.architecture or "").endswith("ForMaskedLM"):
        return "fill-mask"  # PEFT has no task type for it
    return _PIPELINES.get(str(getattr(config.task_type, "value", config.task_type)))


def auto_class(architecture: str | None) -> str | None:
    """Return the Auto class of transformers for a model class, by the end of its name; `None` if there is none."""
    if architecture is None:
        return None
    if architecture.endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    names = [name for name in modeling_auto.__all__ if name.startswith("AutoModelFor")]
    fitting = [name for name in names if architecture.endswith(name.removeprefix("AutoModel"))]
    return max(fitting, key=len, default=None)


def read_card(path: Path) -> Any:
    """Return a card, or `None` if there is none.

    Raises:
        CardError: If its metadata is not valid YAML.
    """
    if not path.exists():
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except Exception as error:  # whatever the YAML parser raises
        raise CardError(
            f"The metadata at the beginning of '{path}' must be valid YAML: correct it, or delete the file. {error}"
        ) from None


def _update(written: Any, card: Any) -> ModelCard:
    block = card.text[card.text.index(BEGIN) : card.text.index(END) + len(END)]
    card.text = replace_block(_without_peft_version(written.text), BEGIN, END, block)
    for field, value in vars(written.data).items():
        if field == "tags":
            # PEFT writes local paths into tags, and into `base_model`.
            kept = [tag for tag in value or [] if not tag.startswith("base_model:adapter:")]
            card.data.tags = sorted({*kept, *card.data.tags})
        elif field == "base_model":
            card.data.base_model = card.data.base_model or (value if _on_hub(value) else None)
        elif value and field not in ("library_name", "eval_results", "model_name"):
            setattr(card.data, field, value)
    if card.data.eval_results is None and _adapter_of(written.text) in (None, _adapter_of(card.text)):
        card.data.eval_results = written.data.eval_results
    return card


def _adapter_of(text: str) -> str | None:
    found = _FINGERPRINT.search(text)
    return found[1] if found else None


def _on_hub(name: Any) -> bool:
    return isinstance(name, str) and is_name_on_hub(name) and not Path(name).exists()


def _render(
    config: AdaPruneConfig,
    name: str,
    subfolder: str | None,
    metrics: dict[str, float],
    data_of: tuple[str | None, str | None, str | None],
    picture: str | None,
) -> ModelCard:
    dataset, part, split = data_of
    (base, description), pipeline = describe_base(config.base_model_name_or_path), pipeline_of(config)
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=dataset or "custom",
            dataset_name=" ".join(filter(None, (dataset or "custom", part))),
            dataset_config=part,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(float(value), 4),  # numpy scalars are no YAML
        )
        for metric, value in metrics.items()
    ]
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
        library_name="peft",
        model_name=name,
        pipeline_tag=pipeline,
        tags=["adaprune", "pruning", "sparse", "transformers"],
    )
    opener = auto_class(config.architecture) or ("AutoModel" if pipeline == "feature-extraction" else None)
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        begin=BEGIN,
        end=END,
        name=name,
        subfolder=subfolder,
        base=description,
        has_head=bool(config.head_tensors),
        has_base=bool(config.base_model_name_or_path),
        on_hub=base is not None,
        base_fingerprint=config.base_fingerprint,
        adapter_fingerprint=config.adapter_fingerprint,
        module="transformers" if opener else "peft",
        auto_class=opener or "AutoPeftModel",
        advice=speed_advice(config),
        grouped=bool(config.group_kinds),
        coded=bool(config.mask_bytes),
        report=sparsity_report(config),
        metrics=metrics,
        picture=picture,
        combination=config.combination,
        options={option: getattr(config, option) for option in _OPTIONS} | (config.training or {}),
    )
