"""The memory estimate: never below what a run takes, and not far above."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import UNET_2D, UNET_3D, CountingEngine, make_bundle, make_spec, nearest, nearest_engine, unet_bundle, write_case

from segrt.arrays import FloatArray
from segrt.assemble import Flow, assemble
from segrt.bundle import Bundle
from segrt.device import Simulated, to_device, to_host
from segrt.device_plan import _device_plan, plan_device
from segrt.engines import Engine
from segrt.engines.batches import gpu_batch
from segrt.engines.compose import Hosted, Spread
from segrt.engines.function import FunctionEngine
from segrt.errors import BackendError
from segrt.infer import infer
from segrt.memory import available_bytes, case_bytes, engine_bytes, estimate
from segrt.opened import OpenModel, run_models
from segrt.phantom import make_phantom
from segrt.postprocess import postprocess
from segrt.preprocess import preprocess
from segrt.slabs import Load, logits_bytes, starts_per_slab, whole_placement
from segrt.spec import Channel, KeepLargest, ModelSpec, PreviousStage, Resampling, SpacingTarget, UNetSpec, ZScoreNorm
from segrt.volume import Grid, Volume
from segrt.windows import Aggregator, plan_slabs, plan_windows

ROOT = Path(__file__).resolve().parents[2]
GRID = Grid((100, 200, 200), (5.0, 1.5, 1.5))
SPEC = make_spec(values=range(16), patch=(32, 64, 64), target=SpacingTarget(spacing=(4.0, 2.5, 2.5)))


def test_the_process_is_measured() -> None:
    # in a process of its own: elsewhere threads of other libraries give memory back meanwhile
    code = """
import numpy as np
from segrt.memory import peak_bytes, resident_bytes
before = resident_bytes()
block = np.ones(10**7)
assert resident_bytes() >= before + 7 * 10**7
assert peak_bytes() >= resident_bytes() - 10**6
del block
assert peak_bytes() >= before + 7 * 10**7
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_new_process_does_not_inherit_our_peak() -> None:
    block = np.ones(5 * 10**7)
    code = "from segrt.memory import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < block.nbytes


class Groups:
    """A machine with 8 GB left, and control groups on it."""

    def __init__(self, root: Path, own: str) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n")
        (root / "proc/self/cgroup").write_text(own)

    def write(self, group: str, **files: object) -> None:
        folder = self.root / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("memory_", "memory.")).write_text(f"{content}\n")

    @property
    def left(self) -> int:
        return available_bytes(self.root)


def test_a_containers_limit_counts_and_files_it_holds_do_not(tmp_path: Path) -> None:
    groups = Groups(tmp_path, "0::/\n")
    assert groups.left == 8_000_000 * 1024
    groups.write("", memory_max=3000, memory_current=2500, memory_stat="anon 5\nfile 900\ninactive_file 700")
    assert groups.left == 3000 - (2500 - 700)
    groups.write("", memory_max=1000)
    assert groups.left == 1  # 0 would say that nothing is known
    groups.write("", memory_max="max")
    assert groups.left == 8_000_000 * 1024


def test_the_tightest_of_the_groups_around_a_process_counts(tmp_path: Path) -> None:
    groups = Groups(tmp_path, "12:cpu:/\n0::/kubepods/pod7/box\n")
    how = {"memory_current": 100, "memory_stat": "inactive_file 0"}
    for group, limit in (("kubepods", "max"), ("kubepods/pod7", 700), ("kubepods/pod7/box", 900), ("kubepods/pod8", 10)):
        groups.write(group, memory_max=limit, **how)
    assert groups.left == 600


@pytest.mark.parametrize("seen_as", ["", "docker/abc"])
def test_groups_of_the_first_version_count_too(tmp_path: Path, seen_as: str) -> None:
    """A container's own lies at the root there, whatever its path on the host; without a limit it is a number beyond all memory."""
    groups = Groups(tmp_path, "9:name=systemd:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    files = {"memory_usage_in_bytes": 400, "memory_stat": "total_inactive_file 100"}
    groups.write(f"memory/{seen_as}", memory_limit_in_bytes=1000, **files)
    assert groups.left == 700
    groups.write(f"memory/{seen_as}", memory_limit_in_bytes=9223372036854771712)
    assert groups.left == 8_000_000 * 1024


def test_a_system_that_tells_nothing_has_no_limit(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) == 0
    assert available_bytes() > 10**6


@pytest.mark.parametrize(
    ("more", "options"),
    [
        (SPEC.model_copy(update={"target": SpacingTarget(spacing=(1.0, 1.0, 1.0))}), {}),
        (make_spec(values=range(64), patch=(32, 64, 64), target=SPEC.target), {}),
        (make_spec(values=range(300), patch=(32, 64, 64), target=SPEC.target), {}),
        (make_spec(values=range(16), patch=(200, 64, 64), target=SPEC.target), {}),
        (make_spec(values=range(16), patch=(32, 64, 64), target=SPEC.target, previous=PreviousStage(values=tuple(range(1, 16)))), {}),
        (SPEC, {"probabilities": True}),
        (SPEC.model_copy(update={"resample_logits": Resampling(order=3)}), {}),
    ],
)
def test_what_needs_more_is_estimated_higher(more: ModelSpec, options: dict[str, bool]) -> None:
    assert case_bytes(more, GRID, 2, **options) > case_bytes(SPEC, GRID, 2)


def test_half_sums_need_less_and_wider_voxels_more() -> None:
    fine = SPEC.model_copy(update={"target": SpacingTarget(spacing=(2.0, 1.0, 1.0))})
    # float16 sums are held whole, as logits are that probabilities are made of
    assert case_bytes(fine, GRID, 2, half=True, probabilities=True) < case_bytes(fine, GRID, 2, probabilities=True)
    assert case_bytes(SPEC, GRID, 8) > case_bytes(SPEC, GRID, 2)


def test_an_image_of_any_claimed_size_is_estimated_at_once() -> None:
    """Windows are not listed one by one: an image of absurd spacing has more than fit into memory."""
    start = time.perf_counter()
    spec = make_spec(target=SpacingTarget(spacing=(1.0, 1.0, 1.0)))
    assert case_bytes(spec, Grid((10, 10, 10), (1e9, 1e9, 1e9)), 2) > 10**27
    assert time.perf_counter() - start < 1


def test_engines_grow_with_their_patch_members_and_network() -> None:
    small = make_spec(network=UNET_3D, patch=(32, 32, 32))
    assert engine_bytes(make_spec(network=UNET_3D, patch=(64, 64, 64)), 1) > engine_bytes(small, 1)
    assert engine_bytes(small, 5) > engine_bytes(small, 1)
    wide = UNET_3D.model_copy(update={"features": (32, 64)})
    assert engine_bytes(make_spec(network=wide, patch=(32, 32, 32)), 1) > engine_bytes(small, 1)
    assert engine_bytes(make_spec(network=UNET_2D, patch=(1, 32, 32)), 1) > 0
    assert engine_bytes(make_spec(), 2) == 2 * engine_bytes(make_spec(), 1)


def test_the_estimate_adds_up() -> None:
    low = estimate(SPEC, GRID, 2, base=0, engines=0)
    assert estimate(SPEC, GRID, 2, base=100, engines=23) == low + 123
    assert low > case_bytes(SPEC, GRID, 2)


def cascade(folder: Path) -> Bundle:
    low = make_bundle(folder / "low", SPEC.model_copy(update={"target": SpacingTarget(spacing=(6.0, 5.0, 5.0))}))
    spec = make_spec(
        values=range(16), patch=(32, 64, 64), target=SPEC.target, previous=PreviousStage(values=tuple(range(1, 16))), mirror_axes=(2,)
    )
    return make_bundle(folder / "model", spec, previous=low)


def compiled(folder: Path) -> Bundle:
    bundle = unet_bundle(folder / "model")
    return bundle.update_spec(bundle.spec.model_copy(update={"target": SpacingTarget(spacing=(10.0, 4.0, 4.0))}))


def cleaned(folder: Path) -> Bundle:
    steps = tuple(KeepLargest(values=(v,)) for v in range(1, 16))
    spec = SPEC.model_copy(update={"postprocess": steps, "target": SpacingTarget(spacing=(2.5, 1.2, 1.2)), "transpose": (1, 0, 2)})
    return make_bundle(folder / "model", spec, centres=[60 * k - 900 for k in range(16)])


def many_classes(folder: Path) -> Bundle:
    """Logits of more than the budget, had they been held whole."""
    spec = make_spec(values=range(90), patch=(16, 64, 64), target=SpacingTarget(spacing=(2.0, 1.7, 1.7)))
    return make_bundle(folder / "model", spec, centres=[20 * k - 900 for k in range(90)])


def by_class(folder: Path) -> Bundle:
    spec = make_spec(
        values=(0, 1), patch=(32, 64, 64), target=SPEC.target, transpose=(1, 0, 2), resample_logits=Resampling(order=3, order_z=3)
    )
    return make_bundle(folder / "model", spec)


def pair(folder: Path) -> Bundle:
    """Slices and volumes of ninety classes, whose probabilities on the image's grid would be more than a gigabyte each."""
    centres = [20 * k - 900 for k in range(90)]
    slices = make_spec(values=range(90), patch=(1, 64, 64), target=SpacingTarget(spacing=(None, 1.7, 1.7)))
    volumes = make_spec(values=range(90), patch=(16, 64, 64), target=SpacingTarget(spacing=(4.0, 2.0, 2.0)))
    return make_bundle(folder / "model", slices, centres=centres, partner=make_bundle(folder / "partner", volumes, centres=centres))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "flags"),
    [
        (by_class, ("--step", "1", "--accumulate", "float16", "--save-probabilities")),
        (compiled, ("--step", "1", "--no-tta")),
        (compiled, ("--step", "1", "--no-tta", "--backend", "pytorch")),
        (cleaned, ("--step", "1")),
        (cleaned, ("--step", "1", "--accumulate", "float16")),
        (cascade, ("--save-probabilities",)),
        (many_classes, ("--step", "1")),
        (pair, ("--step", "1")),
        (pair, ("--step", "1", "--save-probabilities")),
    ],
)
def test_a_run_stays_under_the_estimate_it_prints(tmp_path: Path, make: object, flags: tuple[str, ...]) -> None:
    make(tmp_path)  # type: ignore[operator]
    image, _, grid = make_phantom(np.random.default_rng(1), spacing=(5.0, 1.6, 1.6), shape=(64, 224, 224))
    write_case(tmp_path / "ct.nii.gz", image, grid.spacing)
    code = "from segrt.cli.predict import main; main()"
    arguments = ("ct.nii.gz", "out", "--model", "model", *flags)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = re.search(r"memory: at most ([\d.]+) GB", done.stderr)
    assert printed
    promised = float(printed[1]) * 1e9
    taken = json.loads((tmp_path / "out" / "predictions.json").read_text())["peak_bytes"]
    assert taken <= promised <= 4 * taken


CT_LARGE = Grid((600, 512, 512), (1.0, 0.8, 0.8))
LARGE_UNET = UNetSpec(  # 31 M parameters
    family="plain_unet",
    dimensions=3,
    in_channels=1,
    out_channels=117,
    features=(32, 64, 128, 256, 320, 320),
    kernels=((3, 3, 3),) * 6,
    strides=((1, 1, 1), *((2, 2, 2),) * 5),
    blocks=(2,) * 6,
    decoder_convs=(2,) * 5,
)
ORGANS_117 = make_spec(
    values=range(117), patch=(128, 128, 128), target=SpacingTarget(spacing=(1.0, 0.8, 0.8)), network=LARGE_UNET, mirror_axes=(0, 1, 2)
)


def opened(spec: ModelSpec, *engines: Engine, mirror_axes: tuple[int, ...] = ()) -> OpenModel:
    """A model with an engine of a GPU's own batch, which nobody measured."""
    return OpenModel(spec, engines or [nearest_engine(batch=gpu_batch(spec.inference.patch))], None, "float32", mirror_axes)


@pytest.mark.parametrize("mirror_axes", [(), (0, 1, 2)])
def test_117_classes_on_a_large_ct_fit_a_gpu_of_24_gb(mirror_axes: tuple[int, ...]) -> None:
    """By slabs and, as these are not enough, in smaller batches than the engine likes."""
    load = opened(ORGANS_117, mirror_axes=mirror_axes).load
    assert load.batch == 4
    plan = plan_device([load], CT_LARGE, 2, free=24 * 10**9)
    whole = 4 * 117 * 600 * 512 * 512
    logits = dict(plan.stages["network"])["logits"]
    assert whole > 70e9
    assert (plan.starts, plan.batches) == ((1,), (1,))
    assert logits == 4 * 117 * 129 * 512 * 512
    assert plan.peak < 0.92 * 24e9
    for most in (load, load.less):
        assert most is not None
        with pytest.raises(BackendError, match="voxels needs"):
            plan_device([replace(most, less=None)], CT_LARGE, 2, free=24 * 10**9)


def test_batches_stay_as_large_as_the_gpu_allows() -> None:
    load = opened(ORGANS_117).load
    assert plan_device([load], CT_LARGE, 2, free=140 * 10**9).batches == (4,)
    assert plan_device([load], CT_LARGE, 2, free=33 * 10**9).batches == (4,), "slabs come first"
    assert plan_device([load], CT_LARGE, 2, free=26 * 10**9).batches == (2,)


def test_a_planned_batch_is_kept_for_the_case_alone(caplog: pytest.LogCaptureFixture) -> None:
    """An engine fills up what is less than its batch: during the case that is smaller, and the next case finds it as it was."""
    seen = []

    class Looks(CountingEngine):
        def __call__(self, patches: FloatArray) -> FloatArray:
            seen.append(self.batch)
            return super().__call__(patches)

    spec = make_spec(values=range(40), patch=(8, 8, 8), network=UNET_3D.model_copy(update={"out_channels": 40}))
    image = np.random.default_rng(0).normal(size=(1, 8, 24, 24)).astype(np.float32)
    placement = whole_placement(spec, Grid(image.shape[1:]))
    engine = Looks(nearest(range(40)), batch=4, device="simulated")
    model = opened(spec, engine)
    assert model.load.less is not None
    how: dict[str, Any] = {"probabilities": True}  # without slabs
    each = {load.batch: plan_device([load], placement.grid, 4, free=10**12, **how).peak for load in (model.load, model.load.less)}
    worked = [(to_device(image, "simulated"), placement)]
    labels = {}
    for batch, peak in each.items():
        (inferred,) = run_models([model], worked, 4, free=int(peak / 0.92) + 100, progress=None, **how)
        labels[batch] = to_host(inferred.whole())
        assert (max(engine.calls), set(seen), engine.batch) == (batch, {batch}, 4)
        engine.calls.clear()
        seen.clear()
    np.testing.assert_allclose(labels[4], labels[2], rtol=1e-6)
    assert caplog.messages == ["simulated: 4 windows at once do not fit beside this case; going on with 2"]


def test_several_gpus_have_memory_of_their_own() -> None:
    engines = [nearest_engine(batch=4, device=device) for device in ("simulated", "cpu")]
    alone, spread = opened(ORGANS_117, engines[0]).load, opened(ORGANS_117, Spread(engines)).load
    assert (spread.batch, spread.engine) == (8, alone.engine)
    assert spread.less is not None
    assert alone.less is not None
    assert spread.less.engine == alone.less.engine


def test_an_engine_of_the_host_takes_none_of_the_gpus_memory() -> None:
    inner = nearest_engine(batch=4)
    inner.held_bytes = 10**9
    assert opened(ORGANS_117, Hosted(inner, "simulated")).load.engine == 0


def test_a_turned_image_is_copied_once() -> None:
    turned = ORGANS_117.model_copy(update={"transpose": (2, 1, 0)})
    plans = [plan_device([Load(spec)], CT_LARGE, 2, free=10**12) for spec in (ORGANS_117, turned)]
    assert [dict(plan.stages["preprocess"])["turned image"] for plan in plans] == [0, 2 * 600 * 512 * 512]


def test_logits_stay_whole_where_the_gpu_is_large_enough() -> None:
    assert plan_device([Load(ORGANS_117)], CT_LARGE, 2, free=140 * 10**9).starts == (None,)


def test_probabilities_ask_for_whole_logits() -> None:
    with pytest.raises(BackendError, match="probabilities"):
        plan_device([Load(ORGANS_117)], CT_LARGE, 2, free=24 * 10**9, probabilities=True)


def test_what_does_not_fit_a_gpu_is_a_sentence_with_its_parts() -> None:
    with pytest.raises(BackendError, match=r"600 x 512 x 512 voxels needs .* GB .*logits 15\.83.* 7\.36 GB can be had"):
        plan_device([Load(ORGANS_117)], CT_LARGE, 2, free=8 * 10**9)


def test_a_2d_models_slab_fills_the_engines_batch() -> None:
    spec = make_spec(patch=(1, 32, 32))
    assert starts_per_slab(spec, (50, 32, 48), 0, batch=8) == 4  # two windows a slice
    assert starts_per_slab(spec, (3, 32, 48), 0, batch=8) is None


@pytest.mark.parametrize("starts", [1, 2, 3])
@pytest.mark.parametrize("depth", [33, 64, 100])
def test_the_bytes_of_slabs_are_those_the_aggregator_takes(starts: int, depth: int) -> None:
    spec = make_spec(values=range(5), patch=(16, 8, 8))
    plan = plan_windows((depth, 20, 8), spec.inference)
    slabs = plan_slabs(plan, starts)
    taken = Aggregator(5, plan, "uniform", slabs=slabs, like=np.empty(0)).logits.nbytes
    planned = logits_bytes(spec, (depth, 20, 8), starts)
    assert taken <= planned <= taken + 4 * 5 * 4 * 20 * 8


class Held:
    """The most bytes of arrays on the simulated device at once; an array counts until the last view of it is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        self._owners: set[int] = set()

        def made(array: Simulated, _: object) -> None:
            owner: Any = array
            while owner.base is not None:
                owner = owner.base
            if id(owner) not in self._owners:
                self._owners.add(id(owner))
                self.now += owner.nbytes
                self.most = max(self.most, self.now)
                weakref.finalize(owner, self._gone, id(owner), owner.nbytes)

        monkeypatch.setattr(Simulated, "__array_finalize__", made)

    def _gone(self, owner: int, size: int) -> None:
        self._owners.remove(owner)
        self.now -= size

    def stage(self) -> int:
        """The most since the last call."""
        most, self.most = self.most, self.now
        return most


FINER = {"target": SpacingTarget(spacing=(2.0, 1.0, 1.1))}
CASES = {
    "spline, components": make_spec(values=range(5), postprocess=(KeepLargest(values=(1, 2)),), mirror_axes=(1,), **FINER),
    "slices, turned": make_spec(patch=(1, 16, 16), transpose=(1, 0, 2), resample_image=Resampling(separate=True), **FINER),
    "masked": make_spec(channels=(Channel(name="T1", normalization=ZScoreNorm(masked=True)),), values=(0, 1, 300), **FINER),
    "cascade": make_spec(previous=PreviousStage(values=(1, 2)), resample_labels=Resampling(order=1, separate=False), **FINER),
    "by class": make_spec(resample_logits=Resampling(order=3, separate=False), **FINER),
}


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
@pytest.mark.parametrize("how", ["whole", "by slab", "probabilities"])
def test_a_gpus_plan_holds_what_each_stage_takes(monkeypatch: pytest.MonkeyPatch, spec: ModelSpec, how: str) -> None:
    """Of a case of 24 x 30 x 28 voxels, in which tables and partial sums, which the plan leaves to its slack, are a few thousand bytes."""
    grid = Grid((24, 30, 28), (3.0, 1.2, 1.5))
    image = (1 + np.arange(24 * 30 * 28) % 89).reshape(1, *grid.shape).astype(np.int16)
    previous = (image[0] % 3).astype(np.uint8) if spec.previous else None
    model = opened(spec, Hosted(nearest_engine(range(spec.classes), batch=2), "simulated"))
    plan = _device_plan([model.load], grid, 2, how == "probabilities", by_slab=how == "by slab")
    held, taken = Held(monkeypatch), {}
    there = Volume(to_device(image, "simulated"), grid)
    data, placement = preprocess(there, spec, previous=previous)
    taken["preprocess"] = held.stage()
    del there
    held.stage()
    inferred = model.run(data, batch=plan.batches[0], starts_per_slab=plan.starts[0])
    labels, _ = assemble([Flow(inferred, placement, spec)], probabilities=how == "probabilities")
    taken["network"] = held.stage()
    del inferred, data
    gc.collect()
    held.stage()
    postprocess(labels, spec.postprocess, voxel_mm3=1.0)
    taken["postprocess"] = held.stage()
    planned = {stage: sum(size for _, size in parts) for stage, parts in plan.stages.items()}
    planned["network"] = max(planned["network"], planned.pop("restore"))
    for stage, most in taken.items():
        assert most <= planned[stage] + 20_000, stage
        assert planned[stage] <= 4 * most, stage


def test_the_recorded_cases_kept_to_their_plans() -> None:
    """The H200's own numbers, which count all that was in use there; weights and the driver's share are not of a case's plan."""
    recorded = json.loads((ROOT / "benchmarks/results/gpu_nvidia-h200.json").read_text())
    network = LARGE_UNET.model_copy(update={"out_channels": 16, "strides": ((1, 1, 1), (1, 2, 2), *((2, 2, 2),) * 4)})
    steps = KeepLargest(values=(1,)), KeepLargest(values=(2,))
    target = SpacingTarget(spacing=(2.0, 0.68, 0.68))
    spec = make_spec(values=range(16), patch=(64, 160, 160), target=target, network=network, postprocess=steps)
    for shape, peak in (
        ((200, 512, 512), recorded["case"]["pytorch fp16"]["peak_device_bytes"]),
        ((70, 160, 140), recorded["repeats"]["pytorch fp16"]["peak_device_bytes"]),
    ):
        plan = plan_device([replace(opened(spec).load, batch=4)], Grid(shape, (2.1, 0.72, 0.72)), 2, free=140 * 10**9)
        assert peak <= plan.peak <= 2 * peak


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_117_classes_by_slab_are_those_of_the_whole(device: str) -> None:
    spec = make_spec(values=range(117), patch=(4, 6, 6), target=SpacingTarget(spacing=(2.0, 1.0, 1.1)))
    image = np.random.default_rng(0).integers(-50, 180, (1, 12, 9, 8)).astype(np.float32)
    data, placement = preprocess(Volume(image, Grid(image.shape[1:], (2.5, 1.2, 1.1))), spec)
    engine = FunctionEngine(nearest(range(117)), device=device)
    labels = []
    for starts in (None, 1, 2):
        inferred = infer(to_device(data, device), [engine], spec, starts_per_slab=starts)
        labels.append(to_host(assemble([Flow(inferred, placement, spec)], probabilities=False)[0]))
    assert len(np.unique(labels[0])) > 60
    np.testing.assert_array_equal(labels[1], labels[0])
    np.testing.assert_array_equal(labels[2], labels[0])


def test_members_that_keep_what_their_calls_took_are_added_up() -> None:
    class Keeps(CountingEngine):
        keeps = True

        def call_bytes(self, windows: int, each: int) -> int:
            return 1000 * windows

    def member(kind: type[CountingEngine]) -> Engine:
        return kind(nearest((0, 1)), batch=2, device="simulated")

    spec = make_spec(members=("0", "1", "2"))
    needed = {}
    for kinds in ((Keeps,), (Keeps, Keeps), (CountingEngine,), (CountingEngine, CountingEngine), (Keeps, CountingEngine)):
        needed[kinds] = opened(spec, *map(member, kinds)).load.engine
    assert needed[Keeps,] == 2000
    assert needed[Keeps, Keeps] == 4000
    assert needed[CountingEngine, CountingEngine] == needed[CountingEngine,] > 0
    assert needed[Keeps, CountingEngine] == 2000 + needed[CountingEngine,]
