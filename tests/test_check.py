"""What is looked at before a run takes the GPUs, and --check, which does only that."""
import shutil
import socket

import pytest

from checkpoints import RunFolder
from conftest import launch, refusal_of
from failures import Refusal


def check(data, *flags, **options):
    """A launch with --check, into a folder which that must not make."""
    return launch("pets", "--data-path", data, "--check", *flags, **options)


def test_check_says_ready_and_writes_nothing(data, checkpoint, tmp_path):
    done = check(data / "pets", "--resume", checkpoint, "--output_dir", tmp_path / "out")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "verdict: ready", done.stdout + done.stderr
    assert "ok       images: all 70 can be decoded" in lines
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert not (tmp_path / "out").exists()


def test_check_names_every_problem(data, tmp_path):
    pets = tmp_path / "pets"
    shutil.copytree(data / "pets", pets)
    broken = sorted((pets / "images").glob("*.jpg"))[7:10]
    for image in broken:
        image.write_bytes(image.read_bytes()[:150])
    done = check(pets, "--resume", pets / "annotations" / "test.txt", processes=8)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "verdict: not ready, 3 of the above to mend"
    assert "PROBLEM  data set: no full batch in an epoch" in done.stdout
    assert "PROBLEM  start: " in done.stdout and "test.txt cannot be read" in done.stdout
    assert "PROBLEM  images: 3 of 70 are broken:" in done.stdout
    assert all(str(image) in done.stdout for image in broken)


@pytest.mark.parametrize("flags, variables", [
    ([], {"DEIT_DIR": "/nowhere"}), (["--epochs", "0"], {}), ([], {"NPROC_PER_NODE": "abc"})])
def test_a_check_that_cannot_begin_ends_in_a_verdict(flags, variables):
    done = launch("pets", *flags, "--check", **variables)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "verdict: not ready"


def test_a_port_that_is_taken_is_named(data):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = launch("pets", "--data-path", data / "pets", MASTER_PORT=port)
        assert f"MASTER_PORT {port}" in refusal_of(done)
        checked = check(data / "pets", MASTER_PORT=port)
        assert f"PROBLEM  port: MASTER_PORT {port}" in checked.stdout


def test_a_disk_without_room_for_the_checkpoints_is_named(tmp_path):
    with pytest.raises(Refusal, match="needs 48000000.0 GB for checkpoints"):
        RunFolder(tmp_path, writes=True).check_space(parameters=10**15)
    assert "needed" in RunFolder(tmp_path / "new", writes=True).check_space(parameters=1)


def test_overwriting_waits_until_all_is_checked(data, checkpoint, tmp_path):
    (tmp_path / "log.txt").write_text("of an earlier run\n")
    (tmp_path / "checkpoint.pth").write_bytes(b"of an earlier run")
    refused = launch("pets", "--data-path", data / "pets", "--resume", tmp_path / "log.txt",
                     "--output_dir", tmp_path, "--overwrite")
    assert "log.txt" in refusal_of(refused)
    assert (tmp_path / "checkpoint.pth").read_bytes() == b"of an earlier run"
