"""A process that has imported everything and forks real `llmattrib` processes on request.

Importing torch takes seconds, a fork a few milliseconds: so many builds can be killed. Each child is a process of its
own with its own session, arguments and environment; it runs the command line and ends with its exit code. The parent
starts no thread and opens no store before it forks.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Zygote:
    """The parent, seen from a test."""

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._ask({"ready": True}) is True

    def _ask(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, log, *arguments, **env):
        """Start `llmattrib ARGUMENTS`; all it prints goes to the file `log`."""
        Path(log).touch()  # it may be killed before it opens it
        return Child(self, self._ask({"start": list(map(str, arguments)), "log": str(log), "env": env}), Path(log))

    def status(self, pid):
        """Return the exit code of a child, minus the signal that killed it, or None while it runs."""
        return self._ask({"wait": pid})

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Child:
    """A real process that runs one command."""

    def __init__(self, zygote, pid, log):
        self.zygote, self.pid, self.log, self.returncode = zygote, pid, log, None

    def poll(self):
        if self.returncode is None:
            self.returncode = self.zygote.status(self.pid)
        return self.returncode

    def send(self, number):
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, seconds=120):
        """Wait for its end; return its exit code and what it printed."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running after {seconds} s: {self.log.read_text()}")
            time.sleep(0.002)
        return self.returncode, self.log.read_text()


def _child(request):
    from llmattrib.cli import app

    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["env"])
    code = 1
    try:
        app(request["start"], prog_name="llmattrib")
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    os._exit(code)  # an interpreter that takes down what it shares with its parent copies all of it: seconds


def _serve():
    sys.path.insert(0, str(ROOT))
    import torch

    import llmattrib.build
    import llmattrib.console
    import llmattrib.index
    import llmattrib.reduce
    import llmattrib.verify  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request, answer = json.loads(line), True
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                _child(request)
        elif "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
