"""`segrt-predict --benchmark`: one case timed by stages, with and without mirroring, as JSON."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..files import write_atomic
from ..io import Case, read_volume
from ..io.peek import find_labels
from ..memory import peak_bytes
from ..pipeline import make_folder
from ..predictor import Predictor

WARM_UPS, RUNS = 5, 5


def time_case(bundle: Bundle, case: Case, output: Path, *, tta: bool, previous: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """Time the first case, print the figures and write them to `output`/benchmark.json.

    Five warm-up and five timed runs of the whole call; medians are reported. Models with mirrored axes are timed with (unless `tta` is
    off) and without them. `previous` is a folder with labels of a cascade's first stage.
    """
    folder = make_folder(output)
    stage = None if previous is None else find_labels(previous, case.name)
    record: dict[str, Any] = {"case": case.name, "bundle_sha256": bundle.fingerprint, "warm_ups": WARM_UPS, "runs": RUNS, "modes": {}}
    modes = {"no_tta": False} | ({"tta": True} if tta and bundle.spec.inference.mirror_axes else {})
    for mode, mirrored in modes.items():
        with Predictor(bundle, tta=mirrored, **options) as predictor:
            record["modes"][mode] = _time(predictor, case, stage)
            record["engine"] = ", ".join(dict.fromkeys(engine.name for engine in predictor.all_engines))
    record["peak_bytes"] = peak_bytes()
    text = json.dumps(record, indent=1)
    write_atomic(folder / "benchmark.json", text + "\n")
    print(text)
    return record


def _time(predictor: Predictor, case: Case, stage: Path | None) -> dict[str, Any]:
    source = case.files if len(case.files) > 1 else case.files[0]
    names = [channel.name for channel in predictor.spec.channels]
    volume = read_volume(source, names)
    for _ in range(WARM_UPS):
        predictor(volume, previous=stage)
    runs = [predictor(source, previous=stage) for _ in range(RUNS)]
    seconds = {stage: statistics.median(r.seconds[stage] for r in runs) for stage in runs[0].seconds}
    windows = runs[0].windows[0]
    return {
        "seconds": seconds,
        "total": statistics.median(sum(r.seconds.values()) for r in runs),
        "windows": windows,
        "windows_per_second": windows / seconds["network"],
    }
