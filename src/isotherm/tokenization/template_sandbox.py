"""Jinja for templates nobody vouches for: each loop, call, operator and output pays from a TemplateBudget.

The syntax tree is rewritten before it is compiled: loop and macro bodies begin with a payment for their nodes, and
what Jinja compiles to bare Python (displays, comparisons, concatenation, slices, output) passes through a paying filter.
Operators, calls, filters and tests are caught where the sandbox of Jinja lets us. What is not on the lists below does not
run. No thread, signal or trace is used, so it works in any thread and beside any debugger.
"""

import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateRuntimeError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner
from jinja2.visitor import NodeTransformer

from isotherm.errors import TemplateError
from isotherm.tokenization.template_budget import TemplateBudget, check_int_bits

# Not an identifier: templates cannot name it, nor the filters below.
BUDGET_KEY = "<budget>"
_TICK, _READ, _KEEP, _CONCAT, _OUTPUT = "<tick>", "<read>", "<keep>", "<concat>", "<output>"

_CALL_STEPS = 40
_MAX_INDENT = 16
_MAX_ROUND_DIGITS = 20

_ALLOWED_NODES: tuple[type[nodes.Node], ...] = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock),
    *(nodes.FilterBlock, nodes.With, nodes.Scope, nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.Continue),
    *(nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword),
    *(nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat),
    *(nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr),
)
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "indent", "int", "items"),
    *("join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse"),
    *("round", "safe", "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim", "unique", "upper"),
)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
        "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition "
        "rsplit rstrip split splitlines startswith strip swapcase title upper".split()
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    LoopContext: frozenset(("changed", "cycle")),
    Cycler: frozenset(("next", "reset")),
}
_SEARCHES = frozenset(
    "count find index lstrip partition replace rfind rindex rpartition rsplit rstrip split strip".split(),
)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The environment `transformers` renders chat templates in, with a budget.

    Contexts carry their TemplateBudget under BUDGET_KEY.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag])
        plain = ImmutableSandboxedEnvironment()
        plain.filters["tojson"] = _tojson
        plain.filters["join"] = _join
        self.filters = {name: _metered(plain.call_filter, name) for name in _FILTERS}
        self.filters |= {_TICK: _tick, _READ: _read, _KEEP: _keep, _CONCAT: _concat, _OUTPUT: _output}
        self.tests = {name: _metered(plain.call_test, name) for name in plain.tests}
        self.globals = {name: plain.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def metered_tree(self, source: str) -> nodes.Template:
        """The syntax tree of `source`, to be compiled; refuses what is not on the list."""
        tree = self.parse(source)
        for node in tree.find_all(nodes.Node):
            if not isinstance(node, _ALLOWED_NODES):
                raise TemplateError(f"the chat template uses {type(node).__name__} in line {node.lineno}, which is refused")
        metered = _Metering().visit(tree)
        metered.set_environment(self)
        assert isinstance(metered, nodes.Template)
        return metered

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        budget = _budget_of(__context)
        budget.step(_CALL_STEPS)
        for value in (*args, *kwargs.values()):
            budget.read(value)
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            if owner_method(owner, method.__name__) == "join":
                return budget.keep(owner.join(_checked_texts(budget, owner, *args)))
            _check_text_method(budget, method.__name__, owner, args, kwargs)
        elif not _may_call(__self, __obj, owner):
            raise TemplateRuntimeError(f"a template may not call {__obj!r:.100}")
        result = super(MeteredEnvironment, __self).call(__context, __obj, *args, **kwargs)
        return budget.keep(result)
