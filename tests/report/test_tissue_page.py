"""The page of tissue masks."""

import re

import pandas as pd

from wsi_pipeline.report.tissue_page import TiledSlide, write_tissue_page


def test_slides_to_look_at_come_first_each_with_its_picture_if_there_is_one(tmp_path):
    note = "lesion 1 has no tissue in the mask: no patch can find it"
    slides = [
        TiledSlide("a", 1, 0, (), True),
        TiledSlide("d", 1200, 3, (note,), True),
        TiledSlide("c #2", 0, 0, (), True),
        TiledSlide("b", 5, 0, (), False),
    ]
    failures = pd.DataFrame([{"slide_id": "e", "reason": "e.svs: no slide"}])
    write_tissue_page(tmp_path / "p.html", title="Tissue", slides=slides, failures=failures)
    page = (tmp_path / "p.html").read_text()
    assert re.findall(r"<h3>(.*)</h3>", page) == ["c #2", "d", "a", "b"]
    assert re.findall(r'<img src="(.*?)"', page) == ["c%20%232.jpg", "d.jpg", "a.jpg"]
    assert page.count("No picture") == 1
    assert f"1,200 patches, 3 with tumour · {note}" in page
    assert "1 patch, 0 with tumour" in page
    assert "<td>e.svs: no slide</td>" in page

    write_tissue_page(tmp_path / "p.html", title="Tissue", slides=[], failures=pd.DataFrame())
    assert "Failures" not in (tmp_path / "p.html").read_text()
