"""The suite on a GPU, `GT_JAX_TEST_PLATFORM=gpu`: what is set for it, and the one table of what is left out and why."""

from __future__ import annotations

import os
from collections.abc import Iterator

SWITCH = "GT_JAX_TEST_PLATFORM"
PLATFORMS = ("cpu", "gpu")
JAX_PLATFORMS = "cuda,cpu"  # what JAX calls them; a CPU beside, for what is put there
DEVICES = 8  # of the meshes under test

MESH = f"a mesh of up to {DEVICES} devices; run where there are as many cards"
INTERPRETED = "TPU kernels, by an interpreter that runs on a CPU"
OF_A_CPU = "GPU kernels, by an interpreter that runs on a CPU, and what is said where there is no GPU"
PROCESSES = "several processes with devices of their own, which a CPU gives each of them"

LEFT_OUT = {  # by the beginning of a test's name under tests/
    "checkpoints/test_checkpoint.py::test_restores_onto_a_mesh": MESH,
    "commands/test_plan_pod.py::test_what_does_not_divide": MESH,
    "commands/test_plan_pod.py::test_a_step_is_measured": MESH,
    "commands/test_plan_pod.py::test_a_large_tensor": MESH,
    "configs/test_presets.py": MESH,
    "growth/test_calibration.py::test_a_mesh_gives": MESH,
    "growth/test_transform.py::test_sharding_of_the_other_axes": MESH,
    "kernels/test_gated_delta_rule_properties.py::test_inside_shard_map": MESH,
    "models/layers/test_early_exit.py::test_a_mesh": MESH,
    "models/layers/test_embedding.py::test_a_mesh": MESH,
    "models/layers/test_groundthink.py::test_every_mesh": MESH,
    "models/layers/test_hyper_connections.py::test_every_mesh": MESH,
    "models/layers/test_memory_stream.py::test_a_mesh": MESH,
    "models/layers/test_mixers.py::test_a_mesh": MESH,
    "models/layers/test_moe.py::test_a_mesh": MESH,
    "models/layers/test_reversible.py::test_rows_on_eight_devices": MESH,
    "models/layers/test_sliding.py::test_every_mesh": MESH,
    "models/test_components.py::test_a_mesh": MESH,
    "models/test_language_model.py::test_every_mesh": MESH,
    "models/test_language_model.py::test_rows_are_counted_by_the_mesh": MESH,
    "models/test_tokens_stay.py": MESH,
    "training/test_accumulate.py::test_on_a_mesh_too": MESH,
    "training/test_gates_closed_loop.py::test_a_model_trains_under_a_budget": MESH,
    "training/test_loss.py": MESH,
    "training/test_thaw.py::test_masks_work_on_sharded_leaves": MESH,
    "kernels/test_gated_delta_rule_decode.py": INTERPRETED,
    "kernels/test_gated_delta_rule_choice.py::test_a_cpu": OF_A_CPU,
    "kernels/test_gated_delta_rule_gpu.py": OF_A_CPU,
    "kernels/test_gated_delta_rule_tpu.py": INTERPRETED,
    "kernels/test_hyper_connections.py": INTERPRETED,
    "kernels/test_sparse_attention.py::test_heads_split_over_devices": MESH,
    "kernels/test_sparse_attention_tpu.py": INTERPRETED,
    "models/layers/test_hyper_connections.py::test_the_kernels": INTERPRETED,
    "models/layers/test_moe.py::test_the_tpus_tiles": INTERPRETED,
    "growth/test_processes.py": PROCESSES,
    "training/test_several_processes.py": PROCESSES,
}


def platform() -> str:
    """What the switch says; raises ValueError for anything but its two values."""
    chosen = os.environ.get(SWITCH, PLATFORMS[0])
    if chosen not in PLATFORMS:
        raise ValueError(f"{SWITCH} is {chosen!r}; it is one of {', '.join(PLATFORMS)}")
    return chosen


def prepare() -> str:
    """Set for JAX, before it is imported, what the tests need of a GPU; the flags of XLA to add.

    Bounds are those of float32 and equal bits are asked for, so nothing is rounded to TensorFloat-32, and no sum is
    taken in an order that changes. Several workers share the card's memory.
    """
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return f"--xla_force_host_platform_device_count={DEVICES} --xla_gpu_deterministic_ops=true"


def no_gpu() -> str | None:
    """Why nothing can run: JAX finds no GPU; else None."""
    import jax

    try:
        jax.devices("gpu")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return f"{SWITCH}=gpu, and JAX finds no GPU ({reason}); pip install -e '.[cuda,test]' where one is, or leave it"
    return None


def left_out(names: list[str], cards: int) -> Iterator[tuple[int, str]]:
    """(place, reason) of each of the `names`, under tests/, that is not run with so many cards."""
    for place, name in enumerate(names):
        for beginning, reason in LEFT_OUT.items():
            if name.startswith(beginning) and (reason != MESH or cards < DEVICES):
                yield place, reason
                break
