"""A synthetic cohort: H&E-like slides whose lesions are known to the pixel.

`plan_cohort` decides what each slide holds; `write_slide` draws one of them, in a strip of rows
at a time, so that slides of any size fit into memory and each can be a task of its own.

    plan.py       which slides, patients, lesions and tiles
    layout.py     outlines of a slide: tissue, lesions, lymphocytes, folds, pen marks
    feather.py    polygons with soft edges
    stamps.py     small pictures of nuclei and glands
    histology.py  tissue drawn from stamps and noise
    mosaic.py     tissue pieced together from real tiles
    pyramid.py    strips of pixels to a pyramidal TIFF
    slide.py      all of these to the files of a slide
"""

from wsi_pipeline.phantom.plan import SlidePlan, plan_cohort
from wsi_pipeline.phantom.slide import write_slide, write_table

__all__ = ["SlidePlan", "plan_cohort", "write_slide", "write_table"]
