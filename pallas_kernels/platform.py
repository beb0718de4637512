"""Which machine is being compiled for: known while a function is traced, also where that machine is not at hand."""

from __future__ import annotations

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def target_device() -> tuple[str, str]:
    """(platform, kind) of the devices that the function being traced will run on, as `("tpu", "TPU v6 lite")`.

    Those of the mesh in whose context the trace stands (`shard_map`, `jax.set_mesh`), which may be a topology that is
    only compiled for; else `jax_default_device`, else of the first device. The sharding of an argument is not known
    while tracing: who lowers for a topology from `ShapeDtypeStruct`s alone, without `shard_map`, does it under
    `jax.set_mesh` of a mesh of its devices, if only of one. (`jax.lax.platform_dependent` chooses when lowering, but
    traces the kernels on every machine, 13 times as long as the XLA path, and does not tell the matrix unit's width.)
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or _default_device()
    return device.platform, device.device_kind


def _default_device() -> jax.Device:
    chosen = getattr(jax.config, "jax_default_device")  # noqa: B009 — mypy does not see the attribute
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen or jax.devices()[0]


def compute_capability() -> str | None:
    """That of the GPU of `target_device`, as "9.0"; None for no GPU, or for one that is not here and no Hopper.

    A mesh tells its devices' kind and not their capability: of those that are not here only Hopper's names are known.
    """
    if target_device()[0] != "gpu":
        return None
    if jax.sharding.get_abstract_mesh().abstract_device is None:
        return _default_device().compute_capability
    here = [device for device in jax.devices() if device.device_kind == target_device()[1]]
    if here:
        return here[0].compute_capability
    return "9.0" if is_hopper(*target_device()) else None


def matrix_unit_width(kind: str) -> int:
    """128 up to the fifth generation of TPUs, 256 after it."""
    return 128 if any(kind.startswith(f"TPU v{generation}") for generation in range(2, 6)) else 256


def is_hopper(platform: str, kind: str) -> bool:
    """Whether the device is a GPU of compute capability 9.0, by its name: no device of a mesh says more of itself."""
    return platform == "gpu" and any(name in kind for name in HOPPER)
