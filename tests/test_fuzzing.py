"""Nothing that is wrong in an adapter's files goes unseen, or gets further than an error of ours."""

from __future__ import annotations

import itertools
import mmap
import sys
from pathlib import Path

import pytest
from fuzzing import EscapeError, Fuzzer, Guard, HangError
from mutations import MUTATIONS


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by what Linux tells of a process")


def test_ten_thousand_damaged_adapters_are_refused_or_equal_to_the_intact_one(tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path)
    for number in range(10_000):
        fuzzer.run(number)
    assert not fuzzer.faults
    assert {kind for kind, _ in fuzzer.outcomes} == {mutation.__name__ for mutation in MUTATIONS}
    assert 100 < sum(count for (_, outcome), count in fuzzer.outcomes.items() if outcome == "equal") < 2_000


def test_what_must_not_be_done_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard()
    with pytest.raises(EscapeError, match="open"), guard():
        (tmp_path / "mark").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr("fuzzing.MAX_SECONDS", 0.05)  # not for the next block, which needs its time
        with pytest.raises(HangError), guard():
            all(number >= 0 for number in itertools.count())
    with guard():
        # Pages of its own: what earlier tests have freed, and the process has kept, would be used again.
        filled = mmap.mmap(-1, 2**25 + 2**20)
        for page in range(0, len(filled), mmap.PAGESIZE):
            filled[page] = 1
    assert guard.peak >= 2**25
    with pytest.raises(MemoryError), guard():
        bytes(2**40)
