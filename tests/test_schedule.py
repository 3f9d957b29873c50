import pytest

from hf_adaprune.training.schedule import cubic_sparsity


def test_the_ramp_starts_at_nothing_and_stays_at_its_target() -> None:
    points = [cubic_sparsity(i / 100, 0.8, start=0.1, end=0.6) for i in range(101)]
    assert points[:11] == [0.0] * 11
    assert points[60:] == [0.8] * 41
    assert points == sorted(points)


@pytest.mark.parametrize(("progress", "expected"), [(0.25, 0.5 * (1 - 0.75**3)), (0.5, 0.4375), (1.0, 0.5)])
def test_the_ramp_is_cubic(progress: float, expected: float) -> None:
    assert cubic_sparsity(progress, 0.5) == pytest.approx(expected, abs=1e-15)
