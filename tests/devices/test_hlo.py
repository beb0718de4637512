"""Reading compiled programs: loops counted out, bytes, products, collectives, beside XLA's counts and by hand."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from gt_jax.devices.pods import hlo
from gt_jax.devices.pods.collectives import Links, collectives, largest
from gt_jax.devices.pods.hbm_traffic import called_bytes, hbm_traffic
from gt_jax.devices.pods.program_flops import _meetings, count_flops

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %gathered = f32[32,128]{1,0:T(8,128)} all-gather(%x), dimensions={0}, metadata={op_name="jit(step)/experts/gate"}
  %summed = (f32[8,128]{1,0}, f32[]) all-reduce(%x, %x), to_apply=%add
  ROOT %t = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) tuple(%x)
}

%condition.1 (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[], f32[8,128]) parameter(0)
  %n = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%condition.2 (p: (s32[], f32[8,128])) -> pred[] {
  ROOT %less = pred[] compare(%i, %m), direction=LT
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %start = (f32[8,128]{1,0}, f32[16,128]{1,0}) all-gather-start(%x), dimensions={0}
  %one = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%x), condition=%condition.1, body=%body.1
  %two = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%one), condition=%condition.2, body=%body.1
  ROOT %out = f32[8,128]{1,0} get-tuple-element(%two), index=1
}
"""


def test_a_loops_collectives_count_as_often_as_it_runs():
    program = hlo.read(PROGRAM)
    assert program.entry == "main" and program.times["body.1"] == 6 and program.unknown_loops == 1
    assert collectives(Links(program)) == {  # of one device: nothing is received
        "all-gather": {"count": 7, "bytes": 6 * 32 * 128 * 4 + 16 * 128 * 4, "received": 0},
        "all-reduce": {"count": 6, "bytes": 6 * (8 * 128 * 4 + 4), "received": 0},
    }
    first = largest(program)[0]
    assert (first["bytes"], first["shape"], first["source"]) == (16384, "f32[32,128]", "jit(step)/experts/gate")


# A loop of 4: takes a slice of %big through a conversion, keeps it in VMEM, and writes it to its slice of the result.
HLO = """HloModule jit_f

%slice_of (p.0: f32[4,8,128], p.1: s32[]) -> bf16[8,128] {
  %p.0 = f32[4,8,128]{2,1,0} parameter(0)
  %p.1 = s32[]{:S(6)} parameter(1)
  %zero.1 = s32[] constant(0)
  %narrow = bf16[4,8,128]{2,1,0} convert(%p.0)
  %slice.1 = bf16[1,8,128]{2,1,0} dynamic-slice(%narrow, %p.1, %zero.1, %zero.1), dynamic_slice_sizes={1,8,128}
  ROOT %flat = bf16[8,128]{1,0} bitcast(%slice.1)
}

%put (q.0: f32[4,8,128], q.1: bf16[8,128], q.2: s32[]) -> f32[4,8,128] {
  %q.0 = f32[4,8,128]{2,1,0} parameter(0)
  %q.1 = bf16[8,128]{1,0:S(1)} parameter(1)
  %q.2 = s32[]{:S(6)} parameter(2)
  %zero.2 = s32[] constant(0)
  %wide = f32[1,8,128]{2,1,0} convert(%q.1)
  ROOT %put.1 = f32[4,8,128]{2,1,0} dynamic-update-slice(%q.0, %wide, %q.2, %zero.2, %zero.2)
}

%body (b: (s32[], f32[4,8,128], f32[4,8,128])) -> (s32[], f32[4,8,128], f32[4,8,128]) {
  %b = (s32[]{:S(6)}, f32[4,8,128]{2,1,0}, /*index=2*/f32[4,8,128]{2,1,0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%b), index=0
  %big = f32[4,8,128]{2,1,0} get-tuple-element(%b), index=1
  %result = f32[4,8,128]{2,1,0} get-tuple-element(%b), index=2
  %taken = bf16[8,128]{1,0:S(1)} fusion(%big, %i), kind=kLoop, calls=%slice_of, metadata={op_name="a(b)"}
  %put_back = f32[4,8,128]{2,1,0} fusion(%result, %taken, %i), kind=kLoop, calls=%put
  ROOT %next = (s32[]{:S(6)}, f32[4,8,128]{2,1,0}, f32[4,8,128]{2,1,0}) tuple(%i, %big, %put_back)
}

%ended (c: (s32[], f32[4,8,128], f32[4,8,128])) -> pred[] {
  %c = (s32[]{:S(6)}, f32[4,8,128]{2,1,0}, f32[4,8,128]{2,1,0}) parameter(0)
  %end = s32[] constant(4)
  %at = s32[]{:S(6)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:S(6)} compare(%at, %end), direction=LT
}

ENTRY %main (x: f32[4,8,128]) -> f32[4,8,128] {
  %x = f32[4,8,128]{2,1,0} parameter(0)
  %start = s32[]{:S(6)} constant(0)
  %buffer = f32[4,8,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %init = (s32[]{:S(6)}, f32[4,8,128]{2,1,0}, f32[4,8,128]{2,1,0}) tuple(%start, %x, %buffer)
  %loop = (s32[]{:S(6)}, f32[4,8,128]{2,1,0}, f32[4,8,128]{2,1,0}) while(%init), condition=%ended, body=%body
  %made = f32[4,8,128]{2,1,0} get-tuple-element(%loop), index=2
  %there = (f32[4,8,128]{2,1,0:S(1)}, f32[4,8,128]{2,1,0}, u32[]{:S(2)}) copy-start(%made)
  %here = f32[4,8,128]{2,1,0:S(1)} copy-done(%there)
  ROOT %rule.1 = f32[4,8,128]{2,1,0} custom-call(%here, %x), custom_call_target="tpu_custom_call"
}
"""


def test_traffic_counts_loops_out_and_slices_not_wholes():
    whole, slice_ = 4 * 8 * 128 * 4, 8 * 128 * 4
    found = hbm_traffic(hlo.read(HLO))
    # four slices read and four written; the copy reads; the kernel reads %x from HBM, the other from VMEM, and writes
    assert found == (4 * 2 * slice_ + whole + 2 * whole, 4 * (2 * slice_ + 2 * slice_ // 2) + 3 * whole, 0)
    assert called_bytes(hlo.read(HLO), "rule") == 2 * whole
    assert hbm_traffic(hlo.read(HLO), leave_out=["rule"]).bytes == found.bytes - 2 * whole
    endless = hlo.read(HLO.replace("constant(4)", "parameter(1)"))
    assert hbm_traffic(endless)[::2] == (2 * slice_ + 3 * whole, 1)
    assert hbm_traffic(endless, loop_length=2.5)[::2] == (5 * slice_ + 3 * whole, 1)
    with pytest.raises(ValueError, match="no custom-call of other"):
        called_bytes(hlo.read(HLO), "other")
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("nothing")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[64,64]{1,0:T(8,128)}", 64 * 128 * 4),
        ("f32[64,64]{0,1:T(8,128)}", 64 * 128 * 4),
        ("bf16[3,5,128]{2,1,0:T(8,128)(2,1)}", 3 * 8 * 128 * 2),
        ("s32[]{:T(128)}", 4),
        ("pred[7]{0}", 7),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),
        ("(f32[8,128]{1,0:T(8,128)}, /*index=1*/token[], f8e4m3fn[16]{0})", 4096 + 16),
    ],
)
def test_arrays_are_as_large_as_their_layout(text, size):
    assert hlo.array_bytes(hlo.arrays(text)) == size


def compiled(function, *shapes):
    return jax.jit(function).lower(*[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]).compile()


def convolution(**how):
    labels = ("NHWC", "HWIO", "NHWC")
    return functools.partial(jax.lax.conv_general_dilated, dimension_numbers=labels, **how)


SPREAD = {"padding": ((2, 0), (1, 3)), "lhs_dilation": (2, 3), "rhs_dilation": (1, 2)}


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda a, b: a @ b, [(64, 32), (32, 16)]),
        (lambda a, b: jnp.einsum("bij,bkj->bik", a, b), [(4, 8, 32), (4, 16, 32)]),
        (convolution(window_strides=(2, 3), padding="SAME"), [(2, 9, 11, 6), (3, 4, 6, 8)]),
        (convolution(window_strides=(1, 2), **SPREAD), [(2, 9, 11, 6), (3, 4, 6, 8)]),
        (convolution(window_strides=(1, 1), padding="SAME", feature_group_count=3), [(2, 9, 11, 6), (3, 4, 2, 6)]),
    ],
)
def test_without_loops_the_counts_are_those_of_xla(function, shapes):
    program = compiled(function, *shapes)
    cost, found = program.cost_analysis(), hlo.read(program.as_text())
    assert count_flops(found) == (cost["flops"], 0, 0)
    assert hbm_traffic(found).bytes == cost["bytes accessed"]


def test_a_loop_works_as_much_as_its_body_written_out():
    """With a loop in the loop; one whose length depends on values counts as long as the caller says."""

    def loop(x, w):
        inner = lambda c: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), c, None, length=3)[0]  # noqa: E731
        return jax.lax.scan(lambda c, _: (jnp.sin(inner(c) @ w), None), x, None, length=5)[0]

    def written_out(x, w):
        for _ in range(5):
            for _ in range(3):
                x = jnp.tanh(x @ w)
            x = jnp.sin(x @ w)
        return x

    shapes = [(8, 16), (16, 16)]
    expected = 5 * 4 * 2 * 8 * 16 * 16
    program = hlo.read(compiled(loop, *shapes).as_text())
    unrolled = hlo.read(compiled(written_out, *shapes).as_text())
    assert count_flops(program).flops == count_flops(unrolled).flops == expected
    assert program.unknown_loops == 0

    def until(x, w):
        return jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ w, x)

    program = hlo.read(compiled(until, *shapes).as_text())
    assert program.unknown_loops == 1
    assert count_flops(program, loop_length=7).flops == 7 * count_flops(program).flops == 7 * 2 * 8 * 16 * 16


def test_windows_meet_elements_as_often_as_counted_one_by_one():
    sizes = itertools.product((1, 2, 5), (1, 4, 7), (1, 2, 3), (1, 2, 3), (-1, 0, 2), (1, 2, 4), (1, 3))
    for length, results, size, stride, pad, holes, spread in sizes:
        elements = {e * holes for e in range(length)}
        met = sum(r * stride + k * spread - pad in elements for r in range(results) for k in range(size))
        assert _meetings(length, results, size, stride, pad, holes, spread) == met


# As the compiler for TPU has them: a product of 2 x 4 pairs of [32, 16] and [16, 8], and a kernel, in a loop of 3.
ON_TPU = """HloModule jit_g

%product (a: f32[2,4,32,16], b: f32[2,4,16,8]) -> f32[2,4,32,8] {
  %a = f32[2,4,32,16]{3,2,1,0:T(8,128)} parameter(0)
  %b = f32[2,4,16,8]{3,2,1,0:T(8,128)} parameter(1)
  ROOT %c = f32[2,4,32,8]{3,2,1,0:T(8,128)} convolution(%a, %b), \
window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=01bf_01io->01bf, operand_precision={highest,highest}
}

%body (p: (s32[], f32[2,4,32,16], f32[2,4,16,8])) -> (s32[], f32[2,4,32,16], f32[2,4,16,8]) {
  %p = (s32[], f32[2,4,32,16], f32[2,4,16,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[2,4,32,16]{3,2,1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[2,4,16,8]{3,2,1,0:T(8,128)} get-tuple-element(%p), index=2
  %fused = f32[2,4,32,8]{3,2,1,0:T(8,128)} fusion(%x, %y), kind=kOutput, calls=%product
  %rule.1 = f32[2,4,16,8]{3,2,1,0:T(8,128)} custom-call(%fused, %y), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"=",\
"cost_estimate":{"flops":"1000","transcendentals":"7","bytes_accessed":"100000000","remote_bytes_transferred":"0"}}}
  %other.1 = f32[2,4,16,8]{3,2,1,0:T(8,128)} custom-call(%rule.1), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], f32[2,4,32,16], f32[2,4,16,8]) tuple(%i, %x, %other.1)
}

%less (l.0: s32[], l.1: s32[]) -> pred[] {
  %l.0 = s32[] parameter(0)
  %l.1 = s32[] parameter(1)
  ROOT %lt = pred[] compare(%l.0, %l.1), direction=LT
}

%condition (p.1: (s32[], f32[2,4,32,16], f32[2,4,16,8])) -> pred[] {
  %p.1 = (s32[], f32[2,4,32,16], f32[2,4,16,8]) parameter(0)
  %n = s32[]{:T(128)} constant(3)
  %j = s32[] get-tuple-element(%p.1), index=0
  ROOT %wrapped = pred[] fusion(%j, %n), kind=kLoop, calls=%less
}

ENTRY %main (m: (s32[], f32[2,4,32,16], f32[2,4,16,8])) -> f32[2,4,16,8] {
  %m = (s32[], f32[2,4,32,16], f32[2,4,16,8]) parameter(0)
  %loop = (s32[], f32[2,4,32,16], f32[2,4,16,8]) while(%m), condition=%condition, body=%body
  ROOT %out = f32[2,4,16,8] get-tuple-element(%loop), index=2
}
"""


def test_products_and_kernels_of_a_tpu_program():
    program = hlo.read(ON_TPU)
    product = 2 * (2 * 4) * 32 * 8 * 16
    assert count_flops(program) == (3 * (product + 1000), 3 * 1000, 1)
    # operands and results once a run, by their tiles of 8 x 128; the kernel says that it moves 100 MB
    left, right, result = 8 * 32 * 128 * 4, 8 * 16 * 128 * 4, 8 * 32 * 128 * 4
    assert hbm_traffic(program).bytes == 3 * (left + right + result + 100_000_000 + 2 * right)
    assert called_bytes(program, "rule") == result + 2 * right
    told = ON_TPU.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert count_flops(hlo.read(told)).of_kernels == 9 * 1000


FUSED_KERNEL = """
HloModule m

%kernel (x: f32[8,128]) -> (f32[8,128], f32[16,128]) {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %rule.1 = (f32[8,128]{1,0}, f32[16,128]{1,0}) custom-call(%x), custom_call_target="tpu_custom_call"
}

ENTRY %main (x: f32[8,128]) -> (f32[8,128], f32[16,128]) {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %fused = (f32[8,128]{1,0}, f32[16,128]{1,0}) fusion(%x), kind=kCustom, calls=%kernel
}
"""


def test_a_kernel_with_several_results_may_be_the_root_of_a_fusion():
    assert hbm_traffic(hlo.read(FUSED_KERNEL)).bytes == 4 * 128 * (8 + 8 + 16)


def test_splash_attention_counts_by_its_shapes():
    """Which gives no estimate, and tells of itself on lines amid an instruction."""
    attend = """  %splash_mha_dq.1 = f32[4,128,64]{2,1,0} custom-call(%m, %m, %q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="attend"}
"""
    text = "ENTRY %main (q: f32[4,128,64], k: f32[2,128,64], m: s8[1]) -> f32[4,128,64] {\n" + "".join(
        f"  %{name} = f32[{shape}] parameter({n})\n" for n, (name, shape) in enumerate(
            (("q", "4,128,64"), ("k", "2,128,64"), ("m", "1"))))  # fmt: skip
    program = hlo.read(text + attend + "  ROOT %out = f32[4,128,64] negate(%splash_mha_dq.1)\n}\n")
    products = 3 * 2 * (4 * 64) * 128 * 129 // 2
    assert count_flops(program) == (products, products, 0)
    assert [x.name for x, _ in program.executed()][-1] == "out"


def test_the_branch_of_a_conditional_that_costs_more_counts():
    def either(x, w, v):
        return jax.lax.cond(x.sum() > 0, lambda: (x @ w).sum(), lambda: (x @ v).sum())

    program = hlo.read(compiled(either, (8, 16), (16, 16), (16, 32)).as_text())
    assert count_flops(program).flops == 2 * 8 * 16 * 32
    quarter = dataclasses.replace(program, taken=lambda x: 0.25 if x.opcode == "conditional" else None)
    assert count_flops(quarter).flops == 2 * 8 * 16 * (0.25 * 32 + 0.75 * 16)


def test_shared_computations_are_read_once():
    """Forty levels of computations that call the next one twice: 2^40 runs, forty readings."""
    levels = [
        f"%level{n} (p{n}: f32[4]) -> f32[4] {{\n  %p{n} = f32[4] parameter(0)\n"
        f"  %a{n} = f32[4] call(%p{n}), to_apply=%level{n + 1}\n"
        f"  ROOT %b{n} = f32[4] call(%a{n}), to_apply=%level{n + 1}\n}}\n"
        for n in range(40)
    ]
    last = "%level40 (p40: f32[4]) -> f32[4] {\n  %p40 = f32[4] parameter(0)\n  ROOT %s = f32[4] negate(%p40)\n}\n"
    program = hlo.read(last + "".join(reversed(levels)).replace("%level0 ", "ENTRY %level0 "))
    assert program.times["level40"] == 2**40
    assert hbm_traffic(program).bytes == 2**40 * 32
