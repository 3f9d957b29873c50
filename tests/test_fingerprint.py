import torch

from hf_adaprune.fingerprint import fingerprint, fingerprints_are_checked, skip_fingerprint_check


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, generator=generator), torch.randn(7, generator=generator)]


def test_a_bfloat16_copy_has_the_same_fingerprint() -> None:
    assert fingerprint(weights()) == fingerprint(weight.bfloat16() for weight in weights())


def test_any_other_value_shape_or_order_has_another() -> None:
    changed = weights()
    changed[1][6] *= 1.02
    reshaped = [weights()[0].view(3, 4), weights()[1]]
    different = {fingerprint(tensors) for tensors in (weights(), changed, reshaped, weights()[::-1])}
    assert len(different) == 4


def test_the_check_is_off_only_inside_its_context() -> None:
    with skip_fingerprint_check():
        assert not fingerprints_are_checked()
    assert fingerprints_are_checked()
