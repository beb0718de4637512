"""Every component in the whole model: causal, decoding equals the forward pass, chunks, stacks, early leaving."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import (
    AdaptiveConfig,
    DeltaNetConfig,
    ExitConfig,
    HyperConfig,
    MemoryConfig,
    ModelConfig,
    SlidingConfig,
    StackConfig,
)
from gt_jax.configs.price import PriceConfig
from gt_jax.devices.pods import hlo
from gt_jax.devices.sharding import Rules, make_mesh, put_like
from gt_jax.errors import Refused
from gt_jax.evaluation.generation import sample
from gt_jax.models.language_model import LanguageModel, abstract, apply_network, free_passes
from gt_jax.models.layers import block
from gt_jax.models.layers.compaction import bucket_lengths
from gt_jax.models.memory_chunks import forward_rows, over_chunks
from gt_jax.training.price import phase
from gt_jax.training.step import after_next_targets, make_loss
from tests.rarely import rarely
from tests.support import ATTENTION, RESOLVENT, decoded, full_model, perturbed, small_model, tokens

FULL = full_model()
GROUNDTHINK = ModelConfig(
    "DS", 32, 264, 48, deltanet=DeltaNetConfig(2, 2, 8, 8, variant="groundthink"),
    sliding=SlidingConfig(2, 8, window=5),
)  # fmt: skip
MODELS = {
    "all components": FULL,
    "batch halting": full_model().replace(adaptive=AdaptiveConfig(halting="batch", features="stream_mean")),
    "lambda": small_model("DG*2", False, stack=StackConfig("lambda", skips=((0, 2), (1, 3)))),
    "midpoint": small_model("DG*2", False, stack=StackConfig("midpoint")),
    "reversible": small_model("DG*2", False, stack=StackConfig("midpoint", mixing=1.0)),
    "exit": small_model("DG*2", False, exit=ExitConfig(threshold=0.6)),
    "exit, streams": small_model("DG", False, exit=ExitConfig(threshold=0.6), hyper=HyperConfig(streams=2)),
    "chunks": small_model("D", False, hyper=HyperConfig(streams=2), memory=MemoryConfig(chunk=12, stream=1)),
    "groundthink": GROUNDTHINK,
    "hybrid": small_model("DA", attention=ATTENTION.replace(post_norm=True)),
    "resolvent": small_model("DB", False, resolvent=RESOLVENT.replace(coupling="learned")),
}
# Under batch halting a token's passes depend on its batch; "all components" has what "chunks" has.
CAUSAL = [name for name in MODELS if name not in ("batch halting", "chunks")]


@pytest.fixture(autouse=True, scope="module")
def two_lengths():
    """Rows of half their tokens, and whole: each length is a program; of all of them: layers/test_early_exit.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "bucket_lengths", functools.partial(bucket_lengths, halvings=1))
        yield


def variables(name):
    return perturbed(MODELS[name])


@functools.cache
def program(name):
    return jax.jit(lambda v, x, ids: apply_network(LanguageModel(MODELS[name]), v, x, ids, mtp=True))


def run(name, v, x, ids=None):
    """The forward pass; rows are one document each where `ids` does not say otherwise, so that one program serves."""
    return program(name)(v, x, jnp.ones_like(x) if ids is None else ids)


@functools.cache
def rows(config):
    """The logits of rows that are run chunk by chunk."""
    return jax.jit(lambda v, x, ids: forward_rows(LanguageModel(config), v, x, ids, free_passes())[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [rarely(n) if n.startswith("exit") else n for n in CAUSAL]
)
def test_no_logit_depends_on_a_later_token(name):
    x = tokens(12)
    changed = x.at[:, 7].set((x[:, 7] + 1) % 257)
    a, b = (run(name, variables(name), t) for t in (x, changed))
    assert np.array_equal(a.logits[:, :7], b.logits[:, :7])
    assert not np.allclose(a.logits[:, 7:], b.logits[:, 7:])
    if a.mtp_logits is not None:  # they look one token ahead, no further
        assert np.array_equal(a.mtp_logits[:, :6], b.mtp_logits[:, :6])
        assert not np.allclose(a.mtp_logits[:, 6], b.mtp_logits[:, 6])


@pytest.mark.slow
@pytest.mark.parametrize("name", [rarely(name) if name == "midpoint" else name for name in CAUSAL
                                  if name not in ("reversible", "exit, streams")])
def test_decoding_equals_the_forward_pass(name):
    x, v = tokens(12), variables(name)
    whole = run(name, v, x).logits
    np.testing.assert_allclose(decoded(MODELS[name], v, x, 9)[0], whole, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all components", "groundthink", "exit"])
def test_documents_of_a_row_are_apart(name):
    x = tokens(12)
    ids = jnp.asarray([[1] * 7 + [2] * 5] * 2, jnp.int32)
    together = run(name, variables(name), x, ids).logits
    changed = x.at[:, 3].set((x[:, 3] + 1) % 257)
    again = run(name, variables(name), changed, ids).logits
    np.testing.assert_allclose(again[:, 7:], together[:, 7:], atol=1e-6)


@pytest.mark.exhaustive  # layers/test_reversible.py has the stack's gradients
def test_the_reversible_stack_has_the_gradients_of_the_scan():
    config = small_model("DG", False, moe=FULL.moe, stack=StackConfig("midpoint", mixing=1.0))
    v, x = perturbed(config), tokens(12)

    def loss(params, model):
        output, moved = model.apply({**v, "params": params}, x, mutable=["statistics"])
        return jnp.mean(output.logits**2) + jnp.sum(output.statistics.router_loss), (output.logits, moved)

    scan = jax.jit(jax.grad(lambda p: loss(p, _Scanned(config)), has_aux=True))
    backwards = jax.jit(jax.grad(lambda p: loss(p, LanguageModel(config)), has_aux=True))
    (wanted, (logits, moved)), (got, (logits_there, moved_there)) = scan(v["params"]), backwards(v["params"])
    np.testing.assert_allclose(logits_there, logits, atol=1e-5)
    chex.assert_trees_all_close(got, wanted, atol=1e-4, rtol=2e-3)
    chex.assert_trees_all_close(moved_there, moved, rtol=1e-4)


class _Scanned(LanguageModel):
    def _reversible(self, cache):
        return False


@pytest.mark.slow
def test_chunks_hand_their_memory_on_and_only_to_their_own_document():
    v, x, config = variables("chunks"), tokens(24), MODELS["chunks"]
    one_document = jnp.ones_like(x)
    two = jnp.asarray([[1] * 12 + [2] * 12] * 2, jnp.int32)
    together, divided = (rows(config)(v, x, ids)[:, 12:] for ids in (one_document, two))
    first = run("chunks", v, x[:, :12])
    second = jax.jit(lambda m: apply_network(LanguageModel(config), v, x[:, 12:], memory=m))(first.memory)
    np.testing.assert_allclose(together, second.logits, atol=1e-5)
    apart = run("chunks", v, x[:, 12:]).logits
    np.testing.assert_allclose(divided, apart, atol=1e-5)
    assert not np.allclose(together, apart, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "length"), [rarely(4, 20), rarely(12, 36), (26, 46)])
def test_sampling_goes_on_from_chunk_to_chunk(prompt, length):
    """Two chunks read and part of a third; what it has room for, two chunks and part of one written."""
    v, config = variables("chunks"), MODELS["chunks"]
    x = np.asarray(tokens(prompt), np.int32)
    drawn = sample(config, v, x, length, temperature=0.0, top_k=None)
    np.testing.assert_array_equal(sample(config, v, x, 40, temperature=0.0, top_k=None)[:, :length], drawn[:, :40])
    whole = jnp.concatenate([x, drawn], axis=1)
    logits = rows(config)(v, whole, jnp.ones_like(whole))
    # the first token of a chunk is drawn from the logits of the last token of the chunk before
    np.testing.assert_array_equal(drawn, jnp.argmax(logits[:, prompt - 1 : -1], axis=-1))


def test_rows_that_are_no_whole_chunks_are_refused():
    batch = {"tokens": jnp.zeros((2, 18), jnp.int32)}
    with pytest.raises(Refused, match=r"18 tokens.*chunk 12"):
        over_chunks(lambda carry, piece: (carry, ()), FULL, Rules(), (), batch)


def test_the_token_after_the_next_is_of_the_same_document():
    targets, segments = jnp.asarray([[5, 6, -1, 8, 9, -1]]), jnp.asarray([[1, 1, 1, 2, 2, 2]])
    assert after_next_targets(targets, segments).tolist() == [[6, -1, -1, 9, -1, -1]]
    # the last token of the first document has a target, as JSON lines of tokens and targets may
    ended, segments = jnp.asarray([[-1, 70, 71, 72]]), jnp.asarray([[1, 1, 2, 2]])
    assert after_next_targets(ended, segments).tolist() == [[-1, -1, 72, -1]]
    assert after_next_targets(ended, segments, 1).tolist() == [[-1] * 4]


@pytest.mark.slow
def test_tokens_leave_the_stack_and_pay_for_what_they_use():
    v, x = variables("exit"), tokens(12)
    sooner = LanguageModel(MODELS["exit"].replace(exit=ExitConfig(threshold=0.2)))
    outputs = jax.jit(lambda v, x: apply_network(sooner, v, x))(v, x), run("exit", v, x)
    (few, cheap), (many, dear) = ((float(jnp.sum(one.statistics.alive)), float(one.ponder)) for one in outputs)
    assert 1 <= few < many <= 4
    assert few <= cheap <= few + 1 and many <= dear <= many + 1


@pytest.mark.slow
@pytest.mark.parametrize("config", [
    small_model("D", moe=FULL.moe, embedding=FULL.embedding, memory=FULL.memory.replace(stream=0)),
    rarely(full_model("D", adaptive=False)),  # streams, and the G layer of multi-token prediction
    rarely(full_model("DG")),
], ids=["experts", "all", "all, adaptive"])  # fmt: skip
def test_a_mesh_gives_the_same_loss_and_gradients(config):
    """And an adaptive layer, two chunks a row, gathers its weights once for its four passes, forward and backward."""
    x = tokens(24, rows=8)
    batch = {"tokens": x, "targets": (x + 1) % 257, "segment_ids": jnp.ones_like(x)}
    price = PriceConfig()
    loss = make_loss(config, price, Rules())

    def step(params, statistics):
        now = phase(price, jnp.asarray(50), 100, 4)
        return jax.value_and_grad(loss, has_aux=True)(
            params, statistics, batch, jnp.asarray(0.01), now, jnp.asarray(50)
        )

    v = perturbed(config)
    (wanted, extra), gradient = jax.device_get(jax.jit(step)(v["params"], v["statistics"]))
    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):  # rows are cut over fsdp too
        placed = put_like(v, abstract(config))
        compiled = jax.jit(step).lower(placed["params"], placed["statistics"]).compile()
        there = compiled(placed["params"], placed["statistics"])
        specs = jax.tree.map(lambda a: a.sharding.spec, placed["params"])
        assert jax.tree.map(lambda a: a.sharding.spec, there[1]) == specs
        (got, extra_there), gradient_there = jax.device_get(there)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    executed = [(times, x.source) for x, times in hlo.read(compiled.as_text()).executed() if "all-gather" in x.opcode]
    gathers = [(times, source) for times, source in executed if "hyper" not in source and "top_k" not in source]
    assert len(gathers) > 4 and max(gathers)[0] == 2, gathers
    chex.assert_trees_all_close(gradient_there, gradient, atol=5e-5, rtol=1e-3)
    chex.assert_trees_all_close(extra_there["statistics"], extra["statistics"], atol=2e-5, rtol=2e-4)
