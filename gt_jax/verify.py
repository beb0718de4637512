"""`python -m gt_jax.verify SRC DST`: did the growth keep what was learned? The same batches through both models.

    python -m gt_jax.verify runs/a grown --picture verify.png
    python -m gt_jax.verify runs/a grown --text story.txt --curve 100 --json

- The source's loss with its own adaptive passes and with passes fixed at k_exec, the target's loss, KL divergence,
  top-1 agreement, logit cosine.
- By target layer, beside the pass of the source that it stands for: |dh|/|h|, the largest singular value of the layer's
  Jacobian, router entropy, KL of the routers, null rate.
- Any two models of one vocabulary can be compared. Where DST was not grown from SRC, no layer stands for a pass: then
  the source's columns are empty, and the report says why.
- Several processes share the work: the same command with --coordinator HOST:PORT --processes N --process I in each.
- Thresholds: a loss less than 3 % above the source's is good, less than 10 % usable; a cosine above 0.995 is good.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gt_jax.devices.flags import add_device_flags, mesh_of, wrong_process_flags
from gt_jax.devices.precision import add_precision_flag, computing
from gt_jax.devices.program_cache import add_cache_flag, keep_programs
from gt_jax.errors import deliver, refuse_all, run_command, say
from gt_jax.evaluation.loading import add_text_arguments, text_config
from gt_jax.files import local_path
from gt_jax.monitoring.picture_file import refuse_picture, write_picture
from gt_jax.options import whole

if TYPE_CHECKING:
    from gt_jax.devices.processes import ProcessGroup


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m gt_jax.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("source", type=local_path, help="the adaptive checkpoint")
    p.add_argument("target", type=local_path, help="the checkpoint grown from it, or any of the same vocabulary")
    add_text_arguments(p)
    p.add_argument("--jacobian-rows", type=whole, metavar="N",
                   help="rows of text for the singular values of the layers (as few as the mesh can cut, 1 on one "
                   "device); 0 leaves them out")  # fmt: skip
    p.add_argument("--jacobian-iterations", type=whole, default=20, metavar="N", help="of Lanczos' iteration (20)")
    p.add_argument("--curve", type=whole, default=0, metavar="STEPS",
                   help="train the target so many steps more, in memory, and report the losses")  # fmt: skip
    p.add_argument("--picture", type=local_path, metavar="FILE.png", help="draw the figures by layer")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_precision_flag(p)
    add_device_flags(p)
    add_cache_flag(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; 0 whatever the verdict."""
    arguments = parser().parse_args(argv)
    refuse_all(wrong_process_flags(arguments), "these arguments do not go together:")
    keep_programs(arguments)
    from gt_jax.devices.processes import process_group

    with process_group(arguments) as group, computing(arguments.matmul_precision, group.first):
        _verify(arguments, group)
    return 0


def _verify(arguments: argparse.Namespace, group: ProcessGroup) -> None:
    """Everything after the command line, in each process of the group; the first one prints and draws."""
    import jax

    from gt_jax.devices.sharding import mesh_for_rows
    from gt_jax.evaluation.verification import verify

    group.agree(lambda: refuse_picture(arguments.picture))
    named = text_config(arguments) or {}
    with jax.set_mesh(group.agree(lambda: mesh_of(arguments)) or mesh_for_rows(1)):
        result = verify(
            arguments.source, arguments.target, batches=arguments.batches, jacobian_rows=arguments.jacobian_rows,
            jacobian_iterations=arguments.jacobian_iterations, curve=arguments.curve, **named, group=group,
            say=lambda line: say(line) if group.first else None,
        )  # fmt: skip
    group.on_first(lambda: _show(result, arguments))


def _show(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    from gt_jax.evaluation.verification_table import report_lines

    def draw() -> None:
        from gt_jax.monitoring.plots import plot_verification

        write_picture(lambda image: plot_verification(result, image), arguments.picture)

    deliver(json.dumps(result, allow_nan=False) if arguments.json else "\n".join(report_lines(result)),
            {} if arguments.picture is None else {f"--picture {arguments.picture}": draw})


if __name__ == "__main__":
    run_command(main)
