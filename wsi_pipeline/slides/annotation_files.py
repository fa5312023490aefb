"""Annotation files of five kinds, parsed to shapes: rings with a class, nothing decided yet.

ASAP XML (CAMELYON), GeoJSON (QuPath, Digital Slide Archive and others), Aperio ImageScope XML,
HALO's XML, which is much like it, and NCRF JSON are told apart by their content. Each may be
packed, by gzip or as the one file of a zip archive.
"""

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.slides.annotation_geojson import geojson_shapes
from wsi_pipeline.slides.annotation_shapes import Role, Shape, listed, ring_of
from wsi_pipeline.slides.annotation_xml import asap_shapes, layered_shapes


def recognise(path: Path) -> tuple[Callable[..., Iterator[Shape]], object]:
    """Parser and parsed document of a file."""
    try:
        data = _unpacked(path.read_bytes())
    except OSError as error:
        raise AnnotationError(f"cannot be read: {error.strerror or error}") from error
    if data.lstrip(b"\xef\xbb\xbf\xff\xfe\x00 \t\r\n")[:1] in (b"{", b"["):
        return _recognise_json(data)
    return _recognise_xml(data)


def _unpacked(data: bytes) -> bytes:
    try:
        if data.startswith(b"\x1f\x8b"):
            return gzip.decompress(data)
        if data.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                names = [
                    name
                    for name in archive.namelist()
                    if not name.endswith("/") and not name.startswith("__MACOSX/")
                ]
                if len(names) != 1:
                    raise AnnotationError(
                        f"is a zip archive of {len(names)} files, not of one annotation:"
                        f" {', '.join(names[:4])}"
                    )
                return archive.read(names[0])
    except (gzip.BadGzipFile, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        raise AnnotationError(f"is packed and cannot be unpacked: {error}") from error
    return data


def _recognise_json(data: bytes):
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"is no JSON: {error}") from error
    if isinstance(document, list) or "type" in document:
        return geojson_shapes, document
    if "positive" in document or "negative" in document:
        return ncrf_shapes, document
    raise AnnotationError(
        f"is JSON with the keys {sorted(document)}: GeoJSON has 'type', NCRF 'positive' and"
        " 'negative'"
    )


def _recognise_xml(data: bytes):
    try:
        root = defusedxml.ElementTree.fromstring(data)
    except DefusedXmlException as error:
        raise AnnotationError(f"declares XML entities, which are refused: {error}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise AnnotationError(f"is neither JSON nor XML: {error}") from error
    if root.tag == "ASAP_Annotations":
        return asap_shapes, root
    if root.tag == "Annotations":
        return layered_shapes, root
    raise AnnotationError(
        f"is XML with the root {root.tag!r}: ASAP has 'ASAP_Annotations', ImageScope and HALO"
        " 'Annotations'"
    )


def ncrf_shapes(document) -> Iterator[Shape]:
    """Shapes of parsed NCRF JSON; an `AnnotationError` names a malformed one."""
    roles: dict[str, Role] = {"positive": "tumour", "negative": "exclusion"}
    for group, role in roles.items():
        for number, entry in enumerate(listed({group: [], **document}, group, "NCRF"), 1):
            name = f"{group} {number}"
            vertices = listed(entry, "vertices", name)
            yield Shape(name, (group,), (ring_of(vertices, name),), role=role)
