"""A layer's own forward with its residual additions and norms joined, by rewriting its source.

Two patterns are looked for among the statements of a forward, whatever the names are and whatever stands around them::

    x = a + b                               normed, x = add_norm(self.norm, a, b)
    residual = x                 becomes    residual = x
    x = self.norm(x)                        x = normed

    residual = x                 becomes    normed, residual = fork_norm(self.norm, x)
    x = self.norm(x)                        x = normed

The statement with the norm may use its result at once, as ``x = x + self.mlp(self.norm(x))`` does. Nothing else of the
forward changes: caches, masks, dropout, multipliers and tuples are what they were. The functions that serve decide in
each call whether the norm's kernel may, and run the statements as they were where it may not.

The new code runs on the globals of the original module, which a compiler looks up by the module's name.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .forwards import HiddenFunctionError, redecorated

__all__ = ["ADD", "FORK", "Joints", "joined", "joints_of"]

# Members of a patched norm's class: (a, b) -> (norm(a + b), a + b) and x -> (norm(x), x).
ADD, FORK = "_liger_add", "_liger_fork"

_NORMED = "_liger_trainer_normed"
_FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


@dataclass(frozen=True)
class Joints:
    """The children of a layer that a forward norms a sum with, and those with which it norms what it keeps."""

    added: tuple[str, ...] = ()
    forked: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.added + self.forked


class RewriteError(Exception):
    """Why a forward stays as it is, in words that follow "left alone: "."""


@functools.cache
def joints_of(forward: Any) -> Joints:
    """Which children of a layer with this forward could be joined with what stands before them, by name.

    No child at all where the forward has neither pattern or is none whose source is known.
    """
    try:
        return _rewrite(inspect.unwrap(forward))[1]
    except RewriteError:
        return Joints()


@functools.cache
def joined(forward: Any) -> Any:
    """forward with its additions and norms joined, inside of the decorators that it had.

    Raises:
        RewriteError: a decorator does not say what it decorates.
    """
    try:
        return redecorated(forward, lambda function: _rewrite(function)[0])
    except HiddenFunctionError as reason:
        raise RewriteError(str(reason)) from None


def add_norm(norm: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``norm(a + b)`` and ``a + b``."""
    serve = getattr(type(norm), ADD, None)
    if serve is not None and type(a) is Tensor and type(b) is Tensor and a.shape == b.shape and _is_bare(norm):
        return serve(norm, a, b)
    total = a + b
    return norm(total), total


def fork_norm(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``norm(x)`` and x."""
    serve = getattr(type(norm), FORK, None)
    if serve is not None and type(x) is Tensor and _is_bare(norm):
        return serve(norm, x)
    return norm(x), x


def _is_bare(norm: nn.Module) -> bool:
    """Whether a call of norm is a call of its class's forward and nothing else: hooks must see what they would see."""
    return not (
        norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or "forward" in norm.__dict__
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


@functools.cache
def _rewrite(forward: Any) -> tuple[Any, Joints]:
    """The new forward and what it joins.

    Raises:
        RewriteError: there is nothing to join, or the source is not known for certain to be forward's.
    """
    if not isinstance(forward, types.FunctionType) or forward.__closure__:
        raise RewriteError("its forward is no plain function")
    tree = _source_of(forward)
    joints = _join(tree)
    if not joints.names:
        raise RewriteError("its forward has no norm behind an addition")
    parameters = [ast.arg(arg=name) for name in ("add_norm", "fork_norm")]
    empty: dict[str, Any] = {"posonlyargs": [], "kwonlyargs": [], "kw_defaults": [], "defaults": []}
    maker = ast.FunctionDef(
        name="make", args=ast.arguments(args=parameters, **empty),
        body=[tree, ast.Return(ast.Name(tree.name, ast.Load()))], decorator_list=[],
    )  # fmt: skip
    if "type_params" in ast.FunctionDef._fields:  # Python 3.12
        maker.type_params = []  # type: ignore[attr-defined]
    new = _made(ast.copy_location(maker, tree), forward)(add_norm, fork_norm)
    new.__defaults__, new.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    functools.update_wrapper(new, forward)
    del vars(new)["__wrapped__"]  # a decorator's mark, by which others would unwrap to the original
    return new, joints


def _source_of(forward: types.FunctionType) -> ast.FunctionDef:
    """The syntax tree of forward without decorators, annotations and the values of defaults."""
    try:
        lines, first = inspect.getsourcelines(forward)
        (tree,) = ast.parse(textwrap.dedent("".join(lines))).body
    except (OSError, SyntaxError, ValueError):
        raise RewriteError("the source of its forward can't be read") from None
    if not isinstance(tree, ast.FunctionDef):
        raise RewriteError("its forward is no plain function")
    ast.increment_lineno(tree, first - 1)
    tree.decorator_list, tree.returns = [], None
    for arg in ast.walk(tree.args):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    nothing = ast.copy_location(ast.Constant(None), tree)
    tree.args.defaults = [nothing for _ in tree.args.defaults]
    tree.args.kw_defaults = [default and nothing for default in tree.args.kw_defaults]
    # A file that was changed since, or a function whose source is another one's.
    same = _made(copy.deepcopy(tree), forward).__code__
    if not _alike(same, forward.__code__):
        raise RewriteError("the source of its forward is not what runs")
    return tree


def _made(tree: ast.FunctionDef, forward: types.FunctionType) -> Any:
    """The function that tree defines, on forward's globals."""
    module = ast.fix_missing_locations(ast.Module([tree], []))
    code = compile(
        module, forward.__code__.co_filename, "exec", flags=forward.__code__.co_flags & _FUTURE, dont_inherit=True
    )
    namespace: dict[str, Any] = {}
    exec(code, forward.__globals__, namespace)
    return namespace[tree.name]


def _alike(a: types.CodeType, b: types.CodeType) -> bool:
    """Whether two code objects do the same, wherever they stand."""
    fields = ("co_code", "co_names", "co_varnames", "co_cellvars", "co_freevars", "co_argcount")
    if any(getattr(a, field) != getattr(b, field) for field in fields) or len(a.co_consts) != len(b.co_consts):
        return False
    if (a.co_flags ^ b.co_flags) & ~inspect.CO_NESTED:  # whose class stands inside a function
        return False
    return all(
        _alike(x, y) if isinstance(x, types.CodeType) and isinstance(y, types.CodeType) else x == y
        for x, y in zip(a.co_consts, b.co_consts, strict=True)
    )


def _join(tree: ast.FunctionDef) -> Joints:
    """Rewrite the patterns in tree in place."""
    added, forked = [], []
    for statements in _blocks(tree):
        for i, first in enumerate(statements[:-1]):
            target, value = _assigned(first)
            if target is None:
                continue
            if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
                alias, aliased = _assigned(statements[i + 1])
                copies = alias is not None and isinstance(aliased, ast.Name) and aliased.id == target
                j = i + 2 if copies and alias != target else i + 1
                call = _norm_call(statements[j], target) if j < len(statements) else None
                if call is not None:
                    added.append(call.func.attr)  # type: ignore[attr-defined]
                    statements[i] = _call(first, "add_norm", target, call, [value.left, value.right])
                    statements[j] = _Replace(call).visit(statements[j])
            elif isinstance(value, ast.Name) and value.id != target:
                call = _norm_call(statements[i + 1], value.id)
                if call is not None and not _is_joined(statements[i - 1] if i else None, value.id):
                    forked.append(call.func.attr)  # type: ignore[attr-defined]
                    statements[i] = _call(first, "fork_norm", target, call, [ast.Name(value.id, ast.Load())])
                    statements[i + 1] = _Replace(call).visit(statements[i + 1])
    return Joints(tuple(added), tuple(forked))


def _is_joined(statement: ast.stmt | None, name: str) -> bool:
    """Whether statement, rewritten, assigns a sum of that name."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Tuple):
        return False
    return any(isinstance(each, ast.Name) and each.id == name for each in statement.targets[0].elts)


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield block


def _assigned(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """The name and the value of a statement ``name = value``."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    return None, None


def _norm_call(statement: ast.stmt, name: str) -> ast.Call | None:
    """The one call ``self.child(name)`` that a simple statement makes for certain and once, before name changes."""
    if not isinstance(statement, (ast.Assign, ast.Expr, ast.Return)) or statement.value is None:
        return None
    found: list[ast.Call] = []
    waiting: list[ast.AST] = [statement.value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.IfExp, ast.BoolOp, ast.Lambda, ast.comprehension, ast.NamedExpr, ast.Await)):
            return None
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "self"
            and len(node.args) == 1
            and not node.keywords
            and isinstance(node.args[0], ast.Name)
            and node.args[0].id == name
        ):
            found.append(node)
        waiting += ast.iter_child_nodes(node)
    return found[0] if len(found) == 1 else None


def _call(statement: ast.stmt, function: str, target: str, norm: ast.Call, arguments: list[ast.expr]) -> ast.stmt:
    """``normed, target = function(norm, *arguments)`` in statement's place."""
    names: list[ast.expr] = [ast.Name(_NORMED, ast.Store()), ast.Name(target, ast.Store())]
    called = ast.Call(ast.Name(function, ast.Load()), [norm.func, *arguments], [])
    return ast.copy_location(ast.Assign([ast.Tuple(names, ast.Store())], called), statement)


class _Replace(ast.NodeTransformer):
    """Puts the normed value in the place of one call."""

    def __init__(self, call: ast.Call) -> None:
        self.call = call

    def visit_Call(self, node: ast.Call) -> ast.AST:
        return ast.copy_location(ast.Name(_NORMED, ast.Load()), node) if node is self.call else self.generic_visit(node)
