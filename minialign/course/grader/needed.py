"""Which statements of a notebook an exercise needs, so that a chapter's training runs are not started to grade it.

    needed(given, own, targets, position)       for the solution in the student's cells `targets`
    answers(cell)                               which check a solution cell is for

Names that a solution uses are looked up in the given cells above it, as they were handed out; what those use, likewise.
An edited or deleted given cell therefore changes nothing, and a name that is not given comes from the student's cells.
"""

import ast
import builtins
import functools
import linecache
import re
import symtable
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

NOTHING, NONE = ast.Module(body=[], type_ignores=[]), frozenset()
MAGICS = 100  # lines of a cell that may be passed over
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
    solved: Mapping[str, Sequence[int]] | None = None,
) -> list[Statement]:
    """What to run for the solution cells own[i], i in targets, that stand before the given cell `position`.

    Names that the solution uses come from the given cells above it, as they were handed out, an earlier solution cell
    being replaced by the student's; names that are not defined there come from the student's other cells. A statement
    that changes an object brings the object's definition with it, and is brought by it. `names`: what the
    exercises are to define, by the grade id of their check; `lent`: those that are not run, their name being defined
    already; `solved`: which cells of `own` solve them, also in cells that the student added. SyntaxError from a target.
    """
    names, solved = names or {}, solved or {}
    last = {answers(cell): number for number, (cell, _) in enumerate(given) if answers(cell)}
    before: list[Statement] = []
    for number, (cell, source) in enumerate(given[:position]):
        check = answers(cell)
        due = frozenset({names[check]} if check in names else ())
        if check in lent:
            before.append(Statement((0, number, 0, 0), NOTHING, "", due, NONE, False, True, "", ""))
        elif check:
            added = [k for k in solved.get(check, ()) if answers(own[k][0]) != check] if last[check] == number else []
            theirs = sorted({*added, *(k for k, (other, _) in enumerate(own) if other == cell)})
            wholes = [
                statement
                for k in theirs
                if k not in targets
                for statement in _statements(own[k][1], (0, number, k), f"your cell {cell}", cell, whole=True)
            ]
            if not any(due <= statement.binds for statement in wholes):  # by `exec`, say
                wholes = [statement._replace(binds=statement.binds | due) for statement in wholes]
            before += wholes
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
    return _with_what_it_uses(goal, before, after_given)


def _with_what_it_uses(goal: list[Statement], *pools: list[Statement]) -> list[Statement]:
    """`goal`, and before it what defines the names that it uses, and theirs: from the first pool that does."""
    chosen: dict[tuple, Statement] = {}
    todo = [(name, statement) for statement in goal for name in statement.uses]
    done = set()
    while todo:
        name, asker = todo.pop()
        limit = asker.order if not asker.late and asker.order[0] < 2 else (2,)
        if (name, limit) in done:
            continue
        done.add((name, limit))
        for pool in pools:
            place = limit if pool is pools[0] or limit[0] > 0 else (2,)
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


def answers(cell: str | None) -> str:
    """The grade id of the check that a solution cell is for: "10-step_kl" of "10-step_kl-answer"; else ""."""
    match = re.fullmatch(r"(.+)-answer(-\d+)?", cell or "")
    return match[1] if match else ""


@functools.cache
def _statements(source, order, file, cell="", whole=False, strict=False) -> list[Statement]:
    try:
        tree = _parse(source, file)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        if strict:
            raise
        return []
    file = f"<{file}>" if order[0] == 2 else f"<{file}, {order[1]}.{order[2]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    body = [node for node in tree.body if not _awaits(node)]
    bodies = [body] if whole else [[node] for node in _split(body)]
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


def _parse(source: str, file: str) -> ast.Module:
    """The cell as Python. What only a notebook understands is passed over, line by line where the parser meets it."""
    for _ in range(MAGICS):
        try:
            return ast.parse(source, file)
        except SyntaxError as error:
            lines, at = source.split("\n"), (error.lineno or 0) - 1
            if not 0 <= at < len(lines) or (python := _without_magic(lines[at])) == lines[at]:
                raise
            source = "\n".join([*lines[:at], python, *lines[at + 1 :]])
    return ast.parse(source, file)


def _without_magic(line: str) -> str:
    """%matplotlib inline, !ls, ?len, len? -> pass; files = !ls -> files = None; %time x = f() -> x = f()."""
    for pattern, python in (
        (r"(\s*)%time\s+(.+)", r"\1\2"),
        (r"(\s*)[%!?].*", r"\1pass"),
        (r"(\s*)([\w, ]+=)\s*[%!].*", r"\1\2 None"),
        (r"(\s*)[\w.*%]+\?{1,2}\s*", r"\1pass"),
    ):
        if match := re.fullmatch(pattern, line):
            return match.expand(python)
    return line


def _awaits(node: ast.AST) -> bool:
    """Whether it awaits something, outside any function: a notebook does, a sandbox has nobody to wait for."""
    if isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith) or getattr(node, "is_async", 0):
        return True
    return not isinstance(node, (*FUNCTIONS, ast.Lambda)) and any(map(_awaits, ast.iter_child_nodes(node)))


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
    """The dotted names that a piece of code imports from minialign, or writes out; and by which other ways it imports.

    Joined by spaces. A name that is put together at run time is not seen, only the way.
    """
    names = []
    for node in (inner for statement in body for inner in ast.walk(statement)):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom():
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            case ast.Constant(value=str(text)) if re.fullmatch(r"minialign(\.\w+)*", text):
                names.append(text)
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in ("__import__", "import_module"):
                names.append(name)
            case ast.Attribute(attr="modules"):
                names.append("sys.modules")
    odd = ("importlib", "sys.modules", "__import__", "import_module")
    return " ".join(name for name in names if name.startswith(("minialign", *odd)) and ".course" not in name)
