#!/usr/bin/env python3
"""torch's own launcher, with a clean end: takes its options and ends as its processes did.

``torch.distributed.run`` where torch has it (1.9 on), ``torch.distributed.launch --use_env``
where not. What is added: a free port on a single machine, no summary of tracebacks after the
line in which a process said why it failed, and no process that outlives this one.
"""
import contextlib
import importlib.util
import logging
import os
import secrets
import signal
import sys
import tempfile
import warnings

import failures
import options
import ports


def main():
    """Run torch's launcher on this script's arguments; exit with the failed process's status."""
    # Torch waits for other machines in C++, where Python's own handler would not be heeded.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    marker = os.path.join(tempfile.gettempdir(), f"finetune-failed-{secrets.token_hex(8)}")
    os.environ[failures.LAUNCHER_PID] = str(os.getpid())
    os.environ[failures.FIRST_FAILURE] = marker
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's default too, but it warns of it
    _exit(_launch(_with_port(sys.argv[1:])))


def _exit(status):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.environ[failures.FIRST_FAILURE])
    sys.stdout.flush()
    os._exit(status)


def _with_port(arguments):
    """torch's launcher takes port 29500 unless told: two runs on one machine would collide."""
    if "--master_port" in arguments:
        return arguments
    return ["--master_port", str(ports.free()), *arguments]


def _launch(arguments):
    if importlib.util.find_spec("torch") is None:
        return _say(f"torch is not installed for {sys.executable}: pip install torch torchvision "
                    "timm Pillow")
    try:
        _check_nodes(arguments)
        if importlib.util.find_spec("torch.distributed.run"):
            return _elastic(arguments)
        return _legacy(arguments)
    except failures.Refusal as refusal:
        return _say(refusal)


def _check_nodes(arguments):
    """The first machine must be able to listen on the port; one too many would wait forever."""
    processes, nodes, rank, port = (arguments[arguments.index(flag) + 1] for flag in (
        "--nproc_per_node", "--nnodes", "--node_rank", "--master_port"))
    options.whole_number("NPROC_PER_NODE", processes)
    last = options.whole_number("NNODES", nodes) - 1
    if not rank.isdigit() or int(rank) > last:
        raise failures.Refusal(f"NODE_RANK={rank}: must be 0 to {last}, for NNODES={nodes} "
                               "machines")
    if int(rank) == 0:
        ports.check(port)


def _elastic(arguments):
    """torch 1.9 and newer."""
    from torch.distributed import run
    from torch.distributed.elastic.agent.server import api
    from torch.distributed.elastic.multiprocessing import errors

    # Both repeat, in up to twenty lines, that a process failed; the process has said why.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    _wait_for_successes_only(api.SimpleElasticAgent)
    try:
        run.main(arguments)
    except errors.ChildFailedError as error:
        return _status(*error.get_first_failure())
    except Exception as error:  # SignalException is not in every version that raises it
        if type(error).__name__ != "SignalException":
            raise
        return _say(f"stopped by {signal.Signals(error.sigval).name}", 128 + error.sigval)
    return 0


def _wait_for_successes_only(agent):
    """Until torch 2.3 a failure, too, waits five minutes for machines that may be gone."""
    wait = agent._exit_barrier

    def exit_barrier(self):
        """Torch's, if all went well."""
        if self._worker_group.state.name == "SUCCEEDED":
            wait(self)

    agent._exit_barrier = exit_barrier


def _legacy(arguments):
    """torch 1.7 and 1.8: it waits for its processes in turn, so a failed one is looked for here."""
    import subprocess

    from torch.distributed import launch

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    signal.signal(signal.SIGCHLD, _stop_when_one_failed)
    processes = arguments[arguments.index("--nproc_per_node") + 1]
    os.environ["LOCAL_WORLD_SIZE"] = processes  # as newer versions do
    sys.argv = [launch.__file__, "--use_env", *arguments]
    try:
        launch.main()
    except subprocess.CalledProcessError as error:
        return _exit_status(error.returncode)
    return 0


def _stop(number, _):
    _exit(_say(f"stopped by {signal.Signals(number).name}", 128 + number))


def _stop_when_one_failed(*_):
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # torch waits for the last one itself; there this would mean status 0
        return
    if ended is None or (ended.si_code == os.CLD_EXITED and ended.si_status == 0):
        return
    code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    _exit(_exit_status(code, ended.si_pid))  # the others notice within seconds, and end


def _status(rank, failure):
    return _exit_status(failure.exitcode, f"{failure.pid} (process {rank})")


def _exit_status(code, who=""):
    """A process that failed has printed why; one that was killed could not."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = " -- out of memory?" if -code == signal.SIGKILL else ""
    return _say(f"process {who} was ended by {name}{hint}; the others were stopped", 128 - code)


def _say(text, status=failures.REFUSED):
    print(f"error: {text}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    main()
