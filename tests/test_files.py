"""What is made once, whoever asks, and is whole or not there."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from deblender.files import make_once, write_whole


def test_who_asks_second_waits_and_makes_nothing(tmp_path):
    folder, made = tmp_path / "cache" / "thing", []

    def make():
        made.append(folder)
        time.sleep(0.2)
        folder.mkdir()

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(make_once, folder, make) for _ in range(2)]
        assert [one.result() for one in asked] == [folder, folder]
    assert len(made) == 1 and folder.is_dir()


def test_a_failure_leaves_nothing_in_the_way(tmp_path):
    folder = tmp_path / "thing"

    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_once(folder, fail)
    assert make_once(folder, folder.mkdir) == folder


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_what_could_not_be_written_leaves_the_old_file_alone(
    stop, tmp_path, monkeypatch
):
    file = tmp_path / "weights"
    write_whole(file, b"old")
    monkeypatch.setattr("os.replace", lambda *files: (_ for _ in ()).throw(stop))
    with pytest.raises(stop):
        write_whole(file, b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["weights"]
    assert file.read_bytes() == b"old"
