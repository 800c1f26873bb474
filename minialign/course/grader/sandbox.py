"""Where submissions run: one sandbox a core, warmed up once, in which `worker.py` forks a process for each exercise.

    isolation()      "bubblewrap" where bwrap works, else "subprocess"
    Sandbox.run      sends a submission in; yields what the student's processes say, exercise by exercise

Two walls. The outer one is bubblewrap's: namespaces, and a file system of its own. The inner one stands around each
exercise (`locks.py`): resource limits, libseccomp's filter of system calls, the kernel's Landlock. What holds:

                                            bwrap +      bwrap   subprocess +   subprocess +   subprocess
                                            libseccomp           libseccomp +   libseccomp
                                                                 Landlock
    time, memory, output, open files          yes         yes       yes            yes            yes
    no access to checks, answers, solutions   yes         yes       yes            NO             NO
    none to other submissions, the grades     yes         yes       yes            can read       NO
    no network                                yes         yes       yes            yes            NO
    no processes of its own                   yes         (1)       yes            yes            at most 8
    no file written, changed or deleted       yes         (2)       yes            yes            NO
    nothing survives or reaches the next      yes         (3)       yes            yes            (4)

(1) At most 8, which see and reach nothing; but root's are not counted, so grade as an ordinary user there. (2) But for
64 MB of scratch space in memory. (3) A new sandbox for each submission, hence torch imported each time. (4) Processes
left behind are ended, but files may have been changed before. Under Landlock a program can still ask whether a file
exists, and for its size. Landlock alone, without libseccomp, gives the rows on files; libseccomp is on every Debian,
Ubuntu and Fedora (apt and systemd need it), Landlock in kernels from 5.13 where it is enabled. Outside Linux there is
only the last column, and limits only as far as the system keeps them.

In every case results come back as JSON through a pipe and are checked before they are believed, the verdict is computed
outside, every submission was read before the first ran, and grades.csv is written last. With neither bubblewrap nor
libseccomp it does not run as root. No wall hides what the package itself holds: `minialign.kernels` is in every
student's hands, and a solution that calls it is right.

Every new sandbox first tries, harmlessly, what should fail in it, and is not used if anything succeeds.

These walls stop programs, not a flaw of the kernel. For that, grade in a virtual machine.
"""

import json
import os
import select
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from minialign.course.grader.locks import landlock, seccomp
from minialign.course.grader.worker import FRAME

PACKAGE = Path(__file__).resolve().parents[2]
# Of the course, with STUB; of the grader, what runs inside, and none of what judges.
INSIDE = ("observe.py", *(f"grader/{name}.py" for name in ("__init__", "locks", "needed", "wire", "worker")))
STUB = '''"""In the grader's sandbox the course is empty: no checks, no references, no answers."""


def check(name, function=None, seed=None):
    return function, 0.0


def quiz(name, answer=None):
    return 0.0
'''
DEVICES = ("/dev/null", "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo")
SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/lib32",
    "/bin",
    "/sbin",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/alternatives",
    "/sys/devices/system/cpu",
)
# Tried in every new sandbox before the first submission, harmlessly: what should fail. Gives what did not.
PROBE = """
import os, socket

def fork():
    if os.fork() == 0:
        os._exit(0)

tries = {{
    "signal another process": lambda: os.kill(os.getppid(), 0),
    "start a process": fork,
    "open a socket": socket.socket,
    "write a file": lambda: os.close(os.open({written!r}, os.O_WRONLY | os.O_CREAT)),
    "read the checks": lambda: open({secret!r}).close(),
}}
value = ""
for name, attempt in tries.items():
    try:
        attempt()
        value += name + ", "
    except OSError:
        pass
"""
START = 300.0  # seconds until a sandbox has imported torch, on a machine that is busy
GRACE = 60.0  # seconds, beyond the limits, after which a sandbox that says nothing is given up


class Lost(Exception):
    """The sandbox died, or says nothing more."""


class Broken(RuntimeError):
    """No sandbox can be started, or no case can be sent: no submission's fault, so the run stops."""


class Limits(NamedTuple):
    """Of one exercise."""

    seconds: int = 10  # of CPU
    wall: float | int = 30.0  # seconds
    memory: int = 1 << 30  # bytes, beyond what python and torch take
    output: int = 8 << 20  # bytes of its result
    processes: int = 8  # threads included, where the system counts them


class Said(NamedTuple):
    index: int  # of the exercise
    status: str  # "ok", "time", "output" or "died N"
    body: bytes  # if ok


def isolation(choice: str = "auto", secrets: Sequence[Path] = ()) -> tuple[str, str]:
    """("bubblewrap" or "subprocess", a warning or ""). ValueError if what was chosen does not work here."""
    if choice not in ("auto", "bubblewrap", "subprocess"):
        raise ValueError(f"unknown isolation {choice!r}. There are: auto, bubblewrap, subprocess.")
    problem = "without bubblewrap, as asked for" if choice == "subprocess" else _no_bubblewrap(secrets)
    if not problem:
        return "bubblewrap", "" if seccomp() else "libseccomp is not installed: a sandbox for each submission."
    if choice == "bubblewrap":
        raise ValueError(f"{problem}.")
    if not seccomp() and hasattr(os, "getuid") and os.getuid() == 0:
        raise ValueError(
            f"{problem}, nor libseccomp, and this is root, whose processes nothing else limits. "
            "Install bubblewrap (best), or grade as an ordinary user."
        )
    left = {
        (True, True): "Landlock and libseccomp keep submissions from all files, processes and the network instead",
        (True, False): "submissions can start processes and use the network",
        (False, True): "submissions can read every file that you can, answers included",
        (False, False): "submissions can read and change every file that you can, answers included, start processes "
        "and use the network",
    }
    return "subprocess", f"{problem}: {left[landlock() > 0, seccomp() is not None]}."


def _no_bubblewrap(secrets: Sequence[Path]) -> str:
    """Why bubblewrap cannot be used here, or ""."""
    if not shutil.which("bwrap"):
        return "bubblewrap (bwrap) is not installed"
    command = [*bubblewrap(PACKAGE / "course", secrets), sys.executable, "-I", "-c", "pass"]
    tried = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment())
    return (tried.returncode and f"bubblewrap does not work here ({tried.stderr.strip() or tried.returncode})") or ""


def environment() -> dict[str, str]:
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    fixed |= {"HOME": "/tmp", "TMPDIR": "/tmp", "MPLCONFIGDIR": "/tmp", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
    # the same kernels as here, whatever it can find out about the processor: the last bits of a float32 depend on them
    fixed |= {"ATEN_CPU_CAPABILITY": torch.backends.cpu.get_cpu_capability().lower()}
    return fixed | {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}


def libraries() -> list[Path]:
    """Where Python and installed packages lie; never a folder that only happens to be on sys.path."""
    folders = {Path(path) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    folders |= {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    folders |= {path.resolve() for path in folders} | {Path(sys.executable).resolve().parent}
    return sorted((path for path in folders if path.exists()), key=lambda path: (len(path.parts), path))


def readable(course: Path, kind: str, secrets: Sequence[Path] = ()) -> dict[str, list[str]]:
    """What a submission may read under Landlock: the system, Python, the package; of the course the empty one.

    Landlock can allow a folder, but not forbid a part of it. Of one that holds a secret, the other parts are allowed;
    "listed" are the folders around a secret, where names may be seen: Python lists a folder to import from it.
    """
    places = [Path(path) for path in (*SYSTEM, *DEVICES)] + libraries() + [PACKAGE]
    closed = {path.resolve() for path in (PACKAGE / "course", *secrets)}
    if kind == "bubblewrap":  # there, they have other contents already
        closed = set()
    whole, listed = [PACKAGE / "course" if kind == "bubblewrap" else course.parent], []

    def add(place: Path) -> None:
        if any(place in path.parents for path in closed):
            listed.append(place)
            for entry in place.iterdir():
                if not entry.is_symlink():  # it is allowed if what it leads to is
                    add(entry)
        elif place not in closed:
            whole.append(place)

    for place in {path.resolve(): path for path in places if path.exists()}:
        add(place)
    return {"readable": [str(path) for path in whole], "listed": [str(path) for path in listed]}


def bubblewrap(course: Path, secrets: Sequence[Path] = ()) -> list[str]:
    """The bwrap command: system and Python read-only, `course` over the package's own, nothing else of this machine."""
    visible = [Path(path) for path in SYSTEM] + libraries() + [PACKAGE]
    options = subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    command += ["--as-pid-1"]  # bwrap's own reaper would hold our pipes, open to whoever finds them in /proc
    if "--disable-userns" in options:
        command += ["--unshare-user", "--disable-userns"]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    command += [*(["--size", str(64 << 20)] if "--size" in options else []), "--tmpfs", "/tmp"]
    for path in visible:
        if path.is_symlink() and len(path.parts) == 2:  # /lib -> usr/lib
            command += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            command += ["--ro-bind", str(path), str(path)]
    for path in (path.resolve() for path in secrets):  # those that a folder above would show
        if path.exists() and any(folder in path.parents for folder in visible):
            blank = ["--tmpfs", str(path), "--remount-ro", str(path)]
            command += blank if path.is_dir() else ["--ro-bind", os.devnull, str(path)]
    command += ["--ro-bind", str(course), str(PACKAGE / "course")]
    for name, value in environment().items():
        command += ["--setenv", name, value]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp"]


class Sandbox:
    """A warmed-up worker behind a wall. Starts when first used, and again after it is lost."""

    def __init__(self, kind: str, secrets: Sequence[Path] = (), inner: bool = True):
        """`inner`: whether the inner wall may use libseccomp and Landlock; tests go without, to see the outer one."""
        self.kind, self.secrets, self.process, self.seconds = kind, list(secrets), None, 0.0
        self.inner = inner
        self.scratch = tempfile.TemporaryDirectory(prefix="minialign-")

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
        walls = {"readable": None}
        if self.inner and landlock():
            walls = readable(self._course(), self.kind, self.secrets)
        body = json.dumps(request | {"limits": request["limits"] | walls}).encode()
        self._write(b"!" + struct.pack("<Q", len(body)) + body)
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
        requests, self.requests = os.pipe()
        self.results, results = os.pipe()
        worker = [sys.executable, "-I", "-X", "utf8", "-c", _bootstrap(course.parent, self.kind), str(results)]
        worker += ["inner"] if self.inner else []
        command = [*bubblewrap(course, self.secrets), *worker] if self.kind == "bubblewrap" else worker
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                command, stdin=requests, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=[results],
                start_new_session=True, env=environment(), cwd="/",
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
        probe = PROBE.format(written=str(Path(self.scratch.name) / "written"), secret=str(PACKAGE / "course/check.py"))
        item = {"expression": "value", "targets": [0], "position": 0, "cases": [], "grad_wrt": []}
        request = {"given": [], "own": [["probe-answer", probe]], "items": [item], "functions": [], "lent": []}
        [said] = self._exchange(request | {"names": {}, "limits": Limits()._asdict()})
        try:
            done = json.loads(said.body.partition(b"\n")[2])[0]["value"].split(", ")[:-1]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Broken(f"the sandbox's self-test says {said.status}: {said.body[:300]!r}") from None
        alone = self.kind == "bubblewrap"  # its processes, network and files are its own, and then may be used
        expected = [] if self.reusable else ["signal another process", "start a process", "open a socket"]
        expected += [] if self.reusable or (self.inner and landlock()) or alone else ["write a file"]
        expected += [] if alone or (self.inner and landlock()) else ["read the checks"]
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
    return (
        f"import sys; sys.path[:] = {paths[:1]} + [*sys.path, *(p for p in {paths[1:]} if p not in sys.path)]; "
        "from minialign.course.grader import worker; worker.main(int(sys.argv[1]), 'inner' in sys.argv)"
    )


def _end_session(session: int) -> None:
    """Kill the process group that the worker led, and what is left of its session."""
    import signal

    for _ in range(3):
        try:
            os.killpg(session, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.01)
