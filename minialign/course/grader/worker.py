"""What runs inside the grader's sandbox: it executes a submission and says what its functions did, as plain data.

The sandbox holds this file and those of the course that it imports, and nothing else of `minialign.course`: no
check, no reference, no answer. Three generations of processes:

    zygote    imports torch once; never reads a submission; forks, for each one,
    server    which reads one submission, and forks, for each exercise in turn,
    child     which locks itself in (`locks.py`), executes the cells that the exercise needs, and reports.

The child belongs to the student from the first statement on: what it sends is a claim, never a verdict. It is limited
in time, memory and output; where libseccomp is installed it can neither start a process, nor signal or trace another,
nor open a socket, nor change a file outside one folder, which is emptied behind it; where the kernel has Landlock, it
can read no file but the system's and the package's. So it can do nothing to its server, to the next exercise or to the
next submission, and goes with one kill.
"""

import contextlib
import ctypes
import gc
import importlib
import io
import json
import linecache
import os
import select
import signal
import struct
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping

import torch

from minialign.course import observe as observing
from minialign.course.grader.locks import PDEATHSIG, end_with_parent, lock, seccomp
from minialign.course.grader.needed import needed
from minialign.course.grader.scratch import empty, overfull
from minialign.course.grader.wire import plain, unpack
from minialign.course.observe import Outcome, observe

DUMPABLE, SUBREAPER = 4, 36  # prctl
PLAIN, WARMER = b"!", b"+"  # what announces a submission; the latter, that it will want what torch imports late
POLL = 0.05  # seconds between two looks at a child
FRAME = struct.Struct("<II")  # lengths of a header, JSON, and of what follows it, bytes from the student's process


# ---------------------------------------------------------------------------------- the child


class Sink(io.TextIOBase):
    """Standard output of a submission: nothing is kept, however much comes."""

    def write(self, text: str) -> int:
        return len(text)


def work(request: Mapping, item: Mapping, say: Callable) -> list[dict]:
    """Execute what the exercise needs, in this process, and observe the function on its cases: an outcome each.

    Before any code of the student's runs, `say` is given what the exercise needs: earlier solutions, and the package.
    """
    module = types.ModuleType("__main__")
    sys.modules["__main__"], scope = module, module.__dict__
    scope["display"] = lambda *things, **options: None
    cases = [unpack(case, request["functions"]) for case in item["cases"]]
    scope |= {name: unpack(function, request["functions"]) for _, name, function in request["lent"]}
    lent = [cell for cell, _, _ in request["lent"]]
    statements, unread, failed = [], None, None
    try:
        statements = needed(
            request["given"], request["own"], item["targets"], item["position"], request["names"], lent,
            request["solved"],
        )  # fmt: skip
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        unread = error
    uses = sorted({name for s in statements for name in s.imports.split()})[:20]
    say({"uses": uses, "needs": sorted({s.cell for s in statements if s.cell and s.order[0] < 2})})
    try:
        if unread:
            raise unread
        for statement in statements:
            try:
                exec(compile(statement.code, statement.file, "exec"), scope)
            except Exception as error:  # a cell that fails at its end may have defined its function before
                failed = failed or error
        if item["expression"] not in scope and failed:
            raise failed
        value = eval(item["expression"], scope)
    except BaseException as error:
        lost = Outcome(error=type(error).__name__, trace=_where(error))
        return [plain(lost)] * max(len(cases), 1)
    if not cases:  # a question
        return [plain(Outcome(value=value if type(value) is str else None))]
    if value is None or value is ...:
        return [plain(Outcome())] * len(cases)
    outcomes = []
    for case in cases:
        try:
            outcome = plain(observe(value, case, item["grad_wrt"]))
        except BaseException as error:  # KeyboardInterrupt, say, or a tensor that cannot be read
            outcome = plain(Outcome(error=type(error).__name__, trace=_where(error)))
        outcomes.append(outcome)
        if outcome.get("error") == "MemoryError":  # it would end no better in the next case
            return outcomes + [outcome] * (len(cases) - len(outcomes))
    return outcomes


def _where(error: BaseException) -> str:
    """The message and the line of the cell; for a syntax error, its own."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, SyntaxError):
        return message
    trace, last = error.__traceback__, None
    while trace:
        file = trace.tb_frame.f_code.co_filename
        last = (trace.tb_lineno, linecache.getline(file, trace.tb_lineno).strip()) if file.startswith("<") else last
        trace = trace.tb_next
    return f"{message}\n    line {last[0]}: {last[1]}" if last else message


# ---------------------------------------------------------------------------------- server and zygote


def send(file: int, header: dict, body: bytes = b"") -> None:
    head = json.dumps(header).encode()
    _write(file, FRAME.pack(len(head), len(body)) + head + body)


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _read(file: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(file, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def serve(source: int, results: int, folder: str, library: ctypes.CDLL | None) -> None:
    """One submission: read it, run each exercise in a child of its own, pass on what the children say."""
    request = json.loads(_read(source, struct.unpack("<Q", _read(source, 8))[0]))
    os.close(source)
    needed(request["given"], [], [], len(request["given"]))  # parsed once, for all children
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    limits, own = request["limits"], os.getpid()
    end = time.monotonic() + limits["total"]
    for index, item in enumerate(request["items"]):
        if time.monotonic() > end:
            send(results, {"index": index, "status": "budget"})
            continue
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(results)
            os.close(ours)
            _child(request, item, theirs, limits, library, own)
        os.close(theirs)
        status, body = _listen(ours, child, limits, folder, end)
        os.close(ours)
        if not library:
            _end_orphans()
        empty(folder)  # or this server ends, and with it the sandbox
        send(results, {"index": index, "status": status}, body)


def _child(
    request: Mapping, item: Mapping, pipe: int, limits: Mapping, library: ctypes.CDLL | None, parent: int
) -> None:
    code = 1
    try:
        sys.stdin, sys.stdout, sys.stderr = io.StringIO(), Sink(), Sink()
        if not library:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()
        lock(limits, library, parent)
        _write(pipe, json.dumps(work(request, item, lambda stated: _say(pipe, stated))).encode())
        code = 0
    finally:
        os._exit(code)


def _say(pipe: int, stated: dict) -> None:
    _write(pipe, json.dumps(stated).encode() + b"\n")


def _listen(pipe: int, child: int, limits: Mapping, folder: str, end: float) -> tuple[str, bytes]:
    """(how the child ended, what it said). It is dead when this returns. `end`: when the submission's time is up."""
    said, status, ended, looked = bytearray(), "", None, time.monotonic()
    deadline = looked + limits["wall"]
    while not status:
        if (now := time.monotonic()) > min(deadline, end):
            status = "time" if now > deadline else "budget"
        elif now > looked + POLL and overfull(folder, limits["files"]):
            status = "files"
        elif select.select([pipe], [], [], POLL if ended is None else 0)[0]:
            part = os.read(pipe, 1 << 16)
            said += part
            if len(said) > limits["output"]:
                status = "output"
            elif not part:
                break
        elif ended is not None:  # its end of the pipe is held open by something that it left behind
            break
        else:
            ended = _wait(child, os.WNOHANG)
        looked = now if now > looked + POLL else looked
    for _ in range(0 if status or ended else 200):  # the pipe is closed; the process should end by itself
        ended = _wait(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.005)
    if ended is None:
        os.kill(child, signal.SIGKILL)
        ended = _wait(child, 0)
    code, seconds = ended
    stated, _, results = bytes(said[: limits["output"]]).partition(b"\n")
    if not status and code == 0 and (results or not stated.startswith(b"{")):
        return "ok", bytes(said)
    return status or ("time" if _overran(code, seconds, limits["seconds"]) else f"died {code}"), stated[:4000]


def _overran(code: int, seconds: float, limit: int) -> bool:
    """Whether the limit of CPU ended it: by its own signal, or by SIGKILL if it was deaf to that.

    The kernel counts ticks for the limit and exact times for the report; on a busy machine they are far apart.
    """
    return code == -signal.SIGXCPU or (code == -signal.SIGKILL and seconds > 0.5 * limit)


def _wait(child: int, options: int) -> tuple[int, float] | None:
    """(exit code, or minus the signal; seconds of CPU), or None if it still runs."""
    pid, code, usage = os.wait4(child, options)
    return (os.waitstatus_to_exitcode(code), usage.ru_utime + usage.ru_stime) if pid else None


def _end_orphans() -> None:
    """Processes that a child left behind are this server's, which is their subreaper: end them all."""
    for _ in range(1000):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
            for pid in file.read().split():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def as_written(model: Callable | None = None, **options) -> Callable:
    """In place of torch.compile, which takes seconds, and another process: a compiler."""
    return as_written if model is None else model


def _ends(*_) -> None:
    """The zygote has ended. Where nothing but its server can end what a child left behind, it does so first."""
    _end_orphans()
    os._exit(0)


def main(results: int, folder: str, inner: bool) -> None:
    """The zygote: warm up, then one server for each byte that comes on standard input."""
    library = seccomp() if inner else None
    os.set_inheritable(results, False)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(DUMPABLE, 0, 0, 0, 0)  # no child may trace it or read its memory; they inherit this
    importlib.import_module("minialign.kernels")
    torch.set_num_threads(1)
    observe(lambda x: (x @ x).exp().sum(), {"x": torch.rand(3, 3)}, ["x"])  # what torch sets up at first use
    observing.open = lambda *_: Sink()  # the system's null device would be a file opened for writing
    torch.compile = as_written
    tempfile.gettempdir()  # it tries what it finds, which a child may not be allowed to
    gc.collect()
    gc.freeze()
    own = os.getpid()
    send(results, {"ready": True, "seccomp": bool(library)})
    while first := os.read(0, 1):
        if first == WARMER:
            importlib.import_module("torch._dynamo")  # torch.optim, torch.func and others import it at first use
        server = os.fork()
        if server == 0:
            try:
                end_with_parent(own)
                if sys.platform == "linux" and not library:
                    signal.signal(signal.SIGTERM, _ends)
                    libc.prctl(PDEATHSIG, signal.SIGTERM, 0, 0, 0)
                if sys.platform == "linux":
                    libc.prctl(SUBREAPER, 1, 0, 0, 0)
                serve(0, results, folder, library)
            finally:
                os._exit(0)
        os.waitpid(server, 0)
        send(results, {"done": True})
