"""Atomic writes of files."""

import os

from mc_core.files import write_atomic


def test_atomic_write_keeps_the_old_file_for_open_readers(tmp_path):
    path, reader = tmp_path / "a.json", tmp_path / "link"
    path.write_bytes(b"old")
    os.link(path, reader)
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert reader.read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "link"]
