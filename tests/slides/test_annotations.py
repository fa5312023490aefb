import json
from collections import Counter, defaultdict

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.draw import polygon2mask

from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.slides.annotation_origin import uses_bounds_origin
from wsi_pipeline.slides.annotation_xml import write_asap_xml
from wsi_pipeline.slides.annotations import read_annotation

POSITIVE = ("_0", "_1", "Tumor", "Tumour", "")
EXCLUSION = ("_2", "Exclusion")

SQUARE = [(0, 0), (100, 0), (100, 100), (0, 100)]
INNER = [(40, 40), (60, 40), (60, 60), (40, 60)]


def read(path, positive=POSITIVE, exclusion=EXCLUSION, **options):
    return read_annotation(path, positive=positive, exclusion=exclusion, **options)


def asap(path, *shapes):
    """ASAP XML of (type, group, points)."""
    body = "".join(
        f'<Annotation Name="A{n}" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58"><Coordinates>'
        + "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(points))
        + "</Coordinates></Annotation>"
        for n, (kind, group, points) in enumerate(shapes)
    )
    path.write_text(
        f"<ASAP_Annotations><Annotations>{body}</Annotations><AnnotationGroups/></ASAP_Annotations>"
    )
    return path


def imagescope(path, *regions, layer='Id="1" Name=""', attribute="Description"):
    """ImageScope XML of one layer of (region attributes, points)."""
    body = "".join(
        f'<Region Id="{n}" {attributes}><Vertices>'
        + "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in points)
        + "</Vertices></Region>"
        for n, (attributes, points) in enumerate(regions, 1)
    )
    path.write_text(
        f"<Annotations><Annotation {layer}><Attributes>"
        f'<Attribute Name="{attribute}" Id="0" Value=""/></Attributes>'
        f"<Regions>{body}</Regions></Annotation></Annotations>"
    )
    return path


def dump(path, document):
    path.write_text(json.dumps(document))
    return path


def feature(kind, coordinates, **properties):
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def closed(ring):
    return [list(point) for point in [*ring, ring[0]]]


def area(annotation):
    return sum(lesion.area for lesion in annotation.lesions)


def left_out(annotation):
    """Number of shapes by class."""
    counts = Counter()
    for (_, group), number in annotation.left_out.items():
        counts[group] += number
    return counts


# From shapes to lesions


def test_exclusions_are_cut_out_whatever_their_place_in_the_file(tmp_path):
    found = read(asap(tmp_path / "a.xml", ("Polygon", "_2", INNER), ("Polygon", "_0", SQUARE)))
    assert [lesion.area for lesion in found.lesions] == [100 * 100 - 20 * 20]
    assert not found.lesions[0].contains(shapely.Point(50, 50))


def test_overlapping_and_touching_regions_are_one_lesion_and_apart_are_two(tmp_path):
    def square(x, y):
        return ("Polygon", "Tumor", [(x, y), (x + 10, y), (x + 10, y + 10), (x, y + 10)])

    found = read(
        asap(tmp_path / "a.xml", square(100, 50), square(0, 0), square(5, 0), square(15, 0))
    )
    assert [lesion.bounds for lesion in found.lesions] == [(0, 0, 25, 10), (100, 50, 110, 60)]
    corner = read(asap(tmp_path / "b.xml", square(0, 0), square(10, 10)))
    assert len(corner.lesions) == 1
    assert area(corner) == pytest.approx(200, abs=1)  # joined by a disc of 1 px
    assert "touch" in corner.repairs[0]


def test_an_exclusion_across_a_region_makes_two_lesions(tmp_path):
    band = [(-10, 45), (110, 45), (110, 55), (-10, 55)]
    found = read(
        asap(tmp_path / "a.xml", ("Polygon", "_0", SQUARE), ("Polygon", "Exclusion", band))
    )
    assert [lesion.bounds for lesion in found.lesions] == [(0, 0, 100, 45), (0, 55, 100, 100)]


def test_lesions_are_numbered_from_top_to_bottom_whatever_the_order_in_the_file(tmp_path):
    shapes = [
        ("Polygon", "_0", [(x, y), (x + 5, y), (x + 5, y + 5)])
        for x, y in [(0, 0), (50, 0), (0, 50), (90, 20), (70, 90)]
    ]
    corners = {
        tuple(
            lesion.bounds[:2]
            for lesion in read(asap(tmp_path / "a.xml", *(shapes[i] for i in order))).lesions
        )
        for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3])
    }
    assert corners == {((0, 0), (50, 0), (90, 20), (0, 50), (70, 90))}


def test_group_names_match_in_any_case_and_the_others_are_counted(tmp_path):
    found = read(
        asap(
            tmp_path / "a.xml",
            ("Polygon", "TUMOR", SQUARE),
            ("Polygon", "exclusion", INNER),
            ("Polygon", "stroma", SQUARE),
            ("Spline", "stroma", SQUARE),
        )
    )
    assert area(found) == 9600
    assert left_out(found) == {"stroma": 2}


def test_a_shape_without_a_class_counts_where_no_shape_has_one(tmp_path):
    path = asap(tmp_path / "a.xml", ("Polygon", "None", SQUARE))
    assert area(read(path)) == 10_000
    path = asap(tmp_path / "b.xml", ("Polygon", "None", SQUARE), ("Polygon", "_0", INNER))
    assert (area(read(path)), left_out(read(path))) == (400, {"": 1})
    only = read(path, positive=("",))
    assert (area(only), left_out(only)) == (10_000, {"_0": 1})


def test_areas_of_other_classes_only_are_no_lesions_and_named(tmp_path):
    path = asap(tmp_path / "a.xml", ("Polygon", "malignant", SQUARE), ("Polygon", "_2", INNER))
    found = read(path)
    assert (found.lesions, found.state) == ((), "unknown classes")
    for part in ("malignant", "catalog.annotation.positive", "catalog.annotation.ignored"):
        assert part in found.unknown_classes


@pytest.mark.parametrize(
    "text",
    [
        "<ASAP_Annotations><Annotations/><AnnotationGroups/></ASAP_Annotations>",
        '<Annotations MicronsPerPixel="0.25"/>',
        '{"type": "FeatureCollection", "features": []}',
        "[]",
        '{"positive": [], "negative": []}',
    ],
)
def test_a_file_without_shapes_has_no_lesions(tmp_path, text):
    path = tmp_path / "a"
    path.write_text(text)
    found = read(path, size=(100, 100))
    assert (found.lesions, found.repairs, found.left_out) == ((), (), {})
    assert found.state == "nothing"


def test_ring_that_crosses_itself_is_repaired_and_reported_and_stays_one_lesion(tmp_path):
    bow_tie = [(0, 0), (100, 100), (100, 0), (0, 100)]
    found = read(asap(tmp_path / "a.xml", ("Polygon", "_0", bow_tie)))
    assert len(found.lesions) == 1
    assert area(found) == pytest.approx(2 * 100 * 50 / 2, abs=1)
    assert "shape 1 (A0)" in found.repairs[0]
    assert "Self-intersection" in found.repairs[0]
    assert "0.0 -> 5000.0 px" in found.repairs[0]


def test_where_an_outline_overlaps_its_own_beginning_there_is_no_hole(tmp_path):
    # Around the square once and then again along its top: ASAP fills all it winds around.
    ring = [(0, 0), (100, 0), (100, 100), (0, 100), (0, -10), (80, -10), (80, 50), (-10, 50)]
    found = read(asap(tmp_path / "a.xml", ("Polygon", "_0", ring)))
    assert found.lesions[0].contains(shapely.Point(40, 25))
    assert not found.lesions[0].interiors


def test_ring_without_area_is_reported_and_an_error_where_it_is_all_there_is(tmp_path):
    line = ("Polygon", "_0", [(0, 0), (50, 50), (100, 100)])
    found = read(asap(tmp_path / "a.xml", line, ("Polygon", "_0", SQUARE)))
    assert area(found) == 10_000
    assert "-> 0.0 px, left out" in found.repairs[0]
    with pytest.raises(AnnotationError, match=r"no area is left of its 1 tumour shapes.*A0"):
        read(asap(tmp_path / "b.xml", line))


def test_tumour_that_exclusions_cover_is_an_error(tmp_path):
    path = asap(tmp_path / "a.xml", ("Polygon", "_0", INNER), ("Polygon", "_2", SQUARE))
    with pytest.raises(AnnotationError, match="no area is left"):
        read(path)


def test_slivers_between_outlines_are_no_lesions_but_reported(tmp_path):
    cut = [(-1, -1), (99.995, -1), (99.995, 40), (101, 40), (101, 101), (-1, 101)]
    rest = ("Polygon", "_0", [(200, 0), (210, 0), (210, 10)])
    found = read(asap(tmp_path / "a.xml", ("Polygon", "_0", SQUARE), ("Polygon", "_2", cut), rest))
    assert [lesion.bounds for lesion in found.lesions] == [(200, 0, 210, 10)]
    assert "1 slivers under 1 px left out, together 0.2 px" in found.repairs[0]


def test_lesions_are_moved_before_clipping_to_the_slide(tmp_path):
    path = asap(tmp_path / "a.xml", ("Polygon", "_0", SQUARE))
    moved = read(path, to_level0=(1, 0, 0, 1, 1000, 2000), size=(1050, 5000))
    assert moved.lesions[0].bounds == (1000, 2000, 1050, 2100)
    assert "clipped to the slide's 1050 x 5000 px: area 10000.0 -> 5000.0 px" in moved.repairs
    assert read(path, size=(100, 100)).repairs == ()
    with pytest.raises(AnnotationError, match="x 1000 to 1100, y 0 to 100, all off the slide of"):
        read(path, to_level0=(1, 0, 0, 1, 1000, 0), size=(1000, 100))


# ASAP


def test_asap_splines_are_joined_by_lines_and_rectangles_may_be_two_corners(tmp_path):
    rectangle = ("Rectangle", "_0", [(200, 0), (300, 50)])
    four = ("Rectangle", "_0", [(400, 0), (450, 0), (450, 50), (400, 50)])
    found = read(asap(tmp_path / "a.xml", ("Spline", "_0", SQUARE), rectangle, four))
    assert [lesion.area for lesion in found.lesions] == [10_000, 5000, 2500]


def test_asap_dots_and_lines_have_no_area_and_are_counted(tmp_path):
    found = read(
        asap(
            tmp_path / "a.xml",
            ("Dot", "_0", [(5, 5)]),
            ("PointSet", "_0", SQUARE),
            ("Measurement", "ruler", [(0, 0), (5, 5)]),
        )
    )
    assert found.lesions == ()
    assert left_out(found) == {"_0": 2, "ruler": 1}


def test_asap_coordinates_are_taken_in_their_order(tmp_path):
    path = asap(tmp_path / "a.xml", ("Polygon", "_0", SQUARE))
    text = path.read_text()
    shuffled = text.replace('Order="1"', 'Order="9"').replace('Order="0"', 'Order="5"')
    path.write_text(shuffled)  # 5, 9, 2, 3: now (100, 100), (0, 100), (0, 0), (100, 0)
    assert area(read(path)) == 10_000
    crossed = text.replace('Order="1"', 'Order="2.5"')  # 0, 2, 2.5, 3 is a bow tie
    path.write_text(crossed)
    assert area(read(path)) == pytest.approx(5000, abs=1)


def test_written_asap_xml_reads_back_the_same_with_holes(tmp_path):
    polygons = [
        shapely.Polygon([(0.1, 1 / 3), (100.25, 0), (100, 77.7), (3, 100)], [INNER]),
        shapely.box(200, 200, 300.5, 300),
    ]
    path = tmp_path / "a.xml"
    write_asap_xml(path, polygons)
    found = read(path)
    assert found.repairs == ()
    for written, lesion in zip(polygons, found.lesions, strict=True):
        assert lesion.equals(written)
    assert read(path, positive=("Tumor",), exclusion=()).lesions[0].area > polygons[0].area


def test_polygon_in_anothers_hole_cannot_be_written(tmp_path):
    island = shapely.box(45, 45, 55, 55)
    with pytest.raises(AnnotationError, match="hole"):
        write_asap_xml(tmp_path / "a.xml", [shapely.Polygon(SQUARE, [INNER]), island])
    assert not (tmp_path / "a.xml").exists()


def winding_number(ring, x, y):
    """How often a ring goes around a point: its crossings of the ray to the right."""
    number = 0
    for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) > x:
            number += 1 if y1 > y0 else -1
    return number


def area_wound_around(ring):
    """Area of the faces between a ring's lines that it winds around, however it does so."""
    lines = shapely.union_all([shapely.LineString([*ring, ring[0]])])
    faces = shapely.get_parts(shapely.polygonize(shapely.get_parts(lines)))
    points = shapely.get_coordinates(shapely.point_on_surface(faces))
    return sum(
        face.area for face, (x, y) in zip(faces, points, strict=True) if winding_number(ring, x, y)
    )


COORDINATE = st.integers(0, 20).map(lambda i: 1000.0 * i)


@given(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=3, max_size=10, unique=True))
def test_any_ring_keeps_what_it_winds_around_in_valid_lesions_apart(tmp_path_factory, ring):
    path = asap(tmp_path_factory.mktemp("any") / "a.xml", ("Polygon", "_0", ring))
    expected = area_wound_around(ring)
    if expected < 1:
        with pytest.raises(AnnotationError, match="no area is left"):
            read(path)
        return
    found = read(path)
    assert area(found) == pytest.approx(expected, abs=100)  # discs at 45 crossings, at most
    assert all(lesion.is_valid for lesion in found.lesions)
    for i, lesion in enumerate(found.lesions):
        assert not any(lesion.intersects(other) for other in found.lesions[i + 1 :])


# GeoJSON


def test_geojson_holes_multipolygons_and_collections(tmp_path):
    tumour = {"classification": {"name": "Tumor", "colorRGB": -3670016}}
    with_hole = feature("Polygon", [closed(SQUARE), closed(INNER)], **tumour)
    other = [(x + 200, y) for x, y in SQUARE]
    third = [(x + 400, y) for x, y in INNER]
    multi = feature("MultiPolygon", [[closed(other)], [closed(third)]], **tumour)
    collection = {
        "type": "Feature",
        "properties": tumour,
        "geometry": {
            "type": "GeometryCollection",
            "geometries": [
                {"type": "Point", "coordinates": [0, 0]},
                {"type": "Polygon", "coordinates": [closed([(x, y + 500) for x, y in SQUARE])]},
            ],
        },
    }
    found = read(
        dump(
            tmp_path / "a.geojson",
            {"type": "FeatureCollection", "features": [with_hole, multi, collection]},
        )
    )
    assert [lesion.area for lesion in found.lesions] == [9600, 10_000, 400, 10_000]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        lambda f: [f],
        lambda f: f["geometry"],
        lambda f: {"type": "FeatureCollection", "features": [f]},
    ],
    ids=["feature", "list", "geometry", "collection"],
)
def test_geojson_comes_in_four_wrappings(tmp_path, wrap):
    path = dump(tmp_path / "a.json", wrap(feature("Polygon", [closed(SQUARE)])))
    assert area(read(path)) == 10_000
    assert uses_bounds_origin(path)


@pytest.mark.parametrize(
    ("properties", "from_bounds"),
    [
        ({"objectType": "annotation"}, True),
        ({"classification": {"name": "Tumor"}, "isLocked": False}, True),
        ({}, True),
        ({"label": "Tumor", "group": "Tumor"}, False),  # the Digital Slide Archive
        ({"terms": ["Tumor"]}, False),  # Cytomine
        ({"classification": {"name": "Tumor"}, "label": "1"}, True),
    ],
)
def test_only_qupaths_geojson_counts_from_the_bounds(tmp_path, properties, from_bounds):
    shape = feature("Polygon", [closed(SQUARE)], **properties)
    assert uses_bounds_origin(dump(tmp_path / "a.json", shape)) == from_bounds


def test_geojson_class_is_qupaths_or_the_label_and_not_the_objects_name(tmp_path):
    features = [
        feature("Polygon", [closed(SQUARE)], classification={"name": "Tumor"}, name="Stroma"),
        feature("Polygon", [closed(INNER)], label="Stroma"),
        feature("Polygon", [closed(INNER)], classification=None, name="Tumor"),
        {"type": "Feature", "geometry": None, "properties": None},
        feature("LineString", [[0, 0], [5, 5]], classification={"name": "Tumor"}),
        feature("Point", [1, 2], classification={"name": "Tumor"}),
    ]
    found = read(dump(tmp_path / "a.json", features), positive=("tumor",))
    assert area(found) == 10_000
    assert left_out(found) == {"Stroma": 1, "": 2, "Tumor": 2}


def test_geojson_heights_are_dropped(tmp_path):
    ring = [[x, y, 7] for x, y in closed(SQUARE)]
    assert area(read(dump(tmp_path / "a.json", feature("Polygon", [ring])))) == 10_000


# ImageScope


def test_imagescope_rectangles_ellipses_and_edited_outlines(tmp_path):
    path = imagescope(
        tmp_path / "a.xml",
        ('Type="0"', SQUARE),
        ('Type="1"', [(200, 0), (300, 50)]),
        ('Type="2"', [(400, 0), (500, 50)]),
        ('Type="1"', [(600, 0), (650, 30), (700, 0), (700, 100), (600, 100)]),
        ('Type="3"', [(0, 0), (9, 9)]),
    )
    found = read(path)
    ellipse = np.pi * 50 * 25
    # the last is a square of 100 px that lacks a triangle of base 100 and height 30
    assert [lesion.area for lesion in found.lesions] == pytest.approx(
        [10_000, 5000, ellipse, 8500], rel=1e-3
    )
    assert left_out(found) == {"": 1}
    assert not uses_bounds_origin(path)


def test_imagescope_negative_region_is_cut_out_whatever_its_name(tmp_path):
    path = imagescope(
        tmp_path / "a.xml",
        ('Type="0" NegativeROA="0" Text="Tumor"', SQUARE),
        ('Type="0" NegativeROA="1" Text="Tumor"', INNER),
    )
    assert area(read(path)) == 9600


@pytest.mark.parametrize(
    ("layer", "attribute", "text", "group"),
    [
        ('Id="1" Name="CaP"', "Gleason", "note", "CaP"),
        ('Id="1" Name=""', "Gleason", "CaP", "CaP"),
        ('Id="1" Name=""', "CaP", "", "CaP"),
        ('Id="1" Name=""', "Description", "", ""),
    ],
)
def test_imagescope_class_is_layer_then_text_then_attribute(
    tmp_path, layer, attribute, text, group
):
    path = imagescope(
        tmp_path / "a.xml", (f'Type="0" Text="{text}"', SQUARE), layer=layer, attribute=attribute
    )
    assert area(read(path, positive=(group,))) == 10_000
    assert read(path, positive=("something else",)).state == "unknown classes"


# Malformed files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither JSON nor XML"),
        ("x,y\n1,2\n", "neither JSON nor XML"),
        ("\x00\x01\x02", "neither JSON nor XML"),
        ("<ASAP_Annotations><Annotations>", "neither JSON nor XML"),
        ("<html/>", "root 'html'"),
        ('{"type": "Feature",', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"shapes": []}', r"keys \['shapes'\]"),
        ("[1, 2]", "1 where a GeoJSON object belongs"),
        ('{"type": "FeatureCollection"}', "'features' is None, not a list"),
        ('{"type": "Circle", "radius": 5}', "'Circle'"),
        ('{"type": "Feature", "geometry": {"type": "Polygon"}}', "shape 1: 'coordinates' is None"),
        ('{"type": "Feature", "geometry": 5, "id": "q"}', r"shape 1 \(q\): its geometry is 5"),
        ('{"type": "Feature", "properties": [], "geometry": null}', "'properties' is"),
        ('{"positive": 5}', "'positive' is 5, not a list"),
        ('{"positive": [{"name": "t"}]}', "positive 1: 'vertices' is None"),
        ('{"positive": [{"vertices": [[0, 0], [1, 1]]}]}', "positive 1: has 2 vertices"),
    ],
)
def test_malformed_file_is_a_named_error(tmp_path, text, message):
    path = tmp_path / "broken.annotation"
    path.write_text(text)
    with pytest.raises(AnnotationError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("ring", "message"),
    [
        ([[0, 0], [1, 0], [1, float("nan")]], "ring 1: vertex 3 is .1.0, nan., not finite"),
        ([[0, 0], [1, 0], [1, float("inf")]], "vertex 3 is .1.0, inf., not finite"),
        ([[0, 0], [3e9, 0], [1, 1]], "vertex 2 is .3000000000.0, 0.0., not finite or 2.31"),
        ([[0, 0], [1, 0], ["1", 1]], "not a list of numeric points"),
        ([[0, 0], [1, 0], [None, 1]], "not a list of numeric points"),
        ([[0, 0], [1, 0], [1]], "not a list of numeric points"),
        ([[0, 0], [1, 0], [10**400, 1]], "not a list of numeric points"),
        ([[[0, 0], [1, 0], [1, 1]]], "not a list of numeric points"),
        ([0, 0, 1, 0, 1, 1], "nested one level too shallow"),
        ([[0, 0], [1, 0], [0, 0]], "has 2 vertices, an area needs 3"),
        ([], "not a list of numeric points"),
    ],
)
def test_bad_vertices_are_a_named_error(tmp_path, ring, message):
    good = feature("Polygon", [closed(SQUARE)])
    path = dump(tmp_path / "a.json", [good, feature("Polygon", [ring])])
    with pytest.raises(AnnotationError, match=message) as error:
        read(path)
    assert f"{path}: shape 2 ring 1: " in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('X="100"', 'X="1,5"', "not numeric: .*1,5"),
        ('X="100"', 'Z="1"', "a vertex lacks its X"),
        ('X="100"', 'X="nan"', "not finite"),
        ('Order="1"', 'Order="b"', "not numeric"),
        ('Type="Polygon"', 'Type="Circle"', "its Type is 'Circle', not one of Polygon, Spline"),
    ],
)
def test_bad_xml_shape_is_a_named_error(tmp_path, old, new, message):
    path = asap(tmp_path / "a.xml", ("Polygon", "_0", SQUARE))
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(AnnotationError, match=message) as error:
        read(path)
    assert f"{path}: shape 1 (A0): " in str(error.value)


def test_imagescope_types_that_it_does_not_have_are_an_error(tmp_path):
    path = imagescope(tmp_path / "a.xml", ('Type="5"', SQUARE))
    with pytest.raises(AnnotationError, match="its Type is '5', not one of"):
        read(path)


def test_entity_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.xml"
    path.write_text(
        '<?xml version="1.0"?><!DOCTYPE b [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
        '<ASAP_Annotations><Annotations Name="&b;"/></ASAP_Annotations>'
    )
    with pytest.raises(AnnotationError, match="entities, which are refused"):
        read(path)


def test_missing_file_is_a_named_error(tmp_path):
    for function in (read, uses_bounds_origin):
        with pytest.raises(AnnotationError, match=r"gone\.xml: cannot be read: No such file"):
            function(tmp_path / "gone.xml")


def test_format_is_known_by_content_not_by_suffix(tmp_path):
    xml = asap(tmp_path / "a.geojson", ("Polygon", "_0", SQUARE))
    assert not uses_bounds_origin(xml)
    text = json.dumps(feature("Polygon", [closed(SQUARE)]))
    (tmp_path / "b.xml").write_bytes(b"\xef\xbb\xbf\n" + text.encode())
    assert uses_bounds_origin(tmp_path / "b.xml")
    ncrf = dump(tmp_path / "c.geojson", {"positive": [{"vertices": SQUARE}]})
    assert not uses_bounds_origin(ncrf)
    assert area(read(ncrf)) == 10_000


# Real files


def outer_ring_area(path):
    """Sum over all shapes of the areas of the outer rings: each group read on its own."""
    names = ("CaP", "Tumor", "Other", "Negative", "")
    return sum(
        shapely.Polygon(lesion.exterior).area
        for name in names
        for lesion in read(path, positive=(name,)).lesions
    )


def test_imagescope_and_qupath_of_one_slide_agree(test_data):
    folder = test_data / "wsi-handling"
    scope = folder / "TCGA-EJ-5519-01Z-00-DX1.imagescope.xml"
    qupath = folder / "TCGA-EJ-5519-01Z-00-DX1.qupath.json"
    assert outer_ring_area(scope) == pytest.approx(3.08e9, rel=2e-3)
    assert outer_ring_area(qupath) == pytest.approx(3.08e9, rel=2e-3)
    # The tumour itself: one outline, to which the file states the area 3050322256.4.
    cap = read(scope, positive=("CaP",))
    tumor = read(qupath, positive=("Tumor",))
    assert area(cap) == pytest.approx(3050322256.4, abs=1)
    assert area(tumor) == pytest.approx(3050322256.4, rel=1e-6)
    assert cap.lesions[0].symmetric_difference(tumor.lesions[0].buffer(0)).area < 1e-4 * 3.05e9
    assert left_out(cap) == {"": 2}
    assert left_out(tumor) == {"Other": 3, "Negative": 1}


@pytest.mark.parametrize(
    "slide",
    [
        "TCGA-A7-A13E-01Z-00-DX1",
        "TCGA-AR-A1AK-01Z-00-DX1",
        "TCGA-B0-5698-01Z-00-DX1",
        "TCGA-B0-5710-01Z-00-DX1",
        "TCGA-CH-5767-01Z-00-DX1",
    ],
)
def test_monuseg_nuclei_fill_their_mask(test_data, slide):
    found = read(test_data / f"monuseg/{slide}.xml", size=(1000, 1000))
    truth = np.asarray(Image.open(test_data / f"monuseg/{slide}.mask.png")) > 0
    mask = np.zeros_like(truth)
    for lesion in found.lesions:
        # pixel i covers [i, i + 1): its centre is at i + 0.5; polygon2mask wants (y, x)
        ring = np.asarray(lesion.exterior.coords)[:, ::-1] - 0.5
        mask |= polygon2mask(truth.shape, ring)
    iou = (mask & truth).sum() / (mask | truth).sum()
    assert iou > 0.88
    swapped = (mask.T & truth).sum() / (mask.T | truth).sum()
    assert swapped < 0.2


def test_monuseg_nuclei_out_of_the_image_are_clipped(test_data):
    path = test_data / "monuseg/TCGA-B0-5710-01Z-00-DX1.xml"
    whole, clipped = read(path), read(path, size=(1000, 1000))
    assert shapely.union_all(whole.lesions).bounds == pytest.approx((-3, 3, 1002, 1002), abs=1)
    assert shapely.union_all(clipped.lesions).bounds == (0, 3, 1000, 1000)
    assert any(repair.startswith("clipped") for repair in clipped.repairs)


def test_qupath_features_without_a_class(test_data):
    found = read(test_data / "dlup/qupath05.geojson")
    assert len(found.lesions) == 3
    assert left_out(found) == {}
    assert found.doubts == ("no shape has a class; their names ['I', 'UT'] are not read",)
    found = read(test_data / "dlup/qupath05.geojson", positive=("Tumor",))
    assert (found.state, left_out(found)) == ("unknown classes", {"": 3})
    assert len(read(test_data / "dlup/qupath05.geojson", positive=("UT",)).lesions) == 1


def test_digital_slide_archive_labels(test_data):
    path = test_data / "luna/1006844.annotation.geojson"
    assert left_out(read(path)) == {"Other": 3, "TILs": 8}
    assert len(read(path).lesions) == 4
    tils = read(path, positive=("TILs",), exclusion=())
    assert left_out(tils) == {"Other": 3, "Tumor": 4}


def test_square_past_the_slides_edge_is_clipped(test_data):
    found = read(test_data / "luna/CMU-1-Small-Region.dsa.geojson", size=(2220, 2967))
    assert [lesion.bounds for lesion in found.lesions] == [(1512, 1512, 2220, 2333)]
    assert left_out(found) == {"Other": 1}
    assert "area 674041.0 -> 581268.0 px" in found.repairs[0]  # 821 x 821, 708 x 821


def test_ring_one_level_too_shallow_is_reported(test_data):
    with pytest.raises(AnnotationError, match=r"jill.geojson: shape 1 ring 1: .*too shallow"):
        read(test_data / "luna/CMU-1-Small-Region.jill.geojson")


def test_real_asap_file_with_dots_and_other_groups(test_data):
    path = test_data / "wsiprocess/CMU-1_classification.asap.xml"
    found = read(path, positive=("malignant",))
    assert len(found.lesions) == 2
    assert left_out(found) == {"benign": 3}  # two splines and a dot
    assert left_out(read(path)) == {"malignant": 2, "benign": 3}


def test_ncrf_lesions_are_the_outlines_drawn_even_where_one_crosses_itself(test_data):
    repaired = 0
    for path in sorted((test_data / "ncrf/polygons").glob("*/Tumor_*.json")):
        drawn = json.loads(path.read_text())["positive"]
        outlines = np.array([shapely.Polygon(shape["vertices"]).buffer(0) for shape in drawn])
        first, second = shapely.STRtree(outlines).query(outlines, predicate="intersects")
        groups, _ = connected_components(coo_array((first >= 0, (first, second))))
        found = read(path)
        cut_apart = 2 if path.stem == "Tumor_107" else 0  # by its `negative` outlines
        assert len(found.lesions) == groups + cut_apart, path.name
        repaired += bool(found.repairs)
    assert repaired == 6


def test_normal_slides_of_ncrf_hold_no_lesion(test_data):
    normals = sorted((test_data / "ncrf/polygons/valid").glob("Normal_*.json"))
    assert len(normals) == 4
    assert all(read(path).lesions == () for path in normals)


def test_ncrf_written_as_asap_xml_gives_the_same_lesions(test_data, tmp_path):
    lesions = defaultdict(int)
    for path in sorted((test_data / "ncrf/polygons").glob("*/Tumor_*.json")):
        shapes = json.loads(path.read_text())
        xml = asap(
            tmp_path / "a.xml",
            *(("Polygon", "_1", shape["vertices"]) for shape in shapes["positive"]),
            *(("Polygon", "Exclusion", shape["vertices"]) for shape in shapes["negative"]),
        )
        from_json, from_xml = read(path), read(xml)
        assert from_json.lesions == from_xml.lesions
        write_asap_xml(tmp_path / "b.xml", from_json.lesions)
        again = read(tmp_path / "b.xml")
        assert [lesion.area for lesion in again.lesions] == pytest.approx(
            [lesion.area for lesion in from_json.lesions], rel=1e-12
        )
        lesions[path.stem] = len(again.lesions)
    assert len(lesions) == 23
    assert lesions["Tumor_106"] == 228
