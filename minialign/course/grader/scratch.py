"""The one folder that a submission may write to: watched while it runs, emptied behind it.

Optimizers, `torch.func` and plots make temporary files without being asked to. What one exercise writes, the next must
not find, or a solution could be handed on.
"""

import os
import secrets
import stat

MOST_FILES = 1000


def overfull(folder: str, most: int) -> bool:
    """Whether there are more than `most` bytes, more than MOST_FILES files, or one that cannot be looked at."""
    size, number, todo = 0, 0, [folder]
    while todo:
        try:
            for entry in os.scandir(todo.pop()):
                about = entry.stat(follow_symlinks=False)
                size, number = size + 512 * about.st_blocks, number + 1
                if size > most or number > MOST_FILES:
                    return True
                todo += [entry.path] if stat.S_ISDIR(about.st_mode) else []
        except FileNotFoundError:  # removed in the meantime
            continue
        except OSError:  # a folder that was closed, or a path too long
            return True
    return False


def empty(folder: str) -> None:
    """Remove all that it holds, however deep: what is in a folder is lifted to the top until only files are left.

    Nothing else may write here meanwhile. OSError if something stays.
    """
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while names := os.listdir(top):
            for name in names:
                if stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
                    _lift(top, name)
                else:
                    os.unlink(name, dir_fd=top)
    finally:
        os.close(top)


def _lift(top: int, name: str) -> None:
    os.chmod(name, 0o700, dir_fd=top)
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
    try:
        for entry in os.listdir(inner):
            if stat.S_ISDIR(os.stat(entry, dir_fd=inner, follow_symlinks=False).st_mode):
                os.chmod(entry, 0o700, dir_fd=inner)  # a folder that is moved has to be writable itself
            os.rename(entry, secrets.token_hex(16), src_dir_fd=inner, dst_dir_fd=top)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=top)
