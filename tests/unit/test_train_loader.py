"""Batches are the same whoever makes them, and nothing is left running."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import UNET_2D, UNET_3D, make_spec
from train_factory import configure, write_dataset

from segrt.errors import BackendError, InputError
from segrt.train.cache import Prepared
from segrt.train.loader import Batch, Batches, Share, share
from segrt.train.prepare import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare_balls(tmp_path_factory.mktemp("loader"))


def prepare_balls(folder: Path) -> Prepared:
    return prepare(write_dataset(folder / "raw", ((12, 14, 10), (9, 16, 11), (20, 9, 9))), configure(), folder / "cache", workers=1)


CONFIGURATION = configure(make_spec(patch=(8, 8, 8), network=UNET_3D, mirror_axes=(0, 1, 2)), batch_size=3, deep_supervision=True)


def _take(batches: Batches, count: int, first: int = 0) -> list[Batch]:
    stream = batches(first)
    try:
        return list(islice(stream, count))
    finally:
        stream.close()


def _same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip((x.data, *x.targets), (y.data, *y.targets), strict=True)]
    return [b.names for b in one] == [b.names for b in other] and all(torch.equal(a, b) for a, b in pairs)


def test_a_batch_holds_patches_targets_and_names(prepared: Prepared) -> None:
    [batch] = _take(Batches(prepared, CONFIGURATION, workers=0), 1)
    assert batch.data.shape == (3, 1, 8, 8, 8)
    assert batch.data.dtype == torch.float32
    assert [target.shape for target in batch.targets] == [(3, 8, 8, 8)]
    assert set(batch.names) <= {"a", "b", "c"}
    assert (batch.targets[0][2] > 0).any()  # the last of three holds foreground


def test_targets_have_the_sizes_of_the_networks_outputs(prepared: Prepared) -> None:
    three = {"features": (4, 4, 4), "kernels": ((3, 3, 3),) * 3, "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2))}
    network = UNET_3D.model_copy(update=three | {"blocks": (1, 1, 1), "decoder_convs": (1, 1)})
    configuration = configure(make_spec(patch=(8, 8, 8), network=network), deep_supervision=True)
    [batch] = _take(Batches(prepared, configuration, workers=0), 1)
    assert [target.shape[1:] for target in batch.targets] == [(8, 8, 8), (8, 4, 4)]
    alone = configuration.model_copy(update={"deep_supervision": False})
    assert len(_take(Batches(prepared, alone, workers=0), 1)[0].targets) == 1


def test_slices_come_from_volumes(prepared: Prepared) -> None:
    configuration = configure(make_spec(patch=(1, 8, 8), network=UNET_2D, mirror_axes=(1, 2)), batch_size=5)
    [batch] = _take(Batches(prepared, configuration, workers=0), 1)
    assert batch.data.shape == (5, 1, 8, 8)
    assert batch.targets[0].shape == (5, 8, 8)


def test_workers_do_not_change_a_batch_and_end_when_closed(prepared: Prepared) -> None:
    alone = _take(Batches(prepared, CONFIGURATION, workers=0), 7)
    assert _same(_take(Batches(prepared, CONFIGURATION, workers=2), 7), alone)
    assert multiprocessing.active_children() == []
    # stopped after 4 batches and resumed, with another number of workers
    assert _same(_take(Batches(prepared, CONFIGURATION, workers=1), 3, first=4), alone[4:])
    assert multiprocessing.active_children() == []


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")
def test_eight_workers_draw_eight_different_things(prepared: Prepared) -> None:
    """SEEDS 2.12 a: forked workers shared one state of the generator, and 8 of them drew one thing."""
    batches = _take(Batches(prepared, CONFIGURATION, workers=8), 8)  # the first of each worker
    assert len({batch.data.numpy().tobytes() for batch in batches}) == 8
    patches = {patch.numpy().tobytes() for batch in batches for patch in batch.data}
    assert len(patches) == 24


def test_seed_and_stream_decide(prepared: Prepared) -> None:
    first = _take(Batches(prepared, CONFIGURATION, workers=0), 2)
    assert _same(_take(Batches(prepared, CONFIGURATION, workers=0), 2), first)
    for other in ({"seed": 1}, {"stream": "validation"}):
        assert not _same(_take(Batches(prepared, CONFIGURATION, workers=0, **other), 2), first)


def test_cases_are_drawn_with_replacement_and_evenly(prepared: Prepared) -> None:
    batches = _take(Batches(prepared, CONFIGURATION, workers=0, augmentation="none"), 120)
    names = [name for batch in batches for name in batch.names]
    assert any(len(set(batch.names)) < 3 for batch in batches)
    assert np.std([names.count(name) for name in "abc"]) < 25


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_divide_the_batch_of_one(prepared: Prepared, processes: int) -> None:
    """What several processes train on together is what one would have trained on, forced foreground included."""
    whole = _take(Batches(prepared, CONFIGURATION, workers=0), 2)
    parts = [_take(Batches(prepared, CONFIGURATION, workers=0, rank=rank, processes=processes), 2) for rank in range(processes)]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[number].data for part in parts]), batch.data)
        assert sum((part[number].names for part in parts), ()) == batch.names


def test_a_batch_is_divided_as_evenly_as_it_goes() -> None:
    assert [share(7, rank, 3) for rank in range(3)] == [Share(7, 0, 3), Share(7, 3, 5), Share(7, 5, 7)]
    with pytest.raises(InputError, match="a batch of 2 cannot be divided among 3 processes"):
        share(2, 0, 3)


def test_torchs_generator_is_left_alone(prepared: Prepared) -> None:
    """Or the weights of a network made afterwards would depend on whether batches had been drawn."""
    before = torch.get_rng_state()
    _take(Batches(prepared, CONFIGURATION, workers=1), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_case_is_named(prepared: Prepared, tmp_path: Path, workers: int) -> None:
    configuration = configure()
    cache = prepare(write_dataset(tmp_path / "raw", ((9, 9, 9),)), configuration, tmp_path / "cache", workers=1)
    (cache.folder / "a" / "data.b2nd").write_bytes(b"nothing")
    stream = Batches(cache, CONFIGURATION, workers=workers)()
    with pytest.raises(InputError, match=r"cache/a: the prepared case cannot be opened .*; delete the folder and prepare again") as caught:
        next(stream)
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []
    with pytest.raises(StopIteration):
        next(stream)


def test_blocks_that_do_not_decompress_are_named(tmp_path: Path) -> None:
    cache = prepare(write_dataset(tmp_path / "raw", ((9, 9, 9),)), configure(), tmp_path / "cache", workers=1)
    file = cache.folder / "a" / "data.b2nd"
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle - 300 : middle + 300] = bytes(600)
    file.write_bytes(content)
    whole = configure(make_spec(patch=(10, 10, 10), network=UNET_3D))
    with pytest.raises(InputError, match=r"case a|cache/a"):
        _take(Batches(cache, whole, workers=0, augmentation="none"), 3)


def test_a_worker_outlives_the_first_sigterm(prepared: Prepared) -> None:
    """A cluster ends a job by SIGTERM to all its processes: the loop still needs the batch it waits for, and saves then."""
    stream = Batches(prepared, CONFIGURATION, workers=1)()
    next(stream)
    [worker] = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    assert len(list(islice(stream, 6))) == 6
    stream.close()
    assert not worker.is_alive()


def test_a_killed_worker_is_a_sentence(prepared: Prepared) -> None:
    stream = Batches(prepared, CONFIGURATION, workers=1)()
    next(stream)
    [worker] = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(BackendError, match="a process that makes batches was killed"):
        list(islice(stream, 20))
    assert multiprocessing.active_children() == []


JOB = """
import multiprocessing, time
from pathlib import Path
from test_train_loader import CONFIGURATION, prepare_balls
from segrt.train.loader import Batches
if __name__ == "__main__":
    stream = Batches(prepare_balls(Path("cases")), CONFIGURATION, workers=1)()
    next(stream)
    [worker] = multiprocessing.active_children()
    Path("worker").write_text(str(worker.pid))
    time.sleep(60)
"""


def test_workers_end_with_a_training_that_is_killed(tmp_path: Path) -> None:
    """Their parent is the fork server, which stays while they do."""
    (tmp_path / "job.py").write_text(JOB)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen([sys.executable, "job.py"], cwd=tmp_path, env=environment) as process:
        worker = tmp_path / "worker"
        while not (worker.exists() and worker.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{worker.read_text()}/exe").exists():  # a zombie has none
        assert time.monotonic() < end
        time.sleep(0.05)


def test_no_case_no_batches(prepared: Prepared) -> None:
    with pytest.raises(InputError, match="there is no case to draw training batches from"):
        Batches(prepared.select([]), CONFIGURATION)
