"""The explain stage: why the model called places of slides tumour, and which method to believe.

plan.py             what is going to be done; what cannot be is refused here
stage.py            the run: what is done, in which order, and the page
places.py           what the evaluation says is worth a look, or a place that is asked for
methods.py          which methods fit which of our models
maps_and_panels.py  a method's map of a place, and the picture of all of them
checks.py           methods held against annotations, and whether they can be trusted
"""

from wsi_pipeline.stages.explain.plan import plan_explanations
from wsi_pipeline.stages.explain.stage import run

__all__ = ["plan_explanations", "run"]
