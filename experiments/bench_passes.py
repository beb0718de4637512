"""Does a pass cost what it uses? Wall time of a training step and of decoding against the passes that tokens run.

    python -m experiments.bench_passes [--layouts D*4 G*4 DG*2] [--rows 4] [--tokens 675] [--rounds 5] [--json]

* `share` of the tokens live on in passes 2 to 4, the others run one pass. Which they are is written into the model:
  half of the vocabulary has embeddings so large that a layer's update is small beside them, and the gates read that.
* proportional = t_1 + (n - 1) / (K - 1) (t_K - t_1): t_1 and t_K the times of one pass and of K passes for all tokens,
  measured in the same rounds, n the mean passes run. `ratio` is the time over that.
* Each living share is measured under context "all" and "alive" (gt_jax.configs.model.AdaptiveConfig). Tokens live at
  random, so that rows differ in how many do; with --even every row has the same number.
* Decoding reads `--decoded` given tokens one at a time, in one compiled loop, a batch of --decoding-rows.
* Rounds take turns over the cases, and the least time counts: what the machine does beside only adds. Beside the wall
  time stands that of the processors together, which others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pages import markdown_table
from experiments.training_measured.report import note
from gt_jax.configs.model import AdaptiveConfig, DeltaNetConfig, GSAConfig, ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.devices.sharding import Rules
from gt_jax.errors import refuse_all, run_command
from gt_jax.models.language_model import (
    LanguageModel,
    apply_network,
    empty_cache,
    fixed_passes,
    free_passes,
    initialise,
)
from gt_jax.options import at_least
from gt_jax.training.optimizer import make_optimizer
from gt_jax.training.state import new_state
from gt_jax.training.step import make_step
from gt_jax.typing import Tree

STEPS = 10**6  # of the schedule: no step comes near a change of phase
CASES = ("one", "most", "all", "alive")
HEAD = ("layout", "what", "time", "alive", "passes", "one pass", "all passes", "proportional", "context all",
        "context alive", "ratio")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser().parse_args(argv)
    refuse_all(problems(options), "these arguments cannot be measured:")
    found = [measured(layout, what, share, options)
             for layout in options.layouts for what in options.what for share in options.shares]  # fmt: skip
    lines = [line for one in found for line in rows_of_table(one)]
    print(json.dumps(found, indent=1) if options.json else "\n".join(markdown_table(lines, HEAD)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layouts", nargs="+", default=["D*4", "G*4", "DG*2"])
    p.add_argument("--what", nargs="+", choices=("step", "decoding"), default=["step", "decoding"])
    p.add_argument("--shares", nargs="+", type=float, default=[0.25], help="of tokens that live on (0.25)")
    p.add_argument("--lengths", nargs="+", type=float, default=list(AdaptiveConfig().lengths),
                   help="shares of a row that a pass is compiled for (the default of a model)")
    p.add_argument("--even", action="store_true", help="as many living tokens in every row")
    p.add_argument("--width", type=at_least(0), default=64)
    p.add_argument("--rows", type=at_least(0), default=4)
    p.add_argument("--tokens", type=at_least(0), default=675, help="of a row (675)")
    p.add_argument("--decoded", type=at_least(0), default=64)
    p.add_argument("--decoding-rows", type=at_least(0), default=1)
    p.add_argument("--rounds", type=at_least(0), default=5)
    p.add_argument("--remat", default="pass", choices=("none", "pass", "layer", "block"))
    p.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    return p


def problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments."""
    counts = ("width", "rows", "tokens", "decoded", "decoding_rows", "rounds")
    wrong = [f"--{name.replace('_', '-')} {value}: at least 1 is needed"
             for name in counts if (value := getattr(options, name)) < 1]  # fmt: skip
    return wrong + [f"--shares {share:g}: it must lie in 0 to 1" for share in options.shares if not 0 <= share <= 1]


def model(layout: str, context: Any, options: argparse.Namespace) -> ModelConfig:
    """A byte model of this width, with heads of 16."""
    width, heads = options.width, max(options.width // 16, 1)
    return ModelConfig(
        layout=layout, width=width, vocab=264, mlp_width=2 * width, remat=options.remat,
        deltanet=DeltaNetConfig(heads, heads, 16, 16, chunk_size=32),
        gsa=GSAConfig(heads, 16, indexer_heads=min(heads, 2), indexer_width=16, k_base=64, k_min=16, k_max=128),
        adaptive=AdaptiveConfig(context=context, lengths=tuple(options.lengths)),
    )  # fmt: skip


def gated_by_token(variables: Tree) -> Tree:
    """The variables with gates that are open for tokens below 128 and shut for the others, in every layer and pass.

    p = sigmoid(1e5 |dh|/|h| - 30): |h| of the others is ten million times larger, and a layer's update is not.
    """
    params = jax.tree.map(np.array, variables["params"])
    params["embedding"]["table"][128:] *= 1e7
    for name in (name for name in params if name.startswith("segment")):
        for layer in params[name].values():
            head = layer["halting"]
            head["hidden"]["w"][:] = head["output"]["w"][:] = head["hidden"]["b"][:] = 0
            head["hidden"]["w"][:, 0, 0], head["output"]["w"][:, 0], head["output"]["b"][:] = 1e5, 1.0, -30.0
    return {**variables, "params": params}


def rows_of(share: float, rows: int, tokens: int, even: bool) -> np.ndarray:
    """Rows of tokens, this share of them below 128, at random places."""
    random = np.random.default_rng(0)
    below, above = random.integers(0, 128, (2, rows, tokens))
    order = random.random((rows, tokens))
    lives = np.argsort(np.argsort(order, axis=1), axis=1) < round(share * tokens) if even else order < share
    return np.where(lives, below, 128 + above).astype(np.int32)


def training(layout: str, case: str, tokens: np.ndarray, options: argparse.Namespace) -> Callable[[], float]:
    """A training step of a case: call it to run one; passes run, of the last one."""
    forced = {"one": 1, "most": 4}.get(case, 0)
    upto = 1.0 if forced else 0.0
    price = PriceConfig(forced_until=upto, price_from=upto, clipped_until=upto, forced_passes=max(forced, 1),
                        audit_every=STEPS)  # fmt: skip
    config = model(layout, "alive" if case == "alive" else "all", options)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-12, warmup=0.0, weight_decay=0.0), STEPS)
    state = new_state(gated_by_token(initialise(config, 0)), optimizer, price)
    held = [state._replace(step=state.step + 1)]
    step = make_step(config, price, optimizer, STEPS, Rules())
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "segment_ids": np.ones_like(tokens)}

    def once() -> float:
        held[0], metrics = step(held[0], batch)
        return float(np.mean(metrics["passes_run"]))

    return once


def decoding(layout: str, case: str, tokens: np.ndarray, options: argparse.Namespace) -> Callable[[], float]:
    """Reading the rows a token at a time: call it to read all; passes run, of all of them."""
    config = model(layout, "alive" if case in ("alive", "one", "most") else "all", options)
    variables, network = gated_by_token(initialise(config, 0)), LanguageModel(config)
    forced = {"one": 1, "most": 4}.get(case, 0)
    control = fixed_passes(forced) if forced else free_passes()

    @jax.jit
    def read(variables: Tree, tokens: jax.Array) -> jax.Array:
        def step(cache: Tree, token: jax.Array) -> tuple[Tree, tuple[jax.Array, jax.Array]]:
            output = apply_network(network, variables, token[:, None], control=control, cache=cache)
            return output.cache, (jnp.sum(output.statistics.alive, axis=-1), output.logits)

        _, (passes, logits) = jax.lax.scan(step, empty_cache(config, *tokens.shape), tokens.T)
        return jnp.mean(passes) + 0 * jnp.sum(logits)

    return lambda: float(read(variables, tokens))


def measured(layout: str, what: str, share: float, options: argparse.Namespace) -> dict[str, Any]:
    """All cases of one layout, in turns."""
    training_rows = (options.rows, options.tokens)
    shape = training_rows if what == "step" else (options.decoding_rows, options.decoded)
    tokens = rows_of(share, *shape, options.even)
    make = training if what == "step" else decoding
    calls: dict[str, Callable[[], float]] = {}
    passes: dict[str, float] = {}
    seconds: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    for case in CASES:
        calls[case] = make(layout, case, tokens, options)
        started = time.perf_counter()
        passes[case] = calls[case]()
        note(f"{layout} {what} {case}: {passes[case]:.3f} passes, first call {time.perf_counter() - started:.1f} s")
        calls[case]()
    for _ in range(options.rounds):
        for case, call in calls.items():
            wall, processors = time.perf_counter(), time.process_time()
            call()
            seconds[case].append((time.perf_counter() - wall, time.process_time() - processors))
    found: dict[str, Any] = {"layout": layout, "what": what, "share": share, "passes": passes["alive"],
                             "rounds": seconds}  # fmt: skip
    for index, name in enumerate(("wall", "processors")):
        best = {case: min(each[index] for each in times) for case, times in seconds.items()}
        proportional = best["one"] + (found["passes"] - 1) / 3 * (best["most"] - best["one"])
        ratio = {case: best[case] / proportional for case in ("all", "alive")}
        found[name] = {"seconds": best, "proportional": proportional, "ratio": ratio}
    return found


def rows_of_table(found: dict[str, Any]) -> list[list[str]]:
    """Two lines of the table, wall time and that of the processors together, in milliseconds."""
    lines = []
    for name in ("wall", "processors"):
        best, proportional = found[name]["seconds"], found[name]["proportional"]
        times = [best["one"], best["most"], proportional, best["all"], best["alive"]]
        lines.append([found["layout"], found["what"], name, f"{found['share']:g}", f"{found['passes']:.2f}",
                      *(f"{1000 * each:.0f}" for each in times),
                      "{all:.2f}, {alive:.2f}".format(**found[name]["ratio"])])  # fmt: skip
    return lines


if __name__ == "__main__":
    run_command(main)
