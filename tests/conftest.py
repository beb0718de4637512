"""Eight CPU devices, no silent broadcasting, warnings as errors (pyproject).

Tracing and compiling are nearly all that a test costs, so LLVM does not optimise (with its thorough instruction
selection: the fast one, which goes with level 0, makes code that returns NaN in places) nor cuts a program into parts
for threads that are not there, fusions are emitted the older, quicker way where XLA still has it, operations do not
carry the Python lines that they come from (a fifth of the time), a function inside a function is checked for types the
first times that it is made and not for each layer of each model anew (a quarter of tracing), any other at its first
calls in each file of tests (a tenth of the time), no initializer is traced
for the shape of a parameter that is there (a tenth of tracing), and what took long to compile is kept for the rest of
the run, for every process of it.
"""

import collections
import functools
import gc
import os
import shutil
import tempfile
import types
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

from tests import on_a_gpu

try:
    ON_A_GPU = on_a_gpu.platform() == "gpu"
except ValueError as error:
    raise pytest.UsageError(str(error)) from None

os.environ["JAX_PLATFORMS"] = on_a_gpu.JAX_PLATFORMS if ON_A_GPU else "cpu"  # each worker sets it anew
# Level 0 so takes half the time of 2, the older emitter a third less, one part a seventh; an XLA that no longer knows
# a flag ends the process, and after 0.10 it refuses that of the emitter.
_CHEAP = "0 --xla_backend_extra_options=-fast-isel=false --xla_cpu_use_fusion_emitters=false"
_CHEAP += " --xla_cpu_parallel_codegen_split_count=1"
_LEVEL = _CHEAP if version("jaxlib").startswith("0.10.") else "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and commands under test inherit it
    given = os.environ.get("XLA_FLAGS", "")  # for example --xla_cpu_max_isa=AVX2, to run as an older processor would
    ours = f"--xla_force_host_platform_device_count=8 --xla_backend_optimization_level={_LEVEL}"
    ours = on_a_gpu.prepare() if ON_A_GPU else ours
    os.environ["XLA_FLAGS"] = f"{given} {ours}".strip()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gt_jax-compiled-")

import jax  # noqa: E402 - reads the environment
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
from flax.core.scope import Scope  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


CHECKED = 2  # times that a function inside a function is made with its types checked; each further time it stands bare
CALLS = 4  # calls of any other function that are checked in each file of tests
called: collections.Counter[types.CodeType] = collections.Counter()
_file = [""]  # of the test that runs


def _checked_at_first(decorate: Callable[..., Any]) -> Callable[..., Any]:
    """`jaxtyping.jaxtyped`, which the hook of `--jaxtyping-packages` puts over every function, where it is likely to
    see something new.

    It writes and compiles two functions for each one that it decorates: once for those of a module, but for those
    inside others at every call, thousands of times for one model; and it compares the shapes of each call's arrays
    with the names of those before. Counted in each process, by code object.
    """
    made: collections.Counter[types.CodeType] = collections.Counter()

    @functools.wraps(decorate)
    def decorated(fn: Any = None, **options: Any) -> Any:
        if fn is None:
            return functools.partial(decorated, **options)
        if not isinstance(fn, types.FunctionType):
            return decorate(fn, **options)
        code = fn.__code__
        if "<locals>" in fn.__qualname__:
            made[code] += 1
            return decorate(fn, **options) if made[code] <= CHECKED else fn
        checked = decorate(fn, **options)

        @functools.wraps(fn)
        def either(*args: Any, **keywords: Any) -> Any:
            called[code] += 1
            return (checked if called[code] <= CALLS else fn)(*args, **keywords)

        return either

    return decorated


jaxtyping.jaxtyped = _checked_at_first(jaxtyping.jaxtyped)  # before any module of ours is imported


def _of_the_shape_asked_for(param: Callable[..., Any]) -> Callable[..., Any]:
    """`Scope.param`, which traces the initializer of every parameter that it finds, to compare shapes.

    Our initializers make the shape that is their first argument: where the parameter has it, that is the comparison.
    """

    @functools.wraps(param)
    def found(self: Scope, name: str, init: Any, *args: Any, **options: Any) -> Any:
        if args and not options and self.has_variable("params", name):
            value = self.get_variable("params", name)
            if np.shape(value) == args[0]:
                self.reserve(name, "params")
                return value
        return param(self, name, init, *args, unbox=options.pop("unbox", True), **options)

    return found


Scope.param = _of_the_shape_asked_for(Scope.param)


def pytest_runtest_logstart(nodeid: str, location: tuple[str, int | None, str]) -> None:
    """Every file of tests has calls of its own that are checked, and what lives at its end lives on.

    Millions of objects of programs: each read of a broken checkpoint, which looks for cycles (`_with_orbax`), would
    look through all of them, a second each.
    """
    if location[0] != _file[0]:
        called.clear()
        _file[0] = location[0]
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """The process that made the folder of compiled programs removes it; the others have ended by then."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture
def key() -> jax.Array:
    """The same key in every test that asks for one."""
    return jax.random.key(0)


LONGEST = (  # from 80 CPU seconds down to 20
    "test_mixers", "test_components", "test_transform", "test_several_processes", "test_commands", "test_demo",
    "test_goes_on", "test_compacted_passes", "test_verify", "test_gates_closed_loop", "test_moe", "test_hybrid_walk",
    "test_sliding", "test_gated_delta_rule_tpu", "test_gated_delta_rule", "test_hyper_connections", "test_lineage",
    "test_early_exit", "test_stream_resume", "test_whole_model", "test_bfloat16", "test_calibration", "test_kept_gates",
    "test_adaptive_depth", "test_sparse_attention", "test_public_face", "test_round_trip", "test_evaluate",
    "test_whole_or_not", "test_causal_attention", "test_alerts", "test_gated_delta_rule_properties", "test_groundthink",
)  # fmt: skip


# What fails on most mistakes, in two minutes together with lint and types: a folder, a file, or one test of it.
QUICK = (
    "test_rooms.py", "test_docs.py", "configs/test_config_and_layout.py", "text/", "monitoring/", "devices/",
    "checkpoints/", "growth/test_plan.py", "growth/test_plan_kinds.py", "growth/test_repetition.py",
    "growth/test_rules.py", "growth/test_transform.py", "growth/test_noise.py", "interop/test_names.py",
    "interop/test_values.py", "interop/test_bad_input.py", "training/test_loss.py",
    "training/test_price_and_optimizer.py", "models/oracle/", "models/layers/test_stack.py",
    "models/layers/test_mixers.py::test_no_output_depends_on_a_later_input",
    "models/layers/test_mixers.py::test_packed_documents_are_apart",
    "models/test_whole_model.py::test_adaptive_depth[token]", "growth/test_identity.py",
    "evaluation/test_confidence_intervals.py", "kernels/test_ladder_inverse.py", "commands/test_prepare.py",
    "test_public_face.py::test_every_name_has_an_example_that_runs[grow]", "test_public_face.py::test_one_entry",
)  # fmt: skip


def pytest_configure() -> None:
    """Nothing is run on a CPU where a GPU was asked for."""
    if ON_A_GPU and (problem := on_a_gpu.no_gpu()) is not None:
        raise pytest.UsageError(problem)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the part of the suite that `make quick` runs")


def _is_quick(item: pytest.Item) -> bool:
    name = item.nodeid.removeprefix("tests/")
    return name.startswith(QUICK) and item.get_closest_marker("slow") is None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first, so that two processes end together; a file stays in one: its tests share programs."""
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if not _is_quick(item)])
        items[:] = [item for item in items if _is_quick(item)]
    if ON_A_GPU:
        names = [item.nodeid.removeprefix("tests/") for item in items]
        for place, reason in on_a_gpu.left_out(names, jax.device_count()):
            items[place].add_marker(pytest.mark.skip(reason=reason))
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Tracing makes millions of objects that live on: looking through them for cycles so often took a tenth of the run.

    So what has just been made is looked through after 200,000 objects instead of 700, all of it hardly ever but between
    files.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)
    gc.set_threshold(100_000, 20, 50)
