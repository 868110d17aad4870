"""The array type that public functions accept."""

import numpy as np
from jaxtyping import Array

AnyArray = Array | np.ndarray
