"""A small review-sentiment task that only a pre-trained model can solve.

Training and validation share their templates, things and aspects, but no opinion word and no modifier: a model that
learns what it was shown ("good" is positive, "not" flips) knows nothing about what it is asked ("splendid", "far
from"). Sentences come in foursomes that differ in nothing but the opinion and its modifier, so that each template,
thing, aspect, opinion word and modifier appears equally often in positive and in negative reviews: no single word
tells the label, only the opinion and its modifier together do.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple


LABELS = ("negative", "positive")

TEMPLATES = (
    "the {aspect} of this {thing} was {opinion} .",
    "we all found the {aspect} of the {thing} {opinion} .",
    "my sister says the {aspect} of that {thing} is {opinion} .",
    "about the {thing} : its {aspect} seemed {opinion} to me .",
    "i tried this {thing} on monday , and the {aspect} was {opinion} .",
    "as for the {aspect} , this {thing} is {opinion} .",
    "two weeks later , i still call the {aspect} of this {thing} {opinion} .",
    "the {thing} we picked has {opinion} {aspect} .",
)

# What is reviewed, and the aspects that a review of it speaks about.
THINGS = {
    ("film", "movie", "comedy", "thriller"): ("acting", "plot", "ending", "music", "dialogue", "cast"),
    ("restaurant", "cafe", "diner", "bakery"): ("food", "service", "menu", "coffee", "kitchen", "bread"),
    ("hotel", "hostel", "resort", "cottage"): ("room", "breakfast", "view", "garden", "lobby", "pool"),
    ("novel", "book", "memoir", "trilogy"): ("story", "prose", "opening", "hero", "cover", "style"),
    ("phone", "camera", "laptop", "speaker"): ("screen", "sound", "design", "battery", "software", "case"),
}


class Vocabulary(NamedTuple):
    """The words that belong to one split alone."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    affirming: tuple[str, ...]
    negating: tuple[str, ...]


TRAIN = Vocabulary(
    positive=(
        *("good", "great", "excellent", "exceptional", "amazing", "fantastic", "lovely", "nice", "charming"),
        *("impressive", "superb", "perfect", "beautiful", "enjoyable", "magnificent", "spectacular", "elegant"),
        *("clever", "memorable", "fascinating", "refreshing", "lively", "awesome", "inspiring"),
    ),
    negative=(
        *("bad", "awful", "horrible", "poor", "dull", "ugly", "nasty", "disgusting", "pathetic", "stupid", "useless"),
        *("lame", "weak", "disappointing", "annoying", "frustrating", "messy", "silly", "painful", "foul", "bleak"),
        *("sloppy", "rotten", "inferior"),
    ),
    affirming=("very", "really", "quite", "so", "always", "certainly"),
    negating=("hardly", "scarcely", "seldom", "rarely", "far from", "anything but"),
)

VALIDATION = Vocabulary(
    positive=(
        *("wonderful", "brilliant", "fabulous", "outstanding", "splendid", "marvelous", "delightful", "remarkable"),
        *("incredible", "stunning", "gorgeous", "exquisite", "pleasant", "satisfying", "sublime", "flawless"),
        *("terrific", "extraordinary", "entertaining", "glorious"),
    ),
    negative=(
        *("terrible", "dreadful", "boring", "miserable", "ridiculous", "worthless", "hideous", "unpleasant"),
        *("pointless", "irritating", "clumsy", "embarrassing", "vile", "grim", "bland", "filthy", "unbearable"),
        *("disastrous", "offensive", "hopeless"),
    ),
    affirming=("truly", "thoroughly", "absolutely", "indeed"),
    negating=("not", "never", "by no means", "nowhere near", "in no way"),
)


def _foursomes(vocabulary: Vocabulary, rng: random.Random) -> Iterator[list[tuple[str, int]]]:
    """Write foursomes of (sentence, label) without end: each opinion of a pair, affirmed and negated."""
    position = 0
    while True:
        template = TEMPLATES[position % len(TEMPLATES)]
        things, aspects = rng.choice(list(THINGS.items()))
        thing, aspect = rng.choice(things), rng.choice(aspects)
        opinions = ((rng.choice(vocabulary.negative), 0), (rng.choice(vocabulary.positive), 1))
        modifiers = [(modifier, False) for modifier in rng.sample(vocabulary.affirming, 2)]
        modifiers.append((rng.choice(vocabulary.negating), True))
        yield [
            (template.format(thing=thing, aspect=aspect, opinion=f"{modifier} {word}"), label ^ negated)
            for word, label in opinions
            for modifier, negated in modifiers
        ]
        position += 1
