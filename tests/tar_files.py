"""Tar files in memory."""

import io
import tarfile


def tar_bytes(entries):
    """Return a tar file with the given contents by name."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, value in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(value)
            tar.addfile(entry, io.BytesIO(value))
    return content.getvalue()
