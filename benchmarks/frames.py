"""Frames per second of UNet++'s smallest level on a stream of pictures, against torch eager in the same run and nnU-Net's 0.5 s a frame.

    python benchmarks/frames.py [BUNDLE] [--frames 1000] [--level L1] [--toy]

BUNDLE is a 2-D UNet++ that has the level, and frames are as large as its patch; without one, random weights of the published width are
built (the time is the same). The eager network gets frames normalised as the bundle says and its logits are thresholded, as a plain
script does; segrt's time has everything from the camera's array to the label array. nnU-Net's 0.5 s is what a user reported for 2-D frames
in real time (MIC-DKFZ/nnUNet#2027).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from _timer import environment, write_results

from segrt.bundle import Bundle
from segrt.export.build import build_model
from segrt.export.onnx import load_member
from segrt.networks import build, initialize
from segrt.predictor import Predictor
from segrt.spec import Channel, Head, Inference, Label, ModelSpec, RGBNorm, ShapeTarget, UNetPPSpec

NNUNET_S = 0.5


def make_bundle(path: Path, side: int, width: float, level: str) -> Bundle:
    """A colour model whose masks have about as much foreground as background, at every level."""
    network = UNetPPSpec(
        family="unetpp",
        in_channels=3,
        out_channels=1,
        features=tuple(round(width * n) for n in (32, 64, 128, 256, 512)),
        deep_supervision=True,
    )
    made = build(network, deep_supervision=True)
    initialize(made, generator=torch.Generator().manual_seed(0))
    spec = ModelSpec(
        name="frames",
        channels=tuple(Channel(name=name, normalization=RGBNorm()) for name in ("red", "green", "blue")),
        labels=(Label(name="structure", values=(1,)),),
        head=Head(activation="sigmoid", values=(1,)),
        crop_nonzero=False,
        target=ShapeTarget(shape=(1, side, side)),
        inference=Inference(patch=(1, side, side), step=1.0, blending="uniform"),
        network=network,
        members=("0",),
    )
    _halve(made, camera(8, spec))
    bundle = Bundle.create(path, spec, weights={"0": made.state_dict()})
    build_model(bundle.path, device="cpu", prune=(level,))
    return bundle


def _halve(network: Any, frames: Iterator[Any]) -> None:
    """Move every head's bias to where half of the frames' pixels are foreground: labels of one kind would agree whatever was computed."""
    network.eval()
    with torch.inference_mode():
        pixels = [torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255 for frame in frames]
        logits = [network(one) for one in pixels]
        # the last level's head comes first
        for number, head in enumerate(reversed(network.heads.values())):
            head.bias -= torch.cat([one[number].flatten() for one in logits]).median()


def camera(count: int, spec: ModelSpec) -> Iterator[Any]:
    """Smooth moving colours with noise, (Y, X, C) uint8; a few pictures in turn, so that making them costs nothing."""
    _, height, width = spec.inference.patch
    rng, (y, x) = np.random.default_rng(1), np.mgrid[:height, :width] / width
    shown = []
    for n in range(8):
        waves = [127 + 100 * np.sin(9 * (y + 0.5 * 2**c * x) + n) for c in range(len(spec.channels))]
        shown.append((np.stack(waves, 2) + rng.normal(0, 9, (height, width, len(waves)))).clip(0, 255).astype(np.uint8))
    for n in range(count):
        yield shown[n % len(shown)]


def pace(answers: Callable[[Iterator[Any]], Iterator[Any]], frames: Iterator[Any], batch: int = 1) -> list[float]:
    """Seconds a frame takes; those of a batch, whose labels come together, share what it takes."""
    seconds, last = list[float](), time.perf_counter()
    labels = answers(frames)
    while group := list(islice(labels, batch)):
        now = time.perf_counter()
        seconds += [(now - last) / len(group)] * len(group)
        last = now
    return seconds


def figures(seconds: list[float]) -> dict[str, float]:
    median, p99 = (float(np.percentile(seconds, share)) for share in (50, 99))
    return {
        "frames": len(seconds),
        "frames_per_s": len(seconds) / sum(seconds),
        "median_ms": 1000 * median,
        "p99_ms": 1000 * p99,
        "max_ms": 1000 * max(seconds),
        "p99_over_median": p99 / median,
    }


def eager(bundle: Bundle) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """The level's network in torch, frame by frame."""
    network = load_member(bundle, bundle.spec.members[0])
    kinds = {channel.normalization.kind for channel in bundle.spec.channels}
    if len(kinds) > 1 or not kinds <= {"rgb_0_1", "zscore"}:
        raise SystemExit(f"{bundle.path}: frames are prepared for torch by rgb_0_1 or zscore, the model has {', '.join(sorted(kinds))}")

    def run(frames: Iterator[Any]) -> Iterator[Any]:
        for frame in frames:
            with torch.inference_mode():
                pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
                if kinds == {"rgb_0_1"}:
                    prepared = pixels / 255
                else:
                    std, mean = torch.std_mean(pixels, (2, 3), correction=0, keepdim=True)
                    prepared = (pixels - mean) / std
                yield (network(prepared)[0, 0] > 0).numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--eager-frames", type=int, default=40)
    parser.add_argument("--level", default="L1")
    parser.add_argument("--side", type=int, default=256, help="of frames, where there is no BUNDLE")
    parser.add_argument("--name", default="frames", help="of the file in results/")
    parser.add_argument("--toy", action="store_true", help="small and short, to see that it runs")
    options = parser.parse_args()
    side, count, few, width = (32, 12, 4, 0.125) if options.toy else (options.side, options.frames, options.eager_frames, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(options.bundle) if options.bundle else make_bundle(Path(folder) / "bundle", side, width, options.level)
        results = run(bundle, options.level, count, few)
    if options.bundle is None:
        share = results["foreground_share"]
        assert 0.1 < share < 0.9, f"foreground is {share:.3f} of the pixels: labels of nearly one kind agree whatever was computed"
    for name in ("segrt", "torch_eager", "torch_eager_whole"):
        print(name, {key: round(value, 3) for key, value in results[name].items()})
    print({key: value for key, value in results.items() if key.startswith("times")})
    write_results(options.name, results | environment(), toy=options.toy)


def run(bundle: Bundle, level: str, count: int, few: int) -> dict[str, Any]:
    spec = bundle.spec
    pruned = bundle.at_level(level)
    with Predictor(bundle, level=level, device="cpu") as predictor:
        rivals = {"torch_eager": eager(pruned), "torch_eager_whole": eager(bundle)}
        ours, theirs = (np.stack(list(answer(camera(8, spec)))) for answer in (predictor.frames, rivals["torch_eager"]))
        agreement = float((ours.astype(bool) == theirs).mean())
        assert agreement > 0.9995, f"labels agree on {agreement:.5f} of the pixels only"
        found: dict[str, Any] = {"torch_eager": [], "torch_eager_whole": [], "segrt": []}
        batch, engine = predictor.engines[0].batch, predictor.engines[0].name
        # in four parts, one after the other, so that a busy moment hits all
        for _ in range(4):
            found["segrt"] += pace(predictor.frames, camera(count // 4, spec), batch)
            for name, answer in rivals.items():
                found[name] += pace(answer, camera(max(1, few // 4), spec))
    results: dict[str, Any] = {name: figures(seconds) for name, seconds in found.items()}
    fast = results["segrt"]["frames_per_s"]
    return results | {
        "level": level,
        "frame": [*spec.inference.patch[1:], len(spec.channels)],
        "engine": engine,
        "batch": batch,
        "foreground_share": float((ours > 0).mean()),
        "label_agreement": agreement,
        "nnunet_s_per_frame": NNUNET_S,
        "times_torch_eager": fast / results["torch_eager"]["frames_per_s"],
        "times_torch_eager_whole": fast / results["torch_eager_whole"]["frames_per_s"],
        "times_nnunet": fast * NNUNET_S,
    }


if __name__ == "__main__":
    main()
