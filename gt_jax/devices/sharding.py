"""Where every array lives: one frozen `Rules` dataclass maps logical axes to mesh axes.

- Layers name logical axes ("batch", "heads", "mlp" …) and never a mesh axis.
- The mesh has Explicit axes: a contraction that nobody thought about is an error at trace time.
- A weight is stored sharded over "embed" too and gathered just before use; its gradient is scattered back by the
  transpose of that gather (fully sharded data parallelism).
- Without a mesh in context every helper is the identity, so a model runs on one device with no ceremony.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from gt_jax.devices.meshes import MESH_AXES, slice_count
from gt_jax.errors import Refused, refuse_all

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. Change a field to change the strategy of the whole model.

    Raises `Refused` where tokens are cut over an axis that also cuts heads, hidden units, vocabulary or experts.

    >>> import gt_jax
    >>> tuple(gt_jax.Rules(embed=None).spec("embed", "heads"))
    (None, 'tensor')
    """

    batch: MeshAxes = ("data", "fsdp")
    embed: MeshAxes = "fsdp"  # the model-width axis of weights; activations keep theirs whole
    heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    experts: MeshAxes = "expert"

    def __post_init__(self) -> None:
        batch, wrong = set(self.mesh_axes("batch")), []
        for name in ("heads", "mlp", "vocab", "experts"):
            both = [axis for axis in self.mesh_axes(name) if axis in batch]
            wrong += [f"{name} and batch are both cut over {axis!r}; the devices of an axis that cuts {name} must hold "
                      "the same tokens, whose shares they add up" for axis in both]  # fmt: skip
        refuse_all(wrong, "these rules would give wrong outputs:")

    def spec(self, *axes: str | None) -> P:
        """The stored partition of an array whose axes have these logical names (None: not sharded)."""
        return P(*(None if axis is None else getattr(self, axis) for axis in axes))

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The mesh axes of a logical axis, as a tuple."""
        names = getattr(self, axis)
        return names if isinstance(names, tuple) else () if names is None else (names,)

    def shards(self, axis: str) -> int:
        """Into how many pieces the current mesh cuts a logical axis; 1 without a mesh."""
        sizes = current_sizes()
        return math.prod(sizes.get(name, 1) for name in self.mesh_axes(axis))

    def gathered(self, *axes: str | None) -> P:
        """The partition of a weight at the moment of use: as `spec`, with "embed" whole."""
        return self.spec(*(None if axis == "embed" else axis for axis in axes))


def make_mesh(
    data: int | None = None, fsdp: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """A mesh with the four named axes; `data=None` takes the devices that the others leave.

    Of several slices `data` goes from slice to slice, over the network between them, and then along each; the other
    axes stay in one. Raises `Refused` when the sizes do not multiply to the number of devices, and where a slice would
    hold no whole number of `data`.

    >>> import gt_jax, jax
    >>> mesh = gt_jax.make_mesh(devices=jax.devices()[:1])
    >>> dict(mesh.shape)
    {'data': 1, 'fsdp': 1, 'expert': 1, 'tensor': 1}
    """
    available = list(devices) if devices is not None else jax.devices()
    asked = zip(MESH_AXES, (data, fsdp, expert, tensor), strict=True)
    refuse_all([f"{name} is {size}; it must be at least 1" for name, size in asked if size is not None and size < 1],
               "the axes of the mesh:")  # fmt: skip
    rest = fsdp * expert * tensor
    data = max(1, len(available) // rest) if data is None else data
    shape = (data, fsdp, expert, tensor)
    if math.prod(shape) != len(available):
        wanted = " x ".join(f"{name} {size}" for name, size in zip(MESH_AXES, shape, strict=True))
        raise Refused(f"mesh {wanted} does not use exactly the {len(available)} devices there are; the sizes must "
                      "multiply to their number")  # fmt: skip
    # not jax.make_mesh, which on most tori wants whole axes: 16x16 has none for tensor 4
    if (slices := slice_count(available)) == 1:
        placed = mesh_utils.create_device_mesh(shape, available, allow_split_physical_axes=True)
    else:
        if data % slices:
            raise Refused(f"the devices are {slices} slices of {len(available) // slices}; data is {data}, and must be "
                          f"a multiple of {slices}: it alone goes over the network between slices")  # fmt: skip
        placed = mesh_utils.create_hybrid_device_mesh((data // slices, *shape[1:]), (slices, 1, 1, 1), available,
                                                      allow_split_physical_axes=True)  # fmt: skip
    return jax.sharding.Mesh(placed, MESH_AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(MESH_AXES))


def mesh_for_rows(rows: int) -> jax.sharding.Mesh:
    """As many devices on `data` as divide a batch of `rows` evenly."""
    devices = jax.devices()[: math.gcd(rows, len(jax.devices()))]
    return make_mesh(devices=devices)


def current_sizes() -> dict[str, int]:
    """Sizes of the axes of the mesh in this context, empty without one."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def has_mesh() -> bool:
    """Whether a mesh is set in this context."""
    return not jax.sharding.get_abstract_mesh().empty


def on_mesh(spec: P) -> P | None:
    """`spec` for `out_sharding=`; None where no mesh is set."""
    return spec if has_mesh() else None


def reshard(x: Array, spec: P) -> Array:
    """`x` laid out as `spec` (all-gather or slice; the transpose scatters the gradient back)."""
    return jax.sharding.reshard(x, spec) if has_mesh() else x


def gather_weight(w: Array, x: Array, rules: Rules, *axes: str | None) -> Array:
    """A weight with these logical axes as a product with `x` needs it: whole along "embed".

    Each device's share of its gradient is added up and scattered over the axes that cut the weight, then added up over
    the other axes of the batch. Two steps, which the types of the two layouts ask for: a gradient that is added up over
    all axes of the batch at once is an all-reduce of the whole weight, twice the bytes. For operations with a sharding
    rule that know reduced operands, as `einsum` does; in `per_device` use `gather_own`. One that is whole already
    (`gather_for_passes`) stays as it is.
    """
    if not has_mesh() or is_whole(w, rules):
        return w
    batch = set(rules.mesh_axes("batch"))
    cut = {name for axis in axes if axis is not None for name in rules.mesh_axes(axis)}
    once = jax.sharding.reshard(_tied(w, x), P(*rules.spec(*axes), reduced=batch - cut))
    return jax.sharding.reshard(once, P(*rules.gathered(*axes), reduced=batch))


def is_whole(w: Array, rules: Rules) -> bool:
    """Whether a weight was gathered: each device then has its own share of the gradient, added up where it was."""
    return bool(jax.typeof(w).sharding.spec.reduced) and has_mesh() and not embed_axes(w, rules)


def embed_axes(w: Array, rules: Rules) -> set[str]:
    """The mesh axes that cut a weight along "embed", by its type."""
    return _cutting(w) & set(rules.mesh_axes("embed"))


def _cutting(w: Array) -> set[str]:
    parts = jax.typeof(w).sharding.spec.partitions
    return {name for one in parts if one is not None for name in (one if isinstance(one, tuple) else (one,))}


def gather_for_passes(w: Array, x: Array, rules: Rules) -> Array:
    """`gather_weight` for all passes of a layer that begins with `x`: gathered once, its gradient added up once.

    By the type of `w` alone, which stays as it is where "embed" does not cut it, and on a mesh of one device, where JAX
    cannot lower what `per_device` gives for a share of a gradient.
    """
    if math.prod(current_sizes().values()) == 1 or not (embed := embed_axes(w, rules)):
        return w
    parts, batch = jax.typeof(w).sharding.spec.partitions, set(rules.mesh_axes("batch"))
    once = jax.sharding.reshard(_tied(w, x), P(*parts, reduced=batch - _cutting(w)))
    left = [None if set(one if isinstance(one, tuple) else (one,)) & embed else one for one in parts]
    return jax.sharding.reshard(once, P(*left, reduced=batch))


def gather_compute_weights(weights: Any, x: Array, rules: Rules, dtype: str, kind: str) -> Any:
    """The weights of a layer of this kind by `gather_for_passes`, each under the scope that its use has.

    But those that a module casts before it uses them, which are not of `dtype`, and those of hyper-connections: they
    are gathered where they are used.
    """

    def one(path: Any, w: Array) -> Array:
        names = [str(getattr(key, "key", key)) for key in path]
        if w.dtype != jnp.dtype(dtype) or any("hyper" in name for name in names):
            return w
        with jax.named_scope("/".join(f"mixer_{kind}" if name == "mixer" else name for name in names)):
            return gather_for_passes(w, x, rules)

    return jax.tree_util.tree_map_with_path(one, weights)


def zero_gradient(w: Array) -> Array:
    """Zeros laid out as the gradient of `w`: of a weight that was gathered, each device's own share."""
    if not has_mesh():
        return jnp.zeros_like(w)
    spec = jax.typeof(w).sharding.spec
    return jnp.zeros(w.shape, w.dtype, out_sharding=P(*spec.partitions, unreduced=spec.reduced))


def gather_own(w: Array, x: Array, rules: Rules, *axes: str | None) -> Array:
    """`gather_weight` on one device, inside `per_device`: its piece of a weight, laid out as `Rules.spec`, made whole.

    The transpose scatters the gradient back over the same devices; `per_device` adds it up over all others.
    """
    cut = rules.mesh_axes("embed") if "embed" in axes and has_mesh() else ()
    return jax.lax.all_gather(_tied(w, x), cut, axis=axes.index("embed"), tiled=True) if cut else w


def _tied(w: Array, x: Array) -> Array:
    """`w`, no sooner than `x`.

    JAX moves out of a loop what does not depend on what the loop carries: a loop over the parts of a row would keep the
    weights of all layers, gathered.
    """
    return jax.lax.optimization_barrier((w, jax.lax.stop_gradient(x)))[0]


def with_mesh_devices(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """`shape` laid out over the devices of the current mesh: a restore needs devices, tracing gives axes only."""
    if not has_mesh():
        return shape
    spec = P() if shape.sharding is None else shape.sharding.spec
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def put_like(tree: Any, shapes: Any) -> Any:
    """A copy of the arrays of `tree`, each where its stand-in in `shapes` (`model.abstract`) says."""
    return jax.tree.map(lambda leaf, shape: jax.device_put(np.array(leaf), shape.sharding), tree, shapes)


MODEL_INPUTS = ("tokens", "targets", "segment_ids")


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model reads of a batch: held-out batches of tasks say more, such as the difficulty of an answer."""
    return {name: batch[name] for name in MODEL_INPUTS}


def global_batch(batch: Mapping[str, np.ndarray | Array], rules: Rules) -> dict[str, Any]:
    """What a model reads of a batch that every process has whole, over the devices of all; as it is in one process."""
    read = model_inputs(batch)
    if jax.process_count() == 1 or not has_mesh():
        return read
    rows = jax.sharding.NamedSharding(jax.sharding.get_mesh(), rules.spec("batch", None))
    return {name: jax.make_array_from_callback(array.shape, rows, array.__getitem__) for name, array in read.items()}


def per_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on each device's own shard: for operations that have no sharding rule and need none."""
    if not has_mesh():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
