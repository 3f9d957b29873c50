"""A small review-sentiment task that only a pre-trained network can solve.

Training and validation share templates, things and aspects, but no opinion word and no modifier: a network that knows
only the training words ("good" is positive, "hardly" reverses it) cannot classify the validation words ("splendid",
"by no means"). The sentences come in groups of six that differ only in the opinion and its modifier:

    The plot of this film was very good.      positive
    The plot of this film was always good.    positive
    The plot of this film was hardly good.    negative
    The plot of this film was very dull.      negative
    The plot of this film was always dull.    negative
    The plot of this film was hardly dull.    positive

Templates, things, aspects and modifiers, and with them length and negation, are thus equally frequent in positive and
in negative reviews. A model that understands opinions but no modifiers is right on two sentences in three.
"""

import random
from typing import NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value


GROUP_SIZE = 6
MAX_REVIEWS = 30_000  # of about 300,000 possible ones, so that new ones are still sampled quickly

TEMPLATES = (
    "The {aspect} of this {thing} was {opinion}.",
    "We all found the {aspect} of the {thing} {opinion}.",
    "My sister calls the {aspect} of this {thing} {opinion}.",
    "About that {thing}: its {aspect} is {opinion}.",
    "To me, the {thing} and its {aspect} seemed {opinion}.",
    "As for the {aspect}, this {thing} is {opinion}.",
    "Everyone says the {aspect} of that {thing} is {opinion}.",
    "I tried the {thing} today; its {aspect} was {opinion}.",
)

# The things that are reviewed, and the aspects that their reviews mention.
THINGS = {
    ("film", "movie", "comedy", "thriller"): ("acting", "plot", "ending", "music", "dialogue", "cast"),
    ("restaurant", "cafe", "diner", "bakery"): ("food", "service", "menu", "coffee", "kitchen", "bread"),
    ("hotel", "hostel", "resort", "cottage"): ("room", "breakfast", "view", "garden", "lobby", "pool"),
    ("novel", "book", "memoir", "trilogy"): ("story", "prose", "opening", "hero", "cover", "style"),
    ("phone", "camera", "laptop", "speaker"): ("screen", "sound", "design", "battery", "software", "case"),
}


class Vocabulary(NamedTuple):
    """The words and phrases that occur in one split only."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    affirming: tuple[str, ...]
    negating: tuple[str, ...]


def _listed(text: str) -> tuple[str, ...]:
    """Split a comma-separated list that may span several lines."""
    return tuple(" ".join(text.split()).split(", "))


# Each opinion is one token of BERT's vocabulary, so that no subword such as "un" or "##less" is common to both splits.
TRAIN = Vocabulary(
    positive=_listed(
        """good, great, excellent, exceptional, amazing, fantastic, lovely, nice, charming, elegant, impressive,
        superb, perfect, beautiful, enjoyable, magnificent, spectacular, clever, memorable, fascinating, refreshing,
        lively, awesome, inspiring"""
    ),
    negative=_listed(
        """bad, awful, horrible, poor, dull, ugly, nasty, disgusting, pathetic, stupid, useless, lame, weak,
        disappointing, annoying, frustrating, messy, silly, painful, foul, bleak, sloppy, rotten, inferior"""
    ),
    affirming=("very", "really", "quite", "so", "always", "certainly"),
    negating=("hardly", "scarcely", "seldom", "rarely", "far from", "anything but"),
)
VALIDATION = Vocabulary(
    positive=_listed(
        """wonderful, brilliant, fabulous, outstanding, splendid, marvelous, delightful, remarkable, incredible,
        stunning, gorgeous, exquisite, pleasant, satisfying, sublime, flawless, terrific, extraordinary, entertaining,
        glorious"""
    ),
    negative=_listed(
        """terrible, dreadful, boring, miserable, ridiculous, worthless, hideous, unpleasant, pointless, irritating,
        clumsy, embarrassing, vile, grim, bland, filthy, unbearable, crude, offensive, hopeless"""
    ),
    affirming=("truly", "thoroughly", "absolutely", "indeed", "extremely"),
    negating=("not", "never", "by no means", "nowhere near", "in no way"),
)


def make_reviews(num_train: int = 1200, num_validation: int = 600, seed: int = 0) -> DatasetDict:
    """Generate the reviews of both splits.

    Args:
        num_train (`int`): Number of training sentences, a multiple of 6 in [6, 30000].
        num_validation (`int`): Number of validation sentences, a multiple of 6 in [6, 30000].
        seed (`int`): Seed of the sentences and their order. A split's sentences do not depend on the other's size.

    Returns:
        `datasets.DatasetDict`: The splits `train` and `validation`, each with the columns `sentence` (a string) and
        `label` (0 is negative, 1 positive). Labels are balanced, and no sentence occurs twice.

    Raises:
        ValueError: If `num_train` or `num_validation` is not such a multiple.

    Example:

        >>> make_reviews()["train"][0]
    """
    sizes = {"num_train": num_train, "num_validation": num_validation}
    problems = [
        f"`{name}` must be a multiple of {GROUP_SIZE} in [{GROUP_SIZE}, {MAX_REVIEWS}], got {size}."
        for name, size in sizes.items()
        if size % GROUP_SIZE or not GROUP_SIZE <= size <= MAX_REVIEWS
    ]
    if problems:
        raise ValueError(" ".join(problems))
    return DatasetDict(
        train=_split(TRAIN, num_train, random.Random(f"train {seed}")),
        validation=_split(VALIDATION, num_validation, random.Random(f"validation {seed}")),
    )


def _split(vocabulary: Vocabulary, num_reviews: int, rng: random.Random) -> Dataset:
    """Generate groups of sentences until there are enough, and shuffle them."""
    reviews: dict[str, int] = {}
    while len(reviews) < num_reviews:
        group = _group(vocabulary, rng)
        if reviews.keys().isdisjoint(group):
            reviews.update(group)
    sentences = list(reviews)
    rng.shuffle(sentences)
    return Dataset.from_dict(
        {"sentence": sentences, "label": [reviews[sentence] for sentence in sentences]},
        features=Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])}),
    )


def _group(vocabulary: Vocabulary, rng: random.Random) -> dict[str, int]:
    """Map the sentences of a new group to labels: two opinions, each with two affirming and one negating modifier."""
    things, aspects = rng.choice(list(THINGS.items()))
    template, thing, aspect = rng.choice(TEMPLATES), rng.choice(things), rng.choice(aspects)
    opinions = [(rng.choice(vocabulary.negative), 0), (rng.choice(vocabulary.positive), 1)]
    modifiers = [(modifier, 0) for modifier in rng.sample(vocabulary.affirming, 2)]
    modifiers.append((rng.choice(vocabulary.negating), 1))
    return {
        template.format(thing=thing, aspect=aspect, opinion=f"{modifier} {opinion}"): label ^ flips
        for opinion, label in opinions
        for modifier, flips in modifiers
    }
