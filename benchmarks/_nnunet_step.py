"""nnU-Net's own training step, one for each line on standard input; run it with the rival's Python. See step_time.py.

python benchmarks/_nnunet_step.py PLANS.json DATASET.json CONFIGURATION FOLDER THREADS

FOLDER gets weights.npz, the network's first weights, and has batch.npz: data, and target_0, target_1, ... finest first. Each answer is a
line "step SECONDS LOSS"; the trainer's own lines come between.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(plans_file: str, dataset_file: str, configuration: str, folder: str, threads: str) -> None:
    place = Path(folder)
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(place / name)
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    plans, dataset = (json.loads(Path(p).read_text()) for p in (plans_file, dataset_file))
    plans["continue_training"] = False
    # the trainer looks there for the kind of its data, of which it needs none here
    cases = place / "preprocessed" / plans["dataset_name"] / plans["configurations"][configuration]["data_identifier"]
    cases.mkdir(parents=True)
    (cases / "case.b2nd").touch()
    trainer = nnUNetTrainer(plans, configuration, 0, dataset, torch.device("cpu"))
    trainer.initialize()
    np.savez(place / "weights.npz", **{name: tensor.numpy() for name, tensor in trainer.network.state_dict().items()})
    print("ready", flush=True)
    batch: dict[str, object] = {}
    for _ in sys.stdin:
        if not batch:
            arrays = np.load(place / "batch.npz")
            batch["data"] = torch.from_numpy(arrays["data"])
            batch["target"] = [torch.from_numpy(arrays[f"target_{i}"]) for i in range(len(arrays.files) - 1)]
            trainer.network.train()
        began = time.perf_counter()
        loss = float(trainer.train_step(batch)["loss"])
        print(f"step {time.perf_counter() - began} {loss}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
