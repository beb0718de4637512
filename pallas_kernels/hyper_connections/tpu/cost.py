"""What the TPU kernels of hyper-connections cost, counted: for the compiler, and for who measures them.

Useful FLOPs of a token, n streams of d, m = n^2 + 2n: read 2nd m + 4nd; write 2nd(n + 1); gradients of a read 2nd for
each of m - n inner products, dX 2nd(n + 2), the projection's two products 4nd m; of a write 4nd.
"""

from __future__ import annotations

from pallas_kernels.hyper_connections.tpu.plan import Plan


def token_flops(plan: Plan, kernel: str) -> float:
    """Of one token in the kernel of that name."""
    n, m, size = plan.streams, plan.numbers, plan.streams * plan.width
    read, write = 2 * size * m + 4 * size, 2 * size * (n + 1)
    read_back, write_back = 2 * size * (m / n - 1 + n + 2 + 2 * m), 4 * size
    return float({
        "enter": read, "leave": write, "between": read + write,
        "enter_back": read_back, "leave_back": write_back, "between_back": read_back + write_back,
    }[kernel])  # fmt: skip


def block_bytes(plan: Plan) -> int:
    """VMEM of the largest kernel, `between_back`: blocks twice, sums and scratch."""
    item, n, tile, d = 4 if plan.exact else 2, plan.streams, plan.tile, plan.width
    tokens = (3 * n + 3) * d * item + 4 * (2 * plan.record + 16)
    phi = n * d * plan.phi_rows * item
    sums = n * d * plan.packed * 4
    scratch = 4 * tile * (128 * (2 * plan.numbers + 2) + n * plan.slab)
    return 2 * (tile * tokens + phi + sums) + scratch
