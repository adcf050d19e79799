"""TRAIN, before anything is prepared: what prepared cases of all stages will take on disk, and whether there is room for them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from ..errors import InputError
from .configuration import Configuration
from .prepare import unprepared
from .sizes import room_bytes
from .work import Work


def check_space(place: Work, stages: Mapping[str, Configuration]) -> None:
    """Tell what the cases of every stage that are not prepared yet will take, all together, and what is free.

    Raises
    ------
    InputError
        When it is more than a disk has left: a stage that comes hours later would not find it either.
    """
    config = place.config
    needs: dict[int, int] = {}
    folders = {place.shared.stat().st_dev: place.shared} | {place.folder.stat().st_dev: place.folder}
    for name, configuration in stages.items():
        folder = place.prepared(name, cascaded=configuration.previous is not None)
        left = unprepared(place.dataset, configuration, folder, dtype=config.cache, storage=config.storage)
        disk = (place.folder if configuration.previous is not None else place.shared).stat().st_dev
        need = room_bytes(left, configuration.spec, folder, dtype=config.cache, storage=config.storage, workers=config.workers)
        needs[disk] = needs.get(disk, 0) + need
    names = ", ".join(stages)
    for disk, need in needs.items():
        folder, free = folders[disk], shutil.disk_usage(folders[disk]).free
        told = f"about {_gigabytes(need)} and {_gigabytes(free)} are free in {folder}"
        place.show.stage(f"prepared cases of {names} need {told}")
        if need > free:
            smaller = "store float16 (--cache-dtype float16), " if config.cache == "float32" else ""
            fewer = "train fewer configurations, " if len(stages) > 1 else ""
            raise InputError(f"prepared cases of {names} need {told}; {smaller}{fewer}free some space or choose another folder (--work)")


def _gigabytes(count: int) -> str:
    """Three figures: small sets need little more than nothing."""
    return f"{count / 1e9:.3g} GB" if count < 1e12 else f"{count / 1e9:,.0f} GB"
