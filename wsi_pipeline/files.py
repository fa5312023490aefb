"""Files that are there whole or not at all."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_atomically(path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; then rename it to `path`.

    Readers see the old file or the new one, never half of one, also after a kill of the process.
    After an exception the old file stays and the temporary one is removed.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
