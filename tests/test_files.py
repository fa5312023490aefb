"""Writing aside and renaming."""

import pytest

from wsi_pipeline.files import replace_atomically


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "index.parquet"
    with replace_atomically(path) as part:
        part.write_text("first")
        assert part.parent == tmp_path
        assert not path.exists()
    with pytest.raises(OSError, match="disk full"), replace_atomically(path) as part:
        part.write_text("sec")
        raise OSError("disk full")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
