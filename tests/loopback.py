"""A web server of this machine's own, and processes that download from it all at once."""

import contextlib
import functools
import hashlib
import http.server
import multiprocessing
import os
import shutil
import threading
from pathlib import Path
from unittest import mock

FORK = multiprocessing.get_context("fork")


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        # Newer torchvision asks for each address once more, to follow redirections.
        if self.headers.get("Method") != "HEAD":
            self.server.downloads.append(self.path)
            if self.server.stall:
                content = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.server.stalled.set()
                self.server.resume.wait(60)
                return
        with contextlib.suppress(ConnectionError):
            super().do_GET()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(folder):
    """A server of `folder` that notes the `downloads` and, with `stall`, stops halfway in each."""
    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.folder, server.downloads, server.stall = folder, [], False
    server.stalled, server.resume = threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with mock.patch.dict(os.environ, no_proxy="*"):
            yield server
    finally:
        server.resume.set()
        server.shutdown()
        thread.join()
        server.server_close()


def official(cifar, folder):
    """What a CIFAR class says of its files, were those in `folder` the official ones."""

    def md5(name):
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    facts = {attribute: [[name, md5(name)] for name, _ in getattr(cifar, attribute)]
             for attribute in ("train_list", "test_list")}
    return dict(facts, meta=dict(cifar.meta, md5=md5(cifar.meta["filename"])))


def offer(server, archive, cifar, folder):
    """Let the server offer a CIFAR archive, and the class take it for the official one."""
    shutil.copy(str(archive), str(server.folder))
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    url = server.url + archive.name
    return mock.patch.multiple(cifar, url=url, tgz_md5=md5, **official(cifar, folder))


def start(functions):
    """Processes that begin the functions at the same moment."""
    barrier = FORK.Barrier(len(functions))

    def begin(function):
        barrier.wait(60)
        function()

    children = [FORK.Process(target=begin, args=(function,)) for function in functions]
    for child in children:
        child.start()
    return children


def exit_codes(children):
    """How processes ended; None for one that hangs."""
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


def kill(children):
    """End processes with no chance to clean up."""
    for child in children:
        child.kill()
    exit_codes(children)
