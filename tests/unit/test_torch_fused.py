"""Our kernels between a network's convolutions: against torch in float32, on a GPU; their source for every generation."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from segrt.engines.torch_fused import KINDS, SOURCE, InstanceNormLeaky, JoinBiased, fuse, separate
from segrt.networks import build
from segrt.spec import UNetSpec

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def block(channels: int, activation: nn.Module) -> nn.Module:
    made = nn.Module()
    made.conv = nn.Conv3d(1, channels, 3)
    made.norm, made.activation = nn.InstanceNorm3d(channels, affine=True), activation
    return made


@pytest.mark.parametrize("generation", [80, 90, 120])
@pytest.mark.parametrize("kind", sorted(KINDS.values()))
def test_the_source_compiles_without_spilling(tmp_path: Path, kind: int, generation: int) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    command = ["nvcc", f"-DKIND={kind}", "-cubin", f"-arch=sm_{generation}", "-Xptxas", "-v", "-o", str(tmp_path / "cubin"), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 5


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


@GPU
@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize(
    "shape", [(1, 8, 1, 1, 1), (2, 32, 5, 7, 9), (3, 320, 4, 5, 5), (1, 2048, 3, 3), (2, 40, 33, 65, 31), (4, 32, 64, 80, 80)]
)
def test_equals_torch_in_float32(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if shape[1] // (4 if dtype == torch.float32 else 8) > 256:
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
    ours = InstanceNormLeaky(norm, 0.01).cuda()  # moves the parameters of `norm` too
    found = ours(x.cuda().contiguous(memory_format=CHANNELS_LAST[x.ndim]))
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert found.is_contiguous(memory_format=CHANNELS_LAST[x.ndim])
    torch.testing.assert_close(found.float().cpu(), expected.detach(), rtol=tolerance, atol=tolerance)


@GPU
def test_equal_bytes_from_run_to_run() -> None:
    x = torch.randn(2, 64, 40, 48, 48, device="cuda", dtype=torch.float16).contiguous(memory_format=torch.channels_last_3d)
    ours = InstanceNormLeaky(nn.InstanceNorm3d(64, affine=True), 0.01).cuda()
    first = ours(x.clone(memory_format=torch.channels_last_3d))
    assert all(torch.equal(first, ours(x.clone(memory_format=torch.channels_last_3d))) for _ in range(20))


@GPU
@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("shape", [(2, 32, 5, 7, 9), (3, 320, 4, 5, 5), (1, 16, 3, 3), (4, 32, 64, 80, 80)])
def test_joined_as_torch_joins(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    below, skip = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    bias = torch.randn(shape[1], generator=generator)
    expected = torch.cat(((below.float() + bias.view(1, -1, *[1] * (len(shape) - 2))).to(dtype), skip), 1)
    on_gpu = (part.cuda().contiguous(memory_format=CHANNELS_LAST[part.ndim]) for part in (below, skip))
    found = JoinBiased(bias.cuda())(*on_gpu)
    assert torch.equal(found.cpu(), expected)


@GPU
@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 9), (1, 16, 40, 33, 31), (3, 117, 8, 8, 8), (2, 1, 30, 30)])
def test_logits_come_apart_as_torch_copies_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.full(shape, torch.nan, dtype=torch.float16 if dtype == torch.float16 else torch.float32, device="cuda")
    separate(logits.cuda().contiguous(memory_format=CHANNELS_LAST[logits.ndim]), out)
    assert torch.equal(out.cpu(), logits.to(out.dtype))
