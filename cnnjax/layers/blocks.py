"""A convolution followed by batch normalization: the part from which the networks for photos are built."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.layers.depthwise import depthwise_conv2d, plain_depthwise_conv2d, strided_conv2d
from cnnjax.layers.derivatives import in_plain_operations
from cnnjax.layers.ops import dense, plain_dense
from cnnjax.onednn import calls as onednn
from cnnjax.typing import Padding

# Built once: modules are static arguments of the step. Source: He et al. (2015), equation 14, as in torchvision.
HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
UNIFORM_FAN_IN = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # As in PyTorch's linear layers.


def padding_of(image: Float[Array, "B H W C"], kernel_size: int, stride: int, same: bool) -> Padding:
    """Returns the zeros around an image: those of TensorFlow's SAME, or equally many on both sides as in PyTorch."""

    def pad(n: int) -> tuple[int, int]:
        both = max((-(-n // stride) - 1) * stride + kernel_size - n, 0) if same else kernel_size // 2 * 2
        return both // 2, both - both // 2

    return pad(image.shape[1]), pad(image.shape[2])


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalization, and optionally a ReLU, in the dtype of its input.

    Parameters: kernel, norm/scale and norm/bias; statistics: norm/mean and norm/var.
    """

    features: int | None  # None: depthwise.
    kernel_size: int = 3  # Height and width.
    stride: int = 1
    relu: float | None = jnp.inf  # Its upper bound; None: no ReLU.
    same: bool = False  # Pads as TensorFlow's SAME, instead of equally on both sides as PyTorch.
    momentum: float = 0.9
    epsilon: float = 1e-5
    update_stats: bool = True
    plain: bool = False
    zero_init: bool = False  # Initialize the scale with 0.

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H2 W2 K"]:
        """Returns the features; in training, updates the running statistics, unless `update_stats` is false."""
        size, channels = (self.kernel_size, self.kernel_size), x.shape[-1]
        padding = padding_of(x, self.kernel_size, self.stride, self.same)
        if self.features is None:
            std = (2 / self.kernel_size**2) ** 0.5  # One filter per channel.
            kernel = self.param("kernel", nn.initializers.normal(std), (*size, 1, channels), jnp.float32)
            convolve = plain_depthwise_conv2d if self.plain else depthwise_conv2d
            x = convolve(x, kernel[:, :, 0], padding, self.stride)
        else:
            kernel = self.param("kernel", HE_FAN_OUT, (*size, channels, self.features), jnp.float32)
            by_onednn = jax.default_backend() == "cpu" and onednn.in_use(x.dtype)
            if self.kernel_size > 1 or in_plain_operations() or by_onednn:
                x = strided_conv2d(x, kernel, padding, self.stride, plain=self.plain)
            else:
                x = x[:, :: self.stride, :: self.stride]
                y = (plain_dense if self.plain else dense)(x.reshape(-1, channels), kernel[0, 0])  # [B*H*W K]
                x = y.reshape(*x.shape[:-1], self.features)
        fixed = not (train and self.update_stats)
        options: Any = {"scale_init": nn.initializers.zeros_init()} if self.zero_init else {}
        norm = nn.BatchNorm(fixed, momentum=self.momentum, epsilon=self.epsilon, dtype=x.dtype, name="norm", **options)
        x = norm(x)
        return x if self.relu is None else jnp.clip(x, 0, self.relu)


class Head(nn.Module):
    """The dense layer that returns the logits, in float32."""

    num_classes: int
    plain: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B N"]) -> Float[Array, "B K"]:
        """Returns the logits."""
        kernel = self.param("kernel", UNIFORM_FAN_IN, (x.shape[-1], self.num_classes), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.num_classes,), jnp.float32)
        return (plain_dense if self.plain else dense)(x, kernel) + bias[None]
