"""Chat templates that want all time or all memory. Run as a program: renders each, prints a JSON line about it.

The program limits its own memory, so that a hole in the sandbox fails a test and no machine.
"""

import json
import resource
import time

from isotherm.errors import TemplateError
from isotherm.tokenization.chat import ChatTemplate

_MEMORY_BYTES = 2**30

_LOOPS = "{% for a in range(100000) %}" * 3
_ENDS = "{% endfor %}" * 3
_DOUBLE = "{% set ns = namespace(x='a' * 1000) %}{% for i in range(100) %}"
_TREE = "{% set ns = namespace(x=(1, 2), y=(1, 2)) %}{% for i in range(90) %}"
_TREE += "{% set ns.x = (ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}{% endfor %}"
_BIG = "{% set h = 'a' * 10000000 %}{% set g = 'a' * 10000000 %}{% for i in range(100000) %}"
_TEXT = "x" * 50_000

HOSTILE = {
    # work
    "nested loops": _LOOPS + _ENDS,
    "nested loops with text": _LOOPS + "x" + _ENDS,
    "nested loops with output": _LOOPS + "{{ a }}" + _ENDS,
    "nested loops with filter": _LOOPS + "{% for d in range(100000) if false %}{% endfor %}" + _ENDS,
    "wide loop": "{% for a in range(100000) %}" + "{% if b %}{% endif %}" * 3000 + "{% endfor %}",
    "wide macro": "{% macro f() %}" + "{% if b %}{% endif %}" * 3000 + "{% endmacro %}" + _LOOPS + "{{ f() }}" + _ENDS,
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for a in range(99999) recursive %}{{ loop(range(99999)) if loop.depth < 9 }}{% endfor %}",
    "loop length": "{% for a in range(99999) %}{% for b in range(99999) %}{{ loop.length }}{% endfor %}{% endfor %}",
    "filter over range": "{% for a in range(99999) %}{{ range(99999) | min }}{% endfor %}",
    "lazy filter": "{% set r = [0] * 99999 %}{% for a in range(99999) %}{{ r | select | first }}{% endfor %}",
    "many arguments": "{% macro f() %}{{ varargs }}{% endmacro %}{% set r = range(99999) | list %}"
    "{% for a in range(99999) %}{{ f(*r) | length }}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "long number": "{{ ('f' * 4000000) | int(base=16) }}",
    "rounding": "{{ 5 | round(-10 ** 9) }}",
    "sum of lists": "{{ ([[1] * 100] * 99999) | sum(start=[]) | length }}",
    "search": _BIG + "{{ ('a' * 5000 + 'b') in h }}{% endfor %}",
    "search from the right": _BIG + "{{ h.rsplit('b' + 'a' * 5000) | length }}{% endfor %}",
    "strip": _BIG + "{{ h.strip('bcdefgh' * 10000 + 'a') }}{% endfor %}",
    "compare": _BIG + "{{ h == g }}{% endfor %}",
    "compare in a test": _BIG + "{{ h is eq(g) }}{% endfor %}",
    "compare in a filter": "{% set h = 'a' * 9999999 %}{{ range(99999) | map('string') | select('in', h) | list }}",
    "attribute path": "{% set a = namespace() %}{% set a.b = a %}{{ [a]|map(attribute='b' ~ '.b' * 5000000) | first }}",
    # much of little
    "repeat": "{{ 'a' * 10 ** 9 }}",
    "repeat a list": "{{ (10 ** 9 * [0]) | length }}",
    "pad": "{{ 'a'.ljust(10 ** 9) }}",
    "pad by a found method": "{% set f = ['a'] | map(attribute='center') | first %}{{ f(10 ** 9) }}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format by argument": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "format often": "{% set a = 'x' * 1000000 %}{{ ('{0}' * 10000).format(a) | length }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "bytes": "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "date": "{{ strftime_now('%1000000000d') }}",
    "indent": "{{ ('\\n' * 100000) | indent(100000) | length }}",
    "indent JSON": "{{ [1, 2] | tojson(indent=10 ** 9) }}",
    "separate JSON": "{{ range(9999) | list | tojson(separators=('x' * 1000000, 'y')) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) | length }}",
    "replace nothing": "{{ ('a' * 1000).replace('', 'b' * 1000000) | length }}",
    "join": "{{ range(99999) | join('x' * 100000) | length }}",
    "join the same": "{% set a = 'x' * 1000000 %}{{ ''.join([a] * 99999) | length }}",
    "split": "{{ ('a,' * 30000000).split(',') | length }}",
    "list of characters": "{{ ('ab' * 8000000) | list | length }}",
    # doubling
    "double by +": _DOUBLE + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "double by ~": _DOUBLE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "double by a block": _DOUBLE + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "double a list": _DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "double a dict": _DOUBLE + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "double a namespace": _DOUBLE + "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x | string }}",
    "wide ~": "{% set a = 'x' * 10000000 %}{% set b = " + " ~ ".join(["a"] * 5000) + " %}",
    "hash a tree": _TREE + "{{ {ns.x: 1} | length }}",
    "look up a tree": _TREE + "{{ {1: 2}[ns.x] }}",
    "get a tree": _TREE + "{{ {1: 2}.get(ns.x) }}",
    "find a tree": _TREE + "{{ ns.x in {1: 2} }}",
    "compare trees": _TREE + "{{ ns.x == ns.y }}",
    "index trees": _TREE + "{{ [ns.x].index(ns.y) }}",
    "changed trees": _TREE + "{% for a in (ns.x, ns.y) %}{{ loop.changed(a) }}{% endfor %}",
    "sort trees": _TREE + "{{ [ns.x, ns.y] | sort }}",
    "print a tree": _TREE + "{{ ns.x }}",
    "trim a tree": _TREE + "{{ ns.x | trim | length }}",
    "raise a tree": _TREE + "{{ raise_exception(ns.x) }}",
    "deep list": "{% set ns = namespace(x=1) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "itself": "{% set a = namespace() %}{% set a.b = a %}{{ a }}",
    # text
    "endless output": "{% for a in range(100000) %}" + _TEXT + "{% endfor %}",
    "endless block": "{% set z %}{% for a in range(100000) %}" + _TEXT + "{% endfor %}{% endset %}",
    "endless filter block": "{% filter upper %}{% for a in range(100000) %}" + _TEXT + "{% endfor %}{% endfilter %}",
    "endless macro text": "{% macro f() %}"
    + _TEXT
    + "{% endmacro %}{% for a in range(100000) %}{% set z = f() %}{% endfor %}",
    "nested call blocks": "{% macro f() %}{{ caller() ~ caller() }}{% endmacro %}"
    + "{% call f() %}" * 18
    + _TEXT
    + "{% endcall %}" * 18,
    # the compiler
    "too long": "x" * 100_000,
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "additions": "{{ " + "+".join(["1"] * 30_000) + " }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "elifs": "{% if 0 %}" + "{% elif 0 %}" * 4500 + "{% endif %}",
    "loops in loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "not closed": "{{ " * 20_000,
    # the world outside
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "formatted attribute": "{{ '{0.__class__.__mro__}'.format(1).x.y }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends 'x' %}",
    "change of a message": "{{ messages.append(1) }}",
    "budget": "{{ messages | map('<keep>') | list }}{{ nothing.more }}",
}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for name, source in HOSTILE.items():
        start_s = time.process_time()
        try:
            outcome = (
                f"rendered {len(ChatTemplate(source, '', '').render([{'role': 'user', 'content': 'x'}]))} characters"
            )
        except TemplateError as error:
            outcome = "TemplateError" if len(str(error)) < 1000 else "a message too long to read"
        except BaseException as error:
            outcome = repr(error)
        print(json.dumps([name, outcome, time.process_time() - start_s]), flush=True)


if __name__ == "__main__":
    main()
