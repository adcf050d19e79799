"""What `segrt-predict` shows: the memory estimate, two progress bars, and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..bundle import Bundle
from ..device import free_bytes
from ..errors import BackendError, InputError
from ..io import Case
from ..io.cases import PICTURE_SUFFIXES, image_suffix
from ..io.peek import peek
from ..memory import available_bytes, engine_bytes, estimate, resident_bytes
from ..pipeline import CaseResult
from ..predictor import Predictor
from ..spec import ModelSpec
from .common import gigabytes

_FIRST_WINDOW = 160 * 2**20


def print_estimate(predictor: Predictor, cases: Sequence[Case], base: int, *, probabilities: bool) -> None:
    """Say how much memory the largest case will take, on the GPU when that is where it is computed."""
    if predictor.device.startswith("cuda"):
        _print_device_estimate(predictor, cases, probabilities=probabilities)
        return
    sizes = {case.name: case_estimate(predictor, case, base, probabilities=probabilities) for case in cases}
    if any(sizes.values()):
        name = max(sizes, key=lambda key: sizes[key])
        # file names and messages may hold brackets, which are no markup
        line = f"memory: at most {gigabytes(sizes[name])} (case {name})"
        free = available_bytes()
        if free and sizes[name] - resident_bytes() > free:
            line += f", more than the {gigabytes(free)} that are free: the system may end this run"
        Console(stderr=True, markup=False).print(line, highlight=False, soft_wrap=True)


def _print_device_estimate(predictor: Predictor, cases: Sequence[Case], *, probabilities: bool) -> None:
    known = {case.name: found for case in cases if (found := peek(case.files))}
    if not known:
        return
    name, (grid, itemsize) = max(known.items(), key=lambda item: prod(item[1][0].shape))
    try:
        plan = predictor.device_plan(grid, itemsize, free_bytes(predictor.device), probabilities=probabilities)
    except BackendError as err:
        line = f"case {name} will fail: {err}"  # the others of the folder need not
    else:
        how = "" if plan.starts == (None,) * len(plan.starts) else ", logits slab by slab"
        line = f"memory of {predictor.device}: at most {gigabytes(plan.peak)} (case {name}{how})"
    Console(stderr=True, markup=False).print(line, highlight=False, soft_wrap=True)


def case_estimate(predictor: Predictor, case: Case, base: int, *, probabilities: bool = False) -> int:
    """Peak bytes of the process on this case, first stages and the partner of a pair included; 0 when its header cannot be read."""
    known = peek(case.files)
    if known is None:
        return 0
    grid, itemsize = known
    models = [predictor] if predictor.partner is None else [predictor, predictor.partner]
    engines = predictor.engine_bytes
    if not engines:
        # nobody measured: what the library holds by now counts, and what it loads with its first window
        base = max(base, resident_bytes())
        engines = sum(engine_bytes(model.spec, len(model.members)) for model in models) + _FIRST_WINDOW
    options: dict[str, Any] = {"half": predictor.accumulate == "float16", "probabilities": probabilities, "step": predictor.step}
    partner = predictor.partner.spec if predictor.partner is not None else None
    peak = estimate(predictor.spec, grid, itemsize, base=base, engines=engines, partner=partner, **options)
    for first in (model.previous for model in models):
        if first is not None:
            held = first.engine_bytes or engine_bytes(first.spec, len(first.members))
            peak = max(peak, case_estimate(first, case, base)) + held
    return peak


class Bars:
    """One bar over the cases, one over the windows of the case at hand."""

    def __init__(self, cases: int) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True, markup=False))
        self._cases = self._progress.add_task("cases", total=cases)
        self._windows = self._progress.add_task("windows", total=None)

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    @property
    def is_seen(self) -> bool:
        """Whether the bars move before somebody's eyes."""
        return self._progress.console.is_terminal

    def windows(self, case: str, done: int, total: int) -> None:
        """Windows of `case` that are done."""
        self._progress.start()  # not before there is progress: what cannot start leaves one sentence and no empty bars
        self._progress.update(self._windows, description=f"windows of {case}", completed=done, total=total)

    def case(self, result: CaseResult) -> None:
        """One more case is finished."""
        self._progress.start()
        self._progress.advance(self._cases)
        if result.status == "failed":
            self._progress.console.print(f"{result.name} failed: {result.error}", style="red", highlight=False)


# stage -> a heading that leaves room for nine columns in 80
_HEADINGS = {"previous": "stage 1", "preprocess": "prepare", "postprocess": "clean"}


def print_summary(results: Sequence[CaseResult], output: Path) -> None:
    """Print seconds per stage and voxels per label, a row per case."""
    stages = list(dict.fromkeys(stage for r in results for stage, seconds in r.seconds.items() if seconds >= 0.005))
    times = _table(f"seconds per stage, {output}", ("case",), (*(_HEADINGS.get(stage, stage) for stage in stages), "total", "windows"))
    voxels = _table("voxels per label", ("case", "voxels"), ())
    for r in results:
        seconds = [f"{r.seconds[stage]:.2f}" if stage in r.seconds else "" for stage in stages]
        total = f"{sum(r.seconds.values()):.2f}" if r.status == "done" else r.status
        times.add_row(r.name, *seconds, total, str(r.windows or ""))
        found = ", ".join(f"{label} {count}" for label, count in r.voxels.items() if count and label != "background")
        if r.status != "skipped":
            voxels.add_row(r.name, r.error or found or "background only")
    console = _console()
    console.print(times, highlight=False)
    if voxels.row_count:
        console.print(voxels, highlight=False)
    counts = {status: sum(r.status == status for r in results) for status in ("done", "skipped", "failed")}
    print(", ".join(f"{count} {status}" for status, count in counts.items() if count) + f"; details in {output / 'predictions.json'}")


def show_overview(cases: Sequence[Case], results: Sequence[CaseResult], output: Path, spec: ModelSpec, *, wanted: bool | None) -> None:
    """Write overview.png beside the labels when it is wanted; None: for pictures, where matplotlib is installed."""
    from ..report.predictions import OVERVIEW, overview_of_files

    pairs = list(zip(cases, results, strict=True))
    if any(result.output == OVERVIEW for result in results):
        if wanted:
            raise InputError(f"{output / OVERVIEW} is the label file of a case, so there is no overview; leave --overview out")
        return
    if wanted is None:
        wanted = find_spec("matplotlib") is not None and all(image_suffix(case.files[0]) in PICTURE_SUFFIXES for case in cases)
    done = [(case.name, case.files, output / result.output) for case, result in pairs if result.status != "failed"]
    if wanted and done:
        values = spec.head.values if spec.head.activation == "sigmoid" else [label.values[0] for label in spec.labels]
        overview_of_files(output / OVERVIEW, done, {value: label.name for value, label in zip(values, spec.labels, strict=True)})
        print(f"overview: {output / OVERVIEW}")


def _console() -> Console:
    """Standard output; tables in a file or a pipe are not squeezed into 80 columns."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(markup=False, width=140)


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in left:
        table.add_column(column, overflow="fold", min_width=12)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_rows(title: str, rows: Sequence[dict[str, str]]) -> None:
    """Print a table of text as it stands, a row per dictionary."""
    first, *others = rows[0]
    table = _table(title, (first,), others)
    for row in rows:
        table.add_row(*row.values())
    _console().print(table, highlight=False)


def print_build(bundle: Bundle, reports: Sequence[dict[str, Any]]) -> None:
    """Print a line per engine and member: how it compares with the fp32 torch network."""
    print(f"{bundle.spec.name} in {bundle.path}: members {', '.join(bundle.spec.members)}")
    if bundle.partner is not None:
        partner = bundle.partner
        print(f"a pair with {partner.spec.name} in {partner.path}: members {', '.join(partner.spec.members)}, built and verified too")
    for report in reports:
        for member, check in report["members"].items():
            verdict = "verified" if check["passed"] else f"KEPT UNVERIFIED, {check['reason']}"
            figures = f"labels agree {check['label_agreement']:.6f}, mean Dice {check['mean_dice']:.4f}"
            errors = f"relative error {check['relative_error']:.1e}, max |d logit| {check['max_abs_difference']:.1e}"
            print(f"{report['key']}, member {member}: {verdict}; {figures}, {errors}")
