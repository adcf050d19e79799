"""V-Net against the numbers MedicalSeg's has, a slow re-statement of it, and everything that runs U-Nets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from factories import make_spec, write_case
from torch.nn import functional as f
from torch.utils.flop_counter import FlopCounterMode

from segrt.bundle import Bundle
from segrt.engines import open_engine
from segrt.errors import BuildError, InputError, SpecError
from segrt.export.build import build_model
from segrt.export.onnx import export_onnx
from segrt.memory import engine_bytes
from segrt.networks import build, build_empty, count_parameters, initialize, load_weights, supervision_scales
from segrt.predictor import Predictor
from segrt.spec import VNetSpec, parse_spec

# classes -> parameters with PReLU and with ELU (MedicalSeg, commit d7975e7c)
COUNTS = {
    2: (45_603_934, 45_600_316),
    3: (45_607_944, 45_604_325),
    4: (45_611_956, 45_608_336),
    16: (45_660_256, 45_656_624),
    20: (45_676_420, 45_672_784),
}
# MedicalSeg's mri_spine_seg: 12 slices of 512 x 512
SPINE: dict[str, Any] = {
    "kernels": ((4, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    "strides": ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
}
ANISOTROPIC: dict[str, Any] = dict.fromkeys(("kernels", "strides"), ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)))


def spec(**changes: Any) -> VNetSpec:
    return VNetSpec(**({"in_channels": 1, "out_channels": 3, "width": 0.125} | changes))


def trained(network: VNetSpec, seed: int = 0) -> torch.nn.Module:
    """A network whose every number differs from its start, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    made = build(network)
    initialize(made, generator=generator)
    for name, tensor in made.state_dict().items():
        if name.endswith(("norm.weight", "running_var")) or "activation" in name:
            tensor.uniform_(0.2, 1.2, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.3, generator=generator)
    return made


def patch(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("classes", COUNTS)
def test_parameter_counts_are_those_of_medicalseg(classes: int) -> None:
    counts = tuple(count_parameters(build_empty(VNetSpec(in_channels=1, out_channels=classes, elu=elu))) for elu in (False, True))
    assert counts == COUNTS[classes]


def test_the_forward_pass_has_the_published_flops() -> None:
    network = build_empty(VNetSpec(in_channels=1, out_channels=16))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 1, 128, 128, 128, device="meta"))
    assert round(counter.get_total_flops() / 1e9) == 1699


def test_the_heads_of_deep_supervision_have_3x3x3_kernels() -> None:
    plain, supervised = (count_parameters(build_empty(VNetSpec(in_channels=1, out_channels=3, deep_supervision=d))) for d in (False, True))
    assert supervised - plain == sum(27 * 3 * n + 3 for n in (256, 128, 64))


def slow_vnet(x: torch.Tensor, w: dict[str, torch.Tensor], network: VNetSpec) -> list[torch.Tensor]:
    """The table of layers once more, in float64 and evaluation mode: logits, then the heads' from the coarsest on."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return f.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    def act(x: torch.Tensor, name: str) -> torch.Tensor:
        return f.elu(x) if network.elu else torch.where(x > 0, x, x * w[f"{name}.weight"].view(1, -1, 1, 1, 1))

    def convolved(x: torch.Tensor, name: str) -> torch.Tensor:
        return act(norm(f.conv3d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], padding=2), f"{name}.norm"), f"{name}.activation")

    features = network.features[0]
    first = norm(f.conv3d(x, w["stem.conv.weight"], w["stem.conv.bias"], padding=2), "stem.norm")
    tiled = torch.stack([x[:, k % network.in_channels] for k in range(features)], 1)
    now = act(first + tiled, "stem.activation")
    skips = []
    for level, count in enumerate((1, 2, 3, 2)):
        skips.append(now)
        name = f"down.{level}"
        down = f.conv3d(now, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride=network.strides[level])
        down = now = act(norm(down, f"{name}.norm"), f"{name}.activation")
        for i in range(count):
            now = convolved(now, f"{name}.convs.{i}")
        now = act(now + down, f"{name}.activation_out")
    coarse = []
    for level, count in enumerate((2, 2, 1, 1)):
        name = f"up.{level}"
        up = f.conv_transpose3d(now, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride=network.strides[3 - level])
        both = now = torch.cat((act(norm(up, f"{name}.norm"), f"{name}.activation"), skips.pop()), 1)
        for i in range(count):
            now = convolved(now, f"{name}.convs.{i}")
        now = act(now + both, f"{name}.activation_out")
        if f"heads.{level}.weight" in w:
            head = f.conv3d(now, w[f"heads.{level}.weight"], w[f"heads.{level}.bias"], padding=1)
            coarse.append(f.interpolate(head, size=x.shape[2:], mode="trilinear", align_corners=False))
    return [f.conv3d(convolved(now, "out"), w["out.head.weight"], w["out.head.bias"]), *coarse]


@pytest.mark.parametrize(
    "network",
    [spec(), spec(elu=True), spec(in_channels=2), spec(in_channels=3), spec(in_channels=5), spec(**SPINE), spec(deep_supervision=True)],
    ids=["prelu", "elu", "two channels", "three", "more than features", "spine", "supervised"],
)
def test_the_network_equals_its_table_in_float64(network: VNetSpec) -> None:
    made = trained(network)
    made.deep_supervision = network.deep_supervision
    x = patch(2, network.in_channels, 12 if network.strides[0][0] == 1 else 16, 32, 16)
    expected = slow_vnet(x.double(), {k: v.double() for k, v in made.state_dict().items()}, network)
    with torch.inference_mode():
        found = made(x)
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == (4 if network.deep_supervision else 1)
    for ours, slow in zip(found, expected, strict=True):
        assert ours.shape == (2, 3, *x.shape[2:])
        torch.testing.assert_close(ours.double(), slow, atol=2e-4, rtol=1e-4)


def test_both_forms_share_their_weights() -> None:
    network = spec(deep_supervision=True)
    supervised, plain = build(network, deep_supervision=True), build(network)
    load_weights(plain, supervised.state_dict())
    x = patch(1, 1, 16, 16, 16)
    assert torch.equal(supervised.eval()(x)[0], plain(x))
    assert supervision_scales(network) == ((1.0, 1.0, 1.0),) * 4
    assert supervision_scales(spec()) == ((1.0, 1.0, 1.0),)


def test_deep_supervision_needs_heads() -> None:
    with pytest.raises(SpecError, match="no heads at its coarser levels"):
        build(spec(), deep_supervision=True)


def test_every_parameter_learns() -> None:
    network = build(spec(deep_supervision=True), deep_supervision=True)
    assert network.training
    sum(level.square().mean() for level in network(patch(2, 1, 32, 32, 32))).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_works_in_training_only_and_spares_the_shortcut() -> None:
    network = build(spec())
    x = patch(1, 1, 32, 32, 32)
    assert torch.equal(network(x), network(x))
    kinds = {name: type(module).__name__ for name, module in network.named_modules() if "dropout" in name}
    assert [name for name, kind in kinds.items() if kind == "Dropout3d"] == [
        *("down.2.dropout", "down.3.dropout"),
        *("up.0.dropout", "up.0.dropout_skip", "up.1.dropout", "up.1.dropout_skip"),
    ]
    down = build(spec(dropout=0.99)).down[3].train()
    for parameter in down.convs.parameters():
        torch.nn.init.zeros_(parameter)
    assert down(patch(2, 16, 4, 4, 4)).abs().sum() > 0  # all features were dropped, and yet what they were went through


def test_without_dropout_training_is_deterministic() -> None:
    network = build(spec(dropout=0.0)).train()
    x = patch(2, 1, 32, 32, 32)
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize(
    ("network", "shape", "words"),
    [
        (spec(), (16, 24, 16), r"expected multiples of 16 on axis y, got 24"),
        (spec(**ANISOTROPIC), (8, 16, 20), r"expected multiples of 16 on axis x, got 20"),
        (spec(**ANISOTROPIC), (12, 16, 16), r"expected multiples of 8 on axis z, got 12"),
        (spec(**SPINE), (11, 32, 32), r"11 on axis z is 7 at level 3, which kernel 2 and stride 2 do not fill"),
        (spec(**SPINE), (3, 32, 32), r"3 on axis z is 3 at level 1, which kernel 4 and stride 1 do not fill"),
    ],
)
def test_sides_that_do_not_fit_are_a_sentence(network: VNetSpec, shape: tuple[int, int, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(network)(torch.zeros(1, 1, *shape))
    good = make_spec(network=spec(), patch=(16, 16, 16)).model_dump(by_alias=True)
    good["network"], good["inference"]["patch"] = network.model_dump(), shape
    with pytest.raises(SpecError, match=rf"inference.patch: {words}"):
        parse_spec(good)


def test_kernels_smaller_than_their_strides_are_refused() -> None:
    with pytest.raises(ValueError, match="leaves out voxels"):
        spec(kernels=((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)))


def test_the_spec_survives_its_json() -> None:
    made = make_spec(network=spec(elu=True, dropout=0.1, deep_supervision=True, **SPINE), patch=(12, 32, 32))
    assert parse_spec(json.loads(made.to_json())) == made
    assert made.dimensions == 3


def test_weights_start_as_paddle_starts_them() -> None:
    network = build(VNetSpec(in_channels=1, out_channels=3, width=0.5))
    initialize(network, generator=torch.Generator().manual_seed(0))
    conv, up = network.down[3].convs[0].conv, network.up[0].conv
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (125 * 128)) ** 0.5, rel=0.02)
    limit = (6 / (8 * (64 + 128))) ** 0.5
    assert limit * 0.99 < float(up.weight.detach().abs().max()) <= limit
    assert not conv.bias.any()
    assert not up.bias.any()
    assert set(network.down[0].activation.weight.tolist()) == {0.25}


def vnet_bundle(folder: Path, network: VNetSpec, shape: tuple[int, int, int] = (32, 32, 32), **changes: Any) -> Bundle:
    made = make_spec(network=network, patch=shape, **changes)
    return Bundle.create(folder, made, weights={"0": trained(network).state_dict()})


@pytest.mark.parametrize(
    ("network", "shape", "slope"),
    [
        (spec(), (32, 32, 32), "PRelu"),
        (spec(elu=True), (32, 32, 32), "Elu"),
        (spec(in_channels=3), (16, 32, 16), "PRelu"),
        (spec(deep_supervision=True, **SPINE), (12, 32, 32), "PRelu"),
    ],
    ids=["prelu", "elu", "channels", "supervised"],
)
def test_engines_answer_like_torch(tmp_path: Path, network: VNetSpec, shape: tuple[int, int, int], slope: str) -> None:
    channels = tuple({"name": f"c{k}", "normalization": {"kind": "none"}} for k in range(network.in_channels))
    bundle = vnet_bundle(tmp_path / "b", network, shape, channels=channels)
    (path,) = export_onnx(bundle)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    # normalisation has gone into the convolutions, the heads of deep supervision are gone
    assert operators - {"Slice"} == {"Conv", "ConvTranspose", "Concat", "Add", slope}
    x = np.random.default_rng(0).normal(size=(2, network.in_channels, *shape)).astype(np.float32)
    answers = {}
    for backend in ("pytorch", "onnxruntime", "openvino"):
        engine = open_engine(bundle, "0", backend=backend)
        answers[backend] = engine(x)
        engine.close()
    for backend in ("onnxruntime", "openvino"):
        assert answers[backend] == pytest.approx(answers["pytorch"], abs=2e-4), backend


def test_a_free_spatial_shape(tmp_path: Path) -> None:
    bundle = vnet_bundle(tmp_path / "b", spec(**ANISOTROPIC), (16, 32, 32))
    (path,) = export_onnx(bundle, dynamic=True)
    import onnxruntime

    x = patch(1, 1, 24, 32, 48).numpy()
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"patches": x})[0]
    with torch.inference_mode():
        expected = trained(spec(**ANISOTROPIC))(torch.from_numpy(x)).numpy()
    assert found == pytest.approx(expected, abs=2e-4)


def test_a_free_spatial_shape_needs_steps_that_fill(tmp_path: Path) -> None:
    bundle = vnet_bundle(tmp_path / "b", spec(**SPINE), (12, 32, 32))
    with pytest.raises(BuildError, match="kernels are as large as their strides"):
        export_onnx(bundle, dynamic=True)


def test_build_and_predict(tmp_path: Path) -> None:
    """From weights to label maps: both engines give one result, on the grid of an image of any size."""
    bundle = vnet_bundle(tmp_path / "b", spec(), mirror_axes=(2,))
    report = build_model(bundle.path)[1][0]["members"]["0"]
    assert (report["reference"], report["passed"]) == ("torch fp32", True)
    image = write_case(tmp_path / "image.nii.gz", np.random.default_rng(0).normal(size=(20, 41, 33)).astype(np.float32), (2.0, 1.0, 1.5))
    results = {}
    for backend in ("openvino", "pytorch"):
        with Predictor(bundle.path, backend=backend) as predictor:
            results[backend] = predictor(image).labels
    assert results["openvino"].shape == (20, 41, 33)
    assert len(np.unique(results["openvino"])) > 1
    assert (results["openvino"] == results["pytorch"]).mean() >= 0.9995


@pytest.mark.parametrize(("width", "side", "measured"), [(1, 64, 530), (1, 96, 847), (0.25, 64, 141), (0.25, 128, 619)])
def test_the_memory_estimate_is_a_close_upper_bound(width: float, side: int, measured: int) -> None:
    """Measured with OpenVINO on two cores: MiB above what the process held before."""
    made = make_spec(values=range(16), network=VNetSpec(in_channels=1, out_channels=16, width=width), patch=(side,) * 3)
    assert measured <= engine_bytes(made, 1) / 2**20 <= 1.2 * measured
