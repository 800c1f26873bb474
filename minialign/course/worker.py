"""What runs inside the grader's sandbox: it executes a submission and says what its functions did, as plain data.

`minialign.course.grade` copies this file and `observe.py` into the sandbox and nothing else of `minialign.course`: no
check, no reference, no answer. Three generations of processes:

    zygote    imports torch once; never reads a submission; forks, for each one,
    server    which reads one submission, and forks, for each exercise in turn,
    child     which locks itself in (`lock`), executes the cells that the exercise needs, and reports.

The child belongs to the student from the first statement on: what it sends is a claim, never a verdict. It is limited
in time, memory and output; where libseccomp is installed it can neither start a process, nor signal or trace another,
nor open a socket, nor write, make or remove a file; where the kernel has Landlock, it can read no file but the system's
and the package's. So it can do nothing to its server, to the next exercise or to the next submission, and goes with one
kill.

    needed(given, own, targets, position)   which statements an exercise needs, by the names it uses
    Packer, unpack                          arguments, on their way in: tensors, numbers, containers, functions
    plain                                   results, on their way out: JSON of tensors, numbers, strings, containers
"""

import ast
import base64
import builtins
import contextlib
import ctypes
import dis
import functools
import gc
import importlib
import io
import json
import linecache
import marshal
import os
import re
import resource
import select
import signal
import struct
import symtable
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from minialign.course import observe as observing
from minialign.course.observe import TENSORS, Outcome, observe

MAX_DEPTH = 20  # of containers in a result
TEXT = 600  # characters kept of a message or string
FRAME = struct.Struct("<II")  # lengths of a header, JSON, and of what follows it, bytes from the student's process


# ---------------------------------------------------------------------------------- arguments, on their way in


class Packer:
    """Arguments as JSON. Functions travel as code, with the globals that they name; a forbidden one raises ValueError.

    This way is the trusted one: what the grader sends, the sandbox believes.
    """

    def __init__(self, forbidden: Sequence[Callable] = ()):
        self.forbidden = {id(function) for function in forbidden}
        self.functions, self.numbers = [], {}

    def pack(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind in TENSORS:
            return {"tensor": _tensor_out(value)}
        if kind in (list, tuple):
            return {kind.__name__: [self.pack(item) for item in value]}
        if kind is dict:
            return {"dict": [[self.pack(key), self.pack(item)] for key, item in value.items()]}
        if isinstance(value, torch.Generator):
            return {"generator": _tensor_out(value.get_state())}
        if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
            scalar = isinstance(value, np.generic)
            return {"numpy": [value.dtype.str, value.shape, _base64(np.ascontiguousarray(value).tobytes()), scalar]}
        if isinstance(value, torch.dtype | torch.device):
            return {"torch": str(value).removeprefix("torch."), "device": isinstance(value, torch.device)}
        if isinstance(value, types.ModuleType):
            return {"import": [value.__name__, ""]}
        if id(value) in self.forbidden:
            raise ValueError("it leads to an answer, which must not enter the sandbox")
        if name := _importable(value):
            return {"import": name}
        if isinstance(value, types.FunctionType):
            return {"function": self._function(value)}
        if hasattr(value, "__dict__") and (name := _importable(kind)):
            return {"object": name, "items": self.pack(dict(vars(value)))}
        raise ValueError(f"the grader cannot send an object of type {kind.__name__}")

    def _function(self, function: types.FunctionType) -> int:
        while hasattr(function, "__wrapped__") and "jaxtyping" in function.__code__.co_filename:
            function = function.__wrapped__  # in tests, annotations are checked; the sandbox has no such hook
        if id(function) not in self.numbers:
            number = self.numbers[id(function)] = len(self.functions)
            self.functions.append(None)  # its place is taken before its globals are looked at: they may name it
            names = {name for name in _globals(function.__code__) if name in function.__globals__}
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
            self.functions[number] = {
                "code": _base64(marshal.dumps(function.__code__)),
                "globals": self.pack({name: function.__globals__[name] for name in sorted(names)}),
                "defaults": self.pack(function.__defaults__),
                "keywords": self.pack(function.__kwdefaults__),
                "cells": self.pack(cells),
            }
        return self.numbers[id(function)]


def unpack(packed: Any, functions: Sequence[dict], made: dict | None = None) -> Any:
    """What Packer.pack made `packed` of."""
    made = {} if made is None else made
    if not isinstance(packed, dict):
        return packed
    (kind, value), *rest = packed.items()
    if kind == "tensor":
        return _tensor_in(value)
    if kind in ("list", "tuple"):
        items = (unpack(item, functions, made) for item in value)
        return list(items) if kind == "list" else tuple(items)
    if kind == "dict":
        return {unpack(key, functions, made): unpack(item, functions, made) for key, item in value}
    if kind == "generator":
        generator = torch.Generator()
        return generator.set_state(_tensor_in(value))
    if kind == "numpy":
        array = np.frombuffer(base64.b64decode(value[2]), dtype=value[0]).reshape(value[1]).copy()
        return array[()] if value[3] else array
    if kind == "torch":
        return torch.device(value) if packed["device"] else getattr(torch, value)
    if kind == "import":
        found = importlib.import_module(value[0])
        for part in filter(None, value[1].split(".")):
            found = getattr(found, part)
        return found
    if kind == "object":
        new = object.__new__(unpack({"import": value}, functions))
        vars(new).update(unpack(rest[0][1], functions, made))
        return new
    if value not in made:
        parts = functions[value]
        scope = {"__builtins__": builtins}
        cells = [types.CellType() for _ in parts["cells"]["list"]]
        code = marshal.loads(base64.b64decode(parts["code"]))
        defaults = unpack(parts["defaults"], functions, made)
        made[value] = types.FunctionType(code, scope, closure=tuple(cells), argdefs=defaults)
        made[value].__kwdefaults__ = unpack(parts["keywords"], functions, made)
        scope |= unpack(parts["globals"], functions, made)
        for cell, content in zip(cells, parts["cells"]["list"], strict=True):
            cell.cell_contents = unpack(content, functions, made)
    return made[value]


def _globals(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals(constant)


def _importable(value: Any) -> list[str] | None:
    """[module, qualified name] if that leads to `value` in the sandbox, too, where minialign.course is empty."""
    name = getattr(value, "__qualname__", None)
    for module in filter(None, (getattr(value, "__module__", None), "torch")):
        if isinstance(name, str) and not module.startswith(("minialign.course", "__main__")) and module in sys.modules:
            found = sys.modules[module]
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is value and _installed(module):
                return [module, name]
    return None


def _installed(module: str) -> bool:
    """Whether the sandbox has the module: the package's own, the standard library's, or an installed one."""
    file = getattr(sys.modules[module], "__file__", None)
    folders = [sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(os.path.dirname(__file__)))]
    return file is None or (module.startswith("minialign.") or any(file.startswith(f) for f in folders[:2]))


def _tensor_out(tensor: torch.Tensor) -> list:
    """[dtype, shape, order of the axes in memory, bytes]: dense strides are kept, as by clone()."""
    tensor = tensor.detach().clone()
    order = sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis))
    raw = tensor.permute(order).contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), order, _base64(raw)]


def _tensor_in(packed: list) -> torch.Tensor:
    dtype, shape, order, raw = packed
    buffer = bytearray(base64.b64decode(raw))
    tensor = torch.frombuffer(buffer, dtype=getattr(torch, dtype)) if buffer else torch.empty(0)
    tensor = tensor.to(getattr(torch, dtype)).clone().view([shape[axis] for axis in order])
    return tensor.permute([order.index(axis) for axis in range(len(order))]) if order else tensor


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


# ---------------------------------------------------------------------------------- results, on their way out

DTYPES = (
    "float64", "float32", "float16", "bfloat16", "complex64", "complex128",
    "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


def plain(outcome: Outcome) -> dict:
    """The outcome as JSON; an object that is none of tensor, number, string and container only leaves its type."""
    return {
        "value": _plain(outcome.value),
        "error": str(outcome.error)[:100],
        "trace": str(outcome.trace)[:TEXT],
        "mutated": list(outcome.mutated),
        "grads": {name: _plain(grad) for name, grad in outcome.grads.items()},
    }


def _plain(value: Any, depth: int = 0) -> Any:
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        return value[:TEXT]
    if type(value) is float or isinstance(value, np.floating):
        return float(value)
    if (type(value) is int or isinstance(value, np.integer)) and abs(int(value)) < 2**63:
        return int(value)
    if value is ...:
        return {"ellipsis": 1}
    if type(value) in TENSORS and value.layout == torch.strided and value.device.type == "cpu":
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype in DTYPES:
            raw = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return {"tensor": [dtype, list(value.shape), _base64(raw)]}
    if depth < MAX_DEPTH and isinstance(value, tuple | list):
        return {"list": [_plain(item, depth + 1) for item in value]}
    if depth < MAX_DEPTH and isinstance(value, Mapping):
        return {"dict": [[_plain(key, depth + 1), _plain(item, depth + 1)] for key, item in value.items()]}
    return {"object": type(value).__name__[:60]}


# ---------------------------------------------------------------------------------- what an exercise needs


NOTHING, NONE = ast.Module(body=[], type_ignores=[]), frozenset()
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Statement(NamedTuple):
    """A top-level statement of a cell, or a whole solution cell."""

    order: tuple  # when it runs
    code: ast.Module
    file: str
    binds: frozenset
    uses: frozenset
    late: bool  # a function: its globals are looked up when it is called
    fixed: bool  # an import, a function or a class: what is later done with it does not change it
    imports: str  # what of minialign it imports
    cell: str  # the grade id of the solution cell that this is


def needed(
    given: Sequence,
    own: Sequence,
    targets: Sequence[int],
    position: int,
    names: Mapping[str, str] | None = None,
    lent: Sequence[str] = (),
) -> list[Statement]:
    """What to run for the solution cells own[i], i in targets, that stand before the given cell `position`.

    Names that the solution uses come from the given cells above it, as they were handed out, an earlier solution cell
    being replaced by the student's; names that are not defined there come from the student's other cells. A statement
    that changes an object brings the object's definition with it, and is brought by it. `names`: what the
    exercises are to define, by the grade id of their check; `lent`: those that are not run, their name being defined
    already. SyntaxError from a target.
    """
    names = names or {}
    answers = {cell: [i for i, (other, _) in enumerate(own) if other == cell] for cell, _ in given if _is_answer(cell)}
    before: list[Statement] = []
    for number, (cell, source) in enumerate(given[:position]):
        check = re.sub(r"-answer(-\d+)?$", "", cell or "")
        due = frozenset({names[check]} if check in names else ())
        if check in lent:
            before.append(Statement((0, number, 0, 0), NOTHING, "", due, NONE, False, True, "", ""))
        elif cell in answers:
            for k in answers[cell]:
                if k not in targets:
                    whole = _statements(own[k][1], (0, number, k), f"your cell {cell}", cell, whole=True)
                    before += (statement._replace(binds=statement.binds | due) for statement in whole)
        elif cell is None:
            before += _statements(source, (0, number, 0), f"cell {number}")
    known = {source for _, source in given}
    after_given = [
        statement
        for k, (cell, source) in enumerate(own)
        if k not in targets and cell is None and source not in known
        for statement in _statements(source, (1, k, 0), f"your cell {k + 1}")
    ]
    goal = [
        statement
        for k in targets
        for statement in _statements(own[k][1], (2, k, 0), "your cell", own[k][0] or "", whole=True, strict=True)
    ]
    chosen: dict[tuple, Statement] = {}
    todo = [(name, statement) for statement in goal for name in statement.uses]
    done = set()
    while todo:
        name, asker = todo.pop()
        limit = asker.order if not asker.late and asker.order[0] < 2 else (2,)
        if (name, limit) in done:
            continue
        done.add((name, limit))
        for pool in (before, after_given):
            place = limit if pool is before or limit[0] > 0 else (2,)
            found = [s for s in pool if name in s.binds and s.order < place and s.order != asker.order]
            if not found:
                continue
            last = max(k for k, s in enumerate(found) if name not in s.uses or k == 0)
            final = last + 1 if found[last].fixed else len(found)
            for statement in found[last:final]:  # the definition, and what changed the object since
                if statement.order not in chosen:
                    chosen[statement.order] = statement
                    todo += [(other, statement) for other in statement.uses]
            break
    return [*sorted(chosen.values(), key=lambda statement: statement.order), *goal]


def _is_answer(cell: str | None) -> bool:
    return bool(cell) and re.search(r"-answer(-\d+)?$", cell) is not None


@functools.cache
def _statements(source, order, file, cell="", whole=False, strict=False) -> list[Statement]:
    try:
        try:
            tree = ast.parse(source, file)
        except SyntaxError:  # magics are not Python; kept as empty lines, for the numbers of the others
            source = re.sub(r"(?m)^[ \t]*[%!?].*", lambda line: "pass" if line[0][0] in " \t" else "", source)
            tree = ast.parse(source, file)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        if strict:
            raise
        return []
    file = f"<{file}>" if order[0] == 2 else f"<{file}, {order[1]}.{order[2]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    bodies = [tree.body] if whole else [[node] for node in _split(tree.body)]
    found = []
    for k, body in enumerate(bodies):
        try:
            binds, uses = _names_of_cell(body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            if strict:
                raise
            continue
        late = not whole and isinstance(body[0], FUNCTIONS)
        fixed = not whole and isinstance(body[0], (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom))
        module = ast.Module(body=body, type_ignores=[])
        found.append(Statement((*order, k), module, file, binds, uses, late, fixed, _package(body), cell))
    return found


def _split(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Imports one name at a time: `from minialign import show, worlds` need not load both."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (ast.copy_location(ast.Import([alias]), node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.names[0].name != "*":
            for alias in node.names:
                yield ast.copy_location(ast.ImportFrom(node.module, [alias], node.level), node)
        else:
            yield node


def _names_of_cell(body: list[ast.stmt]) -> tuple[frozenset, frozenset]:
    """(bound or changed, used before it is bound here) by statements that run one after the other."""
    bound, used, later = set(), set(), set()
    for node in body:
        binds, uses = _names_of(node)
        if isinstance(node, FUNCTIONS):
            later |= uses
        else:
            used |= uses - bound
        bound |= binds
    return frozenset(bound), frozenset(used | later - bound)


def _names_of(node: ast.stmt) -> tuple[set, set]:
    """(bound or changed at the top level, used) by one statement."""
    table = symtable.symtable(ast.unparse(node), "cell", "exec")
    symbols = table.get_symbols()
    binds = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}
    uses = {s.get_name() for s in symbols if s.is_referenced()}
    uses -= {s.get_name() for s in symbols if s.is_imported() or s.is_namespace()}
    inner = list(table.get_children())
    while inner:
        scope = inner.pop()
        inner += scope.get_children()
        uses |= {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        targets = [node.value.func]
    for expression in targets:
        changes = isinstance(expression, ast.Attribute | ast.Subscript)  # x.y[0].append(1) changes x
        while isinstance(expression, ast.Attribute | ast.Subscript):
            expression = expression.value
        if changes and isinstance(expression, ast.Name):
            binds.add(expression.id)
            uses.add(expression.id)
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        uses.add(node.target.id)
    return binds, {name for name in uses if not hasattr(builtins, name)}


def _package(body: list[ast.stmt]) -> str:
    """The dotted names that a piece of code imports from minialign, joined by spaces."""
    names = []
    for node in (inner for statement in body for inner in ast.walk(statement)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return " ".join(name for name in names if name.startswith("minialign") and ".course" not in name)


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
        statements = needed(request["given"], request["own"], item["targets"], item["position"], request["names"], lent)
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


# ---------------------------------------------------------------------------------- locks

NO_NEW_PRIVS, DUMPABLE, PDEATHSIG, SUBREAPER = 38, 4, 1, 36  # prctl
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
MASKED_EQ, NOT_EQUAL = 7, 1
SET_OWNER, SET_OWNER_EX, SET_LEASE = 8, 15, 1024  # fcntl: who gets a file's signals, SIGKILL if asked for; who may open it
CLONE_THREAD = 0x10000
WRITING = (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC)
REFUSED = """
    fork vfork execve execveat
    socket socketpair connect bind listen accept accept4
    ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_open pidfd_getfd pidfd_send_signal
    tkill rt_sigqueueinfo rt_tgsigqueueinfo setrlimit setpriority sched_setscheduler sched_setparam sched_setattr
    sched_setaffinity ioprio_set setpgid setsid migrate_pages move_pages
    shmget shmat shmctl msgget msgsnd msgrcv msgctl semget semop semtimedop semctl mq_open mq_unlink
    unshare setns mount umount2 pivot_root chroot open_tree move_mount fsopen fsmount fsconfig fspick mount_setattr
    bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key
    fanotify_init init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff acct
    sethostname setdomainname settimeofday clock_settime clock_adjtime adjtimex quotactl nfsservctl personality
    setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset iopl ioperm
    creat openat2 open_by_handle_at unlink unlinkat rename renameat renameat2 mkdir mkdirat rmdir link linkat
    symlink symlinkat mknod mknodat chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat truncate ftruncate
    fallocate utime utimes utimensat futimesat setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr
    fremovexattr removexattrat memfd_create memfd_secret copy_file_range flock inotify_add_watch sync syncfs syslog
"""


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def seccomp() -> ctypes.CDLL | None:
    """libseccomp, or None."""
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        return None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_load.argtypes = library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Compare),
    ]  # fmt: skip
    return library


def refuse_system_calls(library: ctypes.CDLL) -> None:
    """From now on this process is alone: it reads files and computes; all else fails with EPERM. OSError if not."""
    own = os.getpid()
    context = library.seccomp_init(ALLOW)

    def rule(name: str, *comparisons: tuple, action: int = EPERM) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # unknown to this library or architecture
            return
        array = (_Compare * max(len(comparisons), 1))(*(_Compare(*c) for c in comparisons))
        if error := library.seccomp_rule_add_array(context, action, number, len(comparisons), array):
            raise OSError(-error, f"seccomp rule for {name}")

    for name in REFUSED.split():
        rule(name)
    rule("clone3", action=ENOSYS)  # its flags cannot be looked at; the C library then uses clone
    rule("clone", (0, MASKED_EQ, CLONE_THREAD, 0))  # threads only
    for call in ("kill", "tgkill"):
        rule(call, (0, NOT_EQUAL, own, 0))
    rule("prlimit64", (2, NOT_EQUAL, 0, 0))  # limits may be read
    for command in (SET_OWNER, SET_OWNER_EX, SET_LEASE):  # the kernel looks at the lower half of the register only
        rule("fcntl", (1, MASKED_EQ, 0xFFFFFFFF, command))
    for flag in WRITING:
        rule("open", (1, MASKED_EQ, flag, flag))
        rule("openat", (2, MASKED_EQ, flag, flag))
    error = library.seccomp_load(context)
    library.seccomp_release(context)
    if error:
        raise OSError(-error, "seccomp")


LANDLOCK_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF}  # by version of the interface: all that can be done with a file
READ_FILE, READ_FOLDER = 0x5, 0xD  # with execution, which a shared library needs


def landlock() -> int:
    """The version of the kernel's Landlock, 0 if it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def refuse_files(readable: Sequence[str]) -> None:
    """From now on this process can read what lies at or under `readable`, and no other file. OSError if not."""
    libc = ctypes.CDLL(None, use_errno=True)
    rights = ctypes.c_uint64(LANDLOCK_RIGHTS[min(landlock(), 3)])
    rules = libc.syscall(444, ctypes.byref(rights), ctypes.c_size_t(8), ctypes.c_uint32(0))
    for path in filter(os.path.exists, readable):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = READ_FOLDER if os.path.isdir(path) else READ_FILE
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, place), 12)
        if libc.syscall(445, rules, 1, rule, ctypes.c_uint32(0)):
            raise OSError(ctypes.get_errno(), f"landlock rule for {path}")
        os.close(place)
    if libc.syscall(446, rules, ctypes.c_uint32(0)):
        raise OSError(ctypes.get_errno(), "landlock")
    os.close(rules)


def lock(limits: Mapping, library: ctypes.CDLL | None) -> None:
    """Limits of the child. Hard ones: nothing that runs later can raise them."""
    pages = 0
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    memory = pages * os.sysconf("SC_PAGE_SIZE") + limits["memory"] if pages else resource.RLIM_INFINITY
    for name, value in {
        "RLIMIT_CPU": limits["seconds"], "RLIMIT_AS": memory, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": limits["processes"], "RLIMIT_CORE": 1,  # not 0, which a system's crash collector ignores
    }.items():  # fmt: skip
        with contextlib.suppress(ValueError, OSError, AttributeError):
            resource.setrlimit(getattr(resource, name), (value, value))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capset(header, data)  # an administrator's process gives up its capabilities
        libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if limits["readable"] is not None:
        refuse_files(limits["readable"])
    if library:
        refuse_system_calls(library)


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


def serve(source: int, results: int, library: ctypes.CDLL | None) -> None:
    """One submission: read it, run each exercise in a child of its own, pass on what the children say."""
    request = json.loads(_read(source, struct.unpack("<Q", _read(source, 8))[0]))
    os.close(source)
    needed(request["given"], [], [], len(request["given"]))  # parsed once, for all children
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    limits = request["limits"]
    for index, item in enumerate(request["items"]):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(results)
            os.close(ours)
            _child(request, item, theirs, limits, library)
        os.close(theirs)
        status, body = _listen(ours, child, limits)
        os.close(ours)
        if not library:
            _end_orphans()
        send(results, {"index": index, "status": status}, body)


def _child(request: Mapping, item: Mapping, pipe: int, limits: Mapping, library: ctypes.CDLL | None) -> None:
    code = 1
    try:
        sys.stdin, sys.stdout, sys.stderr = io.StringIO(), Sink(), Sink()
        if not library:
            os.setsid()
        lock(limits, library)
        _write(pipe, json.dumps(work(request, item, lambda stated: _say(pipe, stated))).encode())
        code = 0
    finally:
        os._exit(code)


def _say(pipe: int, stated: dict) -> None:
    _write(pipe, json.dumps(stated).encode() + b"\n")


def _listen(pipe: int, child: int, limits: Mapping) -> tuple[str, bytes]:
    """(how the child ended, what it said). It is dead when this returns."""
    said, status, ended, deadline = bytearray(), "", None, time.monotonic() + limits["wall"]
    while not status:
        if time.monotonic() > deadline:
            status = "time"
        elif select.select([pipe], [], [], 0.05 if ended is None else 0)[0]:
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
    overran = code < 0 and seconds > limits["seconds"] - 0.5
    return status or ("time" if overran else f"died {code}"), stated[:4000]


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


def main(results: int, inner: bool) -> None:
    """The zygote: warm up, then one server for each byte that comes on standard input."""
    library = seccomp() if inner else None
    os.set_inheritable(results, False)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(DUMPABLE, 0, 0, 0, 0)  # no child may trace it or read its memory; they inherit this
        libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    importlib.import_module("minialign.kernels")
    torch.set_num_threads(1)
    observe(lambda x: (x @ x).exp().sum(), {"x": torch.rand(3, 3)}, ["x"])  # what torch sets up at first use
    observing.open = lambda *_: Sink()  # the system's null device would be a file opened for writing
    gc.collect()
    gc.freeze()
    send(results, {"ready": True, "seccomp": bool(library)})
    while os.read(0, 1):
        server = os.fork()
        if server == 0:
            try:
                if sys.platform == "linux":
                    libc.prctl(SUBREAPER, 1, 0, 0, 0)
                    libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                serve(0, results, library)
            finally:
                os._exit(0)
        os.waitpid(server, 0)
        send(results, {"done": True})
