"""A clock under every cell that runs longer than two seconds, where somebody may be looking (`show.live`)."""

import contextvars
import threading

from minialign import show


def start_clock(patience: float = 2.0, every: float = 1.0) -> None:
    """In a live session: under each cell that runs longer than `patience` seconds, a moving bar and the time so far."""
    if not show.live():
        return
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None or getattr(shell, "minialign_clock", False):
        return
    shell.minialign_clock = True
    running: dict[str, threading.Event] = {}

    def start(info) -> None:
        running["now"] = done = threading.Event()
        context = contextvars.copy_context()  # so that what the thread shows belongs to this cell
        threading.Thread(target=lambda: context.run(_tick, done, patience, every), daemon=True).start()

    def stop(result) -> None:
        if "now" in running:
            running.pop("now").set()

    shell.events.register("pre_run_cell", start)
    shell.events.register("post_run_cell", stop)


def _tick(done: threading.Event, patience: float, every: float) -> None:
    from IPython.display import HTML, display

    if done.wait(patience):
        return
    seconds, handle = patience, display(HTML(""), display_id=True)
    while not done.wait(every):
        seconds += every
        handle.update(HTML(f'<progress aria-label="running"></progress> <small>{seconds:.0f} s</small>'))
    handle.update(HTML(f"<small>{seconds:.0f} s</small>"))
