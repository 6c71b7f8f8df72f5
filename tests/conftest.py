"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Folder with golden files, real vocabularies and real chats, named by `REFERENCE_DATA`."""
    folder = os.environ.get("REFERENCE_DATA")
    if not folder:
        pytest.skip("REFERENCE_DATA is not set: no reference files on this machine")
    return Path(folder)
