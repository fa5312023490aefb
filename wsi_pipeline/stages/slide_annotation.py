"""A slide's annotation by the settings, and whether it lies where the slide has tissue."""

from functools import partial

from wsi_pipeline.config import AnnotationConfig
from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.jobs.unit import SmallFile
from wsi_pipeline.slides.annotation_frame import (
    GOOD,
    better_ways,
    share_on_tissue,
    share_scanned,
)
from wsi_pipeline.slides.annotation_origin import file_to_level0, stated_origin
from wsi_pipeline.slides.annotations import Annotation, OffSlideError, read_annotation
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import TissueMask


def slide_annotation(slide: Slide, file: SmallFile | None, rules: AnnotationConfig) -> Annotation:
    """A slide's annotation in its level-0 px; an empty one where there is no file.

    Raises
    ------
    AnnotationError
        If the file cannot be understood, or all of its lesions lie off the slide; the message
        names the settings by which they would lie on it.
    """
    if file is None:
        return Annotation()
    origin = stated_origin(file.path, rules.origin)
    scale = 1 / slide.mpp if rules.scale == "um" else rules.scale
    to_level0 = file_to_level0(origin, scale, bounds=slide.bounds, size=slide.size)
    try:
        return read_annotation(
            file.path,
            positive=rules.positive,
            exclusion=rules.exclusion,
            ignored=rules.ignored,
            to_level0=to_level0,
            size=slide.size,
        )
    except OffSlideError as error:
        better = better_ways(error.drawn, slide, partial(share_scanned, slide=slide))
        raise AnnotationError(f"{error}{_advice(better, 'on the slide')}") from error


def misplacement_notes(
    slide: Slide, annotation: Annotation, mask: TissueMask, rules: AnnotationConfig, file: SmallFile
) -> list[str]:
    """Notes where lesions lie off tissue and would lie on it if the file were read otherwise.

    Raises
    ------
    AnnotationError
        If less of them than ``rules.min_on_tissue`` lies on tissue.
    """
    share = share_on_tissue(annotation.placed, mask)
    if share >= GOOD:
        return []
    better = better_ways(annotation.drawn, slide, partial(share_on_tissue, mask=mask))
    better = {way: found for way, found in better.items() if found > share + 0.25}
    if share < rules.min_on_tissue:
        raise AnnotationError(
            f"{file.path}: {share:.0%} of the area of its lesions is tissue, under"
            f" catalog.annotation.min_on_tissue, {rules.min_on_tissue:g}"
            f"{_advice(better, 'on tissue')}"
        )
    return [f"{share:.0%} of the lesions' area is tissue{_advice(better, 'on tissue')}"]


def _advice(better: dict[str, float], where: str) -> str:
    if not better:
        return ": is it another slide's annotation, or drawn at another scale?"
    ways = " or ".join(f"{way} ({share:.0%})" for way, share in [*better.items()][:3])
    return f": more would lie {where} with {ways}"
