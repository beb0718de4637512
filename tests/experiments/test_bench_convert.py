"""The benchmark of conversions, at its smallest size: what it makes is a folder, and what came back is compared."""

import pytest

from experiments import bench_convert
from gt_jax.errors import Failed
from gt_jax.interop.from_hf import from_hf
from gt_jax.interop.hf_folder import HFFolder
from gt_jax.interop.to_hf import to_hf


@pytest.mark.exhaustive
def test_a_random_folder_goes_there_and_back(tmp_path):
    config = bench_convert.toy()
    size = bench_convert.write_folder(tmp_path / "folder", config, 50_000)
    folder = HFFolder(tmp_path / "folder")
    assert folder.config.replace(init_std=config.init_std) == config and len(folder.files) > 2
    assert size == sum(map(bench_convert.disk_bytes, folder.tensors.values()))
    from_hf(tmp_path / "folder", tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert bench_convert.compare(tmp_path / "folder", tmp_path / "back") == len(folder.tensors)
    bench_convert.write_folder(tmp_path / "other", config, 50_000, seed=1)
    with pytest.raises(Failed, match=r"did not come back as they were: .*embed_tokens"):
        bench_convert.compare(tmp_path / "folder", tmp_path / "other")


def test_the_page_says_both_ways():
    rounds = [{"read": 2.0, "write": 2.0, "in": 8.0, "out": 6.0, "processor": 5.0, "load": 1.0}]
    one = {"rounds": rounds, "ratio": {"median": 2.0, "least": 1.5, "most": 2.5}, "peak_gib": 0.4}
    report = {"size": "toy", "tensor_bytes": 1e9, "cold": "fadvise", "in": one, "out": one, "identical": 55,
              "machine": {"processor": "P", "cores": 2}}  # fmt: skip
    page = "\n".join(bench_convert.page(report))
    assert "| in, `convert FOLDER OURS` | 8.0 | 4.0 | 2.00 (1.50 to 2.50) | 5.0 | 0.40 |" in page
    assert "| 6.0 | 4.0 |" in page and "55 tensors came back bit for bit. P, 2 cores, on which 1.0" in page
