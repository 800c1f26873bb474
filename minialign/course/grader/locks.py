"""What keeps an exercise's process in: resource limits, libseccomp's filter of system calls, the kernel's Landlock.

    lock(limits, library)       all of them, in the process itself, before the first statement of a student's runs

None can be taken back. The filter lists what is refused, not what is allowed: PyTorch makes far too many calls to name.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping, Sequence

NO_NEW_PRIVS, PDEATHSIG = 38, 1  # prctl
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
MASKED_EQ, NOT_EQUAL = 7, 1
SET_OWNER, SET_OWNER_EX, SET_LEASE = (
    8,
    15,
    1024,
)  # fcntl: who gets a file's signals, SIGKILL if asked for; who may open it
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
READ_FILE, READ_FOLDER, LIST = 0x5, 0xD, 0x8  # the former two with execution, which a shared library needs


def landlock() -> int:
    """The version of the kernel's Landlock, 0 if it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def refuse_files(readable: Sequence[str], listed: Sequence[str] = ()) -> None:
    """From now on this process can read what lies at or under `readable`, see names under `listed`, and no more.

    OSError if that does not work.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    rights = ctypes.c_uint64(LANDLOCK_RIGHTS[min(landlock(), 3)])
    rules = libc.syscall(444, ctypes.byref(rights), ctypes.c_size_t(8), ctypes.c_uint32(0))
    for path in filter(os.path.exists, (*readable, *listed)):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = LIST if path in listed else READ_FOLDER if os.path.isdir(path) else READ_FILE
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
        refuse_files(limits["readable"], limits["listed"])
    if library:
        refuse_system_calls(library)
