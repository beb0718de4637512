"""Eight CPU devices, no silent broadcasting, warnings as errors (pyproject).

Tracing and compiling are nearly all that a test costs, so LLVM optimises less (not level 0, whose code returns NaN in
places), fusions are emitted the older, quicker way where XLA still has it, operations do not carry the Python lines
that they come from (a fifth of the time), and what took long to compile is kept for the rest of the run, for every
process of it.
"""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# The older emitter takes a third less time; XLA after 0.10 refuses the flag. With it, level 1 returns NaN in places.
_LEVEL = "2 --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and commands under test inherit it
    given = os.environ.get("XLA_FLAGS", "")  # for example --xla_cpu_max_isa=AVX2, to run as an older processor would
    ours = f"--xla_force_host_platform_device_count=8 --xla_backend_optimization_level={_LEVEL}"
    os.environ["XLA_FLAGS"] = f"{given} {ours}".strip()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gt_jax-compiled-")

import jax  # noqa: E402 - reads the environment
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure() -> None:
    """The process that made the folder of compiled programs removes it; the others have ended by then."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture
def key() -> jax.Array:
    """The same key in every test that asks for one."""
    return jax.random.key(0)


LONGEST = (
    "test_demo", "test_components", "test_commands", "test_language_model", "test_presets", "test_sliding",
    "test_whole_model",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two processes end together; a file stays in one: its tests share programs."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Tracing makes millions of objects that live on: looking through them for cycles so often took 4 % of the run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
