"""All small mistakes that a source can have, one at a time, and samples of them."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple, TypeVar

# The operators that may replace each operator.
_OTHER: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.FloorDiv,),
    ast.FloorDiv: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}
_NO_CODE = ("annotation", "returns", "decorator_list", "type_params")
_NOT_JUDGED = {"__repr__", "__str__", "_check"}


class Mutation(NamedTuple):
    """A mistake: in one function of `module`, the bytes from `start` to `end` become `new`."""

    module: str
    line: int
    function: str
    kind: str
    start: int
    end: int
    old: str
    new: str

    def apply(self, source: str) -> str:
        """Return the mutated source of the module."""
        encoded = source.encode()
        return (encoded[: self.start] + self.new.encode() + encoded[self.end :]).decode()

    def __str__(self) -> str:
        """Format as one line."""
        where = f"{self.module}:{self.line}" + (f" {self.function}" if self.function else "")
        return f"{where} ({self.kind}): {' '.join(self.old.split())}  ->  {self.new}"


def sample(sources: Mapping[str, str], count: int, seed: int) -> list[Mutation]:
    """Return `count` mutations of the sources by module, or all if there are fewer. One seed gives one sample."""
    found = [mutation for module in sorted(sources) for mutation in mutations(module, sources[module])]
    return random.Random(seed).sample(found, min(count, len(found)))  # noqa: S311 (a sample, no secret)


def mutations(module: str, source: str) -> Iterator[Mutation]:
    """Yield every mutation of one source, except in docstrings, messages, logging, reprs, checks and annotations."""
    encoded = source.encode()
    lines = [0, *accumulate(len(line) for line in encoded.splitlines(keepends=True))]
    for function, node in _code(ast.parse(source), ""):
        for kind, place, new in (*_variants(node), *(_removals(node) if function else ())):
            if ast.dump(place) == ast.dump(new):
                continue
            start = lines[place.lineno - 1] + place.col_offset
            end = lines[(place.end_lineno or 0) - 1] + (place.end_col_offset or 0)
            text = f"({ast.unparse(new)})" if isinstance(new, ast.expr) else ast.unparse(new)
            yield Mutation(module, place.lineno, function, kind, start, end, encoded[start:end].decode(), text)


def _code(node: ast.AST, outer: str) -> Iterator[tuple[str, ast.AST]]:
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if field in _NO_CODE or not isinstance(child, ast.AST) or _is_of_no_interest(child):
                continue
            name = outer
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{outer}.{child.name}".removeprefix(".")
            yield name, child
            yield from _code(child, name)


def _is_of_no_interest(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
            return True
        case ast.FunctionDef(name=name):
            return name in _NOT_JUDGED
        case ast.If(test=ast.Name(id=name)):
            return name == "TYPE_CHECKING"
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
            return name == "logger"
    return False


_Node = TypeVar("_Node", bound=ast.AST)
_Variant = tuple[str, ast.expr | ast.stmt, ast.expr | ast.stmt]


def _variants(node: ast.AST) -> Iterator[_Variant]:
    """Yield the kind of each mistake, the node to replace, and the replacement."""
    match node:
        case ast.Compare() | ast.BoolOp() | ast.BinOp() | ast.AugAssign():
            yield from _other_operators(node)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "removed not", node, operand
        case ast.Constant(value=int(value)):
            yield "constant", node, ast.Constant(not value if isinstance(value, bool) else value + 1)
        case ast.Call():
            yield from _swapped_arguments(node)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            if not isinstance(test, ast.Compare | ast.UnaryOp | ast.Constant):
                yield "negated condition", test, ast.UnaryOp(ast.Not(), test)
        case ast.Return(value=ast.expr() as value):
            if not (isinstance(value, ast.Constant) and value.value is None):
                yield "return value", node, ast.Return(ast.Constant(None))


def _removals(node: ast.AST) -> Iterator[_Variant]:
    """Yield the removal of a statement, if every name is still bound without the statement."""
    match node:
        case ast.Delete(targets=[ast.Name()]):
            return  # only linters ask for it
        case ast.Expr() | ast.AugAssign() | ast.Delete() | ast.Raise() | ast.Continue() | ast.Break():
            yield "removed statement", node, ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "removed statement", node, ast.Pass()


def _other_operators(node: ast.Compare | ast.BoolOp | ast.BinOp | ast.AugAssign) -> Iterator[_Variant]:
    if not isinstance(node, ast.Compare):
        for other in _OTHER.get(type(node.op), ()):
            yield "operator", node, _with(node, op=other())
        return
    for position, operator in enumerate(node.ops):
        for other in _OTHER[type(operator)]:
            yield "comparison", node, _with(node, ops=[*node.ops[:position], other(), *node.ops[position + 1 :]])


def _swapped_arguments(node: ast.Call) -> Iterator[_Variant]:
    if isinstance(node.func, ast.Name) and node.func.id in ("max", "min"):
        return
    given, keywords = node.args, node.keywords
    for position in range(1, len(given)):
        before, (one, other), after = given[: position - 1], given[position - 1 : position + 1], given[position + 1 :]
        yield "swapped arguments", node, _with(node, args=[*before, other, one, *after])
    for position in range(1, len(keywords)):
        first, second = keywords[position - 1 : position + 1]
        if first.arg and second.arg:
            swapped = [_with(first, value=second.value), _with(second, value=first.value)]
            yield (
                "swapped arguments",
                node,
                _with(node, keywords=[*keywords[: position - 1], *swapped, *keywords[position + 1 :]]),
            )


def _with(node: _Node, **fields: object) -> _Node:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new
