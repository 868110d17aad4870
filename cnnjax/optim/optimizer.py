"""The optimizer of a `Config`: a base class with what every recipe shares."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from cnnjax.errors import UserError, check, check_name, describe, describe_shapes, user_code
from cnnjax.fields import check_fields
from cnnjax.optim.transforms import average, delay, lookahead


@dataclass(frozen=True)
class ParamGroup:
    """Parameters with a learning rate of their own."""

    pattern: str
    """A regular expression, searched for in parameter paths such as Conv_0/kernel. The first matching group applies."""
    multiplier: float = 1.0
    """Factor on the learning rate. Without `weight_decay`, the weight decay per update stays the same."""
    num_epochs: int | None = None
    """Number of epochs after which the learning rate is 0; 0: frozen from the start, None: never."""
    start_epoch: int = 0
    """Number of epochs before which the parameters are frozen, as if training began then."""
    weight_decay: float | None = None
    """Weight decay per update of these parameters, multiplied by their learning rate."""

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"`pattern` must be a regular expression, got {self.pattern!r} ({error}).") from error
        check("multiplier", "above 0 and finite (`num_epochs=0` freezes)", 0 < self.multiplier < inf, self.multiplier)
        check("num_epochs", "at least 0", self.num_epochs is None or self.num_epochs >= 0, self.num_epochs)
        check("start_epoch", "at least 0", self.start_epoch >= 0, self.start_epoch)
        empty = self.num_epochs is not None and 0 < self.num_epochs <= self.start_epoch
        check("num_epochs", f"above the `start_epoch` {self.start_epoch}", not empty, self.num_epochs)
        valid = self.weight_decay is None or 0 <= self.weight_decay < inf
        check("weight_decay", "at least 0 and finite", valid, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """The base class of optimizers. A subclass defines `transform`, and its fields become options."""

    learning_rate: float = 1e-3
    """Learning rate for the mean loss of a batch; the peak of a schedule."""
    schedule: str = "constant"
    """constant; one_cycle: a linear warm-up to the peak, then a linear decay; or cosine: the decay is half a cosine
    (Loshchilov and Hutter 2016)."""
    warmup: float = 0.2
    """Fraction of all updates in which one_cycle and cosine rise."""
    init_factor: float = 0.0
    """First learning rate of one_cycle and cosine, as a fraction of the peak."""
    end_factor: float = 0.0
    """Last learning rate of one_cycle and cosine, as a fraction of the peak."""
    weight_decay: float = 0.0
    """Weight decay per update, multiplied by the learning rate."""
    clip_norm: float = 0.0
    """Maximum global norm of the gradients; 0: unlimited."""
    accumulate_steps: int = 1
    """Batches accumulated per update; an incomplete final group is dropped. Above 1, the optimizer receives no `value`,
    `grad` or `value_fn`."""
    lookahead: int = 0
    """Synchronize with the slow weights every this many updates (Zhang et al. 2019); 0: never."""
    groups: tuple[ParamGroup, ...] = ()
    """Parameters with another learning rate, or frozen in some epochs."""
    freeze_epochs: int = 0
    """Number of epochs in which only the head of the network is trained, for fine-tuning. Needs its `depths`."""
    depth_decay: float = 1.0
    """Factor on the learning rate for each layer below the head (Clark et al. 2020). Needs the network's `depths`."""
    ema: float = 0.0
    """Decay of a moving average of the parameters, which is evaluated in place of them; 0: none."""

    def __post_init__(self) -> None:
        for name, rule in (("schedule", "a str"), ("learning_rate", "a float")):
            got = "a function. Override `make_schedule(self, num_updates)` in a subclass, and return it there"
            check(f"optim.{name}", rule, not callable(getattr(self, name)), got)
        check_fields(self, "optim")
        check_name("optim.schedule", self.schedule, ("constant", "one_cycle", "cosine"))
        check("optim.learning_rate", "above 0 and finite", 0 < self.learning_rate < inf, self.learning_rate)
        check("optim.warmup", "at least 0 and below 1", 0 <= self.warmup < 1, self.warmup)
        for name in ("init_factor", "end_factor"):
            check(f"optim.{name}", "between 0 and 1", 0 <= getattr(self, name) <= 1, getattr(self, name))
        for name in ("weight_decay", "clip_norm"):
            check(f"optim.{name}", "at least 0 and finite", 0 <= getattr(self, name) < inf, getattr(self, name))
        check("optim.accumulate_steps", "at least 1", self.accumulate_steps >= 1, self.accumulate_steps)
        check("optim.lookahead", "at least 0", self.lookahead >= 0, self.lookahead)
        check("optim.freeze_epochs", "at least 0", self.freeze_epochs >= 0, self.freeze_epochs)
        check("optim.depth_decay", "above 0 and at most 1", 0 < self.depth_decay <= 1, self.depth_decay)
        check("optim.ema", "at least 0 and below 1", 0 <= self.ema < 1, self.ema)
        patterns = [group.pattern for group in self.groups]
        check("optim.groups", "of distinct patterns", len({*patterns}) == len(patterns), patterns)

    @abstractmethod
    def transform(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        """Returns the update rule, without what this class adds: clipping, groups, accumulation, lookahead.

        Args:
          learning_rate: a function of the number of updates so far.
        """

    def make_schedule(self, num_updates: int) -> optax.Schedule:
        """Returns the learning rate as a function of the number of updates so far, for a run of `num_updates`.

        A subclass may override this; `num_updates` is small when only the structure of the optimizer's state is needed.
        """
        if self.schedule == "constant":
            return optax.constant_schedule(self.learning_rate)
        peak, rise = self.learning_rate, round(self.warmup * num_updates)
        up = optax.linear_schedule(self.init_factor * peak, peak, rise)
        if self.schedule == "cosine":
            down = optax.cosine_decay_schedule(peak, max(1, num_updates - rise), self.end_factor)
        else:
            down = optax.linear_schedule(peak, self.end_factor * peak, num_updates - rise)
        return optax.join_schedules([up, down], [rise])

    def for_network(self, model: Any) -> "Optimizer":
        """Returns the optimizer with a group for each layer of a network, if `freeze_epochs` or `depth_decay` is set.

        Args:
          model: has a method `depths`, which returns the top-level names in its parameters from input to head.

        Raises:
          UserError: it has no such method.
        """
        if not self._needs_network():
            return self
        if not hasattr(model, "depths"):
            raise UserError(
                "`model` must have a method depths() -> tuple of the top-level names of its parameters, from input to "
                f"head, for `optim.freeze_epochs` and `optim.depth_decay`, got {type(model).__name__} without it. Set "
                "`optim.groups` instead."
            )
        with user_code("`model.depths`"):
            names = tuple(model.depths())
        valid = all(isinstance(name, str) for name in names) and len({*names}) == len(names)
        check("model.depths", "a method that returns different names", valid, names)
        layers = tuple(
            ParamGroup(
                f"^{re.escape(name)}(/|$)",
                multiplier=self.depth_decay**below,
                start_epoch=self.freeze_epochs if below else 0,
                weight_decay=self.weight_decay,
            )
            for below, name in enumerate(reversed(names))
        )
        return replace(self, groups=(*self.groups, *layers), freeze_epochs=0, depth_decay=1.0)

    def _needs_network(self) -> bool:
        return self.freeze_epochs > 0 or self.depth_decay < 1

    def _timed_groups(self) -> list[ParamGroup]:
        return [group for group in self.groups if group.num_epochs or group.start_epoch]

    def make_tx(self, num_steps: int, num_epochs: int | None = None) -> optax.GradientTransformation:
        """Returns the optimizer for a run of `num_steps` batches in `num_epochs` epochs.

        Only groups that are frozen in some epochs need `num_epochs`.

        Raises:
          UserError: the run is too short for `accumulate_steps` or `lookahead`, or (in `init`) a group matches no
            parameter; or `num_epochs` or a call of `for_network` is missing although it is necessary.
        """
        if self._needs_network():
            raise UserError(
                "`optim.freeze_epochs` must be 0 and `optim.depth_decay` 1 without a network, got "
                f"{self.freeze_epochs} and {self.depth_decay}. Call `for_network(model)` first."
            )
        if not num_epochs and (timed := self._timed_groups()):
            raise UserError(
                f"`num_epochs` must be the number of epochs of the run for `optim.groups` that are frozen in some of "
                f"them, such as {timed[0].pattern!r}, got {num_epochs}. Call `make_tx(num_steps, num_epochs)`."
            )
        updates = num_steps // self.accumulate_steps
        rule = f"at most the {num_steps} steps of the run"
        check("optim.accumulate_steps", rule, updates > 0, self.accumulate_steps)
        check("optim.lookahead", f"at most the {updates} updates of the run", self.lookahead <= updates, self.lookahead)
        schedule = _one_rate(self.make_schedule(updates))
        tx = self.transform(schedule)
        if self.groups:
            txs = {group.pattern: self._group_tx(group, schedule, updates, num_epochs or 1) for group in self.groups}
            tx = optax.partition({**txs, REST: tx}, partial(param_labels, groups=self.groups))
        if self.clip_norm:
            tx = optax.chain(optax.clip_by_global_norm(self.clip_norm), tx)
        if self.lookahead:
            tx = lookahead(tx, self.lookahead, updates)
        if self.ema:
            tx = average(tx, self.ema)
        if self.accumulate_steps > 1:
            tx = optax.MultiSteps(
                _of_gradients_alone(tx, self.accumulate_steps), self.accumulate_steps
            ).gradient_transformation()
        return tx

    def _group_tx(
        self, group: ParamGroup, schedule: optax.Schedule, updates: int, num_epochs: int
    ) -> optax.GradientTransformation:
        if group.num_epochs == 0:
            return optax.set_to_zero()
        start, end = _first_update(group, updates, num_epochs), _last_update(group, updates, num_epochs)

        def learning_rate(update: Any) -> Any:
            rate = schedule(update + start) if start else schedule(update)
            # Not a factor on the update, which would change how XLA rounds it.
            return group.multiplier * (rate if end is None else jnp.where(jnp.asarray(update) < end - start, rate, 0.0))

        decay = self.weight_decay / group.multiplier if group.weight_decay is None else group.weight_decay
        tx = replace(self, weight_decay=decay).transform(learning_rate)
        return delay(tx, start) if start else tx

    def frozen(self, params: PyTree, step: int, num_steps: int, num_epochs: int) -> tuple[str, ...]:
        """Returns the top-level names in `params`, if it is a dict, whose gradients affect no update from `step` on."""
        if self.clip_norm or not isinstance(params, dict):  # The global norm depends on every gradient.
            return ()
        updates, update = num_steps // self.accumulate_steps, step // self.accumulate_steps
        frozen = set()
        for group in self.groups:
            start, end = _first_update(group, updates, num_epochs), _last_update(group, updates, num_epochs)
            if update < start or (end is not None and update >= end):
                frozen.add(group.pattern)
        labels = param_labels(params, self.groups)
        return tuple(name for name in params if frozen.issuperset(jax.tree.leaves(labels[name])))

    def depends_on_length(self) -> bool:
        """Returns whether an update depends on the number of updates that follow it."""
        methods = ("make_schedule", "make_tx")
        custom = any(getattr(type(self), name) is not getattr(Optimizer, name) for name in methods)
        timed = self.freeze_epochs or self._timed_groups()
        rounded = self.accumulate_steps > 1 and bool(timed)
        return custom or self.schedule != "constant" or self.lookahead > 0 or rounded


def _of_gradients_alone(tx: optax.GradientTransformation, accumulate_steps: int) -> optax.GradientTransformation:
    """Returns `tx` without the arguments `value`, `grad` and `value_fn`, which belong to the last batch only."""

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        try:
            return tx.update(updates, state, params)
        except (TypeError, KeyError) as error:
            if not re.search(r"'(value|grad|value_fn)'", str(error)):
                raise
            raise UserError(
                "`optim.accumulate_steps` must be 1 for an optimizer that needs `value`, `grad` or `value_fn`, which "
                f"belong to the last batch only, got {accumulate_steps}: {describe(error)}"
            ) from error

    return optax.GradientTransformation(tx.init, update)


def _one_rate(schedule: optax.Schedule) -> optax.Schedule:
    """Returns a schedule that checks that its learning rate is one number: an array would scale each channel alone."""
    rule = "a method that returns a function of the number of updates"
    check("optim.make_schedule", rule, callable(schedule), schedule)

    def learning_rate(update: Any) -> Any:
        rate = schedule(update)
        valid = jnp.shape(rate) == ()
        check("optim.make_schedule", f"{rule}, a single rate", valid, describe_shapes(rate))
        return rate

    return learning_rate


REST = "(the other parameters)"


def param_labels(params: PyTree, groups: tuple[ParamGroup, ...]) -> PyTree:
    """Labels each parameter with the pattern of its group.

    Raises:
      UserError: a group matches no parameter.
    """

    def label(name: str) -> str:
        return next((group.pattern for group in groups if re.search(group.pattern, name)), REST)

    names = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params)
    labels = jax.tree.map(label, names)
    if unused := {group.pattern for group in groups} - {*jax.tree.leaves(labels)}:
        names = jax.tree.leaves(names)
        raise UserError(f"`optim.groups` must each match a parameter, got {min(unused)!r}. Parameters: {names}.")
    return labels


def _first_update(group: ParamGroup, updates: int, num_epochs: int) -> int:
    """Returns the number of updates before which a group is frozen."""
    return round(updates * group.start_epoch / num_epochs)


def _last_update(group: ParamGroup, updates: int, num_epochs: int) -> int | None:
    """Returns the number of updates after which a group is frozen, or None."""
    return None if group.num_epochs is None else round(updates * group.num_epochs / num_epochs)
