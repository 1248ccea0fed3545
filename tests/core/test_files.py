"""Files are whole or not there, whoever else writes beside them, and names are refused before any work."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from full_disk import disk_of
from kinetoscope.core.errors import OutputError
from kinetoscope.core.files import (
    append_line,
    check_output_path,
    replacing,
    replacing_folder,
    write_bytes,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_replacing_writes_the_longest_names(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    for name in ("n" * longest, "红" * (longest // 3), "a:b|c?.json", "-f", "trailing.", " ", os.fsdecode(b"\xff.txt")):
        path = check_output_path(tmp_path / name)
        assert write_text(path, "text").read_text() == "text"
        path.unlink()
    deep = tmp_path
    while len(os.fsencode(deep)) < os.pathconf(tmp_path, "PC_PATH_MAX") - 300:
        deep = deep / ("d" * 200)
    assert write_text(check_output_path(deep / "a"), "text").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("n" * 256, "256 bytes, and 255"), ("红" * 86, "258 bytes"), ("a\0b", "null character"),
        ("\ud800", "not valid Unicode"), ("n" * 300 + "/a", "300 bytes"), ("/".join(["d" * 200] * 30), "shorten it"),
    ],
)  # fmt: skip
def test_names_that_no_file_can_have_are_refused(tmp_path: Path, name: str, says: str) -> None:
    for refuse in (check_output_path, lambda path: write_text(path, "")):
        with pytest.raises(OutputError, match=says):
            refuse(tmp_path / name)
    assert names(tmp_path) == []


def test_replacing_leaves_what_was_there_after_an_error(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "before")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(OutputError, match=r"a\.txt cannot be written"), replacing(path):
        pass  # nothing was written under the temporary name
    assert path.read_text() == "before" and names(tmp_path) == ["a.txt"]


def test_replacing_gives_every_thread_a_name_of_its_own(tmp_path: Path) -> None:
    """All threads write the same file at once; each of them succeeds, and one of the files is there whole."""
    path, together, failed = tmp_path / "a.txt", threading.Barrier(8, timeout=30), list[BaseException]()

    def write(text: str) -> None:
        try:
            with replacing(path) as temporary:
                temporary.write_text(text)
                together.wait()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(str(i) * 100,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a thread that writes a file did not end within 60 s"
    assert not failed and names(tmp_path) == ["a.txt"]
    assert path.read_text() in {str(i) * 100 for i in range(8)}


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert write_bytes(tmp_path / "a", b"").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_text_keeps_the_bytes_of_names_that_are_not_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.mp4")
    assert write_text(tmp_path / "a", name).read_bytes() == b"\xff.mp4"
    with pytest.raises(OutputError, match="not valid Unicode"):
        write_text(tmp_path / "a", "\ud800")


def test_replacing_folder_leaves_what_was_there_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with replacing_folder(folder) as temporary:
        write_json(temporary / "config.json", {"a": 1})
    with pytest.raises(RuntimeError), replacing_folder(folder) as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    full = pytest.raises(OutputError, match=rf"^{folder}/part/a\.json cannot be written: File too large$")
    with disk_of(100), full, replacing_folder(folder) as temporary:
        write_json(temporary / "part" / "a.json", "a" * 200)
    full = pytest.raises(OutputError, match=rf"^{folder} cannot be written: .*File too large")
    with disk_of(100), full, replacing_folder(folder) as temporary:
        save_file({"x": torch.zeros(900)}, temporary / "x.safetensors")
    assert names(tmp_path) == ["model"] and names(folder) == ["config.json"]
    with replacing_folder(folder) as temporary, replacing_folder(folder) as other:
        (temporary / "first").touch()
        (other / "second").touch()
    assert names(tmp_path) == ["model"] and names(folder) == ["first"], "the last to end stays"


def test_append_line_takes_back_a_line_that_does_not_fit(tmp_path: Path) -> None:
    log = tmp_path / "folder" / "log.jsonl"
    append_line(log, "one")
    with disk_of(10), pytest.raises(OutputError, match=r"log\.jsonl cannot be written: File too large"):
        append_line(log, "a longer line")
    append_line(log, "two")
    assert log.read_text() == "one\ntwo\n"


def test_replacing_makes_no_folder_when_it_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="No such file"),
        replacing(tmp_path / "gone" / "a", make_folder=False) as temporary,
    ):
        temporary.write_text("text")
    assert names(tmp_path) == []
