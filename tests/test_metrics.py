import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import UserError
from cnnjax.metrics import call_metrics


def test_scores_may_be_numbers_of_every_library():
    values = {"int": 1, "bool": True, "numpy": np.float16(0.5), "array": np.array(2), "bfloat16": jnp.bfloat16(0.25)}
    seen = []

    def metrics(logits, label):
        seen.append((logits.dtype, label.dtype))
        logits[:], label[:] = 0, 0
        return values

    logits, label = jnp.ones((2, 3), jnp.bfloat16), np.array([1, 2], np.int64)
    assert call_metrics(metrics, logits, label) == {"int": 1, "bool": 1, "numpy": 0.5, "array": 2, "bfloat16": 0.25}
    assert seen == [(np.float32, np.int32)] and label.tolist() == [1, 2]
    with pytest.raises(UserError, match=r"`metrics` must return \{name: number\}, got \{'a': \(1\+2j\)\}"):
        call_metrics(lambda logits, label: {"a": 1 + 2j}, logits, label)
    with pytest.raises(UserError, match=r"`metrics`: 'big' failed at .*OverflowError"):
        call_metrics(lambda logits, label: {"big": 10**400}, logits, label)
