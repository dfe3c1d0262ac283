"""Ports on which the processes of a run meet."""
import socket

from failures import Refusal


def free():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check(port):
    """Raise Refusal if something on this machine listens on ``port``."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except (OSError, ValueError, OverflowError) as error:
            raise Refusal(f"MASTER_PORT {port} cannot be used ({error}): set another, the same "
                          "on all machines; on one machine leave it unset") from error
