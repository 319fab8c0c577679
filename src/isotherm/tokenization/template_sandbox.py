"""Jinja for templates nobody vouches for: every loop, call, operator and output pays from a TemplateBudget.

The syntax tree is rewritten before it is compiled: loop and macro bodies begin with a payment for their nodes, and
what Jinja compiles to bare Python (displays, comparisons, concatenation, slices, output) passes through paying filters.
Operators, calls, filters and tests pay where Jinja's own sandbox lets us step in. What is not on the lists below is
refused. No thread, signal, clock or trace function is used: it works in any thread and beside any debugger.
"""

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner
from jinja2.visitor import NodeTransformer

from isotherm.errors import TemplateError
from isotherm.tokenization.template_budget import TemplateBudget
from isotherm.tokenization.template_limits import FILTER_CHECKS, check_attribute, check_operator, check_text_method

# None of these is an identifier, so that no template can name them.
BUDGET_KEY = "<budget>"
_TICK, _READ, _KEEP, _CONCAT, _OUTPUT = "<tick>", "<read>", "<keep>", "<concat>", "<output>"

_CALL_STEPS = 40

# Compiled templates add these to each call; Jinja takes them out again.
_JINJA_KEYWORDS = ("_loop_vars", "_block_vars")

# Compilers recurse, and each Python gives up at another depth, or finds the end of a small C stack first; none does so
# here. The deepest of 70 templates of known models nests to 28.
_MAX_NESTING = 100

_ALLOWED_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock),
    *(nodes.FilterBlock, nodes.With, nodes.Scope, nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.Continue),
    *(nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword),
    *(nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat),
    *(nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr),
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _words(
    "abs capitalize count d default dictsort e escape first float indent int items join last length list lower map max "
    "min reject rejectattr replace reverse round safe select selectattr sort string sum title tojson trim unique upper"
)
# These look at no more of a value than its length, its kind or one of its parts.
_QUICK_FILTERS = _words("count d default first last length")
_QUICK_TESTS = _words(
    "boolean callable defined even false filter float integer iterable mapping none number odd sameas sequence string "
    "test true undefined"
)
# These look at one part after the other, for as long as they are asked.
_LAZY_FILTERS = _words("items list map reject rejectattr select selectattr")

_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (
        str,
        _words(
            "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower "
            "isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rsplit "
            "rstrip split splitlines startswith strip swapcase title upper"
        ),
    ),
    (dict, _words("copy get items keys values")),
    (list, _words("copy count index")),
    (tuple, _words("count index")),
    (LoopContext, _words("changed cycle")),
    (Cycler, _words("next reset")),
)
# Of lists and tuples: they compare their argument with each part.
_WALKING_METHODS = _words("count index")


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The environment in which `transformers` renders chat templates, on a budget: contexts hold it as BUDGET_KEY."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        # Jinja's optimizer tries each part of an expression anew: time cubic in its depth.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, _GenerationTag]
        )
        plain = ImmutableSandboxedEnvironment()
        plain.filters["tojson"] = _tojson
        self.filters = {name: _metered(plain.call_filter, name, _QUICK_FILTERS) for name in _FILTERS}
        self.filters |= {_TICK: _tick, _READ: _read, _KEEP: _keep, _CONCAT: _concat, _OUTPUT: _output}
        self.tests = {name: _metered(plain.call_test, name, _QUICK_TESTS) for name in plain.tests}
        self.globals = {name: plain.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def metered_tree(self, source: str) -> nodes.Template:
        """The syntax tree of `source`, ready to be compiled; raises TemplateError for what is not on the list."""
        tree = self.parse(source)
        _check_nodes(tree)
        _Metering().visit(tree)
        tree.set_environment(self)
        return tree

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget_of(context)
        budget.step(_CALL_STEPS * (1 + len(args) + len(kwargs)))
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(obj, Macro | LoopContext | Undefined):
            return super().call(context, obj, *args, **kwargs)
        if not self._may_call(obj, owner, name):
            raise SecurityError(f"a template may not call {name or type(obj).__name__}")
        if name == "join" and args:
            args = (list(budget.each(args[0])), *args[1:])
        given = {name: value for name, value in kwargs.items() if name not in _JINJA_KEYWORDS}
        budget.read([owner, *args, *given.values()] if name in _WALKING_METHODS else [*args, *given.values()])
        if isinstance(owner, str):
            check_text_method(budget, owner, name, args, given)
        return budget.keep(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget_of(context)
        budget.step(_CALL_STEPS)
        check_operator(budget, operator, left, right)
        return budget.keep(super().call_binop(context, operator, left, right))

    def _may_call(self, obj: object, owner: object, name: str) -> bool:
        for kind, names in _METHODS:
            if isinstance(owner, kind):
                return name in names
        return isinstance(obj, Joiner) or any(obj is known for known in self.globals.values())


def _check_nodes(tree: nodes.Template) -> None:
    waiting: list[tuple[nodes.Node, int]] = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if not isinstance(node, _ALLOWED_NODES):
            raise TemplateError(f"the chat template uses {type(node).__name__} in line {node.lineno}: refused")
        if depth > _MAX_NESTING:
            raise TemplateError(f"the chat template nests more than {_MAX_NESTING} deep in line {node.lineno}: refused")
        # to Python each elif is an if in the else of the one before
        below = depth + 1 + (len(node.elif_) if isinstance(node, nodes.If) else 0)
        waiting += [(child, below) for child in node.iter_child_nodes()]


class _GenerationTag(Extension):
    """{% generation %}: marks what the model wrote, for training; here it is a scope like any other."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Metering(NodeTransformer):
    """Puts payments into a syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        price = _price(node.body, node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(price, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(price, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:  # noqa: N802
        price = _price(node.body, node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(price, lineno=node.lineno))
        return node

    visit_CallBlock = visit_Macro  # noqa: N815

    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [part if isinstance(part, nodes.TemplateData) else _pay(_OUTPUT, part) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _pay(_CONCAT, *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _pay(_KEEP, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _pay(_KEEP, node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _read_first(pair.key)
        return _pay(_KEEP, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _pay(_KEEP, node)
        node.arg = _read_first(node.arg)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)
        searches = any(operand.op in ("in", "notin") for operand in node.ops)
        # Against a constant nothing is walked that is larger than the constant.
        if searches or not any(isinstance(side, nodes.Const) for side in (node.expr, *(o.expr for o in node.ops))):
            node.expr = _read_first(node.expr)
            for operand in node.ops:
                operand.expr = _read_first(operand.expr)
        return node


def _read_first(value: nodes.Expr) -> nodes.Expr:
    """Before `value` is compared or hashed."""
    return value if isinstance(value, nodes.Const) else _pay(_READ, value)


def _pay(name: str, first: nodes.Expr, *others: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(first, name, list(others), [], None, None, lineno=first.lineno)


def _price(body: list[nodes.Node], owner: nodes.Node) -> nodes.Filter:
    """Of one run of `body`: steps for its nodes, bytes for its plain text."""
    inside = [node for child in body for node in (child, *child.find_all(nodes.Node))]
    num_chars = sum(len(node.data) for node in inside if isinstance(node, nodes.TemplateData))
    steps, size = (nodes.Const(number, lineno=owner.lineno) for number in (1 + len(inside), num_chars))
    return _pay(_TICK, steps, size)


def _budget_of(context: Context) -> TemplateBudget:
    budget = context.parent[BUDGET_KEY]
    assert isinstance(budget, TemplateBudget)
    return budget


def _metered(call: Callable[..., Any], name: str, quick: frozenset[str]) -> Callable[..., Any]:
    """The filter or test of that name, behind its payments. `call`: call_filter or call_test of an environment."""
    check = FILTER_CHECKS.get(name)

    @pass_context
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget_of(context)
        budget.step(_CALL_STEPS)
        if name in quick:
            return call(name, value, args, kwargs, context=context)
        if name == "join":
            value = list(budget.each(value))
        (budget.glance if name in _LAZY_FILTERS else budget.read)(value)
        budget.read([*args, *kwargs.values()])
        check_attribute(name, args, kwargs)
        if check is not None:
            check(budget, value, *args, **kwargs)
        result = call(name, value, args, kwargs, context=context)
        return budget.each(result) if isinstance(result, Iterator) else budget.keep(result)

    return run


@pass_context
def _tick(context: Context, num_steps: int, num_bytes: int) -> bool:
    budget = _budget_of(context)
    budget.step(num_steps)
    budget.keep_bytes(num_bytes)
    return True


@pass_context
def _read(context: Context, value: Any) -> Any:
    _budget_of(context).read(value)
    return value


@pass_context
def _keep(context: Context, value: Any) -> Any:
    return _budget_of(context).keep(value)


@pass_context
def _output(context: Context, value: Any) -> Any:
    _budget_of(context).print(value)
    return value


@pass_context
def _concat(context: Context, *values: Any) -> str:
    for value in values:
        _budget_of(context).print(value)
    return "".join(map(str, values))


@pass_context
def _raise_exception(context: Context, message: object) -> None:
    _budget_of(context).print(message)
    raise JinjaError(str(message))


def _strftime_now(form: str) -> str:
    if re.search(r"%\W*\d", form):  # a width, which may be any size
        raise TemplateError("the chat template asks for a date of a given width, which is refused")
    return datetime.now().strftime(form)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As `transformers` has it: no escapes for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
