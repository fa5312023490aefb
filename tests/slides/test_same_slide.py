"""Names, files and copies of one slide: the table of docs/slides.md."""

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import openslide
import pytest
from slide_files import write_mrxs, write_pyramid_tiff

from wsi_pipeline.errors import CatalogError
from wsi_pipeline.slides.catalog import read_catalog
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.same_slide import (
    content_fingerprint,
    copies,
    existing_form,
    slide_fingerprint,
)


@pytest.mark.parametrize("name", ["x/../a.svs", "link.svs", "hard.svs", "linked/a.svs"])
@pytest.mark.parametrize("column", ["path", "annotation"])
def test_one_file_under_two_names_is_refused_with_slides_and_paths(tmp_path, name, column):
    (tmp_path / "x").mkdir()
    (tmp_path / "a.svs").write_bytes(b"a")
    (tmp_path / "link.svs").symlink_to("a.svs")
    (tmp_path / "linked").symlink_to(tmp_path)
    os.link(tmp_path / "a.svs", tmp_path / "hard.svs")
    table = tmp_path / "slides.csv"
    files = ("a.svs,", f"{name},") if column == "path" else ("1.svs,a.svs", f"2.svs,{name}")
    table.write_text(f"slide_id,path,annotation\none,{files[0]}\ntwo,{files[1]}\n")
    told = rf"the same {column} .* one \(line 2, .*a\.svs\), two \(line 3, .*{name[-5:]}"
    with pytest.raises(CatalogError, match=told):
        read_catalog(table)


def test_another_file_of_the_same_size_is_another_slide(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.svs").write_bytes(b"same")
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,path\na,a.svs\nb,b.svs\n")
    assert len(read_catalog(table)) == 2


def test_a_path_is_found_in_the_other_form_of_unicode(tmp_path):
    decomposed = tmp_path / unicodedata.normalize("NFD", "M\u00fcller.svs")
    decomposed.touch()
    asked = str(tmp_path / unicodedata.normalize("NFC", "M\u00fcller.svs"))
    if not Path(asked).exists():  # a file system that tells the two apart
        assert existing_form(asked) == str(decomposed)
    table = tmp_path / "slides.csv"
    table.write_text(f"slide_id,path\na,{asked}\nb,{decomposed}\n")
    with pytest.raises(CatalogError, match="the same path"):
        read_catalog(table)
    assert existing_form("/nowhere/\u00e4.svs") == "/nowhere/\u00e4.svs"


def fingerprint(path):
    with Slide(path, 0.5) as slide:
        return slide_fingerprint(slide)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)


def test_a_copy_has_the_fingerprint_of_its_slide_and_another_slide_another(tmp_path, pixels):
    one = write_pyramid_tiff(tmp_path / "one.tif", [pixels])
    copy = shutil.copy(one, tmp_path / "copy.tif")
    other = write_pyramid_tiff(tmp_path / "other.tif", [pixels[::-1]])
    assert fingerprint(one) == fingerprint(copy) != fingerprint(other)


def test_a_mirax_slide_is_known_by_its_data_folder(tmp_path, pixels):
    """Its .mrxs file says nothing: here it is empty."""
    one = write_mrxs(tmp_path / "one.mrxs", pixels, 100, 100)
    copy = shutil.copy(one, tmp_path / "copy.mrxs")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    other = write_mrxs(tmp_path / "other.mrxs", pixels[::-1], 100, 100)
    assert fingerprint(one) == fingerprint(copy)
    assert fingerprint(one) != fingerprint(other)


def test_files_of_one_dicom_series_are_one_slide():
    if not (data := os.environ.get("WSI_TEST_DATA")):
        pytest.skip("WSI_TEST_DATA is not set")
    folder = Path(data) / "openslide-python"
    assert fingerprint(folder / "boxes_0.dcm") == fingerprint(folder / "boxes_1.dcm")


def test_a_large_coarsest_level_is_compared_by_size_and_blocks(tmp_path):
    """OpenSlide gives no quickhash where the coarsest level has more than 5 MiB."""
    noise = np.random.default_rng(0).integers(0, 255, (2048, 1024, 3), np.uint8)
    one = write_pyramid_tiff(tmp_path / "one.tif", [noise], compression=None)
    assert openslide.PROPERTY_NAME_QUICKHASH1 not in openslide.OpenSlide(one).properties
    copy = shutil.copy(one, tmp_path / "copy.tif")
    other = write_pyramid_tiff(tmp_path / "other.tif", [noise[::-1]], compression=None)
    assert fingerprint(one) == fingerprint(copy) != fingerprint(other)


@pytest.mark.parametrize("at", [0, 1 << 19, (1 << 20) - 1])
def test_the_content_fingerprint_sees_head_middle_and_tail_and_the_size(tmp_path, at):
    content = bytearray(1 << 20)
    (tmp_path / "a").write_bytes(content)
    content[at] = 1
    (tmp_path / "b").write_bytes(content)
    (tmp_path / "c").write_bytes(bytes((1 << 20) + 1))
    assert len({content_fingerprint(tmp_path / name) for name in "abc"}) == 3


def test_copies_are_grouped_in_order():
    assert copies({"a": "x", "b": "y", "c": "x", "d": "z", "e": "y"}) == [["a", "c"], ["b", "e"]]
