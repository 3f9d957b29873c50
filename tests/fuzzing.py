"""Open adapters that have something wrong in them, by the thousand, and watch what comes of it."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mutations import CONFIG, WEIGHTS, Files, mutate
from peft import PeftModel, get_peft_model
from tiny import logits_of, make_model, train_masks

from hf_adaprune import AdaPruneConfig
from hf_adaprune.analysis import load_masks
from hf_adaprune.choices import MaskCodec
from hf_adaprune.errors import AdaPruneError
from hf_adaprune.storage.checks import run_checks
from hf_adaprune.storage.stored_adapter import read_adapter


SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
MAX_SECONDS = 5  # of computing
SLACK = 16 * 2**20  # bytes by which a process breathes whatever it does
HARD_LIMIT = 2 * 2**30


class EscapeError(BaseException):
    """Something was done that opening an adapter must never do. Not an `Exception`: nobody may swallow it."""


class HangError(BaseException):
    """Opening an adapter has taken too long."""


class Guard:
    """Watch a block for what opening an adapter must not do: run code, connect, write, take long, take memory."""

    forbidden = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")

    def __init__(self) -> None:
        self.active = False
        self.peak = 0  # bytes by which the last block made the process grow
        sys.addaudithook(self._watch)

    def _watch(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in self.forbidden or event in ("os.remove", "os.rename", "os.mkdir") or writes:
            self.active = False
            raise EscapeError(f"{event} {args}")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Watch a block."""
        before = signal.signal(signal.SIGPROF, _stop)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        start = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + HARD_LIMIT, limits[1]))
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        self.active = True
        try:
            yield
        finally:
            self.active = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
            resource.setrlimit(resource.RLIMIT_AS, limits)
            self.peak = _memory("VmHWM") - start


def _stop(*args: Any) -> None:
    raise HangError(f"more than {MAX_SECONDS} seconds")


def _memory(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise KeyError(what)


def _by_peft(base: Any, folder: str) -> Any:
    return PeftModel.from_pretrained(base, folder)


def _by_transformers(base: Any, folder: str) -> Any:
    base.load_adapter(folder)
    return base


CODECS: tuple[MaskCodec, ...] = ("packed-bits-lsb", "auto")
DOORS: tuple[Callable[[Any, str], Any], ...] = (_by_peft, _by_peft, _by_peft, _by_transformers)


class Fuzzer:
    """Make an adapter, and open copies of it that have something wrong in them.

    Args:
        folder (`Path`): An empty folder to work in.
        seed (`int`): What is done to the copies depends on it alone.

    Attributes:
        outcomes (`Counter`): How many cases there were of each kind with each outcome: `"equal"`, a typed error, or
            what must not be.
        faults (`dict[int, str]`): The numbers of the cases that came out as they must not, and how.
        opened_unread (`int`): How many were opened though they could not be read.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed = folder / "adapter", seed
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.faults: dict[int, str] = {}
        self.opened_unread = 0
        self.guard = Guard()
        names = {number: f"label {number}" for number in range(3)}
        labels: dict[str, Any] = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        trained = make_model("bert", "sequence", **SIZES, **labels)
        # With a head of its own: of the adapter's size, and of another, so that one has to be built.
        bases = [make_model("bert", "sequence", **SIZES, num_labels=number) for number in (3, 2)]
        for base in bases:
            base.bert.load_state_dict(trained.bert.state_dict())
        self.pickled = [pickle.dumps(base) for base in bases]  # several times as fast as `copy.deepcopy`
        model: Any = get_peft_model(trained, AdaPruneConfig())
        train_masks(model, steps=2)
        self.intact: list[Files] = []
        for codec in CODECS:
            model.peft_config["default"].mask_codec = codec
            model.save_pretrained(str(self.folder))
            self.intact.append({name: (self.folder / name).read_bytes() for name in (CONFIG, WEIGHTS)})
        self.logits, self.labels = logits_of(model), names
        self.on_disk: Files = {}
        self.max_peak = HARD_LIMIT
        peaks = []
        for number in range(2 * len(DOORS) * len(CODECS)):
            self._write(self.intact[number % len(CODECS)])
            outcome = self._judge(number)
            assert outcome == "equal", f"the intact adapter does not open: {outcome}"
            peaks.append(self.guard.peak)
        self.max_peak = 2 * max(peaks) + SLACK

    def run(self, number: int) -> str:
        """Open the copy of a number; return what came of it."""
        kind, files = mutate(self.intact[number % len(CODECS)], self.seed, number)
        self._write(files)
        outcome = self._judge(number)
        self.outcomes[kind, outcome.partition(":")[0]] += 1
        if ":" in outcome:
            self.faults[number] = f"{kind}: {outcome}"
        return outcome

    def _write(self, files: Files) -> None:
        for name in self.on_disk.keys() | files.keys():
            path, content = self.folder / name, files.get(name)
            if name in files and self.on_disk.get(name, b"") == content and path.exists():
                continue
            # Written anew: to truncate a file is slow on some file systems.
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
            if name in files and content is None:
                path.mkdir()
            elif content is not None:
                path.write_bytes(content)
        self.on_disk = files

    def _judge(self, number: int) -> str:
        """Return what came of reading the adapter or, if nothing was wrong with it then, of opening it.

        Of those that cannot be read, every fifth is opened all the same. Loaders may meet what is wrong before any
        code of the package does: then it is enough that they fail, with an error of their own.
        """
        read = self._outcome(lambda: self._read(number))
        if ":" in read or (read != "equal" and number % 5):
            return read
        door, which = DOORS[number // len(CODECS) % len(DOORS)], number // len(CODECS) // len(DOORS) % 2
        base = pickle.loads(self.pickled[which])
        opened = self._outcome(lambda: self._open(door, base))
        if read == "equal":
            return opened
        self.opened_unread += 1
        kind, is_fault, _ = opened.partition(":")
        return opened if is_fault and kind != "crash" else read

    def _outcome(self, action: Callable[[], str]) -> str:
        try:
            with warnings.catch_warnings(), self.guard():
                warnings.simplefilter("ignore")
                outcome = action()
        except AdaPruneError as error:
            outcome = type(error).__name__
        except EscapeError as error:
            outcome = f"escape: {error}"
        except HangError as error:
            outcome = f"hang: {error}"
        except Exception as error:
            outcome = f"crash: {type(error).__name__} {error}"
        if self.guard.peak > self.max_peak:
            outcome = f"memory: {self.guard.peak} bytes"
        return outcome

    def _read(self, number: int) -> str:
        read_adapter(self.folder)
        if number % 4 == 0 and number % len(CODECS) == 0:
            load_masks(self.folder)
        return "equal"

    def _open(self, door: Callable[[Any, str], Any], base: Any) -> str:
        model = door(base, str(self.folder))
        run_checks(base)
        if not isinstance(base.peft_config["default"], AdaPruneConfig):
            return "of another method"
        config: Any = model.config
        same = torch.equal(logits_of(model), self.logits) and config.id2label == self.labels
        return "equal" if same else "other model: it opens"
