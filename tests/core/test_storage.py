"""Features at rest: what they cost in memory and in precision."""

import pytest
import torch

from fastercache_core.features.storage import DTYPES, Storage, StorageSettings

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def storage(dtype="native", device=None, outputs=1):
    return Storage(StorageSettings(dtype=dtype, device=device), outputs)


def features(dtype):
    """Rows of very different sizes, among them one of zeros."""
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))
    return (x * torch.tensor([0.0, 1e-2, 0.3, 1.0, 30.0, 400.0])[:, None]).to(dtype)


def allowed(at_rest, x):
    """The promised largest error of every number of `x`."""
    rounding = torch.finfo(x.dtype).eps  # of the way back
    if at_rest == "native":
        return torch.zeros_like(x, dtype=torch.float64)
    if at_rest == "fp16":
        return x.abs().double() * 2**-11 + 2**-25 if x.dtype == torch.float32 else x.double() * 0
    row = x.abs().amax(-1, keepdim=True).double()
    return x.abs().double() * (2**-4 + 2**-7 + rounding) + row * 2**-18


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("at_rest", DTYPES)
def test_what_comes_back_is_what_was_put_within_the_promised_error(at_rest, dtype, device):
    x, rest = features(dtype), storage(at_rest, device)
    back = rest.get(rest.put(x))
    assert (back.dtype, back.device, back.shape) == (x.dtype, x.device, x.shape)
    error = (back.double() - x.double()).abs()
    assert (error <= allowed(at_rest, x)).all(), (error / x.double().abs().clamp_min(1e-30)).max()


@pytest.mark.parametrize("at_rest, worst", [("fp16", 2**-11), ("fp8", 2**-5)])
def test_errors_are_not_far_below_the_promise(at_rest, worst):
    """So that the promise says something: it is nearly reached."""
    x = features(torch.float32)[:, 1:]
    rest = storage(at_rest)
    assert ((rest.get(rest.put(x)) - x) / x).abs().max() > 0.9 * worst


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("at_rest", DTYPES)
def test_bytes_are_counted_exactly(at_rest, dtype, outputs):
    rest = storage(at_rest, outputs=outputs)
    for x in (features(dtype), features(dtype)[..., :7], features(dtype).transpose(0, 1), torch.ones(3, dtype=dtype)):
        stored = [rest.put(x), *(rest.put_change(x) for _ in range(outputs - 1))]
        assert rest.nbytes(x) == sum(t.untyped_storage().nbytes() for one in stored for t in one.tensors())


def test_sizes_are_as_said():
    x = torch.ones(10, 64)
    assert [storage(dtype).nbytes(x) for dtype in DTYPES] == [2560, 1280, 640 + 10 * 2]
    assert [storage(dtype, outputs=3).nbytes(x) for dtype in DTYPES] == [7680, 3840, 1280 + 2 * 660]
    half = torch.ones(10, 64, dtype=torch.bfloat16)
    assert [storage(dtype).nbytes(half) for dtype in DTYPES] == [1280, 1280, 660]
    assert [storage(dtype, outputs=3).nbytes(half) for dtype in DTYPES] == [3840, 3840, 1280 + 2 * 660]


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("at_rest", DTYPES)
def test_later_work_in_place_does_not_reach_what_is_at_rest(at_rest, device):
    """The host adds onto its activations; a feature may be a slice of one."""
    x, rest = torch.ones(4, 8), storage(at_rest, device)
    stored = rest.put(x[1:3])
    x.zero_()
    assert torch.allclose(rest.get(stored), torch.ones(2, 8), rtol=0.01)


def test_fp16_cuts_off_what_it_cannot_hold_instead_of_making_it_infinite():
    x = torch.tensor([1e6, -1e6, 1.0])
    rest = storage("fp16")
    assert rest.get(rest.put(x)).tolist() == [65504.0, -65504.0, 1.0]


def test_one_large_token_does_not_cost_the_others_their_precision():
    x = torch.ones(2, 64) * 0.01
    x[0, 0] = 1e4
    rest = storage("fp8")
    assert torch.allclose(rest.get(rest.put(x))[1], x[1], rtol=0.01)


def test_what_is_on_no_gpu_needs_no_copy_beside_the_computation():
    rest = storage("native", "cpu")
    stored = rest.put(torch.ones(2))
    rest.expect(stored)
    rest.drop(stored)
    rest.settle()
    assert stored.coming is None and rest.get(stored).tolist() == [1.0, 1.0]
