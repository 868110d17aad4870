"""The names of the operations of a network, from the primitives of JAX."""

from collections.abc import Sequence

# Named functions that are one activation.
ACTIVATIONS = {
    "relu": "ReLU",
    "relu6": "ReLU6",
    "gelu": "GELU",
    "silu": "SiLU",
    "swish": "SiLU",
    "elu": "ELU",
    "selu": "SELU",
    "celu": "CELU",
    "leaky_relu": "leaky ReLU",
    "hard_swish": "hard SiLU",
    "hard_silu": "hard SiLU",
    "hard_sigmoid": "hard sigmoid",
    "softplus": "softplus",
    "mish": "Mish",
    "sigmoid": "sigmoid",
}
AFFINE = {"add", "sub", "mul", "div"}
NONLINEAR = {"max", "min", "clamp", "neg", "sign", "abs", "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic"}
NONLINEAR |= {"erf", "erfc", "square", "integer_pow", "pow", "sqrt", "rsqrt", "select_n", "ge", "gt", "le", "lt", "eq"}
BENDING = {"max", "min", "clamp", "abs", "exp", "exp2", "expm1", "log1p", "select_n"}
# They change the dtype or the shape, not the values.
UNCHANGED = {"convert_element_type", "reshape", "squeeze", "broadcast_in_dim", "copy", "reduce_precision"}
OPERATIONS = {
    "dot_general": "dense",
    "reduce_window_max": "max-pool",
    "reduce_window_sum": "average-pool",
    "concatenate": "concatenation",
}
REDUCTIONS = {"reduce_max": "maximum", "reduce_sum": "sum"}


def is_normalization(ops: Sequence[str]) -> bool:
    """Returns whether affine operations are a normalization: several, one of which scales."""
    return len(ops) > 1 and {*ops} <= AFFINE and not {"mul", "div"}.isdisjoint(ops)


def activation_name(ops: set[str]) -> str:
    """Returns the name of an activation, or "" if it is none: a sum of squares, for example."""
    for op in ops:
        if op in ACTIVATIONS:
            return ACTIVATIONS[op]
    if "max 0" in ops and ops <= {"max 0", "min inf", "min 6"}:
        return "ReLU6" if "min 6" in ops else "ReLU"
    if ops & {"erf", "erfc"} or ("tanh" in ops and "mul of both" in ops):
        return "GELU"
    if "logistic" in ops:
        return "SiLU" if "mul of both" in ops else "sigmoid"
    if "tanh" in ops:
        return "tanh"
    return "activation" if {op.split()[0] for op in ops} & BENDING else ""
