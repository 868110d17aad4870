"""A tiny network, and class names that need to be escaped."""

import flax.linen as nn

NAMES = ("<b>&\"'", "قط", "🐈 cat", "</script><script>alert(1)</script>", *(f"class {k}" for k in range(4, 10)))


class Tiny(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, image):
        x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3))(image)), (2, 2), strides=(2, 2))
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))
