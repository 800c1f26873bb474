"""What one place of a right solution becomes by mistake: operators on syntax trees, each result with its name.

An operator is a function of one node that yields (node in its place, words); `@operator` lists it. The words go on
after "as if", and say what kind of thing is wrong, not where and how it is to be written.
"""

import ast
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import suppress

OPERATORS: list[Callable] = []
Found = Iterator[tuple[ast.AST, str]]


def operator(change: Callable[[ast.AST], Found]) -> Callable[[ast.AST], Found]:
    OPERATORS.append(change)
    return change


# ---- of a value: wherever an expression stands, for a whole parameter, and for the result ----------------------------

UNARY = {  # words with {} for what is changed
    "A ** 2": "{} were squared",
    "A ** 0.5": "a root of {} were taken",
    "-A": "the sign of {} were turned",
    "A * 0": "0 stood in the place of {}",
    "A * 0 + 1": "1 stood in the place of {}",
    "1 / A": "{} stood upside down (one over it)",
    "1 - A": "1 minus it stood in the place of {}",
    "abs(A)": "the sign of {} were lost",
    "A.exp()": "an exponential of {} were taken",
    "A.log()": "a logarithm of {} were taken",
    "A.detach()": "no gradient could flow through {}",
    "A.sigmoid()": "a sigmoid of {} were taken",
    "A - A.mean()": "{} were centred",
    "A / (A.std() + 1e-8)": "{} were divided by its standard deviation",
    "(A - A.mean()) / (A.std() + 1e-8)": "{} were whitened",
    "A.flip(0)": "{} ran in the other direction",
    "A.sum()": "{} were summed up",
    "A.mean()": "{} were averaged",
    "A.cumsum(0)": "{} were added up from the start",
    "A.cumprod(0)": "{} were multiplied up from the start",
    "A.argsort()": "{} were replaced by an order (argsort) of it",
    "A.roll(-1, -1)": "{} were rolled by one place",
    "A.roll(1, -1)": "{} were rolled by one place",
    "A.mT": "the axes of {} were exchanged",
    "A + 1": "{} were larger by 1",
    "A - 1": "{} were smaller by 1",
    "A.clamp(min=0)": "{} were cut off at 0",
    "A.unsqueeze(1)": "{} had one axis more, (n, 1), and met (n,): a table of all pairs",
}
OF_A_NAME = ("A ** 2", "A ** 0.5", "-A", "A * 0", "A * 0 + 1", "1 / A", "1 - A", "abs(A)", "A + 1", "A - 1")
OF_A_NAME += ("A.exp()", "A.log()", "A.detach()", "A.unsqueeze(1)")
OF_A_RESULT = ("A ** 2", "A ** 0.5", "-A", "abs(A)", "1 - A", "A * 0", "A.clamp(min=0)", "A.exp()", "A.detach()")


@functools.cache
def _template(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


def make(source: str, **parts: ast.expr) -> ast.expr:
    """The expression, with nodes in the place of its capital letters."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return parts.get(node.id, node)

    return Fill().visit(copy.deepcopy(_template(source)))


def _called(node: ast.AST) -> str:
    """The name of what a node calls, be it a method or a function."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", "")) if isinstance(node, ast.Call) else ""


def _what(node: ast.AST) -> str:
    return f"`{node.id}`" if getattr(node, "parameter", False) else "an intermediate result"


@operator
def a_value(node: ast.AST) -> Found:
    name = isinstance(node, ast.Name | ast.Subscript) and isinstance(node.ctx, ast.Load)
    for source in OF_A_NAME if name else OF_A_RESULT if isinstance(node, ast.BinOp | ast.Call) else ():
        yield make(source, A=node), UNARY[source].format(_what(node))


@operator
def a_factor_more(node: ast.AST) -> Found:
    for name in getattr(node, "known_parameters", ()):
        words = f"`{name}` multiplied something more than is due"
        yield ast.BinOp(make("A * B", A=node.left, B=ast.Name(name, ast.Load())), node.op, node.right), words
        yield ast.BinOp(node.left, node.op, make("A * B", A=node.right, B=ast.Name(name, ast.Load()))), words


@operator
def another_name(node: ast.AST) -> Found:
    for other in getattr(node, "others", ()):
        here = f"`{other}` stood" if other in node.parameters else "another quantity stood"
        yield ast.Name(other, ast.Load()), f"{here} where {_what(node)} is due, in one place"


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@operator
def a_sign_or_term(node: ast.AST) -> Found:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        turned = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        yield ast.BinOp(node.left, turned, node.right), "a sign were turned"
        yield node.left, "a term were missing"
        yield node.right, "a term were missing"
        if isinstance(node.op, ast.Sub):
            yield ast.UnaryOp(ast.USub(), node.right), "a term were missing"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
        yield node.operand, "a sign were turned" if isinstance(node.op, ast.USub) else "a 'not' were missing"


@operator
def a_factor(node: ast.AST) -> Found:
    if not isinstance(node, ast.BinOp):
        return
    left, right = node.left, node.right
    if isinstance(node.op, ast.Mult):
        yield left, "a factor were missing"
        yield right, "a factor were missing"
        yield make("A / B", A=left, B=right), "a factor stood below the line"
        yield make("B / A", A=left, B=right), "a factor stood below the line"
        yield make("A * A", A=left), "one factor stood there twice, the other not at all"
        yield make("B * B", B=right), "one factor stood there twice, the other not at all"
        yield make("A + B", A=left, B=right), "two factors were added, not multiplied"
    if isinstance(node.op, ast.Div | ast.FloorDiv):
        yield left, "a division were missing"
        yield make("A * B", A=left, B=right), "it were multiplied where it is divided"
        yield make("B / A", A=left, B=right), "a fraction stood upside down"
        yield make("1 / B", B=right), "a numerator were missing"
        yield make("A - B", A=left, B=right), "a difference stood where a quotient is due"
    if isinstance(node.op, ast.Sub):
        yield make("A / B", A=left, B=right), "a quotient stood where a difference is due"
    if isinstance(node.op, ast.FloorDiv):
        yield make("round(A / B)", A=left, B=right), "it were rounded to the nearest, not down"
        yield make("-(-A // B)", A=left, B=right), "it were rounded up, not down"
        yield make("A / B", A=left, B=right), "it were not rounded down"
    if isinstance(node.op, ast.MatMult):
        yield make("A.mT @ B", A=left, B=right), "a matrix were transposed"
        yield make("A @ B.mT", A=left, B=right), "a matrix were transposed"
        yield make("(A * B).mean()", A=left, B=right), "mean stood where sum is due"
        yield make("B @ A", A=left, B=right), "two factors of a matrix product had changed places"
    if isinstance(node.op, ast.Add | ast.Mult | ast.Sub) and not isinstance(left, ast.Constant):
        yield make("torch.maximum(A, B)", A=left, B=right), "a maximum stood where two things are put together"


@operator
def a_power(node: ast.AST) -> Found:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        root = getattr(node.right, "value", None) == 0.5
        yield node.left, "a root were missing" if root else "a power (a square?) were missing"
        yield make("A * B", A=node.left, B=node.right), "it were multiplied by an exponent"
        yield make("A ** (1 / B)", A=node.left, B=node.right), "power and root had changed places"
        yield make("A ** B", A=node.right, B=node.left), "base and exponent had changed places"
        yield make("A ** (2 * B)", A=node.left, B=node.right), "a square were taken once too often"


@operator
def brackets(node: ast.AST) -> Found:
    """Each pair of them in a line's text left out: (a + b) / c becomes a + b / c."""
    value = getattr(node, "value", None) if isinstance(node, ast.Assign | ast.AugAssign | ast.Return) else None
    text = ast.unparse(value) if value else ""
    for start, letter in enumerate(text):
        if letter != "(" or (start and (text[start - 1].isalnum() or text[start - 1] in "_)]")):
            continue  # of a call
        depth = 0
        end = next(i for i in range(start, len(text)) if (depth := depth + (text[i] == "(") - (text[i] == ")")) == 0)
        with suppress(SyntaxError):
            changed = copy.copy(node)
            changed.value = ast.parse(text[:start] + text[start + 1 : end] + text[end + 1 :], mode="eval").body
            yield changed, "a pair of brackets were missing"


@operator
def the_order(node: ast.AST) -> Found:
    """A sum of squares or the square of a sum, f(a - b) or f(a) - f(b), the mean of f or f of the mean."""
    outer = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func
    inner = outer.value if outer else node
    words = "two steps were taken in the other order"
    if outer and isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute):
        x = inner.func.value
        if is_library(x):
            first, *rest = inner.args or [None]
            reduced = [_again(node, argument) for argument in (first, *rest) if argument is not None]
            yield ast.Call(inner.func, reduced, inner.keywords), words
            yield ast.Call(inner.func, [*reduced[:1], *rest], inner.keywords), words
        else:
            yield _again(inner, _again(node, x)), words
            yield x, "two steps were left out"
    if outer and isinstance(inner, ast.BinOp):
        each = ast.BinOp(_again(node, inner.left), inner.op, _again(node, inner.right))
        yield each, "a function were applied to each part, not to both together"
        yield ast.BinOp(_again(node, inner.left), inner.op, inner.right), "a function were applied to one part only"
        yield ast.BinOp(inner.left, inner.op, _again(node, inner.right)), "a function were applied to one part only"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and isinstance(node.left, ast.BinOp):
        parts = [ast.BinOp(part, ast.Pow(), node.right) for part in (node.left.left, node.left.right)]
        yield ast.BinOp(parts[0], node.left.op, parts[1]), "each part were squared (or rooted), not both together"
    if isinstance(node, ast.Call) and isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Pow):
        yield ast.BinOp(_again(node, inner.left), ast.Pow(), inner.right), words


def _again(call: ast.Call, value: ast.expr) -> ast.Call:
    """The same method, of another value."""
    return ast.Call(ast.Attribute(value, call.func.attr, ast.Load()), call.args, call.keywords)


@operator
def a_constant(node: ast.AST) -> Found:
    if not isinstance(node, ast.Constant) or type(node.value) not in (int, float):
        return
    value = node.value
    if type(value) is float and 0 < value < 1e-3:
        yield ast.Constant(0.0), "a small constant (an eps) were missing"
        yield ast.Constant(value * 100), "a small constant were another"
        yield ast.Constant(value / 100), "a small constant were another"
        return
    if type(value) is int:
        yield ast.Constant(value + 1), "a number were larger by one"
        yield ast.Constant(value - 1), "a number were smaller by one"
    yield ast.Constant(value * 2), "a number were twice as large (a factor 2?)"
    yield ast.Constant(value / 2 if value % 2 or type(value) is float else value // 2), "a number were half as large"
    if type(value) is float and value != 1.0:
        yield ast.Constant(1.0), "a number were 1"
    yield ast.UnaryOp(ast.USub(), node), "a sign were turned"


# ---- calls -----------------------------------------------------------------------------------------------------------

LEFT_OUT = {
    "sqrt": "a root", "square": "a square", "log": "a logarithm", "exp": "an exponential", "mean": "a mean",
    "sum": "a sum", "detach": "a detach", "sigmoid": "a sigmoid", "clamp": "a clamp", "clamp_min": "a clamp",
    "abs": "an absolute value", "cumprod": "a running product", "cumsum": "a running sum", "where": "a mask",
    "flip": "a reversal", "reversed": "a reversal", "masked_fill": "a mask", "argsort": "an order",
    "unsqueeze": "a new axis", "squeeze": "a squeeze", "expand_as": "an axis (one entry a sample met the last axis)",
    "softmax": "a softmax", "log_softmax": "a log_softmax", "norm": "a norm", "logsigmoid": "a log-sigmoid",
}  # fmt: skip
EXCHANGED = [  # two that are taken for each other
    ("mean", "sum"), ("mean", "median"), ("sum", "prod"), ("std", "var"), ("argmax", "argmin"), ("amax", "amin"),
    ("max", "min"), ("maximum", "minimum"), ("cumsum", "cumprod"), ("zeros_like", "ones_like"), ("sum", "amax"),
    ("square", "abs"), ("sqrt", "square"), ("exp", "log"), ("log", "log2"), ("sigmoid", "tanh"), ("square", "sqrt"),
    ("softmax", "log_softmax"), ("std", "mean"), ("sigmoid", "exp"), ("logsigmoid", "sigmoid"), ("softplus", "relu"),
    ("zeros", "ones"), ("logsigmoid", "relu"), ("ceil", "floor"), ("mean", "amax"),
]  # fmt: skip
REDUCING = {
    "sum",
    "mean",
    "prod",
    "std",
    "var",
    "amax",
    "amin",
    "argmax",
    "argmin",
    "all",
    "any",
    "max",
    "min",
    "median",
}
REDUCING |= {"logsumexp", "norm", "vector_norm"}
ALONG = REDUCING | {"softmax", "log_softmax", "cumsum", "cumprod", "flip", "sort", "argsort", "unbind", "diff", "stack"}


@operator
def a_call_left_out(node: ast.AST) -> Found:
    name = _called(node)
    receiver = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.value
    if receiver and not (isinstance(receiver, ast.Name) and receiver.id in ("torch", "math", "F")):
        yield receiver, f"{LEFT_OUT.get(name, 'a step')} were left out"
        return
    for argument in node.args if name and name not in ("range", "float") else ():
        if not isinstance(argument, ast.Constant | ast.List):
            yield argument, f"{LEFT_OUT.get(name, 'a step')} were left out"


@operator
def another_call(node: ast.AST) -> Found:
    name = _called(node)
    for right, wrong in [*EXCHANGED, *((b, a) for a, b in EXCHANGED)]:
        if name == right:
            changed = copy.copy(node)
            attribute = isinstance(node.func, ast.Attribute)
            changed.func = copy.copy(node.func)
            setattr(changed.func, "attr" if attribute else "id", wrong)
            kept = {"keepdim", "dim"} | ({"correction", "unbiased"} if wrong in ("std", "var") else set())
            changed.keywords = [k for k in node.keywords if k.arg in kept]
            yield changed, f"{wrong} stood where {right} is due"


@operator
def a_neighbour(node: ast.AST) -> Found:
    """What looks the same: a naive logarithm, a mean without the sample itself."""
    name, x = _called(node), node.args[0] if getattr(node, "args", None) and isinstance(node, ast.Call) else None
    if name == "logsigmoid":
        yield make("torch.sigmoid(A).log()", A=x), "exp overflowed before the logarithm was taken"
        yield (
            make("(torch.sigmoid(A) + 1e-8).log()", A=x),
            "a small constant stood in a logarithm",
        )
        yield make("-(1 + torch.exp(-A)).log()", A=x), "exp overflowed before the logarithm was taken"
    if name == "mean" and isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
        value = node.func.value
        yield make("(A.sum() - A) / (len(A) - 1)", A=value), "each one were left out of its own mean"


@operator
def an_axis(node: ast.AST) -> Found:
    name = _called(node)
    if name not in ALONG:
        return
    first = 0 if isinstance(node.func, ast.Attribute) and not is_library(node.func.value) else 1
    axis = node.args[first] if len(node.args) > first else None
    for other in (0, 1, -1) if isinstance(axis, ast.Constant | ast.UnaryOp) else ():
        changed = copy.copy(node)
        changed.args = [*node.args[:first], ast.Constant(other), *node.args[first + 1 :]]
        yield changed, "another axis were meant"
    if name in REDUCING:
        if axis is not None or any(k.arg in ("dim", "axis") for k in node.keywords):
            changed = copy.copy(node)
            changed.args = node.args[:first]
            changed.keywords = [k for k in node.keywords if k.arg not in ("dim", "axis", "keepdim")]
            yield changed, "it were reduced over all axes, the batch included"
            keeps = any(k.arg == "keepdim" for k in node.keywords)
            changed = copy.copy(node)
            changed.keywords = [k for k in node.keywords if k.arg != "keepdim"]
            changed.keywords += [] if keeps else [ast.keyword("keepdim", ast.Constant(True))]
            yield changed, f"the reduced axis were {'not ' if keeps else ''}kept, with size 1"
        else:
            for axis in (0, 1, -1):
                changed = copy.copy(node)
                changed.args = [*node.args[:first], ast.Constant(axis)]
                yield changed, "it were reduced over one axis only"


@operator
def bessel(node: ast.AST) -> Found:
    """n - 1 or n below the sum of squares."""
    if _called(node) in ("std", "var"):
        given = [k for k in node.keywords if k.arg in ("correction", "unbiased")]
        population = any(not getattr(k.value, "value", True) for k in given)
        changed = copy.copy(node)
        changed.keywords = [k for k in node.keywords if k not in given]
        changed.keywords += [ast.keyword("correction", ast.Constant(1 if population else 0))]
        yield changed, "n - 1 stood where n is due (Bessel)" if population else "n stood where n - 1 is due"


@operator
def arguments(node: ast.AST) -> Found:
    """Swapped; a bound of a clamp lost; an order turned round."""
    if not isinstance(node, ast.Call):
        return
    for i in range(len(node.args) - 1):
        changed = copy.copy(node)
        changed.args = [*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]]
        yield changed, "two arguments had changed places"
    if _called(node) in ("clamp", "clip") and len(node.args) >= 2:
        low, high = node.args[-2:]
        for bound, kept in (("upper", ast.keyword("min", low)), ("lower", ast.keyword("max", high))):
            yield ast.Call(node.func, node.args[:-2], [kept]), f"the {bound} bound of a clamp were missing"
    if _called(node) in ("sort", "argsort", "sorted"):
        changed = copy.copy(node)
        key = "reverse" if _called(node) == "sorted" else "descending"
        turned = [k for k in node.keywords if k.arg == key]
        changed.keywords = [k for k in node.keywords if k.arg != key]
        changed.keywords += [] if turned else [ast.keyword(key, ast.Constant(True))]
        yield changed, "an order were turned round"


def is_library(node: ast.AST) -> bool:
    return ast.unparse(node).split(".")[0] in ("torch", "math", "F", "np")


# ---- choices, indices, steps -----------------------------------------------------------------------------------------

STRICT = {ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt}
TURNED = {ast.Gt: ast.Lt, ast.GtE: ast.LtE, ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


@operator
def a_choice(node: ast.AST) -> Found:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        if wrong := STRICT.get(type(node.ops[0])):
            to = "strict" if wrong in (ast.Gt, ast.Lt) else "not strict"
            yield ast.Compare(node.left, [wrong()], node.comparators), f"a comparison were {to}: what about equality?"
        if wrong := TURNED.get(type(node.ops[0])):
            yield ast.Compare(node.left, [wrong()], node.comparators), "a comparison were turned round"
    if isinstance(node, ast.BinOp | ast.BoolOp) and isinstance(node.op, ast.BitAnd | ast.BitOr | ast.And | ast.Or):
        parts = [node.left, node.right] if isinstance(node, ast.BinOp) else node.values
        yield from ((part, "a condition were missing") for part in parts)
        if isinstance(node, ast.BinOp):
            turned = ast.BitOr() if isinstance(node.op, ast.BitAnd) else ast.BitAnd()
            yield ast.BinOp(node.left, turned, node.right), "'and' and 'or' had changed places"
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        for truth in (True, False):
            changed = copy.copy(node)
            changed.test = ast.Constant(truth)
            yield changed, "one case were treated like the other"
    if _called(node) == "where":
        yield node.args[1], "a mask were left out"
        yield node.args[2], "a mask hid everything"


@operator
def an_index(node: ast.AST) -> Found:
    if isinstance(node, ast.Slice):
        for low, high in {(None, None), (1, None), (None, -1), (2, None), (None, -2), (None, 1), (0, -1)}:
            bounds = [None if end is None else ast.Constant(end) for end in (low, high)]
            yield ast.Slice(*bounds), "a slice were shifted, or one too long or short"
        yield ast.Slice(node.upper, node.lower), "another end of the list were kept"
        yield ast.Slice(None, node.lower and ast.UnaryOp(ast.USub(), node.lower)), "another end of the list were kept"
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        yield node.value, "nothing were selected (an index or a mask is missing)"
        if isinstance(node.slice, ast.Name | ast.BinOp | ast.Call):
            for by in (1, -1):
                shifted = make(f"A + {by}", A=node.slice)
                yield ast.Subscript(node.value, shifted, ast.Load()), "an index were off by one"
    if _called(node) in ("range", "arange") and node.args:
        first, last = ([ast.Constant(0), *node.args])[-2:] if len(node.args) < 3 else node.args[:2]
        rest = node.args[2:]
        for low, high in (("A + 1", "B"), ("A", "B - 1"), ("A", "B + 1"), ("A + 1", "B + 1"), ("A - 1", "B - 1")):
            ends = [make(low, A=first), make(high, B=last)]
            yield ast.Call(node.func, [*ends, *rest], node.keywords), "a count began or ended one too early or too late"


@operator
def a_step(node: ast.AST) -> Found:
    nothing = ast.Pass()
    if isinstance(node, ast.AugAssign | ast.Assign | ast.Expr | ast.If):
        yield nothing, "a step were left out"
    if isinstance(node, ast.AugAssign):
        yield ast.Assign([node.target], node.value), "the old value were replaced, not changed"
        turned = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        yield ast.AugAssign(node.target, turned, node.value), "a sign were turned"
    if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and 1 < len(node.elts) < 4:
        yield ast.Tuple([*node.elts[1:], node.elts[0]], ast.Load()), "the things returned stood in another order"
        if len(node.elts) == 2:
            for i in (0, 1):
                yield ast.Tuple([node.elts[i]] * 2, ast.Load()), "one of two things stood there twice"
