"""What becomes of a slide by what its annotation holds: the table of docs/annotations.md."""

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from slide_files import write_pyramid_tiff

from wsi_pipeline.config import AnnotationConfig
from wsi_pipeline.errors import AnnotationError, CatalogError
from wsi_pipeline.jobs.unit import LargeFile, SmallFile
from wsi_pipeline.slides.annotations import read_annotation
from wsi_pipeline.stages.catalog import InspectSlide

DOCS = Path(__file__).parents[2] / "docs" / "annotations.md"

BOX = [(50, 50), (150, 50), (150, 150), (50, 150)]
OTHER = [(300, 200), (400, 200), (400, 300), (300, 300)]
WITHIN = [(80, 80), (120, 80), (120, 120), (80, 120)]


def obj(classification=None, ring=BOX, kind="annotation", geometry="Polygon", **more):
    """An object of QuPath's."""
    coordinates = {
        "Polygon": [[*ring, ring[0]]],
        "MultiPoint": ring,
        "LineString": ring,
    }[geometry]
    properties = {"objectType": kind, **more}
    if classification is not None:
        properties["classification"] = classification
    geometry = {"type": geometry, "coordinates": coordinates}
    return {"type": "Feature", "id": "0b5c", "geometry": geometry, "properties": properties}


def qupath(*objects):
    return json.dumps({"type": "FeatureCollection", "features": list(objects)})


def other_program(ring=BOX, **properties):
    geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
    return json.dumps([{"type": "Feature", "geometry": geometry, "properties": properties}])


def asap(*shapes, groups=()):
    body = "".join(
        f'<Annotation Name="a" Type="{kind}" PartOfGroup="{group}"><Coordinates>'
        + "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(ring))
        + "</Coordinates></Annotation>"
        for kind, group, ring in shapes
    )
    tree = "".join(f'<Group Name="{name}" PartOfGroup="{of}"/>' for name, of in groups)
    return (
        f"<ASAP_Annotations><Annotations>{body}</Annotations>"
        f"<AnnotationGroups>{tree}</AnnotationGroups></ASAP_Annotations>"
    )


def layer(*regions, name="", attribute=("Description", "")):
    body = "".join(
        f'<Region Type="{kind}" Text="{text}" NegativeROA="{negative}"><Vertices>'
        + "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in ring)
        + "</Vertices></Region>"
        for kind, text, negative, ring in regions
    )
    return (
        f'<Annotation Name="{name}"><Attributes><Attribute Name="{attribute[0]}"'
        f' Value="{attribute[1]}"/></Attributes><Regions>{body}</Regions></Annotation>'
    )


def imagescope(*layers):
    return f"<Annotations>{''.join(layers)}</Annotations>"


def halo(*layers):
    return imagescope(*layers).replace("<Vertex ", "<V ").replace('Type="0"', 'Type="Polygon"')


AREA = ("0", "", 0, BOX)
CUT = ("0", "", 1, WITHIN)
TUMOR, STROMA = {"name": "Tumor"}, {"name": "Stroma"}
CELLS = [obj(TUMOR, OTHER, kind="cell", nucleusGeometry={"type": "Polygon"})] * 5
ERROR = "none of its classes"

# Format, what is drawn, the file, settings and label of the table; then label (or the error),
# lesions, their area, and part of what is said.
CASES = [
    # Nothing was drawn
    ("QuPath", "nothing (empty collection)", qupath(), {}, -1, 0, 0, "nothing is drawn"),
    ("QuPath", "nothing, `unannotated: normal`", qupath(), {"unannotated": "normal"},
     0, 0, 0, "nothing is drawn in its annotation: normal, by catalog.unannotated"),
    ("QuPath", "the root object alone", qupath(obj(kind="root")), {}, -1, 0, 0, "nothing is drawn"),
    ("QuPath", "only classes in `ignored`, `unannotated: normal`", qupath(obj(STROMA)),
     {"unannotated": "normal", "ignored": ("stroma",)}, 0, 0, 0, "nothing is drawn"),
    ("ASAP", "nothing", asap(), {}, -1, 0, 0, "nothing is drawn"),
    ("ImageScope", "a layer without regions", imagescope(layer()), {},
     -1, 0, 0, "nothing is drawn"),
    ("NCRF", "nothing", '{"positive": [], "negative": []}', {}, -1, 0, 0, "nothing is drawn"),
    # What was drawn cannot be used
    ("QuPath", "points of class Tumor", qupath(obj(TUMOR, geometry="MultiPoint")), {},
     -1, 0, 0, "1 set of points of class 'Tumor': left out"),
    ("QuPath", "points of class Tumor, `unannotated: normal`",
     qupath(obj(TUMOR, geometry="MultiPoint")), {"unannotated": "normal"}, -1, 0, 0, "no"),
    ("QuPath", "points of class Tumor, label 0 in the table",
     qupath(obj(TUMOR, geometry="MultiPoint")), {"label": 0},
     "holds 1 set of points of class 'Tumor', but the catalog's label", 0, 0, ""),
    ("QuPath", "a line of class Tumor", qupath(obj(TUMOR, geometry="LineString")), {},
     -1, 0, 0, "1 line of class 'Tumor': left out"),
    ("QuPath", "cells alone", qupath(*CELLS), {}, -1, 0, 0, "5 cells of class 'Tumor': left out"),
    ("ASAP", "dots of class Tumor", asap(("Dot", "Tumor", BOX[:1])), {}, -1, 0, 0, "1 point of"),
    ("ImageScope", "an arrow in a layer Tumor",
     imagescope(layer(("3", "", 0, BOX[:2]), name="Tumor")), {}, -1, 0, 0, "1 arrow of class"),
    ("HALO", "a pin in a layer Tumor",
     halo(layer(("Pin", "", 0, BOX[:1]), name="Tumor")), {}, -1, 0, 0, "1 point of class 'Tumor'"),
    ("QuPath", "an outline without area", qupath(obj(TUMOR, [(5, 5), (9, 9), (5, 5), (7, 7)])), {},
     "no area is left of its 1 tumour shapes", 0, 0, ""),
    ("QuPath", "an outline of an unknown class", qupath(obj(STROMA)), {}, ERROR, 0, 0, ""),
    ("QuPath", "the same, label 1 in the table", qupath(obj(STROMA)), {"label": 1}, ERROR,
     0, 0, ""),
    ("any", "a file of another kind", "x,y\n1,2\n", {}, "is neither JSON nor XML", 0, 0, ""),
    ("any", "the file in gzip", gzip.compress(qupath(obj(TUMOR)).encode()), {}, 1, 1, 10_000, ""),
    # The slide is normal
    ("QuPath", "Stroma, label 0 in the table", qupath(obj(STROMA)), {"label": 0},
     0, 0, 0, "1 area of class 'Stroma': left out"),
    ("QuPath", "Tumor, label 0 in the table", qupath(obj(TUMOR)), {"label": 0},
     r"holds lesions \(1\), but the catalog's label", 0, 0, ""),
    ("NCRF", "outlines of tissue, no tumour", json.dumps({"negative": [{"vertices": BOX}]}), {},
     0, 0, 0, ""),
    # Structure before flattening
    ("QuPath", "an annotation and five cells in it", qupath(obj(TUMOR), *CELLS), {},
     1, 1, 10_000, "5 cells of class 'Tumor': left out"),
    ("QuPath", "the same as objects within an object",
     qupath({**obj(TUMOR), "childObjects": CELLS}), {}, 1, 1, 10_000, "5 cells"),
    ("QuPath", "an annotation within an annotation",
     qupath({**obj(STROMA), "childObjects": [obj(TUMOR, OTHER)]}), {}, 1, 1, 10_000, "1 area of"),
    ("QuPath", "a TMA core, tiles and a detection around an annotation",
     qupath(obj(TUMOR), *(obj(TUMOR, OTHER, k) for k in ("tma_core", "tile", "detection"))), {},
     1, 1, 10_000, "1 TMA core of class 'Tumor', 1 tile of class 'Tumor', 1 detection"),
    ("QuPath 0.2", "a detection, known by its id",
     qupath(obj(TUMOR), {**obj(TUMOR, OTHER, None), "id": "PathDetectionObject"}), {},
     1, 1, 10_000, "1 detection"),
    ("QuPath", "a locked annotation", qupath(obj(TUMOR, isLocked=True)), {}, 1, 1, 10_000, ""),
    ("QuPath", "derived class Stroma: Inflamed", qupath(obj({"names": ["Stroma", "Inflamed"]})), {},
     ERROR + r" \['Stroma: Inflamed'\]", 0, 0, ""),
    ("QuPath", "derived class Tumor: Necrosis", qupath(obj({"names": ["Tumor", "Necrosis"]})), {},
     1, 1, 10_000, ""),
    ("QuPath", "the same, `exclusion: [\"Tumor: Necrosis\"]`",
     qupath(obj(TUMOR), obj({"name": "Tumor: Necrosis"}, WITHIN)),
     {"exclusion": ("Tumor: Necrosis",)}, 1, 1, 8400, ""),
    ("QuPath", "no class, names Tumor and Stroma",
     qupath(obj(name="Tumor"), obj(ring=OTHER, name="Stroma")), {}, 1, 1, 10_000,
     "no shape has a class; their names ['Stroma', 'Tumor'] are read as such"),
    ("QuPath", "no class, a name that the settings do not hold", qupath(obj(name="Region 1")), {},
     1, 1, 10_000, "their names ['Region 1'] are not read"),
    ("ASAP", "a group that is part of Tumor",
     asap(("Polygon", "DCIS", BOX), groups=[("DCIS", "Breast"), ("Breast", "Tumor")]), {},
     1, 1, 10_000, ""),
    ("ASAP", "a group that is part of Stroma",
     asap(("Polygon", "Inflamed", BOX), groups=[("Inflamed", "Stroma"), ("Stroma", "Inflamed")]),
     {}, ERROR, 0, 0, ""),
    ("ImageScope", "unnamed layers, Description Tumor and Stroma",
     imagescope(layer(AREA, attribute=("Description", "Tumor")),
                layer(("0", "", 0, OTHER), attribute=("Description", "Stroma"))), {},
     1, 1, 10_000, "1 area of class 'Stroma': left out"),
    ("ImageScope", "a layer's attribute Class with the value Tumor",
     imagescope(layer(AREA, attribute=("Class", "Tumor"))), {}, 1, 1, 10_000, ""),
    ("ImageScope", "a layer's attribute called Tumor, without a value",
     imagescope(layer(AREA, attribute=("Tumor", ""))), {}, 1, 1, 10_000, ""),
    ("ImageScope", "regions with the texts Tumor and Stroma",
     imagescope(layer(("0", "Tumor", 0, BOX), ("0", "Stroma", 0, OTHER))), {},
     1, 1, 10_000, "1 area of class 'Stroma'"),
    ("ImageScope", "a negative region in the tumour's layer",
     imagescope(layer(AREA, CUT, name="Tumor")), {}, 1, 1, 8400, ""),
    ("ImageScope", "a negative region in another layer",
     imagescope(layer(AREA, name="Tumor"), layer(CUT, name="Stroma")), {}, 1, 1, 10_000, ""),
    ("ImageScope", "a layer Exclusion over the tumour's",
     imagescope(layer(AREA, name="Tumor"), layer(("0", "", 0, WITHIN), name="Exclusion")), {},
     1, 1, 8400, ""),
    ("HALO", "a polygon with a negative one in it", halo(layer(AREA, CUT, name="Tumor")), {},
     1, 1, 8400, ""),
    ("Digital Slide Archive", "`label`, text or object",
     other_program(label={"value": "Tumor"}), {}, 1, 1, 10_000, ""),
    ("Cytomine", "`terms`", other_program(terms=[{"name": "Stroma"}]), {}, ERROR, 0, 0, ""),
    ("others", "`class`", other_program(**{"class": "Stroma"}), {}, ERROR, 0, 0, ""),
    ("others", "`classification` as text", other_program(classification="Stroma"), {}, ERROR,
     0, 0, ""),
]  # fmt: skip


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    pixels = np.full((400, 600, 3), 200, np.uint8)
    return write_pyramid_tiff(tmp_path_factory.mktemp("s") / "s.tif", [pixels], mpp=0.5)


def inspect(slide, file, unannotated="unknown", label=None, **rules):
    rules = AnnotationConfig(**rules)
    annotation = SmallFile.at(file)
    return InspectSlide(
        "s", LargeFile.at(slide), None, None, annotation, label, unannotated, rules
    ).run()


@pytest.mark.parametrize(
    ("content", "settings", "outcome", "lesions", "area", "said"),
    [case[2:] for case in CASES],
    ids=[f"{case[0]}: {case[1]}" for case in CASES],
)
def test_a_file_means_what_its_author_meant(
    slide, tmp_path, content, settings, outcome, lesions, area, said
):
    file = tmp_path / "annotation"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(outcome, str):
        with pytest.raises((AnnotationError, CatalogError), match=outcome) as error:
            inspect(slide, file, **settings)
        assert str(file) in str(error.value)
        return
    found = inspect(slide, file, **settings)
    assert (found["label"], found["lesions"]) == (outcome, lesions)
    assert said in "; ".join(found["notes"])


@pytest.mark.parametrize("case", [c for c in CASES if c[6]], ids=lambda c: f"{c[0]}: {c[1]}")
def test_its_tumour_has_the_area_drawn(tmp_path, case):
    _, _, content, settings, *_, area, _ = case
    file = tmp_path / "annotation"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    rules = AnnotationConfig(**{k: v for k, v in settings.items() if k == "exclusion"})
    found = read_annotation(file, positive=rules.positive, exclusion=rules.exclusion)
    assert sum(lesion.area for lesion in found.lesions) == pytest.approx(area)


def test_the_table_in_the_docs_has_these_rows():
    words = {1: "1 (tumour)", 0: "0 (normal)", -1: "-1 (unknown)"}
    rows = [
        f"| {of} | {drawn} | {words.get(outcome, 'refused')} | {lesions} |"
        for of, drawn, _, _, outcome, lesions, *_ in CASES
    ]
    _, _, table = DOCS.read_text().partition("| Format | What is drawn | Label | Lesions |\n")
    assert table.split("\n\n")[0].splitlines()[1:] == rows


def test_a_zip_archive_of_one_file_is_read_and_of_two_refused(slide, tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.geojson", qupath(obj(TUMOR)))
    assert inspect(slide, archive)["lesions"] == 1
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("b.geojson", qupath(obj(TUMOR)))
    with pytest.raises(AnnotationError, match="zip archive of 2 files"):
        inspect(slide, archive)


# Found by trying what programs and people write
MORE = [
    ("an unclassed region around classed cells is no tumour",
     qupath(obj(), *CELLS), {}, ERROR + r" \[''\]", 0, ""),
    ("spaces do not make another class", qupath(obj({"name": " Tumor  "})), {}, 1, 1, ""),
    ("nor does a colon without a space", qupath(obj({"name": "Tumor:Necrosis"})), {}, 1, 1,
     "1 of class 'Tumor: Necrosis' count as 'tumor'"),
    ("a class that is nearly tumour is a doubt",
     qupath(obj(TUMOR), obj({"name": "Tumor 2"}, OTHER)), {}, 1, 1, "class 'Tumor 2' is left out"),
    ("keys of classes in any case", other_program(LABEL="Stroma"), {}, ERROR, 0, ""),
    ("a layer", other_program(layer="Stroma"), {}, ERROR, 0, ""),
    ("a class as an object's value", other_program(classification={"value": "Stroma"}), {}, ERROR,
     0, ""),
    ("NegativeROA in words", imagescope(layer(AREA, ("0", "", "True", WITHIN), name="Tumor")), {},
     1, 1, ""),
    ("a region's comment does not hide its layer's class",
     imagescope(layer(AREA, ("0", "see here", 0, OTHER), attribute=("Description", "Tumor"))), {},
     1, 2, "1 of class 'see here' count as 'tumor'"),
    ("exclusions alone are nothing drawn", qupath(obj({"name": "Exclusion"})), {}, -1, 0,
     "nothing is drawn"),
    ("ImageScope's root around ASAP's shapes",
     asap(("Polygon", "Tumor", BOX)).replace("ASAP_Annotations", "Annotations", 1)
     .replace("</ASAP_Annotations>", "</Annotations>"), {}, "of another form", 0, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "settings", "outcome", "lesions", "said"),
    [case[1:] for case in MORE],
    ids=[case[0] for case in MORE],
)
def test_what_was_understood_wrongly_once(
    slide, tmp_path, content, settings, outcome, lesions, said
):
    file = tmp_path / "annotation"
    file.write_text(content)
    if isinstance(outcome, str):
        with pytest.raises(AnnotationError, match=outcome):
            inspect(slide, file, **settings)
        return
    found = inspect(slide, file, **settings)
    assert (found["label"], found["lesions"]) == (outcome, lesions)
    assert said in "; ".join(found["notes"])


def test_a_class_in_two_lists_of_the_settings_is_refused():
    with pytest.raises(ValueError, match="'tumor' is both in positive and in exclusion"):
        AnnotationConfig(positive=("Tumor",), exclusion=("tumor",))
