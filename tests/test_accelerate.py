"""One process or several: the same masks. What the processes do is in `ranks.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from accelerate.commands.config.config_args import load_config_from_file
from filelock import FileLock
from safetensors.torch import load_file

from hf_adaprune.masks import unpack_mask


CONFIG = ranks.EXAMPLES / "accelerate_configs" / "ddp.yaml"
RUNS = ("trainer", *ranks.LOOPS)
BY_HAND = ("replicated", "sharded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all of `ranks.py` in two processes, and in this one with batches as large what they are compared with.

    Once, even where pytest itself runs in several processes.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "ranks.lock"):
        folder = shared / "ranks"
        if not folder.exists():
            base = str(ranks.save_reviewer(folder / "base"))
            launch(base, folder / "two")
            alone = folder / "one"
            alone.mkdir()
            ranks.run_trainer(base, alone)
            ranks.run_calibration(base, alone)
            for name in ("plain", "bf16"):
                ranks.run_loop(name, base, alone)
    return folder


def launch(base: str, folder: Path) -> None:
    folder.mkdir()
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command += ["--main_process_port", "0", str(tests / "ranks.py"), base, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def masks(folder: Path, run: str, rank: int = 0) -> torch.Tensor:
    """Return all masks that a process ended with, as one."""
    packed = load_file(folder / f"{run}-rank{rank}.safetensors")
    return torch.cat([unpack_mask(bits, torch.Size([8 * bits.numel()])) for _, bits in sorted(packed.items())])


@pytest.mark.parametrize("path", sorted(CONFIG.parent.iterdir()), ids=lambda path: path.stem)
def test_a_configuration_of_accelerate_can_be_read(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type == ("FSDP" if path.stem == "fsdp2" else "MULTI_GPU")
    assert config.fsdp_config.get("fsdp_version") == (2 if path.stem == "fsdp2" else None)
    assert config.mixed_precision == ("bf16" if "bf16" in path.stem else "no")


@pytest.mark.parametrize("run", [*RUNS, *BY_HAND])
def test_processes_end_with_one_mask(run: str, folder: Path) -> None:
    assert torch.equal(masks(folder / "two", run, rank=0), masks(folder / "two", run, rank=1))


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_prune_what_one_does_with_the_same_batches(run: str, folder: Path) -> None:
    # Accumulated over two steps, or with activations computed twice, the gradient is that of the plain run.
    compared = masks(folder / "one", run if run in ("trainer", "bf16") else "plain")
    found = masks(folder / "two", run)
    assert found.count_nonzero() == compared.count_nonzero() == round(found.numel() / 2)
    assert (found == compared).float().mean() >= 0.995


@pytest.mark.parametrize("run", [*RUNS, *BY_HAND])
def test_what_one_process_saves_is_what_all_have(run: str, folder: Path) -> None:
    saved = load_file(folder / "two" / run / "adapter_model.safetensors")
    packed = load_file(folder / "two" / f"{run}-rank1.safetensors")
    assert len(packed) == 12
    for name, bits in packed.items():
        assert torch.equal(saved[f"base_model.model.{name}.adaprune_mask"], bits)


def test_the_inputs_of_all_processes_count(folder: Path) -> None:
    whole = load_file(folder / "one" / "moments-rank0.safetensors")
    for rank in range(2):
        moments = load_file(folder / "two" / f"moments-rank{rank}.safetensors")
        assert moments.keys() == whole.keys()
        assert {total.dim() for total in moments.values()} == {1, 2}
        for name, total in moments.items():
            squares, expected = (t if t.dim() == 1 else t.diagonal() for t in (total, whole[name]))
            torch.testing.assert_close(squares.sqrt(), expected.sqrt(), rtol=1e-5, atol=0)
            # Products of two different inputs may add up to nearly nothing.
            torch.testing.assert_close(total, whole[name], rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_processes_that_diverge_are_all_stopped(folder: Path) -> None:
    for rank in range(2):
        message = said(folder, "divergence", rank)
        assert message.startswith("After step 2 the 2 processes have different masks in ['")
        assert "layer.1.attention.self.key']: they would save different adapters." in message


def test_sharded_scores_make_the_masks_and_the_head_of_whole_ones(folder: Path) -> None:
    whole, sharded = (load_file(folder / "two" / run / "adapter_model.safetensors") for run in BY_HAND)
    assert whole.keys() == sharded.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert int(masks(folder / "two", "sharded").count_nonzero()) == 6656


def test_thresholds_over_shards_choose_what_thresholds_over_all_scores_do(folder: Path) -> None:
    assert [said(folder, "selection", rank) for rank in range(2)] == ["", ""]


def test_fsdp_of_the_first_version_is_refused(folder: Path) -> None:
    for rank in range(2):
        assert "are no longer a matrix but of shape" in said(folder, "flattened", rank)
        assert "Set `fsdp_version: 2`" in said(folder, "flattened", rank)


def said(folder: Path, scenario: str, rank: int) -> str:
    text: str = json.loads((folder / "two" / f"{scenario}-rank{rank}.json").read_text())
    return text
