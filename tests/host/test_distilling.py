"""What distilling needs: the host's schedule, 8-bit weights, LoRA files that the host takes; and what a card needs."""

import sys

import comfy.model_sampling
import comfy.samplers
import pytest
import torch

from testbed.beds import BEDS, MODELS
from testbed.server import LORAS, ROOT
from testbed.train import fp8, lora

sys.path.insert(0, str(ROOT / "testbed" / "train"))
import distill

LARGEST_SUM = 60e6


def schedule(steps: int, shift: float) -> torch.Tensor:
    """The host's own sigmas."""
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=shift)
    return comfy.samplers.calculate_sigmas(sampling, "simple", steps)


@pytest.mark.parametrize(("steps", "shift"), [(4, 3.0), (8, 3.0), (8, 8.0), (20, 8.0)])
def test_a_student_walks_over_the_sigmas_of_the_host(steps, shift):
    torch.testing.assert_close(distill.simple_sigmas(steps, shift), schedule(steps, shift), atol=1e-6, rtol=0)


def test_the_teacher_steps_as_the_finer_schedule_does():
    coarse, fine = schedule(8, 3.0), schedule(24, 3.0)
    parts = distill.between(coarse[2], coarse[3], 3, 3.0)
    torch.testing.assert_close(parts, fine[6:10], atol=2e-3, rtol=0)


def test_weights_in_8_bits_come_back_nearly_the_same():
    weights = {"a.weight": torch.randn(32, 16) / 30, "a.bias": torch.randn(32), "b": torch.randn(5)}
    back = fp8.widen(fp8.squeeze(weights, {"a"}))
    assert set(back) == set(weights)
    assert (back["a.weight"] - weights["a.weight"]).norm() < 0.04 * weights["a.weight"].norm()
    torch.testing.assert_close(back["a.bias"], weights["a.bias"], atol=2e-3, rtol=0)


def test_a_lora_starts_without_effect_and_only_it_is_trained():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)), torch.randn(3, 8)
    before = model(x)
    weights = lora.insert(model, "^0$", 2)
    assert set(weights) == {"diffusion_model.0.lora_up.weight", "diffusion_model.0.lora_down.weight"}
    torch.testing.assert_close(model(x), before)
    assert [w.shape for w in model.parameters() if w.requires_grad] == [(2, 8), (6, 2)]


@pytest.mark.parametrize("name", [name for name, bed in BEDS.items() if bed.base])
def test_the_host_applies_every_part_of_a_lora(name):
    bed = BEDS[name]
    parts = len(comfy.utils.load_torch_file(str(bed.file)))
    assert len(bed.load().patches) == parts / 2
    assert bed.file.parent in LORAS


@pytest.mark.parametrize("name", list(BEDS))
def test_a_bed_has_a_card_with_pictures_and_losses(name):
    folder = BEDS[name].file.parent
    assert (folder / "README.md").read_text().startswith(f"# {BEDS[name].model}\n")
    assert (folder / "contact.jpg").is_file()
    assert (folder / "loss.csv").read_text().count("\n") > 5


def test_the_weights_of_all_models_together_are_small():
    assert sum(file.stat().st_size for file in MODELS.glob("*/*.safetensors")) <= LARGEST_SUM
