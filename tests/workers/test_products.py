"""Products over packed weights: exact, and the same bits in any company, on every target that the kernels know."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from protocol.dtypes import TYPES, GGMLType
from tests.support.products import Case, K, check, packed, unpacked
from workers.kernels import layout
from workers.kernels.simd import TARGETS, cpu_features

ROOT = Path(__file__).resolve().parent.parent.parent
_COMMON = "+sse,+sse2,+cx16"
_AVX2 = _COMMON + ",+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
_CPUS = {
    "AVX-512": ("skylake-avx512", _AVX2 + ",+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd"),
    "AVX2": ("haswell", _AVX2),
    "portable": ("x86-64", _COMMON),
}


@pytest.mark.parametrize("t", layout.KINDS, ids=lambda t: t.name)
def test_products_are_right_in_any_company(t: GGMLType) -> None:
    check(t)


@pytest.mark.parametrize("t", layout.KINDS, ids=lambda t: t.name)
def test_packed_bytes_come_back(t: GGMLType) -> None:
    shape = (37, K // TYPES[t].block * TYPES[t].bytes)
    c = Case(t, np.random.default_rng(int(t)).integers(0, 256, shape, np.uint8), np.empty(0))
    assert np.array_equal(unpacked(c, packed(c)), c.blocks)


@pytest.mark.parametrize("name", _CPUS)
def test_other_targets(name: str, tmp_path: Path) -> None:
    target = next(t for t in TARGETS if t.name == name)
    if os.uname().machine != "x86_64" or not cpu_features().issuperset(target.needs):
        pytest.skip(f"this CPU cannot run code for {name}")
    cpu, features = _CPUS[name]
    env = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "tests.support.products"], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == name
