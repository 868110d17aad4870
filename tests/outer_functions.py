"""Type checks of outer functions only.

jaxtyping generates and compiles the check of a function whenever its definition is run: that of an inner function, a
few milliseconds in each call of the outer one, doubled the time of tracing a network. Imported before cnnjax.
"""

import ast

from jaxtyping._import_hook import JaxtypingTransformer

_visit = JaxtypingTransformer.visit_FunctionDef


def _visit_outer(self, node):
    return node if any(isinstance(parent, ast.FunctionDef) for parent in self._parents) else _visit(self, node)


JaxtypingTransformer.visit_FunctionDef = _visit_outer
