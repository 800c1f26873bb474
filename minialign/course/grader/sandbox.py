"""Where submissions run: one sandbox a core, warmed up once, in which `worker.py` forks a process for each exercise.

    Sandbox.run      sends a submission in; yields what the student's processes say, exercise by exercise

Two walls. The outer one is bubblewrap's (`walls.py`): namespaces, and a file system of its own. The inner one stands
around each exercise (`locks.py`): resource limits, libseccomp's filter of system calls and one of our own, the kernel's
Landlock. What holds:

                                            bwrap +      bwrap   subprocess +   subprocess +   subprocess
                                            libseccomp           libseccomp +   libseccomp
                                                                 Landlock
    time, memory, output, files               yes         yes       yes            yes            yes
    no access to checks, answers, solutions   yes         yes       yes            NO             NO
    none to other submissions, the grades     yes         yes       yes            can read       NO
    no network                                yes         yes       yes            yes            NO
    no processes of its own                   yes         (1)       yes            yes            at most 8
    no file written, changed or deleted       (2)         (2)       (2)            yes            NO
    no mode, attribute, lock, hint of one     yes         yes       yes            yes            NO
    nothing survives or reaches the next      yes         (3)       yes            yes            (4)

(1) At most 8, which see and reach nothing; but root's are not counted, so grade as an ordinary user there. (2) But in a
folder of its own (`scratch.py`), in memory under bubblewrap; it is watched, and emptied after each exercise. (3) A new
sandbox for each submission, hence torch imported each time. (4) Processes left behind are ended, but files may have
been changed before. Under Landlock a program can still ask whether a file exists, and for its size. Landlock alone,
without libseccomp, keeps what files hold, not their modes and attributes; libseccomp is on every Debian, Ubuntu and
Fedora (apt and systemd need it), Landlock in kernels from 5.13 where it is enabled. Outside Linux there is only the
last column, and limits only as far as the system keeps them.

In every case results come back as JSON through a pipe and are checked before they are believed, the verdict is computed
outside, every submission was read before the first ran, and grades.csv is written last. With neither bubblewrap nor
libseccomp it does not run as root. No wall hides what the package itself holds: `minialign.kernels` is in every
student's hands, and a solution that calls it is right.

Every new sandbox first tries, harmlessly, what should fail in it, and is not used if anything succeeds.

These walls stop programs, not a flaw of the kernel, nor signals between two that run at once and watch the machine's
load. For that, grade in a virtual machine, one notebook at a time.
"""

import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from minialign.course.grader.locks import landlock
from minialign.course.grader.walls import (
    FILES,
    INSIDE,
    PACKAGE,
    STUB,
    bubblewrap,
    copies,
    environment,
    libraries,
    readable,
)
from minialign.course.grader.worker import FRAME, PLAIN, WARMER

# Tried in every new sandbox before the first submission, harmlessly: what should fail. Gives what did not.
PROBE = """
import ctypes, os, socket, sys

libc = ctypes.CDLL(None, use_errno=True)


def fork():
    if os.fork() == 0:
        os._exit(0)


def refused(number, *arguments):  # by the filter, before the kernel finds that the arguments are of no use
    ctypes.set_errno(0)
    libc.syscall(*map(ctypes.c_long, (number, *arguments)))
    return ctypes.get_errno() in (1, 38)  # EPERM, ENOSYS


def new_calls():  # fchmodat2, setxattrat, file_setattr among them, and those that are still to come
    if all(refused(number, -1, -1, -1, -1, -1, -1) for number in [*range(450, 600), 1000]):
        raise OSError


def attributes():  # FS_IOC_SETFLAGS, to what stands at address 0
    with open(os.__file__) as file:
        ctypes.set_errno(0)
        libc.ioctl(file.fileno(), ctypes.c_ulong(0x40086602), None)
    if ctypes.get_errno() == 1:
        raise OSError


def outlive():
    if libc.prctl(1, 9, 0, 0, 0):
        raise OSError


def read_checks():
    found = [*{secrets!r}, *(path + "/minialign/course/check.py" for path in sys.path)]
    for path in filter(os.path.exists, found):
        try:
            return open(path).close()
        except OSError:
            pass
    raise OSError


tries = {{
    "signal another process": lambda: os.kill(os.getppid(), 0),
    "start a process": fork,
    "open a socket": socket.socket,
    "write a file": lambda: os.close(os.open({written!r}, os.O_WRONLY | os.O_CREAT)),
    "change a file's mode": lambda: os.chmod({known!r}, 0o600),
    "change a file's attributes": attributes,
    "use new system calls": new_calls,
    "outlive the grader": outlive,
    "read the checks": read_checks,
}}
value = ""
for name, attempt in tries.items():
    try:
        attempt()
        value += name + ", "
    except OSError:
        pass
"""
FILTERED = {  # what nothing but libseccomp stops
    "signal another process", "start a process", "open a socket", "change a file's mode", "change a file's attributes",
    "use new system calls", "outlive the grader",
}  # fmt: skip
NEEDS_WARMER = re.compile(r"optim|torch\.func|vmap|compile|checkpoint")  # else imported in the exercise's own time
START = 300.0  # seconds until a sandbox has imported torch, on a machine that is busy
GRACE = 60.0  # seconds, beyond the limits, after which a sandbox that says nothing is given up


class Lost(Exception):
    """The sandbox died, or says nothing more."""


class Broken(RuntimeError):
    """No sandbox can be started, or no case can be sent: no submission's fault, so the run stops."""


@dataclass(frozen=True)
class Limits:
    """Of one exercise, and of a submission. ValueError if one of them leaves nothing."""

    seconds: int = 10  # of CPU
    wall: float | int = 30.0  # seconds
    total: float | int = 120.0  # seconds of wall time for all exercises of a submission together
    memory: int = 1 << 30  # bytes, beyond what python and torch take
    output: int = 8 << 20  # bytes of its result
    files: int = 64 << 20  # bytes of its temporary files
    processes: int = 8  # threads included, where the system counts them

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not value >= 1:
                raise ValueError(f"a limit of {name}={value:g} lets nobody pass; expected 1 or more.")


class Said(NamedTuple):
    index: int  # of the exercise
    status: str  # "ok", "time", "budget", "output", "files" or "died N"
    body: bytes  # if ok


class Sandbox:
    """A warmed-up worker behind a wall. Starts when first used, and again after it is lost."""

    def __init__(self, kind: str, secrets: Sequence[Path] = (), inner: bool = True):
        """`inner`: whether the inner wall may use libseccomp and Landlock; tests go without, to see the outer one."""
        self.kind, self.secrets, self.process, self.seconds = kind, [*secrets, *copies()], None, 0.0
        self.inner = inner
        self.scratch = tempfile.TemporaryDirectory(prefix="minialign-", ignore_cleanup_errors=True)

    def run(self, request: dict) -> Iterator[Said]:
        """What each item's process says, in order. Raises Lost if the sandbox dies first."""
        if self.process is None:
            try:
                self._start()
            except OSError as error:
                raise Broken(f"no sandbox can be started: {error}") from None
        yield from self._exchange(request)
        if not self.reusable:
            self.close()

    def _exchange(self, request: dict) -> Iterator[Said]:
        walls = {"readable": None, "listed": None, "writable": None}
        if self.inner and landlock():
            walls |= readable(self._course(), self.kind, self.secrets)
        if walls["readable"] is not None or self.kind == "bubblewrap" or not self.reusable:
            walls["writable"] = self.folder  # something keeps it there, or nothing at all
        body = json.dumps(request | {"limits": request["limits"] | walls}).encode()
        own = {source for _, source in request["own"]} - {source for _, source in request["given"]}
        first = WARMER if NEEDS_WARMER.search("\n".join(own)) else PLAIN
        self._write(first + struct.pack("<Q", len(body)) + body)
        patience = request["limits"]["wall"] + GRACE
        for index in range(len(request["items"])):
            header, body = self._frame(patience, request["limits"]["output"])
            if header.get("index") != index:
                raise self._lost("a result out of turn")
            yield Said(index, str(header.get("status")), body)
        header, _ = self._frame(patience, 0)
        if not header.get("done"):
            self.close()

    def _start(self) -> None:
        began = time.monotonic()
        course = self._course()
        self.folder = FILES if self.kind == "bubblewrap" else tempfile.mkdtemp(prefix="files-", dir=self.scratch.name)
        requests, self.requests = os.pipe()
        self.results, results = os.pipe()
        worker = [sys.executable, "-I", "-X", "utf8", "-c", _bootstrap(course.parent, self.kind), str(results)]
        worker += [self.folder, *(["inner"] if self.inner else [])]
        command = [*bubblewrap(course, self.secrets), *worker] if self.kind == "bubblewrap" else worker
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                command, stdin=requests, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=[results],
                start_new_session=True, env=environment(self.folder),
                cwd=self.scratch.name if self.kind == "bubblewrap" else self.folder,
            )  # fmt: skip
            os.close(requests)
            os.close(results)
            try:
                self.reusable = self._frame(START, 0)[0]["seccomp"]
            except Lost as error:
                errors.seek(0)
                raise Broken(f"the sandbox did not start: {error}\n{errors.read(2000).decode()}") from None
            self._prove()
        self.seconds += time.monotonic() - began

    def _prove(self) -> None:
        """Raises Broken unless the walls that should stand here do."""
        known, alone = Path(self.scratch.name) / "known", self.kind == "bubblewrap"
        known.touch()
        hidden = [str(path / "check.py") for path in (PACKAGE / "course", *copies())]
        written = PACKAGE / "course/written" if alone else known.with_name("written")  # there, that is our copy
        probe = PROBE.format(written=str(written), known=str(known), secrets=hidden)
        item = {"expression": "value", "targets": [0], "position": 0, "cases": [], "grad_wrt": []}
        request = {"given": [], "own": [["probe-answer", probe]], "items": [item], "functions": [], "lent": []}
        [said] = self._exchange(request | {"names": {}, "solved": {}, "limits": asdict(Limits())})
        try:
            done = json.loads(said.body.partition(b"\n")[2])[0]["value"].split(", ")[:-1]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Broken(f"the sandbox's self-test says {said.status}: {said.body[:300]!r}") from None
        expected = set() if self.reusable else FILTERED  # in bubblewrap, processes and network are its own
        expected |= {"write a file"} if not (self.reusable or alone or (self.inner and landlock())) else set()
        expected |= {"read the checks"} if not (alone or (self.inner and landlock())) else set()
        if failed := [name for name in done if name not in expected]:
            self.close()
            raise Broken(f"the sandbox is not shut: in it one can {', '.join(failed)}.")

    def _course(self) -> Path:
        """The sandbox's own minialign.course; for a subprocess, in a copy of the package that is links otherwise."""
        package = Path(self.scratch.name) / "minialign"
        if not package.exists():
            (package / "course/grader").mkdir(parents=True)
            (package / "course/__init__.py").write_text(STUB)
            for name in INSIDE:
                shutil.copy(PACKAGE / "course" / name, package / "course" / name)
            for entry in PACKAGE.iterdir():
                if entry.name not in ("course", "__pycache__"):
                    (package / entry.name).symlink_to(entry)
        return package / "course"

    def _frame(self, patience: float | int, limit: int) -> tuple[dict, bytes]:
        deadline = time.monotonic() + patience
        head, body = FRAME.unpack(self._read(FRAME.size, deadline))
        if head > 1000 or body > limit + (1 << 16):
            raise self._lost("a message too long")
        try:
            header = json.loads(self._read(head, deadline))
            return dict(header), self._read(body, deadline)
        except (ValueError, TypeError):
            raise self._lost("a message that makes no sense") from None

    def _read(self, size: int, deadline: float) -> bytes:
        parts = []
        while size:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.results], [], [], left)[0]:
                raise self._lost("it says nothing")
            part = os.read(self.results, min(size, 1 << 20))
            if not part:
                raise self._lost("it has ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _write(self, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self.requests, view) :]
        except BrokenPipeError:
            raise self._lost("it has ended") from None

    def _lost(self, why: str) -> Lost:
        self.close()
        return Lost(why)

    def close(self) -> None:
        """End everything in it; the next run starts afresh."""
        if self.process is None:
            return
        process, self.process = self.process, None
        os.close(self.requests)
        os.close(self.results)
        process.kill()  # bubblewrap's death is that of its namespace
        process.wait()
        if self.kind != "bubblewrap":
            _end_session(process.pid)


def _bootstrap(folder: Path, kind: str) -> str:
    """Runs worker.main; in a subprocess, the copy of the package comes before the one that is installed."""
    installed = [str(path) for path in libraries() if path.name in ("site-packages", "dist-packages")]
    paths = [str(PACKAGE.parent if kind == "bubblewrap" else folder.parent), *installed]
    parent = os.getpid() if kind == "subprocess" else 0  # bubblewrap sees to that itself
    return (
        f"import sys; sys.path[:] = {paths[:1]} + [*sys.path, *(p for p in {paths[1:]} if p not in sys.path)]; "
        f"from minialign.course.grader import locks; {parent} and locks.end_with_parent({parent}); "
        "from minialign.course.grader import worker; worker.main(int(sys.argv[1]), sys.argv[2], 'inner' in sys.argv)"
    )


def _end_session(session: int) -> None:
    """Kill the process group that the worker led, and what is left of its session."""
    for _ in range(3):
        try:
            os.killpg(session, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.01)
