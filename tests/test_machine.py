"""What differs between machines: how processes start, file systems, full disks, and who reads."""
import errno
import fcntl
import os
import re
import subprocess
from unittest import mock

import pytest

import generate
from conftest import error_of, train
from deit_plugin import launcher
from launches import (
    ROOT,
    SCRIPTS,
    environment,
    fork,
    fork_script,
    print_to_a_full_disk,
    run_code,
)


def start_processes_anew():
    """As Python 3.14 does by default: a data worker would import everything by itself."""
    import multiprocessing

    multiprocessing.set_start_method("forkserver", force=True)


def test_data_workers_with_any_start_method(data, flags, tmp_path):
    options = {"before": start_processes_anew}
    flags += ["--num_workers", "1", "--epochs", "1"]
    assert "ready" in train("pets", *flags, "--check", **options).stdout
    train("pets", *flags, **options)
    path = tmp_path / "run" / "best_checkpoint.pth"
    photo = next((data / "pets" / "images").glob("*.jpg"))
    done = fork_script(SCRIPTS / "predict.py", "--resume", path, photo, variables=environment(),
                       **options)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2), done.stderr


def refuse_locks_and_fsync():
    """As Lustre without flock, and some CIFS mounts."""
    def refuse(number):
        return mock.Mock(side_effect=OSError(number, os.strerror(number)))

    fcntl.flock = fcntl.lockf = refuse(errno.ENOSYS)
    os.fsync = refuse(errno.EINVAL)


def test_a_file_system_without_locks_and_fsync(flags, tmp_path):
    """In a folder whose name is not UTF-8."""
    flags += ["--output_dir", os.path.join(tmp_path, os.fsdecode(b"n\xff n")), "--epochs", "1"]
    done = train("pets", *flags, before=refuse_locks_and_fsync)
    assert done.stderr.count("\n") == 1 and "cannot be locked" in done.stderr
    assert "nothing left" in train("pets", *flags).stdout


def test_what_cannot_be_printed_is_an_error(data, flags, finished, tmp_path):
    """Of every command, also where argparse hides it."""
    generate.moco_checkpoint(tmp_path / "moco.pth", width=64, depth=2)
    predict = SCRIPTS / "predict.py"
    ended = [fork("pets", *flags, "--check", before=print_to_a_full_disk)]
    for script, *words in (
            (predict, "--help"),
            (predict, "--resume", finished / "best_checkpoint.pth", data / "pets" / "images"),
            (ROOT / "convert_to_deit.py", "--input", tmp_path / "moco.pth", "--output",
             tmp_path / "c")):
        ended.append(fork_script(script, *words, variables=environment(),
                                 before=print_to_a_full_disk))
    *others, converted = [error_of(done, status=1) for done in ended]
    assert all("disk full: standard output" in line for line in others)
    assert "c was written: No space left" in converted


def test_where_nobody_reads_any_more_a_run_goes_on():
    """Without nohup's file when the terminal is closed, and with >&- 2>&-. For a pipe see
    test_errors.py, odd surroundings."""
    code = """if True:
        import os, sys
        from deit_plugin import errors
        terminal, own = os.openpty()
        sys.stdout = os.fdopen(own, "w")

        def main():
            print("read", flush=True)
            os.close(terminal)
            print("not read", flush=True)
            raise SystemExit(3)

        errors.guard(main)"""
    assert run_code(code).returncode == 3
    code = "from deit_plugin import errors; errors.guard(lambda: print('not read', flush=True))"
    assert run_code(code, "bash", "-c", 'exec "$@" >&- 2>&-', "bash").returncode == 0


@pytest.mark.parametrize("visible, own", [
    (None, "0,1"), ("4,2,7", "4,2"), ("GPU-a1,GPU-b2,GPU-c3", "GPU-a1,GPU-b2")])
def test_a_launch_of_two_processes_sees_two_gpus_of_those_that_are_visible(
        visible, own, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    launcher.show_own_gpus(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


@pytest.mark.parametrize("text, says", [
    ("CUDA out of memory. Tried to allocate 2.00 GiB", "2.00 GiB: .* --batch-size"),
    ("NCCL error in: NCCLUtils.hpp:275, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA "
     "function failed.\nLast error:\nCuda failure 2 'out of memory'", "failure 2 .* --batch-size"),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", "CUBLAS.* --batch-size"),
    ("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with", "nvidia-smi"),
    ("CUDA error: invalid device ordinal\nCompile with", "ordinal: .* NPROC_PER_NODE"),
    ("CUDA error: no kernel image is available for execution on the device", "sm_70 sm_75 only"),
    ("CUDA error: device-side assert triggered\nCompile with", "Traceback"),
    ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2903",
     "another machine or process has ended"),
    ("The server socket has failed to listen on any local network address. EADDRINUSE",
     "a port is in use"),
])
def test_what_torch_reports_is_said_in_one_line_if_its_cause_is_known(text, says, tmp_path):
    """An error of a GPU at once: after PATIENCE, NCCL's watchdog would end the process.

    The texts are those of torch, cuBLAS, NCCL and gloo; there is no GPU here.
    """
    done = run_code(f"""if True:
        import os, sys, types
        from deit_plugin import errors
        errors.PATIENCE = {1000 if "CUDA" in text else 0}
        os.environ[errors.FIRST_FAILURE] = {str(tmp_path / "first")!r}
        cuda = types.SimpleNamespace(get_arch_list=lambda: ["sm_70", "sm_75"])
        sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
        def fail():
            raise RuntimeError({text!r})
        errors.guard(fail)""", stderr=subprocess.PIPE)
    assert done.returncode == 1 and re.search(says, done.stderr), done.stderr
    assert "Traceback" in says or done.stderr.count("\n") == 1
