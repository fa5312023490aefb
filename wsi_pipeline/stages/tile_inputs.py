"""What a slide's patches are made of: its grid, its tissue and its lesions, by the settings."""

from dataclasses import dataclass

import pandas as pd

from wsi_pipeline.config import AnnotationConfig, Config, TileConfig
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.jobs.unit import LargeFile, SmallFile
from wsi_pipeline.slides.annotations import Annotation
from wsi_pipeline.slides.level_reader import BackendSelection
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import GivenMasks, TissueMask, tissue_mask
from wsi_pipeline.stages.slide_annotation import misplacement_notes, slide_annotation


@dataclass(frozen=True, eq=False)
class SlideView:
    """A slide as the tile stage sees it.

    Attributes
    ----------
    grid : PatchGrid
    annotation : Annotation
    tissue : TissueMask
    backend : BackendSelection
        What reads the working level.
    misplaced : list of str
        What to check of where the lesions lie.
    """

    grid: PatchGrid
    annotation: Annotation
    tissue: TissueMask
    backend: BackendSelection
    misplaced: list[str]

    @property
    def expected_patches(self) -> int:
        """About how many patches hold tissue."""
        return round(self.tissue.area_level0 / self.grid.level0_length(self.grid.stride_px) ** 2)


@dataclass(frozen=True)
class TileInputs:
    """A slide, what was drawn on it, and the settings; part of a unit."""

    slide: LargeFile
    mpp: float | None
    annotation: SmallFile | None
    annotation_rules: AnnotationConfig
    tissue: SmallFile | None
    exclude: SmallFile | None
    tissue_values: tuple[int, ...] | None
    exclude_values: tuple[int, ...] | None
    settings: TileConfig

    @classmethod
    def of_slide(cls, row, config: Config) -> "TileInputs":
        """Those of a row of the catalog."""

        def file(path) -> SmallFile | None:
            return None if pd.isna(path) else SmallFile.at(path)

        tissue, exclude = file(row.tissue), file(row.exclude)
        return cls(
            slide=LargeFile.at(row.path),
            mpp=None if pd.isna(row.mpp) else float(row.mpp),
            annotation=file(row.annotation),
            annotation_rules=config.catalog.annotation,
            tissue=tissue,
            exclude=exclude,
            tissue_values=config.catalog.tissue_values if tissue else None,
            exclude_values=config.catalog.exclude_values if exclude else None,
            settings=config.tile,
        )

    def look(self) -> SlideView:
        """Open the slide, find its tissue, and compare its annotation with it.

        Raises
        ------
        SlideError, AnnotationError, MaskError
            If one of its files cannot be used, or lesions lie off tissue.
        """
        tile = self.settings
        with Slide(self.slide.path, self.mpp) as slide:
            downsample = slide.downsample(tile.level, tile.mpp)
            sizes = tile.patch_px, tile.stride_px, tile.inner_px
            grid = PatchGrid(slide.bounds, slide.mpp, downsample, *sizes)
            annotation = slide_annotation(slide, self.annotation, self.annotation_rules)
            tissue = tissue_mask(slide, **tile.tissue.model_dump(), given=self._masks())
            misplaced = []
            known = tissue.mask.any() and not tissue.unread  # else the mask cannot tell
            if self.annotation and annotation.lesions and known:
                rules, file = self.annotation_rules, self.annotation
                misplaced = misplacement_notes(slide, annotation, tissue, rules, file)
            backend = slide.backend(slide.level_for(downsample)[0])
        return SlideView(grid, annotation, tissue, backend, misplaced)

    def _masks(self) -> GivenMasks:
        return GivenMasks(
            tissue=self.tissue.path if self.tissue else None,
            exclude=self.exclude.path if self.exclude else None,
            tissue_values=self.tissue_values,
            exclude_values=self.exclude_values,
            origin=self.annotation_rules.origin,
        )
