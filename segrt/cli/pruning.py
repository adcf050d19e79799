"""What `segrt-build --prune` checks, measures and shows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .common import comma_list

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..export.scoring import Validation


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneOptions:
    """The flags of `segrt-build` that belong to --prune, as they were given."""

    prune: str | None
    max_drop: float | None
    images: Path | None
    labels: Path | None
    mask_suffix: str | None
    mask_threshold: float | None

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels that were asked for."""
        return comma_list(self.prune) or ()

    def check(self) -> None:
        """Raise an InputError when one is given without --prune, or they do not go together."""
        alone = [name for name, value in vars(self).items() if name != "prune" and value is not None]
        if self.prune is None and alone:
            flag = f"--{alone[0].replace('_', '-')}"
            raise InputError(f"{flag} belongs to --prune, which scores the levels of a UNet++; add --prune L1,L2,L3,L4 or leave it out")
        if (self.images is None) != (self.labels is None):
            raise InputError("--images and --labels belong together: images to score on, and their label maps")
        if self.images is None and (self.mask_suffix is not None or self.mask_threshold is not None):
            raise InputError("--mask-suffix and --mask-threshold say how the masks of --labels are read; add --images and --labels")
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise InputError(f"--max-drop: expected 0 <= x <= 1, got {self.max_drop:g}")

    def validation(self, source: Path) -> Validation | None:
        """Cases to score the bundle's levels on, found before minutes go into building; levels it does not have are refused."""
        from ..bundle import Bundle
        from ..export.prune import check_levels
        from ..export.scoring import in_folders, remembered

        if not (source / "model.json").is_file():
            raise InputError(f"{source}: --prune takes the bundle of a UNet++, made by segrt-train --model unetpp")
        bundle = Bundle.open(source)
        check_levels(bundle, self.levels)
        if self.images is None or self.labels is None:
            try:
                return remembered(bundle)
            except InputError as err:
                if self.max_drop is not None:
                    raise
                # a bundle moves to other machines, and its training's pictures often do not
                logger.warning("levels are built without scores: %s", err)
                return None
        channels = len(bundle.spec.channels)
        return in_folders(self.images, self.labels, channels, mask_suffix=self.mask_suffix, threshold=self.mask_threshold)


def show_levels(
    bundle: Bundle, wanted: PruneOptions, validation: Validation | None, *, sample: Path | None, options: Mapping[str, Any]
) -> None:
    """Measure built levels and print their table, with the one that is recommended."""
    from ..export.prune import MAX_DROP, check_levels, measure_levels
    from .show import print_rows

    drop = MAX_DROP if wanted.max_drop is None else wanted.max_drop
    levels = check_levels(bundle, wanted.levels)
    pruning = measure_levels(bundle, levels, options=options, validation=validation, sample=sample, max_drop=drop)
    print_rows(f"levels of {bundle.spec.name}: {pruning.title}", pruning.rows)
    if pruning.recommended is None:
        print(
            "no Dice, and so no recommendation: name images and their masks with --images and --labels"
            if validation is None
            else f"no recommendation: in {pruning.validation} there is nothing to find; check the masks, and --mask-threshold"
        )
        return
    print(
        f"recommended: {pruning.recommended}, the smallest level that loses at most {pruning.max_drop:g} of Dice, "
        "over all cases and over those with the structure"
    )
    print(f"use it with: segrt-predict IMAGES OUT --model {bundle.path} --level {pruning.recommended}")
