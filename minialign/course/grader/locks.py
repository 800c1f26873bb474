"""What keeps an exercise's process in: resource limits, libseccomp's filter of system calls, the kernel's Landlock.

    lock(limits, library, parent)   all of them, in the process itself, before a student's first statement runs

None can be taken back. The filter lists what is refused, not what is allowed: PyTorch makes far too many calls to name.
"""

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import struct
import sys
import termios
from collections.abc import Mapping, Sequence

SECCOMP, FILTER, NO_NEW_PRIVS, PDEATHSIG = 22, 2, 38, 1  # prctl
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
MASKED_EQ, NOT_EQUAL = 7, 1
CLONE_THREAD = 0x10000
WRITING = (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC)
# By name. Of the calls from NEW on this list says nothing: see `_refuse_by_number`.
REFUSED = """
    fork vfork execve execveat
    socket socketpair connect bind listen accept accept4
    ptrace process_vm_readv process_vm_writev kcmp
    tkill rt_sigqueueinfo rt_tgsigqueueinfo setrlimit setpriority sched_setscheduler sched_setparam sched_setattr
    sched_setaffinity ioprio_set setpgid setsid migrate_pages move_pages
    shmget shmat shmctl msgget msgsnd msgrcv msgctl semget semop semtimedop semctl mq_open mq_unlink
    unshare setns mount umount2 pivot_root chroot
    bpf perf_event_open userfaultfd keyctl add_key request_key
    fanotify_init init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff acct
    sethostname setdomainname settimeofday clock_settime clock_adjtime adjtimex quotactl nfsservctl personality
    setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset iopl ioperm
    creat open_by_handle_at link linkat symlink symlinkat mknod mknodat chmod fchmod fchmodat chown fchown lchown
    fchownat truncate fallocate utime utimes utimensat futimesat setxattr lsetxattr fsetxattr removexattr lremovexattr
    fremovexattr memfd_create copy_file_range flock inotify_add_watch sync syncfs syslog
"""
# Refused, too, where neither Landlock nor a file system of its own keeps a submission to one folder.
WRITES = "unlink unlinkat rename renameat renameat2 mkdir mkdirat rmdir ftruncate"
NEW, HARMLESS = 424, (436, 439, 441, 449)  # the first number that is the same everywhere; close_range, faccessat2, ...
# What may be asked of an open file. Not its attributes or hints, which stay with the file, nor locks, which others see.
COMMANDS = {
    "ioctl": (termios.TCGETS, termios.TIOCGWINSZ, termios.FIONREAD, termios.FIONBIO, termios.FIOCLEX, termios.FIONCLEX),
    "fcntl": (
        fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL,
        fcntl.F_GETPIPE_SZ, fcntl.F_SETPIPE_SZ,
    ),
}  # fmt: skip
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of a filter


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


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _refuse_by_number(library: ctypes.CDLL) -> None:
    """What a library cannot name or compare: calls newer than it, and whatever the kernel will learn; odd commands.

    A filter of our own, on top of the library's: from NEW on only HARMLESS, of ioctl and fcntl only COMMANDS.
    """

    def only(values: Sequence[int], action: int) -> list[tuple]:
        tests = [(EQUAL, len(values) - k, 0, value) for k, value in enumerate(values)]
        return [*tests, (RETURN, 0, 0, action), (RETURN, 0, 0, ALLOW)]

    command = 24 + 4 * (sys.byteorder == "big")  # the second argument's lower half, all that the kernel looks at
    program = [(LOAD, 0, 0, 0)]
    for name, commands in COMMANDS.items():
        block = [(LOAD, 0, 0, command), *only(commands, EPERM)]
        program += [(EQUAL, 0, len(block), library.seccomp_syscall_resolve_name(name.encode())), *block]
    program += [(AT_LEAST, 0, len(HARMLESS) + 1, NEW), *only(HARMLESS, ENOSYS)]
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(SECCOMP, FILTER, ctypes.byref(_Program(len(program), packed)), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp's filter by number")


def refuse_system_calls(library: ctypes.CDLL, writes: bool = False) -> None:
    """From now on this process is alone: it reads files and computes; all else fails with EPERM. OSError if not.

    `writes`: it may also write files, and something else keeps them to one folder.
    """
    _refuse_by_number(library)
    own = os.getpid()
    context = library.seccomp_init(ALLOW)

    def rule(name: str, *comparisons: tuple) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # none of this architecture
            return
        array = (_Compare * max(len(comparisons), 1))(*(_Compare(*c) for c in comparisons))
        if error := library.seccomp_rule_add_array(context, EPERM, number, len(comparisons), array):
            raise OSError(-error, f"seccomp rule for {name}")

    for name in REFUSED.split() + ([] if writes else WRITES.split()):
        rule(name)
    rule("clone", (0, MASKED_EQ, CLONE_THREAD, 0))  # threads only
    for call in ("kill", "tgkill"):
        rule(call, (0, NOT_EQUAL, own, 0))
    rule("prlimit64", (2, NOT_EQUAL, 0, 0))  # limits may be read
    rule("prctl", (0, MASKED_EQ, 0xFFFFFFFF, PDEATHSIG))  # it goes when the grader goes
    for call, flags in (("open", 1), ("openat", 2)):
        rule(call, (flags, MASKED_EQ, os.O_ACCMODE, os.O_ACCMODE))  # neither to read nor to write: Landlock looks away
        rule(call, (flags, MASKED_EQ, os.O_ACCMODE | os.O_TRUNC, os.O_TRUNC))  # so it does here, before version 3
        for flag in () if writes else WRITING:
            rule(call, (flags, MASKED_EQ, flag, flag))
    error = library.seccomp_load(context)
    library.seccomp_release(context)
    if error:
        raise OSError(-error, "seccomp")


LANDLOCK_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF}  # by version of the interface: all that can be done with a file
READ_FILE, READ_FOLDER, LIST = 0x5, 0xD, 0x8  # the former two with execution, which a shared library needs
WRITE = 0x61BE  # read, write, make, move and remove files and folders; no devices, sockets or links


def landlock() -> int:
    """The version of the kernel's Landlock, 0 if it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def refuse_files(readable: Sequence[str], listed: Sequence[str] = (), writable: str | None = None) -> None:
    """From now on this process can read what lies at or under `readable`, see names under `listed`, and no more.

    But under `writable` it can do as it likes. OSError if that does not work.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    known = LANDLOCK_RIGHTS[min(landlock(), 3)]
    rights = ctypes.c_uint64(known)
    rules = libc.syscall(444, ctypes.byref(rights), ctypes.c_size_t(8), ctypes.c_uint32(0))
    allowed = {path: READ_FOLDER if os.path.isdir(path) else READ_FILE for path in readable}
    allowed |= dict.fromkeys(listed, LIST) | ({writable: WRITE & known} if writable else {})
    for path in filter(os.path.exists, allowed):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed[path], place), 12)
        if libc.syscall(445, rules, 1, rule, ctypes.c_uint32(0)):
            raise OSError(ctypes.get_errno(), f"landlock rule for {path}")
        os.close(place)
    if libc.syscall(446, rules, ctypes.c_uint32(0)):
        raise OSError(ctypes.get_errno(), "landlock")
    os.close(rules)


def end_with_parent(parent: int) -> None:
    """The kernel ends this process when `parent` ends, whatever it then does; at once if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def lock(limits: Mapping, library: ctypes.CDLL | None, parent: int) -> None:
    """Limits of the child. Hard ones: nothing that runs later can raise them; and it ends with `parent`."""
    pages = 0
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    memory = pages * os.sysconf("SC_PAGE_SIZE") + limits["memory"] if pages else resource.RLIM_INFINITY
    written = limits["files"] // 4 if limits["writable"] else 0
    for name, value in {
        "RLIMIT_AS": memory, "RLIMIT_FSIZE": written, "RLIMIT_NOFILE": 64, "RLIMIT_NPROC": limits["processes"],
        "RLIMIT_CORE": 1,  # not 0, which a system's crash collector ignores
    }.items():  # fmt: skip
        with contextlib.suppress(ValueError, OSError, AttributeError):
            resource.setrlimit(getattr(resource, name), (value, value))
    with contextlib.suppress(ValueError, OSError):  # SIGXCPU first, which says why; who is deaf to it gets SIGKILL
        resource.setrlimit(resource.RLIMIT_CPU, (limits["seconds"], limits["seconds"] + 1))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capset(header, data)  # an administrator's process gives up its capabilities
        libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    end_with_parent(parent)
    if limits["readable"] is not None:
        refuse_files(limits["readable"], limits["listed"], limits["writable"])
    if library:
        refuse_system_calls(library, writes=limits["writable"] is not None)
