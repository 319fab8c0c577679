"""GBNF as Lark: what llama.cpp's documentation says of the language, and where errors are."""

import re

import pytest

from isotherm.errors import GrammarError
from isotherm.grammar.gbnf import lark_of_gbnf


@pytest.mark.parametrize(
    ("source", "lark"),
    [
        ('root ::= "a"', 'start: T0\nT0: "a"\n'),
        ('# c\n\nroot ::= "a" # d\n', 'start: T0\nT0: "a"\n'),
        ('root ::=\n  "a" |\n  "b"', 'start: T0\nT0: "a" | "b"\n'),
        ('root ::= "a" | ', 'start: T0\nT0: "a" | ""\n'),
        ('root ::= ( # c\n "a"\n | "b" )+', 'start: T0\nT0: ( "a" | "b" ) +\n'),
        ('root ::= "a"* "b"? "c"{2} "d"{ 1 , } "e"{0,3}', 'start: T0\nT0: "a" * "b" ? "c" {2} "d" {1,} "e" {0,3}\n'),
        (r'root ::= "\x41\u00e9\U0001F600\n\"\\/"', 'start: T0\nT0: "Aé😀\\n\\"\\\\/"\n'),
        (
            r"root ::= [a-c/^-] .",
            "start: T0\nT0: " + r"/[\x{61}-\x{63}\x{2F}-\x{2F}\x{5E}-\x{5E}\x{2D}-\x{2D}]/ /[\x{0}-\x{10FFFF}]/" + "\n",
        ),
        (r"root ::= [^\]\x00-\x1F]", "start: T0\nT0: " + r"/[^\x{5D}-\x{5D}\x{0}-\x{1F}]/" + "\n"),
        (
            "root ::= a-b root | a_b\na-b ::= a_b\na_b ::= [x]",
            "start: r0\nr0: T1 r0 | T2\nT1: T2\nT2: " + r"/[\x{78}-\x{78}]/" + "\n",
        ),
        ("root ::= start\nstart ::= root", "start: r0\nr0: r1\nr1: r0\n"),
        ('root ::= "a"\r\nx ::= "b"\r\n', 'start: T0\nT0: "a"\nT1: "b"\n'),
    ],
)
def test_translation(source: str, lark: str) -> None:
    assert re.sub(" +", " ", lark_of_gbnf(source)) == lark


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no rule named root"),
        ('a ::= "x"', "no rule named root"),
        ("root ::= x", "rule root refers to x, which does not exist"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 9: a second rule named root"),
        ('root := "a"', "line 1, column 6: expected ::="),
        ('root ::= "a', "line 1, column 12: a literal or set that does not end"),
        ('root ::= "a\n"', "line 1, column 12: a literal or set that does not end"),
        ("root ::= [a", "a literal or set that does not end"),
        ("root ::= []", "a set without a character"),
        ("root ::= [z-a]", "a range of characters that ends before it begins"),
        (r'root ::= "\q"', "line 1, column 12: an escape that does not exist"),
        (r'root ::= "\uD800"', "an escape that does not exist"),
        (r'root ::= "\U00110000"', "an escape that does not exist"),
        ('root ::= ("a"', r"line 1, column 14: expected \)"),
        ('root ::= "a")', "expected the end of the rule"),
        ('root ::= "a"{', r"expected \{m\}, \{m,\} or \{m,n\}"),
        ('root ::= "a"{3,2}', "repetitions go from few to many"),
        ('root ::= "a"{1,99999}', "at most 10000"),
        ("root ::= " + "(" * 30 + '"a"' + ")" * 30, "nested deeper than 24 levels"),
        ("root ::= *", "expected the end of the rule"),
        ("\0", "expected the name of a rule"),
    ],
)
def test_errors_say_where(source: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        lark_of_gbnf(source)
