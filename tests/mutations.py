"""What can be wrong with the two files of a stored adapter: by accident, or by somebody's intention."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from typing import Any


CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# The names of an adapter's files, and what is in them; `None` stands for a folder of that name.
Files = dict[str, bytes | None]


class Trap:
    """Run a command wherever it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


# Matched against a dotted name, it takes longer than anybody waits.
SLOW_PATTERN = r"(\w+\.?)+ "
PATHS = ("../../../etc/passwd", "/etc/passwd", "..", "", "\0", "con", "a/b/c", "~", "file:///etc/passwd")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 10**9, 10**12, 2**63, 10**30, 0.5, -0.5, 1e308, float("inf"), float("nan")),
    *(
        *PATHS,
        SLOW_PATTERN,
        [SLOW_PATTERN],
        "all-linear",
        "neuron",
        "2:4",
        "layer_average",
        "CAUSAL_LM",
        "x" * 100_000,
    ),
    *([], [None], [[]], {}, {"": None}, {"0": "a"}, ["query"], [-1], [0, 10**12], ["bert"], ["embeddings"], [""]),
)
# Which a base's own configuration obeys: sizes to allocate, layers to build, code to fetch.
TRICKS: dict[str, Any] = {
    "num_hidden_layers": 10**9,
    "hidden_size": 10**9,
    "vocab_size": 10**12,
    "num_labels": 10**9,
    "intermediate_size": 2**40,
    "attn_implementation": "somebody/kernel",
    "_attn_implementation": "somebody/kernel",
    "auto_map": {"AutoModel": "somebody/code--modeling.Model"},
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "torch_dtype": "__class__",
    "dtype": "nn",
    "architectures": ["pipeline"],
    "_name_or_path": "/etc",
    "__class__": "x",
}


def _read(files: Files, name: str) -> bytes:
    content = files[name]
    assert content is not None
    return content


def _edit_bytes(rng: random.Random, content: bytes, start: int, end: int) -> bytes:
    """Change, insert or delete one to four bytes between two positions."""
    edited = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(start, end)
        what = rng.randrange(4)
        if what == 0:
            edited[position : position + 1] = b""
        elif what == 1:
            edited[position:position] = bytes([rng.randrange(256)])
        elif what == 2:
            edited[position : position + 1] = bytes([edited[min(position, len(edited) - 1)] ^ 1 << rng.randrange(8)])
        else:
            edited[position : position + 1] = rng.choice([b'"', b"{", b"}", b",", b"0", b"9", b"\\", b"\0", b"["])
    return bytes(edited)


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and its body."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: str | bytes, body: bytes) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + body


# The file of weights


def header_bytes(rng: random.Random, files: Files) -> None:
    content = _read(files, WEIGHTS)
    (length,) = struct.unpack("<Q", content[:8])
    files[WEIGHTS] = _edit_bytes(rng, content, 8, 8 + length)


def header_length(rng: random.Random, files: Files) -> None:
    content = _read(files, WEIGHTS)
    (length,) = struct.unpack("<Q", content[:8])
    sizes = (0, 1, 7, length - 1, length + 1, len(content), 10**8, 10**8 + 1, 2**31, 2**32, 2**63, 2**64 - 1)
    files[WEIGHTS] = struct.pack("<Q", rng.choice([*sizes, rng.getrandbits(64)])) + content[8:]


def body_bytes(rng: random.Random, files: Files) -> None:
    content = bytearray(_read(files, WEIGHTS))
    _, body = _split(bytes(content))
    for _ in range(rng.choice([1, 1, 8])):
        content[-rng.randint(1, len(body))] ^= 1 << rng.randrange(8)
    files[WEIGHTS] = bytes(content)


def file_size(rng: random.Random, files: Files) -> None:
    name = rng.choice([CONFIG, WEIGHTS])
    content = _read(files, name)
    longer = content + rng.choice([b"\0", b"}", bytes(100), content])
    files[name] = rng.choice([content[: rng.randrange(len(content))], longer])


def header_entry(rng: random.Random, files: Files) -> None:
    """Give an entry of the header another type, shape, place or name; the header stays JSON."""
    header, body = _split(_read(files, WEIGHTS))
    key = rng.choice(sorted(header))
    other = rng.choice(sorted(header))
    what = rng.randrange(8)
    if what == 0:
        del header[key]
    elif what == 1:
        header[rng.choice([*PATHS, key + "x", "x" * 10_000])] = header.pop(key)
    elif what == 2:
        header[key], header[other] = header[other], header[key]
    elif what == 3:
        header[rng.choice([*PATHS, "__metadata__"])] = rng.choice([header[key], *VALUES])
    elif what == 4:
        header[key] = rng.choice(VALUES)
    else:
        entry = header[key]
        field = rng.choice(sorted(entry))
        huge = [10**12], [2**63, 2], [0], [-1], [1] * 1000, [0, 10**18], [0, 2**64], "U8", "I8", "BOOL", "F64", "BF16"
        turned = entry[field][::-1] if isinstance(entry[field], list) else entry[field]
        entry[field] = rng.choice([turned, *huge, *VALUES])
    files[WEIGHTS] = _joined(json.dumps(header), body)


def header_shape(rng: random.Random, files: Files) -> None:
    """Turn a tensor on its side, or read it as another type of the same size: the file is a valid one."""
    header, body = _split(_read(files, WEIGHTS))
    entry = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
    if rng.random() < 0.5:
        entry["shape"] = rng.choice([entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1]])
    else:
        entry["dtype"] = {"F32": ["I32", "U32"], "U8": ["I8", "BOOL", "F8_E4M3"]}[entry["dtype"]][rng.randrange(2)]
    files[WEIGHTS] = _joined(json.dumps(header), body)


def header_twice(rng: random.Random, files: Files) -> None:
    """Have a name twice in the header, once with what belongs to another."""
    header, body = _split(_read(files, WEIGHTS))
    key, other = rng.sample(sorted(header), 2)
    extra = f"{json.dumps(key)}: {json.dumps(header[other])}"
    text = json.dumps(header)
    files[WEIGHTS] = _joined(rng.choice([text[:-1] + f", {extra}}}", f"{{{extra}, {text[1:]}"]), body)


def swapped_tensors(rng: random.Random, files: Files) -> None:
    """Exchange two tensors of one shape."""
    header, body = _split(_read(files, WEIGHTS))
    by_shape: dict[str, list[str]] = {}
    for key, entry in header.items():
        by_shape.setdefault(str(entry.get("shape")), []).append(key)
    one, other = rng.sample(rng.choice([keys for keys in by_shape.values() if len(keys) > 1]), 2)
    header[one], header[other] = header[other], header[one]
    files[WEIGHTS] = _joined(json.dumps(header), body)


def surplus_tensor(rng: random.Random, files: Files) -> None:
    """Add an entry that a model would take: a weight of the base, scores, a head of another name."""
    header, body = _split(_read(files, WEIGHTS))
    mask = rng.choice([key for key in sorted(header) if key.endswith("adaprune_mask")])
    module = mask.removesuffix(".adaprune_mask")
    name, shape = rng.choice(
        [
            (f"{module}.base_layer.bias", [16]),
            (f"{module}.base_layer.weight", [16, 16]),
            (f"{module}.adaprune_scores.default", [16, 16]),
            (f"{module}.adaprune_scores", [16, 16]),
            ("base_model.model.bert.embeddings.LayerNorm.weight", [16]),
            ("base_model.model.classifier.original_module.bias", [2]),
            ("bert.embeddings.LayerNorm.weight", [16]),
            ("x", [0]),
        ]
    )
    size = 4
    for length in shape:
        size *= length
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + size]}
    files[WEIGHTS] = _joined(json.dumps(header), body + rng.randbytes(size))


# The configuration


def config_bytes(rng: random.Random, files: Files) -> None:
    content = _read(files, CONFIG)
    files[CONFIG] = _edit_bytes(rng, content, 0, len(content))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return every container in a JSON tree with each of its keys."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [place for key in keys for place in ((tree, key), *_places(tree[key]))]


def config_value(rng: random.Random, files: Files) -> None:
    """Put a value of any type into any place."""
    config = json.loads(_read(files, CONFIG))
    container, key = rng.choice([*_places(config), *((config, key) for key in config)])
    container[key] = rng.choice(VALUES)
    files[CONFIG] = json.dumps(config).encode()


def config_field(rng: random.Random, files: Files) -> None:
    """Drop, rename, add, exchange or double a field."""
    config = json.loads(_read(files, CONFIG))
    one, other = rng.sample(sorted(config), 2)
    what = rng.randrange(5)
    if what == 0:
        del config[one]
    elif what == 1:
        config[rng.choice([*PATHS, one.upper(), "runtime_config", "__class__", "self", "kwargs"])] = config.pop(one)
    elif what == 2:
        config[rng.choice(["self", "is_stored", "masks_loaded", "_problems", "peft_version", "r"])] = rng.choice(
            VALUES
        )
    elif what == 3:
        config[one], config[other] = config[other], config[one]
    text = json.dumps(config)
    if what == 4:
        text = f"{text[:-1]}, {json.dumps(one)}: {json.dumps(config[other])}}}"
    files[CONFIG] = text.encode()


def model_config(rng: random.Random, files: Files) -> None:
    """Write into the configuration of the base what it would obey, were it built from that."""
    config = json.loads(_read(files, CONFIG))
    for key in rng.sample(sorted(TRICKS), rng.randint(1, 3)):
        config["model_config"][key] = TRICKS[key]
    files[CONFIG] = json.dumps(config).encode()


def config_text(rng: random.Random, files: Files) -> None:
    """Replace the whole text, or what is in one field of it, by JSON that wears down its reader."""
    deep = rng.choice([10, 500, 20_000])
    texts = [
        "[" * deep,
        "[" * deep + "]" * deep,
        '{"a":' * deep + "1" + "}" * deep,
        "9" * 5_000,
        "NaN",
        "[]",
        "1",
        "{}",
    ]
    text = rng.choice([*texts, "null", '"x"', "\ufeff{}", '{"peft_type": "LORA"}', '{"peft_type": ["ADAPRUNE"]}'])
    config = json.loads(_read(files, CONFIG))
    if rng.random() < 0.5:
        config[rng.choice(sorted(config))] = "@"
        text = json.dumps(config).replace('"@"', text)
    files[CONFIG] = text.encode(rng.choice(["utf-8", "utf-8", "utf-16"]))


def peft_method(rng: random.Random, files: Files) -> None:
    """Say that it is an adapter of another method, or of another kind of model."""
    config = json.loads(_read(files, CONFIG))
    methods: list[Any] = [
        "LORA",
        "IA3",
        "PROMPT_TUNING",
        "ADALORA",
        "OFT",
        "VERA",
        "X_LORA",
        "adaprune",
        "",
        None,
        {},
        5,
    ]
    tasks: list[Any] = ["CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "x", [], 5]
    if rng.random() < 0.5:
        config["peft_type"] = rng.choice(methods)
    else:
        config["task_type"] = rng.choice(tasks)
    files[CONFIG] = json.dumps(config).encode()


# The folder


def files_missing(rng: random.Random, files: Files) -> None:
    """Take a file away, or put something else in its place."""
    name = rng.choice([CONFIG, WEIGHTS])
    what = rng.randrange(5)
    if what == 0:
        del files[name]
    elif what == 1:
        files[name] = None
    elif what == 2:
        files[CONFIG], files[WEIGHTS] = files[WEIGHTS], files[CONFIG]
    elif what == 3:
        files[name] = pickle.dumps({"mask": Trap()})
    else:
        files[PICKLE] = pickle.dumps({"mask": Trap()})
        del files[WEIGHTS]


# Of each kind how many there are, in proportion: most of those that can be told without a model.
MUTATIONS: dict[Callable[[random.Random, Files], None], int] = {
    header_bytes: 26,
    header_entry: 18,
    header_length: 6,
    header_twice: 3,
    header_shape: 1,
    body_bytes: 2,
    swapped_tensors: 1,
    surplus_tensor: 6,
    file_size: 9,
    config_bytes: 7,
    config_value: 6,
    config_field: 3,
    config_text: 8,
    model_config: 1,
    peft_method: 1,
    files_missing: 2,
}


def mutate(intact: Files, seed: int, number: int) -> tuple[str, Files]:
    """Return the kind of a case, and the files of an adapter with that done to them; the same for the same numbers."""
    rng = random.Random(seed * 1_000_003 + number)
    (mutation,) = rng.choices(list(MUTATIONS), list(MUTATIONS.values()))
    files = dict(intact)
    mutation(rng, files)
    return mutation.__name__, files
