"""Durable files, where the file system plays along and where it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from claas.storage.files import sync_folder


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is a mount that cannot force a folder to disk")
def test_a_mount_that_cannot_force_a_folder_to_disk_is_taken_as_it_is() -> None:
    handle = os.open("/proc/self", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(handle)
    os.close(handle)
    sync_folder(Path("/proc/self"))
