"""Learning rates, optimisers, and the moving average of parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jeagle.config import TrainConfig
from jeagle.run.parameters import ALL_TRAINED, SCHEDULE_FREE_B1, Trained, path_names
from jeagle.runtime.xla_workarounds import clip_by_global_norm


def learning_rate(config: TrainConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` of the steps, then what the schedule says.

    cosine and linear fall to 0 over the rest; wsd stays and falls to 0 linearly over the last `decay` of the steps
    (warm-up, stable, decay: arXiv 2404.06395); constant stays, as schedule_free always does.
    """
    warmup = max(round(config.warmup * steps), 1)
    peak, rest = config.learning_rate, max(steps - warmup, 1)
    falling = min(max(round(config.decay * steps), 1), rest)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "wsd": optax.linear_schedule(peak, 0.0, falling, transition_begin=rest - falling),
        "constant": optax.constant_schedule(peak),
    }["constant" if config.optimizer == "schedule_free" else config.schedule]
    # The first step already moves: warm-up counts from 1.
    return lambda step: jnp.where(step < warmup, peak * (step + 1) / warmup, after(step - warmup))


def stop_frozen_gradients(draft: Any, trained: Trained) -> Any:
    """The draft, such that no gradient reaches what is not trained: none is computed, nor counted in its norm."""
    return jax.tree.map(
        lambda x, label: x if label == "train" else jax.lax.stop_gradient(x), draft, _trained_or_frozen(draft, trained)
    )


def make_optimiser(
    config: TrainConfig, rate: optax.Schedule, *, trained: Trained = ALL_TRAINED
) -> optax.GradientTransformation:
    """Clip by global norm, then the chosen optimiser; what is not `trained` stays, and has no moments.

    Args:
      trained: which parameters move.
    """
    parts = [clip_by_global_norm(config.clip)] if config.clip else []
    both = optax.chain(*parts, OPTIMISERS[config.optimizer](config, rate))
    return optax.partition(
        {"train": both, "frozen": optax.set_to_zero()}, lambda state: _trained_or_frozen(state, trained)
    )


def _adamw(config: TrainConfig, rate: optax.Schedule, *, b1: float = 0.9) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=b1, b2=config.beta2, eps=1e-8, weight_decay=config.weight_decay)


def _muon(config: TrainConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Source: Jordan et al., Muon (2024); updates of AdamW's size as in arXiv 2502.16982."""
    muon = optax.contrib.muon(rate, weight_decay=config.weight_decay, consistent_rms=0.2, adam_learning_rate=rate)

    def label(path: tuple[str, ...], x: Any) -> str:
        # lm_head has a row for each token: no linear map between features, so that AdamW suits it better.
        return "muon" if x.ndim == 2 and path[-1] != "lm_head" else "adamw"

    return optax.partition({"muon": muon, "adamw": _adamw(config, rate)}, lambda state: _labels(state, label))


def _adafactor(config: TrainConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Factored second moments and no first ones: moments of rows and columns only. Source: arXiv 1804.04235."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _schedule_free(config: TrainConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW whose momentum is an average of iterates. Source: The Road Less Scheduled (arXiv 2405.15682)."""
    return optax.contrib.schedule_free(_adamw(config, rate, b1=0.0), rate, b1=SCHEDULE_FREE_B1)


OPTIMISERS: dict[str, Callable[[TrainConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
    "adafactor": _adafactor,
    "schedule_free": _schedule_free,
}


def _trained_or_frozen(state: Any, trained: Trained) -> Any:
    return _labels(state, lambda path, _: "train" if trained(path) else "frozen")


def _labels(state: Any, label: Callable[[tuple[str, ...], Any], str]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, x: label(path_names(jax.tree_util.keystr(path)), x), state)


def moving_average(average: Any, draft: Any, step: jax.Array, decay: float) -> Any:
    """The exponential moving average of parameters after step number `step` (from 0), which it begins with.

    Early on it forgets faster, min(decay, (1 + step) / (10 + step)), so that the start does not stay in it.
    """
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - keep) * (new - old), average, draft)
