"""What stands around a sandbox on this machine, and what can be seen from inside.

    isolation()         "bubblewrap" where bwrap works, else "subprocess"
    readable            what a submission may read, as rules for the kernel's Landlock
    bubblewrap          the same, as the command that starts bubblewrap
    copies              other installed copies of the package: their answers are hidden, too

"Secrets" are paths that no submission may read, even in a folder that it may: answers, submissions, grades.
"""

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from minialign.course.grader.locks import landlock, seccomp

PACKAGE = Path(__file__).resolve().parents[2]
# Of the course, with STUB; of the grader, what runs inside, and none of what judges.
INSIDE = ("observe.py", *(f"grader/{name}.py" for name in ("__init__", "locks", "needed", "scratch", "wire", "worker")))
STUB = '''"""In the grader's sandbox the course is empty: no checks, no references, no answers."""


def check(name, function=None, seed=None):
    return function, 0.0


def quiz(name, answer=None):
    return 0.0
'''
FILES = "/files"  # within bubblewrap, where a submission may write
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
        (True, False): "submissions can start processes, use the network and change modes of your files",
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


def environment(folder: str = FILES) -> dict[str, str]:
    """`folder`: where a submission may write."""
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    fixed |= {"HOME": folder, "TMPDIR": folder, "MPLCONFIGDIR": folder, "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
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


@functools.cache
def copies() -> tuple[Path, ...]:
    """`minialign/course` of every other installed copy of the package that lies where submissions may read."""
    deeper = [part + "python*/*-packages" for part in ("", "lib*/", "local/lib*/", "envs/*/lib*/")]
    roots = {*map(Path, SYSTEM), *libraries(), *(Path(path) for path in sys.path if path)}
    places = {place for root in roots for place in (root, *(p for part in deeper for p in root.glob(part)))}
    found = {(place / "minialign/course").resolve() for place in places}
    return tuple(sorted(path for path in found - {(PACKAGE / "course").resolve()} if path.exists()))


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
    command += ["--tmpfs", "/tmp"]
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
    command += [*(["--size", str(64 << 20)] if "--size" in options else []), "--tmpfs", FILES]
    return [*command, "--remount-ro", "/tmp", "--remount-ro", "/", "--chdir", FILES]
