"""Every dialect's writer: tests/builders/files.py has the file formats of hosts, libraries.py those of libraries."""

from __future__ import annotations

from tests.builders import files, libraries

WRITERS: dict[str, tuple[files.Writer, tuple[str, ...]]] = {**files.WRITERS, **libraries.WRITERS}
