"""Our kernels between a network's convolutions: against torch in float32, as C++ and on a GPU; their source for every generation."""

from __future__ import annotations

import sys
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from segrt.engines.torch_fused import KINDS, SOURCE, InstanceNormLeaky, JoinBiased, fuse, lanes, separate
from segrt.networks import build
from segrt.spec import UNetSpec
from tests.cuda_sources import GENERATIONS, Compiled, compiled
from tests.host_kernels import RawModule, compiler

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def block(channels: int, activation: nn.Module) -> nn.Module:
    made = nn.Module()
    made.conv = nn.Conv3d(1, channels, 3)
    made.norm, made.activation = nn.InstanceNorm3d(channels, affine=True), activation
    return made


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("kind", sorted(KINDS.values()))
def test_the_source_compiles_without_spilling(kind: int, generation: int) -> None:
    kernels = compiled(SOURCE.stem, {"KIND": kind}, generation)
    # sums of many parts are added in double precision, all else is float32
    doubles = {"moments": False, "fold": True, "apply": False, "join": False, "separate": False}
    assert kernels == {name: Compiled(0, double) for name, double in doubles.items()}


def test_norms_are_replaced_all_or_none() -> None:
    whole = nn.ModuleList([block(16, nn.LeakyReLU(0.01)), block(8, nn.ReLU()), block(8, nn.Identity())])
    assert fuse(whole, torch.float16)
    assert [one.norm.slope for one in whole] == [0.01, 0.0, 1.0]
    odd = nn.ModuleList([block(16, nn.LeakyReLU()), block(12, nn.LeakyReLU())])
    assert not fuse(odd, torch.float16)
    assert isinstance(odd[0].norm, nn.InstanceNorm3d)
    assert fuse(odd, torch.float32), "twelve channels are three times four"
    assert not fuse(nn.ModuleList([block(16, nn.SiLU())]), torch.float16)
    assert not fuse(nn.ModuleList([nn.Conv3d(1, 8, 3)]), torch.float16)


@pytest.mark.parametrize("family", ["plain_unet", "residual_unet"])
def test_our_networks_are_fused_with_their_tensors_in_place(family: str) -> None:
    spec = UNetSpec(
        family=family,
        dimensions=3,
        in_channels=1,
        out_channels=3,
        features=(8, 16),
        kernels=((3, 3, 3),) * 2,
        strides=((1, 1, 1), (2, 2, 2)),
        blocks=(1, 2),
        decoder_convs=(1,),
    )
    network = build(spec)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert fuse(network, torch.float16)
    assert not any(isinstance(module, nn.InstanceNorm3d) for module in network.modules())
    after = network.state_dict()
    # what a normalisation takes away again is left out, and an upward step's bias is added where its result is joined
    gone = {name for name in before if name.endswith("conv.bias")} | {name for name in before if name.startswith("up.") and "bias" in name}
    assert before.keys() - after.keys() == gone
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - gone)
    assert torch.equal(network.join[0].bias, before["up.0.bias"])


# ------------------------------------------------------------------ on the host, as C++, thread by thread; and on a GPU
@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        return "cuda"
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=RawModule))
    return "cpu"


def amid(x: torch.Tensor, place: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels-last windows with a window of NaN on both sides, whole and what lies between: neither may be read or written."""
    whole = torch.full((len(x) + 2, *x.shape[1:]), torch.nan, dtype=x.dtype).contiguous(memory_format=CHANNELS_LAST[x.ndim])
    whole[1:-1] = x
    whole = whole.to(place)
    return whole, whole[1:-1]


def of_shapes(*shapes: tuple[int, ...]) -> pytest.MarkDecorator:
    """On the host those that its threads bear, on a GPU all."""
    cases = [pytest.param("host", shape) for shape in shapes if prod(shape) < 200_000]
    cases += [pytest.param("cuda", shape, marks=GPU) for shape in shapes]
    return pytest.mark.parametrize(("place", "shape"), cases, indirect=["place"])


@pytest.mark.parametrize("dtype", list(KINDS))
@of_shapes(
    (1, 8, 1, 1, 1), (2, 32, 5, 7, 9), (3, 320, 4, 5, 5), (1, 2048, 3, 3), (2, 24, 9, 11, 13), (2, 40, 33, 65, 31), (4, 32, 64, 80, 80)
)
def test_equals_torch_in_float32(shape: tuple[int, ...], dtype: torch.dtype, place: str) -> None:
    if shape[1] // lanes(dtype) > 256:
        pytest.skip("more channels than a block takes")
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3 + 20).to(dtype)  # far from zero: sums around zero would lose digits
    norm = (nn.InstanceNorm2d if len(shape) == 4 else nn.InstanceNorm3d)(shape[1], affine=True)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    if x[0, 0].numel() == 1:
        expected = nn.functional.leaky_relu(norm.bias.view(1, -1, 1, 1, 1).expand(shape), 0.01)  # torch refuses a single voxel
    else:
        expected = nn.functional.leaky_relu(norm(x.double().float()), 0.01)
    whole, windows = amid(x, place)
    found = InstanceNormLeaky(norm, 0.01).to(place)(windows)  # moves the parameters of `norm` too
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert found.data_ptr() == windows.data_ptr(), "in place"
    torch.testing.assert_close(found.float().cpu(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert whole[[0, -1]].isnan().all()


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("place", ["host", pytest.param("cuda", marks=GPU)], indirect=True)
def test_a_norm_without_parameters_equals_torch(dtype: torch.dtype, place: str) -> None:
    x = torch.randn((2, 16, 3, 5, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = nn.functional.leaky_relu(nn.functional.instance_norm(x.float()), 0.2).to(dtype)
    found = InstanceNormLeaky(nn.InstanceNorm3d(16), 0.2)(amid(x, place)[1])
    torch.testing.assert_close(found.cpu(), expected, rtol=1.6e-2 if dtype == torch.bfloat16 else 2e-3, atol=2e-3)


@GPU
def test_equal_bytes_from_run_to_run() -> None:
    x = torch.randn(2, 64, 40, 48, 48, device="cuda", dtype=torch.float16).contiguous(memory_format=torch.channels_last_3d)
    ours = InstanceNormLeaky(nn.InstanceNorm3d(64, affine=True), 0.01).cuda()
    first = ours(x.clone(memory_format=torch.channels_last_3d))
    assert all(torch.equal(first, ours(x.clone(memory_format=torch.channels_last_3d))) for _ in range(20))


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("biased", [True, False])
@of_shapes((2, 32, 5, 7, 9), (3, 320, 4, 5, 5), (1, 16, 3, 3), (4, 32, 64, 80, 80))
def test_joined_as_torch_joins(shape: tuple[int, ...], biased: bool, dtype: torch.dtype, place: str) -> None:
    generator = torch.Generator().manual_seed(0)
    below, skip = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    bias = torch.randn(shape[1], generator=generator) if biased else None
    added = below if bias is None else (below.float() + bias.view(1, -1, *[1] * (len(shape) - 2))).to(dtype)
    found = JoinBiased(None if bias is None else bias.to(place))(*(amid(part, place)[1] for part in (below, skip)))
    assert torch.equal(found.cpu(), torch.cat((added, skip), 1))


@pytest.mark.parametrize("dtype", list(KINDS))
@of_shapes((2, 3, 5, 7, 9), (1, 16, 40, 33, 31), (3, 117, 8, 8, 8), (2, 1, 30, 30))
def test_logits_come_apart_as_torch_copies_them(shape: tuple[int, ...], dtype: torch.dtype, place: str) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = torch.full((shape[0] + 2, *shape[1:]), torch.nan, dtype=torch.float16 if dtype == torch.float16 else torch.float32).to(place)
    separate(amid(logits, place)[1], whole[1:-1])
    assert torch.equal(whole[1:-1].cpu(), logits.to(whole.dtype))
    assert whole[[0, -1]].isnan().all()
