"""The grader against a class in which most are hostile: each gets the grade it earned, and nobody else's moves.

Run as a script, this file grades a large class made of the real chapters, kills a run half-way, and says how long it
took:    python tests/course/grader/test_grade.py 300
"""

import csv
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from minialign import cli
from minialign.course import Exercise, Quiz
from minialign.course.check import difference, registered
from minialign.course.grader import grade, gradebook, locks, sandbox, submission, walls, wire
from minialign.course.grader.needed import needed
from minialign.course.grader.sandbox import Limits
from minialign.course.grader.walls import PACKAGE
from minialign.course.observe import observe

ROOT = Path(__file__).parents[3]
SECRET = "the-answer-is-4217"  # stands in every file that a submission must not see
RIGHT = "def double(x, scale):\n    return scale(x) + x"
SECOND = "def slope(weights):\n    return weights.square().sum()"
THIRD = 'q1 = "b"'
BUILDS_ON = "def slope(weights):\n    return double(weights, lambda w: w.square() - w).sum()"

# ---------------------------------------------------------------------------------- a chapter, as handed out


def twice(x):
    return FACTOR * x


FACTOR = 2.0


def double(x, scale):
    return scale(x) + x


def slope(weights):
    return weights.square().sum()


DOUBLE = Exercise(
    "99/double",
    points=3,
    reference=double,
    cases=[lambda g: dict(x=torch.randn(3, generator=g), scale=twice), dict(x=torch.ones(2, 5), scale=twice)],
    mistakes={"x is added once more.": lambda x, scale: scale(x)},
)
SLOPE = Exercise(
    "99/slope",
    points=2,
    reference=slope,
    grad_wrt=("weights",),
    cases=[lambda g: dict(weights=torch.randn(7, generator=g, dtype=torch.float64))],
)
QUESTION = Quiz("99/q1", points=1, answer="b", why={"a": "Tempting, but no.", "b": "Yes: it is.", "c": "Think again."})


@pytest.fixture(autouse=True, scope="module")
def chapter():
    """Registered here, in the grader's process; the sandbox has no such module."""
    name = "minialign.course.chapters.chapter_99"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].exercises = [DOUBLE, SLOPE, QUESTION]
    yield sys.modules[name]
    del sys.modules[name]


def code(source, grade_id=None):
    metadata = {"nbgrader": {"grade_id": grade_id}} if grade_id else {}
    return {"cell_type": "code", "source": source, "metadata": metadata, "outputs": [], "execution_count": None}


def notebook(*cells):
    text = {"cell_type": "markdown", "source": "# Ninety-nine", "metadata": {}}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [text, *cells]}


def handed_in(double=RIGHT, slope=SECOND, q1=THIRD):
    """The chapter with these solutions."""
    return notebook(
        code("import torch\nfrom minialign import kernels, worlds"),
        code("def half(x):\n    return x / 2"),
        code("raise RuntimeError('a training run that grading never starts')"),
        code(double, "99-double-answer"),
        code('double, points = check("99/double", double)\npoints', "99-double"),
        code(slope, "99-slope-answer"),
        code('slope, points = check("99/slope", slope)\npoints', "99-slope"),
        code(q1, "99-q1-answer"),
        code('quiz("99/q1", q1)', "99-q1"),
    )


STUBS = dict(
    double='def double(x, scale):\n    """Thrice, if scale doubles."""\n    # YOUR CODE HERE',
    slope='def slope(weights):\n    """A scalar."""\n    # YOUR CODE HERE',
    q1="q1 = None\n# YOUR CODE HERE",
)  # fmt: skip

# ---------------------------------------------------------------------------------- attacks
# name: (the cell, with NAME for the function and placeholders in capitals; how it ends; what the student is told).
# Each stands where a solution belongs, beside right answers to the other questions, which must keep their points.
# None may do harm where a wall is broken on purpose, to see a test fail: no process but its parent is named, no folder
# but the test's own, and every flood ends.

BODY = "def NAME(*args, **kwargs):\n"
ANY = ("wrong", "stopped")
DENIED = "Errno"
ATTACKS = {
    "loops for ever": (BODY + "    while True: pass", "stopped", "ran longer than"),
    "loops for ever outside the function": ("while True: pass", "stopped", "ran longer than"),
    "sleeps for ever": ("import time\n" + BODY + "    time.sleep(10**6)", "stopped", "ran longer than"),
    "is deaf to signals": (
        "import signal\nfor s in range(1, 64):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
        + BODY + "    while True: pass",
        "stopped", "ran longer than",
    ),
    "exits": ("import os\n" + BODY + "    os._exit(0)", "stopped", "ended before there was a result (exit code 0)"),
    "exits politely": ("import sys\nsys.exit(0)", "wrong", "SystemExit"),
    "aborts": ("import os\n" + BODY + "    os.abort()", "stopped", "signal 6"),
    "segfaults": ("import ctypes\n" + BODY + "    ctypes.string_at(0)", "stopped", "signal 11"),
    "kills itself": ("import os\n" + BODY + "    os.kill(os.getpid(), 9)", "stopped", "signal 9"),
    "kills the grader": ("import os\n" + BODY + "    os.kill(os.getppid(), 9)", "wrong", DENIED),
    "is a fork bomb": ("import os\nfor _ in range(6):\n    os.fork()", "wrong", DENIED),
    "starts a shell": ("import subprocess\n" + BODY + "    subprocess.run(['sh', '-c', 'id'])", "wrong", DENIED),
    "becomes a daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n" + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "becomes another program": ("import os\nos.execv('/bin/sh', ['sh'])", "wrong", DENIED),
    "starts threads for ever": (
        "import threading, time\nfor _ in range(3000):\n    threading.Thread(target=time.sleep, args=(99,)).start()",
        ANY, "",
    ),
    "takes all memory": (BODY + "    held = [bytearray(1 << 24) for _ in range(200)]", ANY, ""),
    "takes all memory in torch": (
        "import torch\n" + BODY + "    return torch.empty(2**30)[:1].clone()", "wrong", "memory",
    ),
    "recurses for ever": (BODY + "    return NAME()", "wrong", "RecursionError"),
    "raises its limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, resource.RLIM_INFINITY))", "wrong", "",
    ),
    "answers too much": ("import torch\n" + BODY + "    return torch.zeros(600_000)", "stopped", "was not taken"),
    "answers with itself": (BODY + "    out = []\n    out.append(out)\n    return out", "wrong", "RecursionError"),
    "answers with a deep list": (
        BODY + "    out = []\n    for _ in range(500):\n        out = [out]\n    return out", ANY, "",
    ),
    "answers with many things": (BODY + "    return [0] * 3_000_000", "stopped", ""),
    "answers with an enormous number": (BODY + "    return 10 ** 9999", "wrong", "an object of type int"),
    "answers with nan": ("import torch\n" + BODY + "    return torch.full((3,), torch.nan)", "wrong", ""),
    "is equal to everything": (
        "class Yes:\n    def __eq__(self, other): return True\n    def __getattr__(self, name): return self\n"
        "    def __call__(self, *a, **k): return self\n" + BODY + "    return Yes()",
        ANY, "",
    ),
    "is a tensor that lies": (
        "import torch\nclass Yes(torch.Tensor):\n    @classmethod\n"
        "    def __torch_function__(cls, function, types, args=(), kwargs=None):\n"
        "        return torch.ones(1, dtype=torch.bool)\n" + BODY + "    return torch.zeros(3).as_subclass(Yes)",
        ANY, "",
    ),
    "patches torch": (
        "import torch\nyes = lambda *a, **k: torch.ones((), dtype=torch.bool)\n"
        "torch.isclose = torch.allclose = torch.equal = torch.Tensor.all = torch.Tensor.__eq__ = yes\n"
        + BODY + "    return torch.zeros(3)",
        ANY, "",
    ),
    "patches the observer": (
        "import sys\nworker = sys.modules['minialign.course.grader.worker']\n"
        "worker.observe = worker.plain = lambda *a, **k: {'status': 'passed', 'points': 99}\n" + BODY + "    return 0",
        "stopped", "could not be read",
    ),
    "patches the builtins": ("import builtins\nbuiltins.len = builtins.isinstance = lambda *a: True\n" + BODY, ANY, ""),
    "drops every assert": (
        BODY + "    return 0\nimport ast\nclass Drop(ast.NodeTransformer):\n"
        "    def visit_Assert(self, node): return None\n"
        "get_ipython().ast_transformers.append(Drop())",
        "wrong", "",
    ),
    "forges a verdict": (
        "import os, json\nforged = json.dumps({'status': 'passed', 'points': 99}).encode()\n"
        "for fd in range(64):\n    try: os.write(fd, forged)\n    except OSError: pass\nos._exit(0)",
        "stopped", "its result",
    ),
    "forges frames of the protocol": (
        "import os, struct\nhead = b'{\"index\": 1, \"status\": \"ok\"}'\n"
        "for fd in range(64):\n    try: os.write(fd, struct.pack('<II', len(head), 0) + head)\n"
        "    except OSError: pass\nos._exit(0)",
        "stopped", "could not be read",
    ),
    "forges results": (
        "import os, json\none = {'value': 0.0, 'error': '', 'trace': '', 'mutated': [], 'grads': {}}\n"
        "forged = json.dumps([one] * 5).encode()\n"
        "for fd in range(3, 64):\n    try: os.write(fd, forged)\n    except OSError: pass\nos._exit(0)",
        ANY, "",
    ),
    "sends a pickle": (
        "import os, pickle\nclass Boom:\n    def __reduce__(self): return os.mkdir, ('SCRATCH/unpickled',)\n"
        "for fd in range(3, 64):\n    try: os.write(fd, pickle.dumps(Boom()))\n    except OSError: pass\nos._exit(0)",
        "stopped", "could not be read",
    ),
    "reads the answers": (BODY + "    return open('PACKAGE/course/chapters/chapter_00.py').read()", "wrong", DENIED),
    "imports the answers": (
        "from minialign.course.chapters import chapter_00\n" + BODY + "    return chapter_00.exercises",
        "wrong", "ModuleNotFoundError",
    ),
    "imports the checks": (
        "from minialign.course.check import find\n" + BODY + "    return find('00/redness').reference(*args, **kwargs)",
        "wrong", "ModuleNotFoundError",
    ),
    "reads the source notebook beside it": (
        BODY + "    raise ValueError(open('SCRATCH/solutions/99.ipynb').read())", "wrong", DENIED,
    ),
    "reads a classmate's notebook": (
        BODY + "    text = open('SCRATCH/class/a right.ipynb').read()\n"
        "    raise ValueError(text[text.find('return scale(x) + x  #'):][:80])",
        "wrong", DENIED,
    ),
    "tells what it reads in an exception": (
        BODY + "    from glob import glob\n"
        "    raise ValueError([open(f).read() for f in glob('SCRATCH/**', recursive=True)])",
        "wrong", "",
    ),
    "edits a classmate's notebook": (
        "open('SCRATCH/class/z right.ipynb', 'w').write('{}')\n" + BODY + "    return 0", "wrong", DENIED,
    ),
    "writes the grade book": (
        "import pathlib\npathlib.Path('SCRATCH/grades.csv').write_text('all,100')\n" + BODY, "wrong", "",
    ),
    "writes its own result": (
        "import pathlib\nfor f in pathlib.Path('SCRATCH/grades/results').iterdir():\n    f.write_text('{}')\n"
        + BODY + "    return 0",
        "wrong", "",
    ),
    "deletes files": (
        "import shutil\nshutil.rmtree('SCRATCH', ignore_errors=True)\n" + BODY + "    return 0", "wrong", "",
    ),
    "fills the disk": (
        "with open('/tmp/full', 'wb') as file:\n    for _ in range(64): file.write(bytes(1 << 20))", "wrong", DENIED,
    ),
    "calls home": (
        "import socket\n" + BODY + "    socket.create_connection(('127.0.0.1', PORT)).send(b'hello')", "wrong", DENIED,
    ),
    "reads its parent's memory": ("import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)", "wrong", DENIED),
    "reads the files of others": (
        "import os\nfound = []\nfor pid in {*range(1, 99), os.getppid()} - {os.getpid()}:\n    for fd in range(9):\n"
        "        try: found.append(os.open(f'/proc/{pid}/fd/{fd}', os.O_RDONLY))\n"
        "        except OSError as error: last = error\n"
        "if not found: raise last\n" + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "looks for the reference in memory": (
        "import gc\n" + BODY + "    found = [o for o in gc.get_objects() if getattr(o, '__name__', '') == 'reference'\n"
        "             or type(o).__name__ in ('Exercise', 'Quiz')]\n    return found[0].reference(*args, **kwargs)",
        "wrong", "IndexError",
    ),
    "closes every file": ("import os\nos.closerange(0, 256)\n" + BODY + "    return 0", "stopped", "ended before"),
    "raises what nobody catches": ("class Boo(BaseException): pass\n" + BODY + "    raise Boo", "wrong", "Boo"),
    "raises what cannot be printed": (
        "class Boo(Exception):\n    def __str__(self): raise self\n" + BODY + "    raise Boo", ANY, "",
    ),
    "writes a script into its feedback": (
        BODY + "    raise ValueError('<script>alert(1)</script>\\x1b[2J\\u202e')", "wrong", "ValueError",
    ),
    "changes its argument": (BODY + "    x = [*args, *kwargs.values()][0]\n    x += 1\n    return x", "wrong", ""),
    "signals through a file": (  # whose owner gets, at the next byte, whatever signal was chosen
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())\nfcntl.fcntl(r, 10, 9)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')\n" + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "signals through a file, past the filter": (  # the kernel looks at half of the register that the filter sees
        "import ctypes, os\nr, w = os.pipe()\nfcntl = ctypes.CDLL(None, use_errno=True).syscall\n"
        "number = {'x86_64': 72, 'aarch64': 25}[os.uname().machine]\n"
        "if fcntl(number, ctypes.c_ulong(r), ctypes.c_ulong(8 + 2**32), ctypes.c_ulong(os.getppid())):\n"
        "    raise OSError(ctypes.get_errno(), 'fcntl')\n" + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "drips its result": (
        "import os, time\n" + BODY + "    while True:\n        for fd in range(3, 16):\n"
        "            try: os.write(fd, b'x')\n            except OSError: pass\n        time.sleep(0.01)",
        "stopped", "ran longer than",
    ),
    "answers with paths that take all memory": (
        BODY + "    out = [0] * 500\n    for _ in range(15):\n        out = {'k' * 600: out}\n    return out",
        "stopped", "odd keys",
    ),
    "answers with many leaves": (BODY + "    return [0.0] * 50_000", "stopped", "too large"),
    "answers with a list without an end": (
        "class Endless(list):\n    def __iter__(self):\n        while True: yield 0\n"
        + BODY + "    return Endless([1])",
        ANY, "",
    ),
    "answers with a tensor larger than memory": (
        "import torch\n" + BODY + "    return torch.zeros(1).expand(2**40)", "wrong", "",
    ),
    "answers with a tensor that is nowhere": (
        "import torch\n" + BODY + "    return torch.empty(3, device='meta')", "wrong", "an object of type Tensor",
    ),
    "answers with a generator": (BODY + "    yield 0", "wrong", "an object of type generator"),
    "maps memory for ever": ("import mmap\nheld = [mmap.mmap(-1, 1 << 26) for _ in range(999)]", "wrong", DENIED),
    "traces its parent": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.ptrace(16, os.getppid(), 0, 0): raise OSError(ctypes.get_errno(), 'ptrace')\n" + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "limits its parent": (
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))\n" + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "stops, and never ends": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "stopped", "ran longer than"),
    "sets an alarm": (
        "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.01)\ntime.sleep(9)", "stopped", "signal 14",
    ),
    "speaks to the kernel of another processor": (  # int 0x80: the numbers of the calls are then others
        "import ctypes, mmap\npage = mmap.mmap(-1, 4096, prot=7)\npage.write(bytes.fromhex('b814000000cd80c3'))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\n" + BODY + "    return 0",
        "stopped", "signal",
    ),
    "locks a file of the system": (
        "import fcntl, torch\nfcntl.flock(open(torch.__file__), fcntl.LOCK_EX)\n" + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "watches the folder of the others": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.inotify_add_watch(libc.inotify_init(), b'SCRATCH/class', 0xFFF) < 0:\n"
        "    raise OSError(ctypes.get_errno(), 'inotify')\n" + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "opens with odd flags": (
        "import os\nfor flags in (os.O_TRUNC, os.O_CREAT, os.O_RDWR | os.O_TMPFILE, 3, os.O_WRONLY | os.O_APPEND):\n"
        "    try: os.open('SCRATCH/class' if flags & os.O_DIRECTORY else 'SCRATCH/class/z right.ipynb', flags)\n"
        "    except OSError as error: last = error\n    else: break\nelse: raise last\n" + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "reads what proc says of others": (
        "import os\nfor path in ('/proc/1/environ', f'/proc/{os.getppid()}/cmdline', f'/proc/{os.getppid()}/maps'):\n"
        "    try: open(path).read()\n    except OSError as error: last = error\n    else: break\nelse: raise last\n"
        + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "leaves its memory on the disk": (
        "import ctypes\nctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\nctypes.string_at(0)", "stopped", "signal 11",
    ),
    "patches json and os": (
        "import json, os\nwrite = os.write\njson.dumps = lambda *a, **k: '[]'\n"
        "os.write = lambda fd, data: write(fd, bytes(data)[::-1])\n" + BODY + "    return 0",
        "stopped", "could not be read",
    ),
    "patches its own end": ("import os\nos._exit = lambda code: None\n" + BODY + "    return 0", ANY, ""),
    "changes what is said of files": (  # by name, by descriptor, by calls that are newer than libseccomp
        "import ctypes, os\npath = b'SCRATCH/class/z right.ipynb'\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "args = (ctypes.c_uint64 * 4)(ctypes.addressof(ctypes.create_string_buffer(b'1')), 1)\n"
        "done = [call for call in (\n"
        "    lambda: libc.chmod(path, 0o666), lambda: libc.fchmodat(-100, path, 0o666, 0),\n"
        "    lambda: libc.syscall(452, -100, path, 0o666, 0), lambda: libc.chown(path, 1, 1),\n"
        "    lambda: libc.setxattr(path, b'user.a', b'1', 1, 0), lambda: libc.utimes(path, None),\n"
        "    lambda: libc.syscall(463, -100, path, 0, b'user.a', args, ctypes.c_size_t(16)),\n"
        "    lambda: libc.syscall(469, -100, path, args, ctypes.c_size_t(24), 0)) if call() == 0]\n"
        "if not done: raise OSError(ctypes.get_errno(), 'nothing can be changed')\n" + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "leaves word on a file that it may read": (  # attributes, hints for the disk, locks: others would see them
        "import fcntl, torch\ndone, file = 0, open(torch.__file__)\n"
        "for call in (lambda: fcntl.ioctl(file, 0x40086602, bytes(8)), lambda: fcntl.fcntl(file, 1036, bytes(8)),\n"
        "             lambda: fcntl.lockf(file, fcntl.LOCK_SH), lambda: fcntl.fcntl(file, fcntl.F_SETLEASE, 0)):\n"
        "    try: done += call() != 'no'\n    except OSError as error: last = error\n"
        "if not done: raise last\n" + BODY + "    return 0",
        "wrong", "Errno 1]",
    ),
    "would outlive the grader": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.prctl(1, 0, 0, 0, 0): raise OSError(ctypes.get_errno(), 'prctl')\n" + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "makes files for ever": (
        "import time\nfor k in range(3000): open(str(k), 'w').close()\ntime.sleep(9)", "stopped", "temporary files",
    ),
    "leaves a folder that is hard to remove": (
        "import os\nos.umask(0)\nfor _ in range(950):\n    os.mkdir('d' * 99)\n    os.chdir('d' * 99)\n"
        "os.mkdir('closed', 0)\n" + BODY + "    return 0",
        ANY, "",
    ),
    "writes outside its folder": (
        "import os\nfor path in ('/tmp/a', '/var/tmp/a', '/dev/shm/a', '../a', os.__file__ + 'a', 'SCRATCH/a'):\n"
        "    try: open(path, 'w')\n    except OSError as error: last = error\n    else: break\nelse: raise last\n"
        + BODY + "    return 0",
        "wrong", DENIED,
    ),
    "is no Python": ("def NAME(:", "wrong", "SyntaxError"),
    "breaks the parser": ("x = " + "(" * 90_000, "wrong", ""),
    "breaks the parser's stack": ("x = " + "-" * 90_000 + "1", ANY, ""),
    "holds a null byte": ("x = '\0'", "wrong", ""),
}  # fmt: skip

# Right, in spite of how it looks: the same number of points as for RIGHT.
HARMLESS = {
    "floods standard output": "import os\nfor _ in range(50):\n    os.write(1, bytes(1 << 20)); print('x' * 10**6)\n"
    + RIGHT,
    "uses a magic": "%matplotlib inline\n" + RIGHT,
    "uses a given helper": "def double(x, scale):\n    return scale(x) + half(x) + half(x)",
    "leaves threads running": "import threading, time\nfor _ in range(3):\n"
    "    threading.Thread(target=time.sleep, args=(99,)).start()\n" + RIGHT,
    "fails after its function": RIGHT + "\nraise ValueError('a plot, say')",
    "calls itself by another name": "mine = lambda x, scale: scale(x) + x\ndouble = mine",
    "asks, calls the shell and waits": "len?\n!ls\nfiles = !ls\nimport asyncio\nawait asyncio.sleep(0)\n" + RIGHT,
    "uses torch.func": "import torch\ndef double(x, scale):\n    return torch.func.vmap(lambda row: row)(scale(x) + x)",
    "compiles itself": "import torch\n@torch.compile\n" + RIGHT,
    "uses a temporary file": "import tempfile, torch\ndef double(x, scale):\n"
    "    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory() as folder:\n"
    "        torch.save(x, file)\n        torch.save(x, f'{folder}/x.pt')\n        file.seek(0)\n"
    "        return scale(torch.load(file)) + torch.load(f'{folder}/x.pt')",
    "uses an optimizer": """import torch
def double(x, scale):
    y = torch.zeros_like(x).requires_grad_()
    optimizer = torch.optim.SGD([y], lr=1.0)
    (y * (scale(x) + x)).sum().backward()
    optimizer.step()
    return -y.detach()""",
}
OPTIMIZER = HARMLESS["uses an optimizer"]


OTHERS = {
    "one mistake": "def double(x, scale):\n    return scale(x)",
    "processor": "import torch\ndef double(x, scale):\n    return torch.backends.cpu.get_cpu_capability()",
}

# of files: formulas, a terminal's commands, text that runs backwards, half a character, one name in two folders
NAMES = ("=1+1", "+1", "-2+3", "@x", "'=1+1", " =1", "\t=1", "\uff1d1", "red\x1b[31m\nline", "\u202eback", "\udce9",
         "one/same", "two/same", "one-same", "\u2028")  # fmt: skip


def notebooks_of_all_kinds():
    """{name: (bytes of a file, points, words of the remark)}: what is not simply a solution cell."""
    stripped = handed_in()
    for cell in stripped["cells"]:
        cell["metadata"] = {}
    moved = handed_in(double=STUBS["double"])
    moved["cells"].insert(5, code(RIGHT))  # solved in a cell of one's own
    before = handed_in(double=STUBS["double"], slope=BUILDS_ON)
    before["cells"].insert(5, code(RIGHT))  # and needed later
    handed_on = handed_in(double="open('note', 'w').write('2')\n" + RIGHT, slope="open('note')\n" + SECOND)
    tolerant = handed_in(double="def double(x, scale):\n    return helper(x, scale)")
    tolerant["cells"].insert(
        1, code("len?\n%time y = 1\n!pip list\ndef helper(x, scale):\n    return scale(x) + x\nawait y")
    )
    helper = handed_in(double="def double(x, scale):\n    return helper(x, scale)")
    helper["cells"].insert(1, code("import math as m\nDELTA = m.cos(0)"))
    helper["cells"].insert(2, code("def helper(x, scale):\n    return scale(x) + DELTA * x"))
    edited = handed_in(double=STUBS["double"])
    edited["cells"][5]["source"] = "points = 99.0\npoints"
    cut = handed_in()
    del cut["cells"][4]
    lame = handed_in(double="def double(x, scale):\n    return scale(x) + 2 * half(x)")
    del lame["cells"][2]  # a given helper was deleted, a check too
    del lame["cells"][4]
    twice_over = handed_in(double="def double(x, scale):\n    return 0")
    twice_over["cells"].insert(5, code(RIGHT, "99-double-answer"))
    odd = handed_in()
    odd["cells"] += [None, 7, "cell", {"cell_type": "code"}, {"cell_type": "code", "source": 5, "metadata": 5}]
    odd["cells"] += [{"cell_type": "code", "source": ["a", 5], "metadata": {"nbgrader": {"grade_id": [1]}}}]
    surrogate = handed_in(double=RIGHT + "\nx = '\ud800'")
    many = notebook(*[code("x")] * 5000)
    old = {"nbformat": 3, "worksheets": []}
    dump = lambda value: json.dumps(value).encode()  # noqa: E731
    return {
        "metadata stripped": (dump(stripped), 6, ""),
        "solved in another cell": (dump(moved), 6, ""),
        "an earlier one solved in another cell": (dump(before), 6, ""),
        "a file for the next exercise": (dump(handed_on), 4, ""),
        "magics beside a helper": (dump(tolerant), 6, ""),
        "helpers of one's own": (dump(helper), 6, ""),
        "edited check": (dump(edited), 3, ""),
        "solution cell deleted": (dump(cut), 3, "missing: 99/double"),
        "given cells deleted": (dump(lame), 6, ""),
        "solution cell copied": (dump(twice_over), 6, ""),
        "odd cells": (dump(odd), 6, ""),
        "lone surrogate": (dump(surrogate), 6, ""),
        **{name: (dump(handed_in(**STUBS)), 0, "") for name in NAMES},
        "<b>&": (dump(handed_in()), 6, ""),
        "nothing solved": (dump(handed_in(**STUBS)), 0, ""),
        "wrong letter": (dump(handed_in(q1='q1 = "a"')), 5, ""),
        "not JSON": (b"I did it, see my e-mail", 0, "not JSON"),
        "not text": (b"\x89PNG\r\n\xff\xfe", 0, "not text"),
        "a pickle": (pickle.dumps(handed_in()), 0, "not text"),
        "empty": (b"", 0, "empty"),
        "a list": (b"[1, 2]", 0, "without a notebook's fields"),
        "no cells": (b'{"nbformat": 4, "cells": 5}', 0, "without cells"),
        "old format": (dump(old), 0, "format 3"),
        "format of lists": (b'{"nbformat": ' + b"[" * 900 + b"]" * 900 + b"}", 0, "format unknown"),
        "format of nan": (b'{"nbformat": NaN, "cells": []}', 0, "format unknown"),
        "keys twice": (b'{"nbformat": 4, "cells": [], "cells": 5}', 0, "without cells"),
        "deep": (b"[" * 100_000 + b"]" * 100_000, 0, "nested too deeply"),
        "long number": (b'{"nbformat": ' + b"9" * 10_000 + b"}", 0, "not JSON"),
        "another course": (dump(notebook(code("print(1)"))), 0, "no cell of any chapter"),
        "many cells": (dump(many), 0, "5001 cells"),
        "much code": (dump(handed_in(double="#" * 2_000_000)), 0, "MB of code"),
    }


def fill(template, name, scratch, port=9):
    for word, value in {"NAME": name, "SCRATCH": scratch, "PACKAGE": PACKAGE, "PORT": port}.items():
        template = template.replace(word, str(value))
    return template


# ---------------------------------------------------------------------------------- one class, graded in either sandbox

# Wall time is for those that sleep: on a busy machine it must not stop the others. Two megabytes of output, so that who
# answers too much is stopped for that, and not for the processor's seconds that packing it takes.
QUICK = Limits(seconds=2, wall=6, output=2 << 20)


def no_bubblewrap():
    """Why bubblewrap cannot be tested here, or "". Where it works at all, it has to work for us."""
    try:
        subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as problem:
        return f"bubblewrap is not installed, or may not be used here: {problem}"
    return ""


def working(kind):
    """Why the attacks are not let loose on `kind` here, or ""."""
    if not locks.seccomp():
        return "no libseccomp"
    if kind == "subprocess":
        return "" if locks.landlock() else "no Landlock"
    return no_bubblewrap()


@pytest.fixture(scope="module", params=["bubblewrap", "subprocess"])
def graded(request, tmp_path_factory):
    """The whole class: {submission: row of grades.csv}, the grades, and the folder."""
    if reason := working(request.param):
        pytest.skip(reason)
    scratch = tmp_path_factory.mktemp("course")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    for folder in ("class", "notebooks", "solutions"):
        (scratch / folder).mkdir()
    (scratch / "notebooks/99_attack.ipynb").write_text(json.dumps(handed_in(**STUBS)))
    (scratch / "solutions/99.ipynb").write_text(SECRET)
    files = {name: content for name, (content, *_) in notebooks_of_all_kinds().items()}
    for place in ("a", "m", "z"):
        files[f"{place} right"] = json.dumps(handed_in(double=f"{RIGHT}  # {SECRET}")).encode()
    for name, (source, *_) in ATTACKS.items():
        files[f"attack {name}"] = json.dumps(handed_in(double=fill(source, "double", scratch, port))).encode()
    others = {f"harmless {name}": source for name, source in HARMLESS.items()} | OTHERS
    for name, source in others.items():
        files[name] = json.dumps(handed_in(double=source)).encode()
    for name, content in files.items():
        path = scratch / "class" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o600)
    with open(scratch / "class/200 MB.ipynb", "wb") as file:
        file.truncate(200_000_000)
    (scratch / "class/link.ipynb").symlink_to(scratch / "solutions/99.ipynb")
    (scratch / "class/endless.ipynb").symlink_to("/dev/zero")
    os.mkfifo(scratch / "class/pipe.ipynb")
    (scratch / "class/folder.ipynb").mkdir()
    for name in ("report.pdf", "._a right.ipynb"):
        (scratch / "class" / name).write_text("not a notebook")
    (scratch / "class/linked").symlink_to(scratch / "solutions")
    listener.setblocking(False)
    grades = grade.grade_all(
        scratch / "class", scratch / "grades.csv", scratch / "notebooks", isolation=request.param, limits=QUICK,
        jobs=2, echo=lambda text: None, hide=[scratch / "solutions"], seed="1",
    )  # fmt: skip
    with open(scratch / "grades.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [g.submission for g in grades] == sorted(g.submission for g in grades)
    rows = {g.submission.removesuffix(".ipynb"): row for g, row in zip(grades, table, strict=True)}
    return types.SimpleNamespace(
        rows=rows, grades={g.submission.removesuffix(".ipynb"): g for g in grades}, scratch=scratch, files=files,
        kind=request.param, listener=listener,
    )  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_its_grade_and_costs_nothing_else(graded, name):
    _, ends, told = ATTACKS[name]
    status, points, worth, text = graded.grades[f"attack {name}"].verdicts["99/double"]
    assert status in ([ends] if isinstance(ends, str) else ends), text
    assert points == 0 and worth == 3 and text.startswith(f"99/double: {status}, 0 of 3 points"), text
    assert told in text, text
    row = graded.rows[f"attack {name}"]
    assert (row["99/double"], row["99/slope"], row["99/q1"], row["points"]) == ("0", "2", "1", "3"), row
    assert row["out_of"] == "6" and row["chapter"] == "99_attack"


@pytest.mark.parametrize("name", HARMLESS)
def test_odd_but_right_is_right(graded, name):
    assert graded.rows[f"harmless {name}"]["points"] == "6", graded.grades[f"harmless {name}"].verdicts


@pytest.mark.parametrize("name", notebooks_of_all_kinds())
def test_a_notebook_of_any_kind_gets_a_grade_and_a_message(graded, name):
    _, points, remark = notebooks_of_all_kinds()[name]
    assert graded.rows[name]["points"] == str(points), graded.grades[name]
    assert remark in graded.rows[name]["remarks"]


@pytest.mark.parametrize(
    ("name", "remark"),
    [("200 MB", "200 MB"), ("link", "a link"), ("endless", "a link"), ("pipe", "regular"), ("folder", "regular")],
)
def test_what_is_no_file_is_not_read(graded, name, remark):
    assert graded.rows[name]["points"] == "0" and remark in graded.rows[name]["remarks"]


def test_the_others_keep_their_grades_and_their_files(graded):
    assert [graded.rows[f"{place} right"]["points"] for place in "amz"] == ["6"] * 3
    for name, content in graded.files.items():
        path = graded.scratch / "class" / f"{name}.ipynb"
        assert path.read_bytes() == content and path.stat().st_mode & 0o777 == 0o600 and not os.listxattr(path)
    assert (graded.scratch / "solutions/99.ipynb").read_text() == SECRET
    assert not (graded.scratch / "unpickled").exists()
    with pytest.raises(BlockingIOError):  # nobody has called
        graded.listener.accept()
    assert len(graded.rows) == len(graded.files) + 5 == len(list((graded.scratch / "grades/feedback").iterdir()))


def test_names_are_no_formulas_and_hide_nothing(graded):
    shown = {name: row["submission"] for name, row in graded.rows.items()}
    assert len(set(shown.values())) == len(shown)
    assert all(cell.isprintable() for row in graded.rows.values() for cell in row.values())
    assert not [cell for cell in shown.values() if cell.lstrip()[0] in "=+-@\uff1d"]
    assert shown["=1+1"] == "'=1+1.ipynb" and shown["'=1+1"] == "''=1+1.ipynb" and shown[" =1"] == "' =1.ipynb"
    assert shown["red\x1b[31m\nline"] == r"red\x1b[31m\nline.ipynb" and shown["\udce9"] == r"\udce9.ipynb"
    for path in (graded.scratch / "grades").rglob("*.html"):
        assert all(line.isprintable() for line in path.read_text().split("\n")), path


def test_no_answer_leaks(graded):
    """Neither what stands in hidden files, nor the letter of a question, nor the reference's code."""
    for path in (graded.scratch / "grades").rglob("*"):
        text = path.read_text() if path.is_file() else ""
        assert SECRET not in text, path
        assert "gc.get_objects" not in text or "found[0]" in text
    wrong = graded.grades["wrong letter"].verdicts["99/q1"]
    assert wrong[0] == "wrong" and "Tempting" in wrong[3] and "Yes: it is" not in wrong[3] and '"b"' not in wrong[3]
    assert "return scale(x) + x" not in (graded.scratch / "grades/summary.html").read_text()


def test_feedback_is_escaped_and_runs_no_script(graded):
    name = "attack writes a script into its feedback.ipynb"
    page = (graded.scratch / "grades/feedback" / f"{gradebook.slug(name)}.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "default-src 'none'" in page
    summary = (graded.scratch / "grades/summary.html").read_text()
    page = (graded.scratch / "grades/feedback" / f"{gradebook.slug('<b>&.ipynb')}.html").read_text()
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page
    assert "report.pdf" in summary and "stopped: 99/double" in summary
    assert "._a right.ipynb" in summary and "linked" in summary


def test_a_mistake_is_named_and_the_smallest_case_shown(graded):
    status, _, _, text = graded.grades["one mistake"].verdicts["99/double"]
    assert status == "wrong" and "Hint: x is added once more." in text and "the notebook goes on" not in text


def test_the_sandbox_computes_as_this_process_does(graded):
    capability = torch.backends.cpu.get_cpu_capability()
    text = graded.grades["processor"].verdicts["99/double"][3]
    assert repr(capability) in text or "an object of type str" in text


def test_a_grade_depends_on_every_file_that_it_comes_from(tmp_path, monkeypatch):
    """So that a resumed run grades again what another version of the package has graded."""
    parts = ("course", "kernels", "methods", "worlds/weights/digits")
    for part in parts:
        shutil.copytree(PACKAGE / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(submission, "PACKAGE", tmp_path)

    def now():
        return submission._fingerprint("10", (), submission._package(tmp_path))

    before, weights = now(), next((tmp_path / parts[-1]).rglob("*.safetensors")).relative_to(tmp_path)
    for name in (
        "course/check.py", "course/observe.py", "course/chapters/chapter_10.py", "course/chapters/questions_10.py",
        "course/grader/grade.py", "course/grader/needed.py", "kernels/language.py", "methods/ddpo.py", weights,
    ):  # fmt: skip
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content + b"#")
        assert now() != before, name
        (tmp_path / name).write_bytes(content)
    (tmp_path / "course/chapters/chapter_11.py").write_text("")
    (tmp_path / "course/__pycache__").mkdir()
    (tmp_path / "course/__pycache__/check.pyc").write_text("")
    assert now() == before


def test_a_sandbox_with_a_hole_is_not_used(tmp_path, monkeypatch):
    """Before any submission is let in; the holes here are in what it is told to do, and harm nobody."""
    if reason := working("subprocess"):
        pytest.skip(reason)
    copied = sandbox.Sandbox._course

    def holed(holes):
        def course(self):
            folder = copied(self)
            text = (PACKAGE / "course/grader/locks.py").read_text()
            for hole in holes:
                assert hole in text
                text = text.replace(hole, "pass\n")
            (folder / "grader/locks.py").write_text(text)
            return folder

        return course

    start = "(start a process, )?" if os.getuid() else "start a process, "  # root's processes are not counted
    for holes, found in {
        (
            'refuse_files(limits["readable"], limits["listed"], limits["writable"])',
            'rule("clone", (0, MASKED_EQ, CLONE_THREAD, 0))',
        ): f"{start}write a file, read the checks",
        ('refuse_system_calls(library, writes=limits["writable"] is not None)\n',): (
            f"signal another process, {start}open a socket, change a file's mode, change a file's attributes, "
            "use new system calls, outlive the grader"
        ),
        ("_refuse_by_number(library)\n",): "change a file's attributes, use new system calls",
    }.items():
        monkeypatch.setattr(sandbox.Sandbox, "_course", holed(holes))
        box = sandbox.Sandbox("subprocess")
        with pytest.raises(sandbox.Broken, match=f"not shut: in it one can {found}"):
            list(box.run({}))


@pytest.mark.parametrize("kind", ["bubblewrap", "subprocess"])
def test_a_secret_among_the_libraries_is_left_out(tmp_path, kind, monkeypatch):
    """As the checks are when minialign is installed, and submissions if they lie in the folder of an environment.

    So are the checks of a second copy of the package, which nobody has named.
    """
    if reason := working(kind):
        pytest.skip(reason)
    place = tmp_path.resolve() / "site-packages"
    (place / "class").mkdir(parents=True)
    (place / "minialign/course").mkdir(parents=True)
    for name in ("class/one.ipynb", "library.py", "minialign/course/check.py", "minialign/kernels.py"):
        (place / name).write_text(SECRET)
    (place / "link").symlink_to(place / "class")
    known = walls.libraries()
    monkeypatch.setattr(walls, "libraries", lambda: [*known, place])
    walls.copies.cache_clear()
    probe = f"""
value = ""
for name in ("library.py", "class/one.ipynb", "link/one.ipynb", "minialign/course/check.py", "minialign/kernels.py"):
    try:
        value += open("{place}/" + name).read()[:3] + " "
    except OSError as error:
        value += "no "
"""
    box = sandbox.Sandbox(kind, [place / "class"])
    item = {"expression": "value", "targets": [0], "position": 0, "cases": [], "grad_wrt": []}
    request = {"given": [], "own": [["probe-answer", probe]], "items": [item], "functions": [], "lent": [], "names": {}}
    [said] = box.run(request | {"solved": {}, "limits": asdict(QUICK)})
    box.close()
    assert json.loads(said.body.partition(b"\n")[2])[0]["value"] == "the no no no the "
    if kind == "subprocess":  # and were it not hidden, the sandbox would not be used
        box = sandbox.Sandbox(kind)
        box.secrets = []
        with pytest.raises(sandbox.Broken, match="in it one can read the checks"):
            list(box.run(request))
    walls.copies.cache_clear()


@pytest.mark.parametrize("kind", ["bubblewrap", "subprocess"])
def test_an_optimizer_needs_no_file_where_none_may_be_written(tmp_path, kind, monkeypatch):
    """A kernel without Landlock: bubblewrap has a file system of its own, a subprocess may write nothing at all."""
    if reason := working(kind):
        pytest.skip(reason)
    for module in (sandbox, walls):
        monkeypatch.setattr(module, "landlock", lambda: 0)
    note = "def slope(weights):\n    open('note', 'w')\n    return weights.square().sum()"
    one = graded_together(tmp_path, kind, one=handed_in(double=OPTIMIZER, slope=note))["one"]
    assert one.verdicts["99/double"][0] == "passed", one.verdicts["99/double"][3]
    assert one.verdicts["99/slope"][0] == ("passed" if kind == "bubblewrap" else "wrong")


# ---------------------------------------------------------------------------------- real chapters


@pytest.fixture(scope="module")
def kind():
    """The better sandbox that works here."""
    works = [kind for kind in ("bubblewrap", "subprocess") if not working(kind)]
    if not works:
        pytest.skip("no libseccomp, or neither bubblewrap nor Landlock")
    return works[0]


class Warm(sandbox.Sandbox):
    """A sandbox that outlives the runs that use it: what they close and clean up at their end, it keeps."""

    def __init__(self, kind):
        super().__init__(kind)
        self.kept, self.scratch = self.scratch, types.SimpleNamespace(name=self.scratch.name, cleanup=lambda: None)

    def hiding(self, kind, secrets):
        assert kind == self.kind
        self.secrets = list(secrets)
        return self

    def close(self):
        pass

    def _lost(self, why):
        super().close()
        return sandbox.Lost(why)

    def end(self):
        super().close()
        self.kept.cleanup()


@pytest.fixture(scope="module")
def one_sandbox(kind):
    warm = Warm(kind)
    warm._start()  # in this thread: with the one that starts it, which in a run is the pool's, it would die
    yield warm
    warm.end()


@pytest.fixture
def warm(one_sandbox, monkeypatch):
    """For tests of anything but the start of a sandbox, which imports torch: they share one."""
    monkeypatch.setattr(grade, "Sandbox", one_sandbox.hiding)


def test_every_chapter_is_graded_right_solved_and_unsolved(tmp_path, kind, warm):
    """All points for the complete edition, none for the student's, with the checks' own cells never run."""
    (tmp_path / "class").mkdir()
    for edition in ("solutions", "notebooks"):
        for path in (ROOT / edition).glob("[0-9][0-9]_*.ipynb"):
            (tmp_path / "class" / f"{edition} {path.name}").write_bytes(path.read_bytes())
    options = dict(echo=lambda text: None, isolation=kind, hide=[ROOT / "solutions"], jobs=1)
    grades = grade.grade_all(tmp_path / "class", tmp_path / "grades.csv", ROOT / "notebooks", seed="0", **options)
    for one in grades:
        lost = {name: entry for name, entry in one.verdicts.items() if entry[0] != "passed"}
        if one.submission.startswith("solutions"):
            assert one.points == one.out_of > 0, lost
            assert one.title in one.submission
        else:
            assert one.points == 0 and {entry[0] for entry in lost.values()} == {"not attempted"}


ALL = [e for n in range(100) if n != 99 for e in registered(f"{n:02d}") if isinstance(e, Exercise)]


@pytest.mark.parametrize("exercise", ALL, ids=lambda exercise: exercise.name)
def test_arguments_arrive_as_they_were_sent(exercise):
    """The reference does the same with what comes out at the other end, functions and all."""
    packer = wire.Packer([exercise.reference])
    cases = exercise.draw(0)
    sent = json.loads(json.dumps([packer.pack(dict(case)) for case in cases]))
    functions = json.loads(json.dumps(packer.functions))
    for case, packed in zip(cases, sent, strict=True):
        here, there = (
            observe(exercise.reference, c, exercise.grad_wrt) for c in (case, wire.unpack(packed, functions))
        )
        assert not difference(there, here)
    packer = wire.Packer()  # where a later exercise builds on this one, the function itself travels
    lent = wire.unpack(packer.pack(exercise.reference), packer.functions)
    assert not difference(observe(lent, cases[0], exercise.grad_wrt), observe(exercise.reference, cases[0]))


def graded_together(tmp_path, kind, limits=QUICK, **cells):
    """{name: its grade} of notebooks of the chapter above."""
    for folder in ("notebooks", "class"):
        (tmp_path / folder).mkdir()
    (tmp_path / "notebooks/99_attack.ipynb").write_text(json.dumps(handed_in(**STUBS)))
    for name, notebook in cells.items():
        (tmp_path / f"class/{name}.ipynb").write_text(json.dumps(notebook))
    options = dict(isolation=kind, limits=limits, echo=lambda text: None, jobs=1)
    grades = grade.grade_all(tmp_path / "class", tmp_path / "g.csv", tmp_path / "notebooks", **options)
    return {g.submission.removesuffix(".ipynb"): g for g in grades}


def test_what_builds_on_an_unsolved_exercise_is_not_lost_with_it(tmp_path, kind, warm):
    """As in the notebook, where the check hands on a working function either way."""
    bad = {"wrong": WRONG, "empty": EMPTY, "loops": "def NAME(*a, **k):\n    while True: pass", "exits": "exit(1)"}
    cells = {name: handed_in(double=fill(text, "double", ""), slope=BUILDS_ON) for name, text in bad.items()}
    cells["right"] = handed_in(slope=BUILDS_ON)
    cells["both"] = handed_in(double=fill(WRONG, "double", ""), slope=BUILDS_ON.replace("square", "exp"))
    grades = graded_together(tmp_path, kind, **cells)
    assert grades["right"].points == 6 and "in place of yours" not in grades["right"].verdicts["99/slope"][3]
    for name in bad:
        status, points, _, text = grades[name].verdicts["99/slope"]
        assert (status, points) == ("passed", 2.0) and "with a right 99/double in place of yours" in text, text
        assert grades[name].points == 3
    status, points, _, text = grades["both"].verdicts["99/slope"]
    assert (status, points) == ("wrong", 0.0) and "it does not pass either" in text


def test_a_notebook_has_a_budget_of_time(tmp_path, kind, warm):
    """Sleeping costs no CPU, and each exercise may take its own wall time; together they may not."""
    sleeps = fill(ATTACKS["sleeps for ever"][0], "double", "")
    cells = {"right": handed_in(), "sleeps": handed_in(double=sleeps, slope=BUILDS_ON)}
    grades = graded_together(tmp_path, kind, Limits(seconds=1, wall=60, total=2), **cells)
    assert grades["right"].points == 6 and grades["sleeps"].points == 1  # the question comes first
    for name in ("99/double", "99/slope"):
        status, _, _, text = grades["sleeps"].verdicts[name]
        assert status == "stopped" and "the 2 s for the whole notebook were used up" in text, text


def test_a_lent_answer_cannot_be_told(tmp_path, kind, warm):
    """The one process that holds an answer cannot say a word: neither an exception's nor a value's reaches anyone."""
    tells = (
        "def slope(weights):\n    double(weights, abs)\n"
        "    raise ValueError('the lent code is ' + double.__code__.co_code.hex())"
    )
    own = "def double(*args, **kwargs):\n    return 0.123"
    one = graded_together(tmp_path, kind, one=handed_in(double=own, slope=tells))["one"]
    pages = "".join(path.read_text() for path in (tmp_path / "g").rglob("*") if path.is_file())
    code_of = {text: compile(text, "", "exec").co_consts[0].co_code.hex() for text in (own, RIGHT)}
    assert "does not pass either" in one.verdicts["99/slope"][3]  # it was lent, and tried again
    assert code_of[own] in pages and code_of[RIGHT] not in pages  # from the first try: the student's own function


# ---------------------------------------------------------------------------------- the outer wall alone

ALONE = [
    "exits", "kills the grader", "becomes a daemon", "calls home", "reads the answers", "edits a classmate's notebook",
    "deletes files", "reads the files of others", "reads a classmate's notebook", "reads the source notebook beside it",
]  # fmt: skip


def test_bubblewrap_alone_keeps_what_its_column_says(tmp_path, monkeypatch):
    """Without libseccomp and Landlock: processes may be started, but see, reach and outlive nothing."""
    if reason := no_bubblewrap():
        pytest.skip(reason)
    monkeypatch.setattr(grade, "Sandbox", lambda kind, hidden: sandbox.Sandbox(kind, hidden, inner=False))
    for folder in ("class", "notebooks", "solutions"):
        (tmp_path / folder).mkdir()
    (tmp_path / "solutions/99.ipynb").write_text(SECRET)
    (tmp_path / "notebooks/99_attack.ipynb").write_text(json.dumps(handed_in(**STUBS)))
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    files = {"a right": handed_in(double=f"{RIGHT}  # {SECRET}"), "z right": handed_in(double=OPTIMIZER)}
    for pair in zip(ALONE[::2], ALONE[1::2], strict=True):  # in the first exercise and in the second
        port = listener.getsockname()[1]
        cells = [fill(ATTACKS[name][0], f, tmp_path, port) for name, f in zip(pair, ("double", "slope"), strict=True)]
        files[" and ".join(pair)] = handed_in(*cells)
    for name, cells in files.items():
        (tmp_path / "class" / f"{name}.ipynb").write_text(json.dumps(cells))
    options = dict(isolation="bubblewrap", limits=QUICK, echo=lambda text: None, jobs=2)
    grades = grade.grade_all(tmp_path / "class", tmp_path / "grades.csv", tmp_path / "notebooks", **options)
    assert {g.submission: g.points for g in grades} == {
        f"{name}.ipynb": 6.0 if name.endswith("right") else 1.0 for name in files
    }
    for name, cells in files.items():
        assert json.loads((tmp_path / "class" / f"{name}.ipynb").read_text()) == cells
    assert not any(SECRET in path.read_text() for path in (tmp_path / "grades").rglob("*") if path.is_file())
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_a_plain_subprocess_keeps_time_and_ends_what_is_left_behind(tmp_path, monkeypatch):
    """The last column: neither bubblewrap nor libseccomp nor Landlock. Only attacks that harm nobody."""
    monkeypatch.setattr(grade, "Sandbox", lambda kind, hidden: sandbox.Sandbox(kind, hidden, inner=False))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # by which a process that is left behind would be known
    pairs = [("exits", "loops for ever"), ("becomes a daemon", "forges a verdict"), ("takes all memory in torch", "")]
    cells = {}
    for pair in pairs:  # in the first exercise and in the second: here each submission imports torch anew
        own = [
            fill(ATTACKS[name][0], f, tmp_path) if name else SECOND
            for name, f in zip(pair, ("double", "slope"), strict=True)
        ]
        cells[pair[0]] = handed_in(*own)
    monkeypatch.setattr(walls, "isolation", lambda *_: ("subprocess", ""))
    grades = graded_together(tmp_path, "subprocess", right=handed_in(double=OPTIMIZER), **cells)
    assert {name: one.points for name, one in grades.items()} == {
        "right": 6.0, "exits": 1.0, "becomes a daemon": 1.0, "takes all memory in torch": 3.0,
    }  # fmt: skip
    assert "ran longer" in grades["exits"].verdicts["99/slope"][3]
    assert strays(tmp_path) == []


# ---------------------------------------------------------------------------------- killed, and started again

SCRIPT = """
import sys
from pathlib import Path
from minialign.course.grader import grade
submissions, out, kind, seed = sys.argv[1:]
limits = grade.Limits(**{limits!r})
options = dict(isolation=kind, limits=limits, seed=seed or None, jobs={jobs})
grade.grade_all(Path(submissions), Path(out), Path({notebooks!r}), **options)
"""


def start(folder, out, kind, scratch, seed, limits=QUICK, jobs=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}
    script = SCRIPT.format(notebooks=str(ROOT / "notebooks"), jobs=jobs, limits=asdict(limits))
    command = [sys.executable, "-c", script, str(folder), str(out), kind, seed]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)  # the package is imported from here


def strays(scratch):
    """Processes whose command line names the scratch folder: sandboxes that were left behind."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if str(scratch).encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


def killed(folder, scratch, kind, after, seed, limits=QUICK, jobs=None):
    """Start a run that writes killed.csv, and kill it after `after` grades. Nothing may be left behind."""
    first = start(folder, scratch / "killed.csv", kind, scratch, seed, limits, jobs)
    deadline = time.monotonic() + 600
    results = scratch / "killed/results"
    while len(list(results.glob("*.json"))) < after and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL and not (scratch / "killed.csv").exists()
    for _ in range(100):
        if not strays(scratch):
            break
        time.sleep(0.05)
    assert strays(scratch) == []


def test_what_changed_is_graded_again_and_nothing_else(tmp_path, kind, warm, monkeypatch):
    (tmp_path / "class").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/99_attack.ipynb").write_text(json.dumps(handed_in(**STUBS)))
    for name in "ab":
        (tmp_path / f"class/{name}.ipynb").write_text(json.dumps(handed_in()))
    options = dict(isolation=kind, limits=QUICK, jobs=1)

    def run():
        said = []
        grades = grade.grade_all(
            tmp_path / "class", tmp_path / "grades.csv", tmp_path / "notebooks", echo=said.append, **options
        )
        return [g.points for g in grades], said[-1]

    running = grade._run

    def change(*arguments):  # what is handed in while the others are graded comes too late for this run
        (tmp_path / "class/b.ipynb").write_text(json.dumps(handed_in(**STUBS)))
        return running(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(grade, "_run", change)
        assert run()[0] == [6, 6]
    points, said = run()
    assert points == [6, 0] and "1 graded" in said
    assert "0 graded" in run()[1]
    kept = tmp_path / "grades/results" / f"{gradebook.slug('a.ipynb')}.json"
    kept.write_text("{")  # half a file is no grade
    assert run()[0] == [6, 0]


def test_a_flaw_of_the_graders_own_costs_one_submission(tmp_path, kind, warm, monkeypatch):
    one = grade.grade_one

    def fails(submission, *rest):
        if submission.name == "bad.ipynb":
            raise ZeroDivisionError("a flaw")
        return one(submission, *rest)

    monkeypatch.setattr(grade, "grade_one", fails)
    grades = graded_together(tmp_path, kind, bad=handed_in(**STUBS), good=handed_in(slope="slope = 5"))
    assert grades["good"].points == 4 and grades["bad"].points == 0
    assert "ZeroDivisionError: a flaw); grade it by hand" in grades["bad"].remarks[0]
    assert "grade it by hand" in (tmp_path / "g/summary.html").read_text()
    assert len(list((tmp_path / "g/results").glob("*.json"))) == 1  # the other is tried again by the next run


# ---------------------------------------------------------------------------------- parts


def ends(tmp_path, text):
    with pytest.raises(ValueError, match=text):
        grade.grade_all(tmp_path / "class", tmp_path / "grades.csv", tmp_path / "notebooks", echo=lambda text: None)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(walls, "isolation", lambda *_: ("bubblewrap", ""))  # nothing is attempted, so nothing is run
    command = ["course", "grade", str(ROOT / "notebooks/00_tour.ipynb"), "--out", str(tmp_path / "grades.csv")]
    assert cli.main(command) == 0 and "00_tour: 1 submissions, points out of 12" in capsys.readouterr().out
    [row] = csv.DictReader((tmp_path / "grades.csv").read_text().splitlines())
    assert (row["submission"], row["points"], row["out_of"]) == ("00_tour.ipynb", "0", "12")
    page = (tmp_path / "grades/feedback" / f"{gradebook.slug('00_tour.ipynb')}.html").read_text()
    assert page.count("not attempted") == 8 and 'role="img"' in (tmp_path / "grades/summary.html").read_text()
    assert cli.main([*command, "--chapter", "99"]) == 2 and "no chapter '99'" in capsys.readouterr().err

    (tmp_path / "by_hand.csv").write_text("submission,exercise,points,reason\n00_tour.ipynb,00/redness,2,on paper\n")
    (tmp_path / "class.csv").write_text("ID number,First name\ntour,Ada\n")
    options = [
        "--overrides",
        str(tmp_path / "by_hand.csv"),
        "--format",
        "moodle",
        "--roster",
        str(tmp_path / "class.csv"),
    ]
    for _ in range(2):  # graded again, it stands, once
        assert cli.main([*command, *options]) == 0
        assert '"tour","Ada","2"' in (tmp_path / "grades-moodle.csv").read_text()
        [row] = csv.DictReader((tmp_path / "grades.csv").read_text().splitlines())
        assert (row["points"], row["00/redness"], row["remarks"]) == ("2", "2", "by hand: 00/redness")
    assert cli.main(command) == 0 and '"0","12"' in (tmp_path / "grades.csv").read_text()
    capsys.readouterr()

    def broken(*_, **__):
        raise sandbox.Broken("the sandbox is not shut")

    monkeypatch.setattr(grade, "grade_all", broken)
    assert cli.main(command) == 2 and "course: the sandbox is not shut" in capsys.readouterr().err


def test_an_instructors_mistakes_are_named(tmp_path):
    (tmp_path / "notebooks").mkdir()
    ends(tmp_path, "holds no student's edition")
    (tmp_path / "notebooks/99_attack.ipynb").write_text(json.dumps(handed_in(**STUBS)))
    (tmp_path / "class").mkdir()
    ends(tmp_path, "holds no notebooks")
    with pytest.raises(ValueError, match="no chapter '98'"):
        grade.grade_all(tmp_path / "class", tmp_path / "grades.csv", tmp_path / "notebooks", chapter="98")
    with pytest.raises(ValueError, match="unknown isolation 'jail'"):
        walls.isolation("jail")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        grade.grade_all(tmp_path / "nothing", tmp_path / "grades.csv", tmp_path / "notebooks")


def test_without_any_wall_root_is_refused_and_others_are_told(monkeypatch):
    monkeypatch.setattr(walls.shutil, "which", lambda name: None)
    monkeypatch.setattr(walls, "seccomp", lambda: None)
    monkeypatch.setattr(walls, "landlock", lambda: 0)
    monkeypatch.setattr(walls.os, "getuid", lambda: 0)
    with pytest.raises(ValueError, match="Install bubblewrap"):
        walls.isolation()
    monkeypatch.setattr(walls.os, "getuid", lambda: 1000)
    kind, warning = walls.isolation()
    assert kind == "subprocess" and "answers included" in warning and "use the network" in warning
    with pytest.raises(ValueError, match="is not installed"):
        walls.isolation("bubblewrap")


def run_statements(given, own, targets, position):
    scope = {}
    for statement in needed(given, own, targets, position):
        exec(compile(statement.code, statement.file, "exec"), scope)
    return scope


def test_only_what_is_needed_is_run():
    given = [
        (None, "import math, does_not_exist\nfrom math import sin, cos"),
        (None, "table = {}\ntable['a'] = 5\nraise RuntimeError\nother = table"),
        (None, "def helper(x):\n    return x + offset()\ndef offset():\n    return table['a']"),
        (None, "x = 1\nx = x + 1\nx += 1"),
        ("01-f-answer", "def f(): pass"),
        ("01-f", 'f, points = check("01/f", f)'),
        ("01-g-answer", "def g(): pass"),
        ("01-g", 'g, points = check("01/g", g)'),
        (None, "x = 99"),
    ]
    own = [
        ("01-f-answer", "from math import sqrt\ndef f(): return sqrt(x + 1)"),
        (None, "mine = []\nmine.append(7)\nprint(1 / 0)"),
        ("01-g-answer", "def g(): return math.floor(f()), helper(cos(0)), mine, own_later()"),
        (None, "def own_later(): return 'later'"),
    ]
    scope = run_statements(given, own, [2], 7)
    assert scope["g"]() == (2, 6, [7], "later")
    assert "does_not_exist" not in scope and "other" not in scope
    assert run_statements(given, own, [0], 5)["f"]() == 2
    assert [s.cell for s in needed(given, own, [2], 7) if s.order[0] < 2 and s.cell] == ["01-f-answer"]
    edited = [(None, "def helper(x): return 'edited'"), *own]  # a given name is as it was given
    assert run_statements(given, edited, [3], 7)["g"]()[1] == 6


def test_a_function_travels_with_what_it_names_but_never_with_an_answer():
    table = torch.arange(6.0).view(2, 3).mT

    def inner(x, power=2):
        return twice(x) ** power + table.sum()

    def closed(x, *, shift=1.0):
        return inner(x) + shift

    packer = wire.Packer([slope])
    packed = json.loads(json.dumps(packer.pack({"f": closed, "t": table, "g": torch.Generator().manual_seed(3)})))
    out = wire.unpack(packed, json.loads(json.dumps(packer.functions)))
    assert out["f"](3.0).item() == closed(3.0).item() == 36 + 15 + 1
    assert torch.equal(out["t"], table) and out["t"].stride() == table.stride()
    assert torch.rand(1, generator=out["g"]) == torch.rand(1, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match="leads to an answer"):
        wire.Packer([slope]).pack([lambda w: slope(w)])
    with pytest.raises(ValueError, match="cannot send an object of type"):
        wire.Packer().pack(object())


def claim(value, **changes):
    entry = {"value": value, "error": "", "trace": "", "mutated": [], "grads": {}} | changes
    return b"{}\n" + json.dumps([entry]).encode()


ONE = {"tensor": ["float32", [1], "AACAPw=="]}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "could not be read"),
        (b"{}\n\xff", "could not be read"),
        (b"{}\n5", "one outcome a case"),
        (b"{}\n[5]", "could not be read"),
        (b"{}\n" + b"[" * 10**6, "could not be read"),
        (b"{}\n[]", "one outcome a case"),
        (claim({"tensor": ["float32", [2], "AACAPw=="]}), "size is not that of its shape"),
        (claim({"tensor": ["float32", [-1, -1], "AACAPw=="]}), "unknown kind"),
        (claim({"tensor": ["float32", [2**39] * 32, ""]}), "size is not that"),
        (claim({"tensor": ["object", [1], "AACAPw=="]}), "unknown kind"),
        (claim({"tensor": ["bool", [1], "Ag=="]}), "truth value"),
        (claim({"tensor": ["float32", [1], "!"]}), "could not be read"),
        (claim({"tensor": []}), "could not be read"),
        (claim({"pickle": "gASVAA=="}), "something unknown"),
        (claim({"a": 1, "b": 2}), "could not be read"),
        (claim(2**63), "64 bits"),
        (claim({"list": [0] * 300_000}), "too large"),
        (claim({"dict": [[ONE, 1]]}), "odd keys"),
        (claim({"dict": [[1, 1], [1.0, 2]]}), "odd keys"),
        (claim({"object": 5}), "could not be read"),
        (claim(1.0, error=5), "no text"),
        (claim(1.0, grads=None), "could not be read"),
        (claim(1.0, mutated=5), "could not be read"),
    ],
)
def test_a_result_that_is_not_plain_data_is_refused(body, problem):
    with pytest.raises(wire.Unreadable, match=problem):
        wire.read_result(body, [{"x": torch.ones(1)}], () if b"null" not in body else ("x",))


def test_a_result_that_is_plain_data_is_read_as_it_was():
    value = {"a": [torch.ones(2, 3).mT, None, True, 3, math.inf], "b": {"c": torch.zeros(0, 2, dtype=torch.int64)}}
    body = claim(wire._plain(value))
    [outcome] = wire.read_result(body, [{}], ())
    assert outcome.value["a"][1:] == [None, True, 3, math.inf]
    assert torch.equal(outcome.value["a"][0], torch.ones(3, 2)) and outcome.value["b"]["c"].shape == (0, 2)
    [outcome] = wire.read_result(claim({"object": "Yes"}), [{}], ())
    assert type(outcome.value).__name__ == "Yes" and outcome.value != 1
    with pytest.raises(wire.Unreadable, match="gradient that does not fit x"):
        wire.read_result(claim(1.0, grads={"x": ONE}), [{"x": torch.ones(2)}], ("x",))


def test_the_histogram_counts_everyone_once():
    assert gradebook.histogram([0, 3, 3, 5], 5) == [("0", 1), ("1", 0), ("2", 0), ("3", 2), ("4", 0), ("5", 1)]
    counts = gradebook.histogram([0.0, 2.0, 28.0, 27.9], 28)
    assert len(gradebook.histogram([0.5, 12.0], 12)) == 13
    assert len(counts) == 10 and sum(count for _, count in counts) == 4 and counts[-1] == ("25.2 to 28", 2)


def test_names_of_files_stay_apart():
    names = ["a/b.ipynb", "a-b.ipynb", "a b.ipynb", "../b.ipynb", "\udce9.ipynb", "x" * 500 + ".ipynb"]
    slugs = {gradebook.slug(name) for name in names}
    assert len(slugs) == len(names) and all(len(s) < 100 and s == Path(s).name for s in slugs)


# ---------------------------------------------------------------------------------- a class of hundreds

WRONG = "def NAME(*args, **kwargs):\n    return 0.123"
EMPTY = "def NAME(*args, **kwargs):\n    return None"


def make_class(folder, number, chapters=("00", "10", "00"), seed=0):
    """Notebooks of real chapters: right, partly right, wrong, hostile. {name: {exercise: points due}}."""
    draw, due, known, hostile = random.Random(seed), {}, grade.load_chapters(ROOT / "notebooks"), 0
    attacks = draw.sample(list(ATTACKS), len(ATTACKS))
    for k in range(number):
        chapter = known[chapters[k % len(chapters)]]
        complete = json.loads((ROOT / "solutions" / f"{chapter.title}.ipynb").read_text())
        points = {item.name: float(item.exercise.points) for item in chapter.items}
        group = ("right", "hostile", "partly", "hostile", "wrong", "hostile")[k // len(chapters) % 6]
        functions = [item for item in chapter.items if isinstance(item.exercise, Exercise)]
        chosen = {
            "right": [], "wrong": chapter.items, "hostile": [draw.choice(functions)],
            "partly": draw.sample(list(chapter.items), len(chapter.items) // 2),
        }[group]  # fmt: skip
        attack = attacks[hostile % len(attacks)] if group == "hostile" else ""
        hostile += group == "hostile"
        for item in chosen:
            points[item.name] = 0.0
            cells = [c for c in complete["cells"] if _id(c).startswith(f"{item.cell}-answer")]
            template = ATTACKS[attack][0] if attack else draw.choice([WRONG, EMPTY])
            template = template if isinstance(item.exercise, Exercise) else "NAME = 'z'"
            for cell in cells:
                cell["source"] = fill(template, item.expression, folder)
        name = f"{k:03d} {group}{attack and ' ' + attack}.ipynb"
        complete["metadata"]["student"] = name  # no two have the same bytes
        (folder / name).write_text(json.dumps(complete))
        due[name] = points
    return due


def _id(cell):
    return cell["metadata"].get("nbgrader", {}).get("grade_id", "")


@pytest.fixture(scope="module")
def real(tmp_path_factory, kind):
    """Forty-two notebooks of real chapters, 21 kinds of attack among them: what is due, and the run."""
    scratch = tmp_path_factory.mktemp("real")
    (scratch / "class").mkdir()
    due = make_class(scratch / "class", 42)
    grades = grade.grade_all(
        scratch / "class", scratch / "whole.csv", ROOT / "notebooks", isolation=kind, limits=QUICK, seed="1",
        echo=lambda text: None,
    )  # fmt: skip
    return types.SimpleNamespace(scratch=scratch, due=due, grades=grades)


def test_a_class_of_real_chapters_gets_the_grades_it_earned(real):
    assert len({name.split(" ", 2)[2] for name in real.due if "hostile" in name}) >= 20
    for one in real.grades:
        assert {name: entry[1] for name, entry in one.verdicts.items()} == real.due[one.submission], one


def test_killed_half_way_it_goes_on_to_the_same_grades(real, tmp_path, kind, warm):
    """Nine of them. The lines of grades.csv are those of the run that nobody killed."""
    (tmp_path / "class").mkdir()
    for name in list(real.due)[:9]:
        (tmp_path / "class" / name).write_bytes((real.scratch / "class" / name).read_bytes())
    killed(tmp_path / "class", tmp_path, kind, after=3, seed="1", jobs=1)
    said = []
    options = dict(isolation=kind, limits=QUICK, echo=said.append, jobs=1)
    grade.grade_all(tmp_path / "class", tmp_path / "killed.csv", ROOT / "notebooks", **options)
    assert 0 < int(said[-2].split(" to grade")[0].split("; ")[-1]) <= 9 - 3, said
    whole = (real.scratch / "whole.csv").read_text().splitlines(keepends=True)
    assert (tmp_path / "killed.csv").read_text() == "".join(whole[:10])


def main(number, scratch):
    """The class of hundreds: every grade as expected, the same grades.csv after a kill, and where the time goes."""
    (scratch / "class").mkdir(parents=True)
    due = make_class(scratch / "class", number)
    attacks = {name.split(" ", 2)[2] for name in due if "hostile" in name}
    before = {path.name: path.read_bytes() for path in (scratch / "class").iterdir()}
    kind = walls.isolation()[0]
    report = start(scratch / "class", scratch / "whole.csv", kind, scratch, "", Limits()).communicate()[0]
    seed = (scratch / "whole/results/seed.txt").read_text().strip()
    killed(scratch / "class", scratch, kind, number // 2, seed, Limits())
    start(scratch / "class", scratch / "killed.csv", kind, scratch, "", Limits()).communicate()
    resumed, whole = ((scratch / name).read_bytes() for name in ("killed.csv", "whole.csv"))
    rows = {row["submission"]: row for row in csv.DictReader(whole.decode().splitlines())}
    wrong = [
        (name, exercise, rows[name][exercise], points)
        for name, points_of in due.items()
        for exercise, points in points_of.items()
        if float(rows[name][exercise]) != points
    ]
    untouched = before == {path.name: path.read_bytes() for path in (scratch / "class").iterdir()}
    print(report)
    print(f"{number} submissions, {len(attacks)} kinds of attack, isolation {kind}")
    kept = [json.loads(path.read_text())["grade"] for path in (scratch / "whole/results").glob("*.json")]
    for group in ("right", "partly", "wrong", "hostile"):
        times = [g["seconds"] for g in kept if group in g["submission"]]
        spent = sorted(sum(t.values()) - t["starting sandboxes"] for t in times)
        print(f"{group:8s} {len(spent)}: {sum(spent) / len(spent):.2f} s each, median {spent[len(spent) // 2]:.2f} s")
    print(f"unexpected grades: {wrong or 'none'}")
    print(f"submissions untouched: {untouched}; the same grades.csv after a kill half-way: {resumed == whole}")
    return 0 if untouched and not wrong and resumed == whole else 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        sys.exit(main(int(sys.argv[1]), Path(place)))
