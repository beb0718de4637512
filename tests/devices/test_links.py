"""What collectives move over links, by hand: kinds, groups, fused and asynchronous ones, parts, least times."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import HyperConfig
from gt_jax.devices.pods import hlo
from gt_jax.devices.pods.between_slices import received
from gt_jax.devices.pods.collectives import Links, collectives
from gt_jax.devices.pods.hbm_traffic import hbm_traffic
from gt_jax.devices.pods.links import RATES, axis_rates, first_group, link_seconds, links_of
from gt_jax.devices.pods.program_flops import count_flops
from gt_jax.devices.sharding import Rules
from gt_jax.models.language_model import LanguageModel, abstract, apply_network
from gt_jax.training.step_parts import by_part, part_of, phase_of
from tests.support import small_model

PATH = "jit(step)/transpose(jvp(LanguageModel))/while/body/checkpoint/layer0.move/layer0/layer0.delta"
# Eight devices, cut 4 (fsdp) x 2 (tensor). As the compiler for TPU writes them: a gather in a loop of 3 that starts in
# one fusion, goes on beside a product in a second, and is done in a third; a reduce-scatter as an all-reduce that is
# sliced; a tuple of which only the first is sliced.
TEXT = f"""HloModule jit_step, is_scheduled=true, num_partitions=8

%begin (a: bf16[16,64]) -> (bf16[16,64], bf16[64,64]) {{
  %a = bf16[16,64]{{1,0}} parameter(0)
  %g.1 = bf16[64,64]{{1,0}} all-gather(%a), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {{'x'}}, dimensions={{0}}
  ROOT %t.1 = (bf16[16,64]{{1,0}}, bf16[64,64]{{1,0}}) tuple(%a, %g.1)
}}

%beside (b: bf16[16,64], w: bf16[64,64]) -> (bf16[64,64], bf16[64,64]) {{
  %b = bf16[16,64]{{1,0}} parameter(0)
  %w = bf16[64,64]{{1,0}} parameter(1)
  %g.2 = bf16[64,64]{{1,0}} all-gather(%b), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {{'x'}}, dimensions={{0}}
  %dot = bf16[64,64]{{1,0}} dot(%w, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, \
metadata={{op_name="{PATH}/mlp/experts/dot_general"}}
  ROOT %t.2 = (bf16[64,64]{{1,0}}, bf16[64,64]{{1,0}}) tuple(%g.2, %dot)
}}

%end (c: bf16[16,64]) -> bf16[64,64] {{
  %c = bf16[16,64]{{1,0}} parameter(0)
  ROOT %g.3 = bf16[64,64]{{1,0}} all-gather(%c), channel_id=7, \
replica_groups=mesh['x'=4,'y'=2] {{'x'}}, dimensions={{0}}
}}

%all-reduce-scatter.1 (d: f32[64,8], e: f32[8]) -> (f32[16,8], f32[8]) {{
  %d = f32[64,8]{{1,0}} parameter(0)
  %e = f32[8]{{0}} parameter(1)
  %all-reduce.1 = (f32[64,8]{{1,0}}, f32[8]{{0}}) all-reduce(%d, %e), channel_id=1, \
replica_groups={{{{0,2,4,6}},{{1,3,5,7}}}}, to_apply=%add
  %first = f32[64,8]{{1,0}} get-tuple-element(%all-reduce.1), index=0
  %second = f32[8]{{0}} get-tuple-element(%all-reduce.1), index=1
  %at = s32[] constant(0)
  %part = f32[16,8]{{1,0}} dynamic-slice(%first, %at, %at), dynamic_slice_sizes={{16,8}}
  ROOT %both = (f32[16,8]{{1,0}}, f32[8]{{0}}) tuple(%part, %second)
}}

%body (p: (s32[], bf16[16,64], bf16[64,64])) -> (s32[], bf16[16,64], bf16[64,64]) {{
  %p = (s32[], bf16[16,64]{{1,0}}, bf16[64,64]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %own = bf16[16,64]{{1,0}} get-tuple-element(%p), index=1
  %whole = bf16[64,64]{{1,0}} get-tuple-element(%p), index=2
  %async-collective-start.3 = (bf16[16,64]{{1,0}}, bf16[64,64]{{1,0}}) fusion(%own), kind=kCustom, calls=%begin, \
metadata={{op_name="{PATH}/mlp/experts/up/reshard"}}
  %fusion.9 = (bf16[64,64]{{1,0}}, bf16[64,64]{{1,0}}) fusion(%own, %whole), kind=kOutput, calls=%beside, \
metadata={{op_name="{PATH}/mlp/experts/dot_general"}}
  %async-collective-done.3 = bf16[64,64]{{1,0}} fusion(%own), kind=kCustom, calls=%end
  ROOT %next = (s32[], bf16[16,64]{{1,0}}, bf16[64,64]{{1,0}}) tuple(%i, %own, %async-collective-done.3)
}}

%condition (q: (s32[], bf16[16,64], bf16[64,64])) -> pred[] {{
  %q = (s32[], bf16[16,64]{{1,0}}, bf16[64,64]{{1,0}}) parameter(0)
  %n = s32[] constant(3)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %n), direction=LT
}}

ENTRY %main (m: (s32[], bf16[16,64], bf16[64,64]), x: f32[64,8], y: f32[8]) -> f32[16,8] {{
  %m = (s32[], bf16[16,64]{{1,0}}, bf16[64,64]{{1,0}}) parameter(0)
  %x = f32[64,8]{{1,0}} parameter(1)
  %y = f32[8]{{0}} parameter(2)
  %loop = (s32[], bf16[16,64]{{1,0}}, bf16[64,64]{{1,0}}) while(%m), condition=%condition, body=%body
  %scattered = (f32[16,8]{{1,0}}, f32[8]{{0}}) fusion(%x, %y), kind=kCustom, calls=%all-reduce-scatter.1, \
metadata={{op_name="{PATH}/mixer_D/mixer/query/reshard"}}
  %moved = f32[64,8]{{1,0}} collective-permute(%x), channel_id=2, source_target_pairs={{{{0,1}},{{1,0}}}}
  %turned = f32[64,8]{{1,0}} all-to-all(%x), channel_id=3, replica_groups=[4,2]<=[8], dimensions={{0}}, \
metadata={{op_name="jit(step)/optimizer/mul"}}
  ROOT %out = f32[16,8]{{1,0}} get-tuple-element(%scattered), index=0
}}
"""


def test_what_one_device_receives():
    """(n - 1) / n of a gather's result and a reduce-scatter's operand, twice that of an all-reduce, over their axes."""
    program = hlo.read(TEXT)
    found = collectives(Links(program))
    gathered = 64 * 64 * 2
    assert found == {
        "all-gather": {"count": 3, "bytes": 3 * gathered, "received": 3 * gathered * 3 // 4},
        "reduce-scatter": {"count": 1, "bytes": 16 * 8 * 4, "received": 64 * 8 * 4 * 3 // 4},
        "all-reduce": {"count": 1, "bytes": 32, "received": 2 * 32 * 3 // 4},
        "collective-permute": {"count": 1, "bytes": 2048, "received": 2048},
        "all-to-all": {"count": 1, "bytes": 2048, "received": 2048},
    }
    assert Links(program).received == sum(one["received"] for one in found.values())


def test_the_parts_add_up_and_have_their_names():
    program = hlo.read(TEXT)
    links = Links(program, lambda group: 1e-9 * len(group))
    rows = by_part(program, links)
    assert sum(row["bytes"] for row in rows) == hbm_traffic(program).bytes
    assert sum(row["flops"] for row in rows) == count_flops(program).flops == 3 * 2 * 64**3
    assert sum(row["links"] for row in rows) == links.received
    assert sum(row["link_seconds"] for row in rows) == pytest.approx(links.least_seconds)
    by = {(row["part"], row["phase"]): row for row in rows}
    assert by["experts", "backward"]["flops"] == 3 * 2 * 64**3 and by["experts", "backward"]["links"] == 18432
    assert by["D mixers", "backward"]["links"] == 64 * 8 * 3 + 48 and by["optimizer", "update"]["links"] == 2048


def test_parts_and_phases_by_the_scopes_of_the_model():
    again = "jit(step)/transpose(jvp(LanguageModel))/while/body/checkpoint/rematted_computation/layer3.move/layer3"
    for source, part, phase in (
        (f"{again}/layer3.delta/mixer_G/mixer/query/dot_general", "G mixers", "again"),
        (f"{again}/layer3.delta/mlp/router/dot_general", "router", "again"),
        (f"{again}/layer3.delta/mlp/route/top_k", "router", "again"),
        (f"{again}/layer3.delta/mlp/shared/up/dot_general", "MLP", "again"),
        (f"{PATH}/hyper_write/mul", "hyper-connections", "backward"),
        (f"{again}/layer3.delta/mlp_hyper.between/hyper_write_read/mul", "hyper-connections", "again"),
        ("jit(step)/jvp(LanguageModel)/mtp/fusion/btcd,cde->bte/dot_general", "MTP", "forward"),
        (f"{PATH}/mixer_norm/mul", "norms", "backward"),
        (f"{PATH}/halting/hidden/dot_general", "halting", "backward"),
        (f"{PATH}/add", "rest of a layer", "backward"),
        ("jit(step)/jvp(LanguageModel)/embedding/norm/mul", "embedding", "forward"),
        ("jit(step)/jvp()/while/body/loss/shard_map/dot_general", "loss", "forward"),
        ("jit(step)/jvp(loss)/shard_map/dot_general", "loss", "forward"),
        ("jit(step)/optimizer/mul", "optimizer", "update"),
        ("jit(step)/while/body/accumulation/add", "gradients summed", "update"),
        ("jit(step)/transpose(jvp())/while/body/closed_call/reshard", "gradients summed", "backward"),
        ("jit(step)/transpose(jvp())/while/body/jvp(mlp/experts/gate/w)/reshard", "experts", "backward"),
        ("jit(step)/transpose(jvp())/while/body/jvp(mixer_D/gate/w)/reshard", "D mixers", "backward"),
        ("jit(step)/jvp(LanguageModel)/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice",
         "saved states and copies", "forward"),
        ("jit(step)/reduce_sum", "other", "forward"),
    ):  # fmt: skip
        assert (part_of(source), phase_of(source)) == (part, phase), source


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{0,1},{2,3}}", [0, 1]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [0, 1, 2, 3]),
        ("source_target_pairs={{3,5},{5,3}}", [3, 5]),
        ("replica_groups={}", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_groups_as_the_compiler_writes_them(groups, first):
    x = hlo.parse_instruction(f"  %g = f32[8]{{0}} all-gather(%a), channel_id=1, {groups}, dimensions={{0}}")
    assert first_group(x, 8) == first


def cube(*shape, cores=1):
    return [SimpleNamespace(coords=at) for at in np.ndindex(*shape) for _ in range(cores)]


def test_links_of_a_group_are_those_of_the_axes_it_spans():
    places = [tuple(device.coords) for device in cube(4, 4, 4)]
    assert links_of(places, (4, 4, 4), 4) == 6
    assert links_of(places[:16], (4, 4, 4), 4) == 4 and links_of(places[:4], (4, 4, 4), 4) == 2
    assert links_of(places[:2], (4, 4, 4), 4) == 1  # a part of a ring is a line
    assert links_of(places[:4], (4, 4, 4), 16) == 1  # v6e: only a whole axis of 16 is a ring
    assert links_of(places[:1], (4, 4, 4), 4) == 0
    byte = link_seconds("v5p", (4, 4, 4), cube(4, 4, 4))
    assert byte(range(64)) == pytest.approx(1 / (6 * RATES["v5p"]))
    two = link_seconds("tpu7x", (2, 2, 1), cube(2, 2, 1, cores=2))
    assert two([0, 1]) == 0.0 and two(range(8)) == pytest.approx(2 / (2 * RATES["tpu7x"]))
    mesh = SimpleNamespace(devices=np.array(cube(4, 4, 4), dtype=object).reshape(1, 16, 1, 4),
                           axis_names=("data", "fsdp", "expert", "tensor"))  # fmt: skip
    assert axis_rates("v5p", (4, 4, 4), mesh) == {
        "data": (np.inf, 0), "fsdp": (4 * 9e10, 2), "expert": (np.inf, 0), "tensor": (2 * 9e10, 1)}  # fmt: skip


def test_what_hyper_connections_do_is_found_by_the_names_that_the_model_gives():
    """Names are made in gt_jax.models; a method or scope that is called otherwise would hide what it costs."""
    config = small_model("G", False, hyper=HyperConfig())
    tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    network = LanguageModel(config, Rules())
    traced = jax.jit(lambda v, ids: apply_network(network, v, ids).hidden).lower(abstract(config), tokens)
    names = set(re.findall(r'"([^"]*/[^"]*hyper[^".]*\.[^"]*/[^"]*)"', traced.as_text(debug_info=True)))
    scopes = {scope for name in names for scope in name.split("/")}
    assert {"mixer_hyper.enter", "mlp_hyper.between", "mlp_hyper.leave"} <= scopes
    assert {part_of(name) for name in names} == {"hyper-connections"}


def test_what_goes_from_slice_to_slice_counts_apart():
    """As the compiler for TPU writes it, in a loop of three; a `recv` of anything else is none."""
    said = ('frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
            '_xla_megascale_target="{1:3}x{0:3}",_xla_megascale_transfer_type="%s"}')
    recv = '  %%r%d = (f32[256]{0:T(256)}, u32[], token[]) recv(%%t), channel_id=1, is_host_transfer=true, %s\n'
    kinds = ("ALL_REDUCE", "ALL_GATHER", "REDUCE_SCATTER", "ONE_TO_ONE")
    lines = [recv % (at, said % kind) for at, kind in enumerate(kinds)] + [recv % (9, "frontend_attributes={}")]
    text = f"""HloModule jit_step, num_partitions=12

%body (p: s32[]) -> s32[] {{
  %t = token[] after-all()
{''.join(lines)}  ROOT %i = s32[] parameter(0)
}}

ENTRY %main (x: s32[]) -> s32[] {{
  %x = s32[] parameter(0)
  ROOT %w = s32[] while(%x), condition=%none, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
}}
"""
    assert received(hlo.read(text)) == 3 * 1024 * (4 / 3 + 2 / 3 + 2 + 1)
