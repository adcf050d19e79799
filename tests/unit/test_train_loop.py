"""The loop: what it records, that it resumes to the bit, stops when asked, and says which cases spoil it."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import socket
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import end, start
from factories import UNET_3D
from safetensors.torch import load_file
from train_jobs import CPU, cross_entropy, make_batches, run, tiny_config, tiny_job, train_in_group

from segrt.errors import InputError, SpecError
from segrt.networks import build
from segrt.spec import Head
from segrt.train import loop
from segrt.train.epoch import dice_of
from segrt.train.loop import Step, _overlap, train


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _losses(folder: Path) -> list[str]:
    return [row["loss"] for row in _rows(folder / "training.csv")]


def _last(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(sorted((folder / "checkpoints").glob("iter_*"))[-1] / "weights.safetensors"))


def test_it_learns_and_records_every_iteration(tmp_path: Path) -> None:
    steps = run(tiny_job(tmp_path, tiny_config(iterations=40, log_interval=5, lr=0.05)))
    assert [step.iteration for step in steps] == list(range(1, 41))
    assert np.mean([s.loss for s in steps[-5:]]) < 0.7 * np.mean([s.loss for s in steps[:5]])
    assert (steps[-1].dice or 0) > 0.3
    assert steps[-1].eta_s == 0
    assert all(step.batch_cost >= step.reader_cost > 0 for step in steps)
    rows = _rows(tmp_path / "training.csv")
    assert [float(row["loss"]) for row in rows] == [step.loss for step in steps]
    assert [bool(row["dice"]) for row in rows] == [i % 5 == 0 for i in range(1, 41)]
    checks = _rows(tmp_path / "validation.csv")
    assert list(checks[0]) == ["iteration", "loss", "dice", "average", "bright", "very bright", "IoU"]
    assert [int(row["iteration"]) for row in checks] == [*range(3, 40, 3), 40]
    assert list((tmp_path / "tensorboard").iterdir())


def test_best_follows_the_moving_average_of_the_pseudo_dice(tmp_path: Path) -> None:
    """MedicalSeg's best model was never written; nnU-Net's rule: .9 of the old average, .1 of the new value."""
    run(tiny_job(tmp_path, tiny_config(iterations=30, lr=0.05)))
    average, best = None, (-math.inf, 0)
    for row in _rows(tmp_path / "validation.csv"):
        value = float(row["dice"])
        average = value if average is None else 0.9 * average + 0.1 * value
        assert float(row["average"]) == pytest.approx(average, abs=1e-12)
        best = max(best, (average, int(row["iteration"])))
    saved = json.loads((tmp_path / "checkpoints" / "best" / "state.json").read_text())
    assert saved["iteration"] == best[1]


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "adamw", "lr": 1e-3, "accumulation": 2}, {"precision": "bf16"}, {"precision": "fp16"}]
)
def test_a_resumed_training_is_the_undisturbed_one_to_the_bit(tmp_path: Path, changes: dict[str, object]) -> None:
    config = tiny_config(**changes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny_job(whole, config))

    def stop(step: Step) -> None:
        if step.iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not train(tiny_job(parts, config), CPU, progress=stop)
    assert len(_losses(parts)) == 4  # the iteration in which the signal is seen is finished and saved
    steps = run(tiny_job(parts, config))
    assert [step.iteration for step in steps] == [5, 6]
    assert _losses(parts) == _losses(whole)
    for row, other in zip(_rows(parts / "validation.csv"), _rows(whole / "validation.csv"), strict=True):
        assert row == other
    for name, tensor in _last(whole).items():
        assert torch.equal(tensor, _last(parts)[name]), name


def test_an_epoch_that_was_interrupted_is_told_whole(tmp_path: Path) -> None:
    """With its validation Dice, which was looked at before the interruption, and the Dice of a batch before it."""
    config = tiny_config(epoch=5, iterations=7, validation_interval=3, log_interval=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny_job(whole, config))

    def stop(step: Step) -> None:
        if step.iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not train(tiny_job(parts, config), CPU, progress=stop)
    assert [step.iteration for step in run(tiny_job(parts, config))] == [5, 6, 7]
    rows = _rows(whole / "epochs.csv")
    assert [row["iteration"] for row in rows] == ["5", "7"]
    assert all(rows[0].values())
    assert _rows(parts / "epochs.csv") == rows


def test_where_fp16_overflows_weights_stay_and_the_scale_is_halved(tmp_path: Path) -> None:
    started: list[dict[str, torch.Tensor]] = []

    def start() -> torch.nn.Module:
        network = build(UNET_3D, deep_supervision=True)
        started.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return network

    def steep(outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, parts = cross_entropy(outputs, targets)
        return 1e6 * loss, parts  # a number itself, with gradients beyond fp16's 65504

    run(tiny_job(tmp_path, tiny_config(precision="fp16", iterations=1), build=start, loss=steep))
    last = _last(tmp_path)
    assert all(torch.equal(tensor, last[name]) for name, tensor in started[0].items())
    saved = json.loads((tmp_path / "checkpoints" / "iter_0000001" / "state.json").read_text())
    assert saved["parts"]["scaler"]["scale"] == 2**15
    run(tiny_job(tmp_path / "even", tiny_config(precision="fp16", iterations=1), build=start))
    even = _last(tmp_path / "even")
    assert not all(torch.equal(tensor, even[name]) for name, tensor in started[1].items())


def test_a_killed_training_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    """No signal was seen: rows after the checkpoint are dropped and made again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny_job(whole))

    def die(step: Step) -> None:
        if step.iteration == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_job(parts), CPU, progress=die)
    assert [step.iteration for step in run(tiny_job(parts))] == [5, 6]
    assert _losses(parts) == _losses(whole)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each look at it sets forward by 10 ms, so that no other work on the machine decides how far a training comes."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=count(0.0, 0.01).__next__))


@pytest.mark.usefixtures("clock")
def test_a_training_by_the_clock_ends_with_its_minutes(tmp_path: Path) -> None:
    config = tiny_config(iterations=1_000_000, epoch=250, minutes=0.02, save_interval=10**6, validation_interval=10**6, lr=0.01)
    steps = run(tiny_job(tmp_path, config))
    rates = [step.lr for step in steps]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.01
    assert rates[-1] < 0.002  # it has fallen over the time there was
    assert steps[-1].iteration == steps[-1].iterations
    assert steps[-1].eta_s == 0
    assert all(step.iteration < step.iterations for step in steps[:-1])
    assert _rows(tmp_path / "validation.csv")[-1]["iteration"] == str(steps[-1].iteration)
    costs = [float(row["batch_cost"]) for row in _rows(tmp_path / "training.csv")]
    assert sum(costs) >= 1.2 > sum(costs[:-2])  # only the iterations' own time counts; one under way is brought to its end
    assert run(tiny_job(tmp_path, config)) == []  # its time is over, also for the same command again


@pytest.mark.usefixtures("clock")
def test_the_time_before_an_interruption_counts(tmp_path: Path) -> None:
    config = tiny_config(iterations=1_000_000, minutes=0.02, save_interval=10**6, validation_interval=10**6)

    asked = []

    def stop(step: Step) -> None:
        if step.lr < 0.005 and not asked:  # after about half
            asked.append(step.iteration)
            os.kill(os.getpid(), signal.SIGTERM)

    assert not train(tiny_job(tmp_path, config), CPU, progress=stop)
    steps = run(tiny_job(tmp_path, config))
    assert steps[0].lr < 0.0051
    assert steps[-1].lr < steps[0].lr
    assert steps[-1].iteration == steps[-1].iterations


def test_a_second_signal_is_not_held_back(tmp_path: Path) -> None:
    def twice(step: Step) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_job(tmp_path), CPU, progress=twice)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_no_number_stops_with_the_names_of_the_cases(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, batches=make_batches(10, spoil=3))
    with pytest.raises(InputError, match=r"the loss became nan in iteration 4, with a batch of the cases case_3_0, case_3_1; look at"):
        train(job, CPU)
    weights = _last(tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_gradient_that_is_no_number_changes_no_weight(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def loss(outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        calls.append(len(calls))
        value, parts = cross_entropy(outputs, targets)
        return value + (outputs[0] * 0).sum().sqrt() if len(calls) == 2 else value, parts

    steps = run(tiny_job(tmp_path, tiny_config(validation_batches=0), loss=loss))
    assert all(math.isfinite(step.loss) for step in steps)
    assert all(torch.isfinite(tensor).all() for tensor in _last(tmp_path).values())
    assert caplog.messages == ["iteration 2: a gradient is nan, so the weights stay as they are"]


def _no_gradient(outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that is a number, and no gradient that is: the root of 0 is infinitely steep."""
    loss, parts = cross_entropy(outputs, targets)
    return loss + (outputs[0] * 0).abs().sum().sqrt(), parts


@pytest.mark.parametrize("clip", [12.0, 0.0])
@pytest.mark.parametrize(("precision", "advice"), [("fp32", "lower"), ("bf16", "try precision fp32, lower")])
def test_a_training_whose_gradients_are_none_ends(tmp_path: Path, precision: str, advice: str, clip: float) -> None:
    """Otherwise it would go on for days, and nothing but its log would say that nothing is learned."""
    config = tiny_config(iterations=100, validation_batches=0, clip=clip, precision=precision)
    with pytest.raises(InputError, match=rf"^the gradient was nan in iteration 25 as in the 24 before, .*case_24_0, case_24_1.*, {advice}"):
        run(tiny_job(tmp_path, config, loss=_no_gradient))
    assert [row["iteration"] for row in _rows(tmp_path / "training.csv")][-1] == "24"


def test_gradients_that_are_none_now_and_then_end_nothing(tmp_path: Path) -> None:
    """Fewer in a row than the limit, and more in all."""
    called = 0

    def loss(outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        nonlocal called
        called += 1
        return (cross_entropy if called % 20 == 0 else _no_gradient)(outputs, targets)

    assert run(tiny_job(tmp_path, tiny_config(iterations=60, validation_batches=0), loss=loss))[-1].iteration == 60


def test_a_checkpoint_of_another_plan_or_configuration_is_refused(tmp_path: Path) -> None:
    run(tiny_job(tmp_path))
    with pytest.raises(SpecError, match="was trained for another plan"):
        train(tiny_job(tmp_path, plan="other"), CPU)
    with pytest.raises(SpecError, match=r"was trained with lr 0.01 \(now 0.5\); go on with the same settings"):
        train(tiny_job(tmp_path, tiny_config(lr=0.5)), CPU)


def test_what_changes_no_weight_may_change(tmp_path: Path) -> None:
    run(tiny_job(tmp_path))
    assert run(tiny_job(tmp_path, tiny_config(keep=3, save_interval=1, workers=0, folds=("1",)))) == []


def test_accumulated_batches_make_the_step_of_a_large_one(tmp_path: Path) -> None:
    """Two halves of a batch, one after the other, give the gradient of the whole (instance normalisation, mean cross-entropy)."""

    def halves(first: int):
        for data, targets, names in make_batches(10)(first // 2):
            for i in range(2):
                yield data[i : i + 1], (targets[0][i : i + 1],), names[i : i + 1]

    run(tiny_job(tmp_path / "large"))
    run(tiny_job(tmp_path / "small", tiny_config(accumulation=2), batches=halves))
    for a, b in zip(_losses(tmp_path / "large"), _losses(tmp_path / "small"), strict=True):
        assert float(a) == pytest.approx(float(b), abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_a_compiled_network_learns_the_same(tmp_path: Path) -> None:
    run(tiny_job(tmp_path / "plain"))
    run(tiny_job(tmp_path / "compiled", tiny_config(compile=True)))
    for a, b in zip(_losses(tmp_path / "plain"), _losses(tmp_path / "compiled"), strict=True):
        assert float(a) == pytest.approx(float(b), abs=1e-4)
    assert _last(tmp_path / "plain").keys() == _last(tmp_path / "compiled").keys()


def test_global_generators_are_left_as_they_were(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(tiny_job(tmp_path))
    assert torch.equal(before, torch.get_rng_state())


def test_the_seed_decides_the_first_weights(tmp_path: Path) -> None:
    a, b, c = ([s.loss for s in run(tiny_job(tmp_path / str(i), tiny_config(seed=seed)))] for i, seed in enumerate((1, 1, 2)))
    assert a == b != c


def test_the_profiler_writes_its_trace(tmp_path: Path) -> None:
    run(tiny_job(tmp_path, tiny_config(profile=(2, 4))))
    trace = json.loads((tmp_path / "profile.json").read_text())
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])
    assert "Self CPU %" in (tmp_path / "profile.txt").read_text()


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    run(tiny_job(tmp_path / "one"))
    _in_group(tmp_path / "two")
    for a, b in zip(_losses(tmp_path / "one"), _losses(tmp_path / "two"), strict=True):
        assert float(a) == pytest.approx(float(b), abs=1e-5)  # the order of the sums differs
    for a, b in zip(_rows(tmp_path / "one" / "validation.csv"), _rows(tmp_path / "two" / "validation.csv"), strict=True):
        assert float(a["dice"]) == pytest.approx(float(b["dice"]), abs=1e-3)


def test_a_batch_that_does_not_divide_evenly_is_one_batch(tmp_path: Path) -> None:
    """Of three images one process has two: each counts a third, in the gradient as in both losses."""
    run(tiny_job(tmp_path / "one", batches=make_batches(10, size=3), validation=make_batches(20, size=3)))
    _in_group(tmp_path / "two", 0.0, None, None, 3)
    for table in ("training.csv", "validation.csv"):
        one, two = ([float(row["loss"]) for row in _rows(tmp_path / name / table)] for name in ("one", "two"))
        assert one == pytest.approx(two, abs=1e-5)  # the order of the sums differs


def test_two_processes_train_without_deep_supervision(tmp_path: Path) -> None:
    """The heads of the coarser levels are there and unread: a group that waits for their gradients ends in the second iteration."""
    steps = {"kernels": ((3, 3, 3),) * 3, "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2))}
    network = UNET_3D.model_copy(update={"features": (4, 8, 8), "blocks": (1, 1, 1), "decoder_convs": (1, 1), **steps})
    run(tiny_job(tmp_path / "one", build=lambda: build(network)))
    _in_group(tmp_path / "two", 0.0, None, network)
    one, two = (np.array(_losses(tmp_path / name), float) for name in ("one", "two"))
    np.testing.assert_allclose(two, one, atol=1e-5)  # the order of the sums differs
    assert _last(tmp_path / "two").keys() == build(network).state_dict().keys()


def test_resumed_processes_drop_what_they_would_have_dropped(tmp_path: Path) -> None:
    """Every process has masks of its own, and the first one's checkpoint holds no other process' generator."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _in_group(whole, 0.5)
    _in_group(parts, 0.5, 3)
    assert len(_losses(parts)) == 4
    _in_group(parts, 0.5)
    assert _losses(parts) == _losses(whole)
    for name, tensor in _last(whole).items():
        assert torch.equal(tensor, _last(parts)[name]), name


def _in_group(folder: Path, *options: object) -> None:
    """Two processes train in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert end([start(train_in_group, rank, 2, str(folder), port, *options) for rank in range(2)]) == [0, 0]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_pseudo_dice_is_hard_and_without_background(activation: str) -> None:
    """MedicalSeg's was soft, took a sigmoid of softmax logits and counted the background."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, 3, 4, 5, 6)).astype(np.float32))
    if activation == "softmax":
        target = torch.from_numpy(rng.integers(-1, 3, (2, 4, 5, 6)))
        pairs = [(logits.argmax(1) == k, target == k, target >= 0) for k in (1, 2)]
    else:
        target = torch.from_numpy(rng.integers(-1, 2, (2, 3, 4, 5, 6)))
        pairs = [(logits[:, k] > 0, target[:, k] == 1, target[:, k] >= 0) for k in range(3)]
    scores = dice_of(_overlap(logits, target, Head(activation=activation, values=(0, 1, 2))))  # type: ignore[arg-type]
    expected = [2 * int((p & t & u).sum()) / int((p & u).sum() + (t & u).sum()) for p, t, u in pairs]
    assert scores == pytest.approx(expected, abs=1e-12)


def test_a_class_nobody_has_gives_no_number() -> None:
    target = torch.zeros(1, 2, 2, dtype=torch.int64)
    logits = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert all(math.isnan(score) for score in dice_of(_overlap(logits, target, Head(activation="softmax", values=(0, 1, 2)))))
