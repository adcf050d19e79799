"""A plan in words: what would be trained, and why; TRAIN, what `--plan-only` shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ..networks import build_empty, count_parameters
from ..spec import ShapeTarget
from .configuration import Configuration, Plan


def tell_plan(plan: Plan, chosen: Mapping[str, Configuration]) -> Iterator[str]:
    """Lines on every configuration of a plan: its numbers, then the reason of each choice.

    Parameters
    ----------
    chosen : those that would be trained, with what the training overrides
    """
    memory = f" for {plan.memory_gb:g} GB" if plan.memory_gb else ""
    median = f"median image {_times(plan.median_shape)} voxels of {_millimetres(plan.median_spacing)}"
    yield f"planner {plan.planner}{memory}; {median}; axes transposed as {', '.join(map(str, plan.transpose))}"
    for name, planned in plan.configurations.items():
        yield f"{name}, {'to be trained' if name in chosen else 'not chosen'}: {_numbers(chosen.get(name, planned))}"
        yield from (f"    {choice}: {reason}" for choice, reason in planned.reasons.items())


def _numbers(configuration: Configuration) -> str:
    spec = configuration.spec
    target = spec.target
    if isinstance(target, ShapeTarget):
        grid = f"every image resized to {_times(target.shape)} voxels"
    else:
        grid = f"spacing {_millimetres(target.spacing)}, median image {_times(round(n) for n in configuration.median_shape)} voxels"
    parameters = count_parameters(build_empty(spec.network))
    return (
        f"patch {_times(spec.inference.patch)}, batch {configuration.batch_size}, {grid}, "
        f"{spec.network.family} of {parameters:,} parameters"
    )


def _times(numbers: Iterable[int]) -> str:
    return " x ".join(str(n) for n in numbers)


def _millimetres(spacing: Iterable[float | None]) -> str:
    return " x ".join("its own" if mm is None else f"{mm:.4g}" for mm in spacing) + " mm"
