"""What a run tells about itself, and the measures of quality."""

import json
import math

import pytest
import torch

from fastercache_core import messages
from fastercache_core.law import Law
from fastercache_core.metrics import latent_psnr, psnr, ssim
from fastercache_core.report import EvaluationRecord, RunReport, full_text, short_line, summary_line

LAW = Law(30.0, between=3.0, within=5.0)


def report() -> RunReport:
    records = [
        EvaluationRecord(0, 1.0, {"cond": "computed", "uncond": "computed"}, 2, 2, 0.1),
        EvaluationRecord(1, 0.5, {"cond": "reused", "uncond": "estimated"}, 1, 2, 0.05),
        EvaluationRecord(2, 0.2, {"cond": "predicted", "uncond": "predicted"}, 0, 2, 0.01),
    ]
    result = RunReport({"settings": "test", "sampler": "euler"}, records, 0.16, {"cpu": 1_000_000})
    result.note("because")
    result.note("because")
    return result


def actions_of(*evaluations: dict[str, str]) -> dict[str, int]:
    """Evaluations by action, of records with these actions."""
    records = [EvaluationRecord(i, 1.0, actions) for i, actions in enumerate(evaluations)]
    return RunReport(evaluations=records).totals()["evaluations"]


def test_totals_count_rows_and_actions():
    totals = report().totals()
    assert totals["evaluations"] == {"computed": 1, "estimated+reused": 1, "predicted": 1}
    assert (totals["rows"], totals["rows_full"], totals["cost"]) == (3, 6, 0.5)


def test_an_evaluation_counts_as_what_skipped_most_of_it():
    assert actions_of({"cond": "computed", "uncond": "estimated"}) == {"estimated": 1}
    assert actions_of({"cond": "reused", "uncond": "computed"}, {"cond": "mixed", "uncond": "mixed"}) == {
        "reused": 1,
        "mixed": 1,
    }
    assert actions_of({"cond": "predicted", "uncond": "mixed"}) == {"predicted": 1}
    assert actions_of({}) == {"computed": 1}, "an evaluation of which nothing is known"


def test_rows_of_probes_are_part_of_the_cost():
    computed = EvaluationRecord(0, 1.0, {"cond": "computed"}, rows=4, rows_full=2, probe_rows=2)
    predicted = EvaluationRecord(1, 0.5, {"cond": "predicted"}, rows=0, rows_full=2)
    totals = RunReport(evaluations=[computed, predicted]).totals()
    assert (totals["rows"], totals["probe_rows"], totals["rows_full"], totals["cost"]) == (4, 2, 4, 1.0)


def test_report_is_json_with_its_version_first_and_each_reason_once():
    data = json.loads(json.dumps(report().as_dict()))
    assert list(data) == ["version", "run", "evaluations", "totals", "notes"]
    assert data["version"] == 2 and data["notes"] == ["because"]
    assert data["evaluations"][1]["actions"] == {"cond": "reused", "uncond": "estimated"}


def test_lines_for_people_say_what_was_skipped_and_why_not_more():
    data = report().as_dict()
    assert short_line(data) == (
        "50% of the network rows run, in part at 1 of 3 evaluations (1 computed, 1 estimated+reused, 1 predicted)"
    )
    assert "3 of 6 rows" in summary_line(data) and "because" in summary_line(data)
    assert full_text(data).count("\n") == 5


def test_the_peak_of_memory_is_kept_by_device():
    class Holder:
        def __init__(self, *sizes: int) -> None:
            self.held = [torch.zeros(size) for size in sizes]

        def tensors(self) -> list[torch.Tensor]:
            return self.held

    run = RunReport()
    for holders in ([Holder(10, 5), Holder(1)], [Holder(3)]):
        run.note_memory(holders)
    assert run.totals()["peak_cache_bytes"] == {"cpu": 16 * 4}


def test_psnr_is_twenty_decibels_for_a_tenth_of_the_peak():
    a = torch.zeros(2, 3, 16, 16)
    assert psnr(a, a + 0.1).tolist() == pytest.approx([20.0, 20.0])
    assert math.isinf(psnr(a, a)[0])


def test_latents_are_compared_in_their_own_units():
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    full = noise * torch.tensor([0.5, 8.0]).reshape(2, 1, 1, 1)
    off = full + 0.04 * full.std((1, 2, 3), keepdim=True)  # a hundredth of four standard deviations
    assert latent_psnr(off, full).tolist() == pytest.approx([40.0, 40.0])
    assert math.isinf(latent_psnr(full, full)[0])


def test_a_person_reads_how_close_the_picture_is_and_what_it_is_calibrated_by():
    report = RunReport(run={"expected": [47.6, 40.1], "psnr": [44.0, 45.0]}).as_dict()
    assert "expected: about 48 dB PSNR to full sampling, in nine of ten pictures above 40" in full_text(report)
    assert "measured: 44.5 dB PSNR to full sampling, of the latent" in full_text(report)
    assert not {"expected:", "measured:"} & set(full_text(RunReport().as_dict()).split())


@pytest.mark.parametrize(
    "constants, change",
    [([36.0] * 9, "5 dB bolder"), ([15.0, 17.0], "5 dB more careful"), ([LAW.mean - 1], "no bolder")],
)
def test_a_calibration_is_told_in_plain_words(constants, change):
    said = messages.calibrated("euler, 13 to 24 steps", LAW.learnt(constants), LAW)
    count = "1 picture" if len(constants) == 1 else f"{len(constants)} pictures"
    assert said == (
        f"calibrated on this model, euler, 13 to 24 steps, {count}: {change} than for a model not seen before"
    )


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(1, 3, 32, 32, generator=g)
    noise = torch.randn(1, 3, 32, 32, generator=g)
    values = [ssim(a, a + k * noise).item() for k in (0.0, 0.05, 0.2)]
    assert values[0] == pytest.approx(1.0) and values[0] > values[1] > values[2]


def test_ssim_agrees_with_the_reference_implementation():
    reference = pytest.importorskip("torchmetrics.functional.image")
    g = torch.Generator().manual_seed(1)
    a = torch.rand(2, 3, 48, 40, generator=g)
    b = (a + 0.1 * torch.randn(2, 3, 48, 40, generator=g)).clamp(0, 1)
    theirs = reference.structural_similarity_index_measure(a, b, data_range=1.0)
    assert ssim(a, b).mean().item() == pytest.approx(theirs.item(), abs=2e-3)
