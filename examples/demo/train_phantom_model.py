"""Train the demo's network on made-up CTs by `segrt-train` and write examples/demo/bundle (needs the extras train and export).

    nice -n 15 python examples/demo/train_phantom_model.py --minutes 12
    python examples/demo/train_phantom_model.py --work W --no-finish       # on one machine: W/bundle is the trained model
    python examples/demo/train_phantom_model.py --trained W/bundle         # on another: export, score, examples/demo/bundle

The phantoms become a dataset in nnU-Net's layout; `segrt-train --plan-only` plans for it, the plan is made small (4 mm, 0.4 million
parameters), and `segrt-train --plan` trains by it. The held-out phantoms are scored through `Predictor`, as a user would.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from segrt.bundle import Bundle
from segrt.io import write_image, write_labels
from segrt.metrics import dice, mean_dice
from segrt.phantom import ORGANS, make_phantom
from segrt.predictor import Predictor
from segrt.spec import CTNorm, Inference, SpacingTarget, UNetSpec
from segrt.train.configuration import load_plan
from segrt.volume import Volume

HERE = Path(__file__).resolve().parent
SPACINGS = ((5.0, 1.5, 1.5), (3.0, 1.8, 1.8), (2.5, 2.5, 2.5), (4.0, 1.6, 1.6), (6.0, 1.4, 1.4))
HELD_OUT = range(10_000, 10_008)
CUBE, HALF = (3, 3, 3), (2, 2, 2)
LIMIT_BYTES = 2_000_000
# left and right organs have labels of their own; an adrenal gland is a ten-thousandth of the voxels, so most patches have to hold an organ
RECIPE = (
    "--config 3d_fullres --fold 0 --batch-size 2 --optimizer adamw --lr 3e-3 --weight-decay 1e-3 --precision bf16 --clip 5 --no-mirroring "
    "--oversampling 0.67 --validation-batches 0 --save-interval 250 --device cpu --force"
)


def make_volume(seed: int) -> tuple[Volume, np.ndarray]:
    """Give the phantom of this seed, its spacing drawn from SPACINGS, and its labels."""
    rng = np.random.default_rng(seed)
    image, labels, grid = make_phantom(rng, spacing=SPACINGS[rng.integers(len(SPACINGS))])
    return Volume(image[None], grid, f"phantom {seed}"), labels


def write_dataset(folder: Path, seeds: list[int]) -> None:
    """Write phantoms in nnU-Net's layout; what is there already stays. The held-out ones are fold 0's validation."""
    for seed in seeds:
        image, labels = folder / "imagesTr" / f"{_name(seed)}_0000.nii.gz", folder / "labelsTr" / f"{_name(seed)}.nii.gz"
        if not labels.exists():
            volume, truth = make_volume(seed)
            for path in (image, labels):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_image(image, volume.data[0], volume.grid)
            write_labels(labels, truth, volume.grid)
    described = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {name: value for value, name in ORGANS.items()},
        "numTraining": len(seeds),
        "file_ending": ".nii.gz",
        "name": "phantom_abdomen",
    }
    (folder / "dataset.json").write_text(json.dumps(described, indent=1))
    held = [_name(seed) for seed in HELD_OUT]
    fold = {"train": [_name(seed) for seed in seeds if seed not in HELD_OUT], "val": held}
    (folder / "split.json").write_text(json.dumps([fold]))


def _name(seed: int) -> str:
    return f"phantom_{seed:05d}"


def shrink(plan_file: Path, target: Path) -> None:
    """Write the plan with a small network: 4 mm, patch 48x64x64, whole image; the intensities' window rounded."""
    plan = load_plan(plan_file)
    configuration = plan.configurations["3d_fullres"]
    spec = configuration.spec
    network = UNetSpec(
        family="plain_unet",
        dimensions=3,
        in_channels=1,
        out_channels=len(ORGANS) + 1,
        features=(12, 24, 40, 56),
        kernels=(CUBE,) * 4,
        strides=((1, 1, 1), HALF, HALF, HALF),
        blocks=(2,) * 4,
        decoder_convs=(1,) * 3,
    )
    norm = spec.channels[0].normalization
    assert isinstance(norm, CTNorm)
    rounded = norm.model_copy(update={name: round(getattr(norm, name), 1) for name in ("lower", "upper", "mean", "std")})
    changes: dict[str, Any] = {
        "source": "examples/demo/train_phantom_model.py, made-up CTs; not for any use on patients",
        "channels": (spec.channels[0].model_copy(update={"normalization": rounded}),),
        "crop_nonzero": False,
        "target": SpacingTarget(spacing=(4.0, 4.0, 4.0)),
        "inference": Inference(patch=(48, 64, 64)),
        "network": network,
    }
    small = configuration.model_copy(update={"spec": spec.model_copy(update=changes), "batch_dice": True})
    target.write_text(plan.model_copy(update={"configurations": {"3d_fullres": small}}).to_json(), encoding="utf-8")


def segrt_train(*arguments: str | Path) -> None:
    """Run the command, and show it."""
    print("$ segrt-train", *arguments, flush=True)
    subprocess.run([sys.executable, "-c", "from segrt.cli.train import main; main()", *map(str, arguments)], check=True)


def train(work: Path, *, cases: int, minutes: float, seed: int, workers: int) -> Path:
    """Dataset, plan, training; the trained bundle comes out."""
    data, plan, bundle = work / "phantoms", work / "plan.json", work / "bundle"
    write_dataset(data, [*range(cases), *HELD_OUT])
    segrt_train(data, "-o", bundle, "--plan-only", "--workers", str(workers))
    shrink(work / "bundle.train" / "plan.json", plan)
    options = [*RECIPE.split(), "--minutes", f"{minutes:g}", "--seed", str(seed), "--workers", str(workers)]
    segrt_train(data, "-o", bundle, "--plan", plan, "--split", data / "split.json", *options)
    return bundle


def finish(trained: Path, output: Path) -> None:
    """Leave of a trained bundle what building and predicting need: the ONNX file and the reference; score it."""
    from safetensors.torch import load_file

    from segrt.export.onnx import export_onnx, write_reference
    from segrt.export.verify import sample_windows

    source = Bundle.open(trained)
    spec = source.spec.model_copy(update={"postprocess": ()})
    bundle = Bundle.create(output, spec, weights={"0": load_file(str(source.weights_path("0")))}, force=True)
    export_onnx(bundle)
    # little enough for the repository: one window, a part of its logits
    write_reference(bundle, sample_windows(spec, count=1), max_values=60_000)
    if (size := bundle.onnx_path("0").stat().st_size) > LIMIT_BYTES:
        raise SystemExit(f"{bundle.onnx_path('0')} has {size} bytes, the demo's limit is {LIMIT_BYTES}")
    bundle.weights_path("0").unlink()
    bundle.weights_path("0").parent.rmdir()
    config = json.loads((trained / "reports" / "fold_0" / "config.json").read_text(encoding="utf-8"))
    environment = json.loads((trained / "reports" / "fold_0" / "environment.json").read_text(encoding="utf-8"))
    lines = (trained / "reports" / "fold_0" / "training.csv").read_text(encoding="utf-8").splitlines()
    values = {
        "recipe": RECIPE,
        "parameters": environment["parameters"],
        "minutes": config["minutes"],
        "iterations": int(lines[-1].split(",")[0]),
        "seed": config["seed"],
        "dice": score(bundle),
    }
    bundle.write_report("training.json", values)
    print(json.dumps(values, indent=1))


def score(bundle: Bundle) -> dict[str, float]:
    """Mean Dice per organ over held-out phantoms, through the public predictor."""
    rows = []
    with Predictor(bundle, backend="openvino") as predictor:
        for seed in HELD_OUT:
            volume, labels = make_volume(seed)
            rows.append(dice(labels, predictor(volume).labels, list(ORGANS)))
            print(f"phantom {seed}: mean Dice {mean_dice(rows[-1]):.3f}", flush=True)
    return {name: round(float(np.nanmean([row[value] for row in rows])), 4) for value, name in ORGANS.items()}


def main() -> None:
    """Train unless that was done elsewhere, write the bundle, score it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "build" / "demo_training")
    parser.add_argument("--trained", type=Path, help="Bundle that was trained before.")
    parser.add_argument("--no-finish", action="store_true")
    parser.add_argument("--output", type=Path, default=HERE / "bundle")
    options = parser.parse_args()
    how = {"cases": options.cases, "minutes": options.minutes, "seed": options.seed, "workers": options.workers}
    trained = options.trained or train(options.work, **how)
    if not options.no_finish:
        finish(trained, options.output)


if __name__ == "__main__":
    main()
