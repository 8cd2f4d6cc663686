"""Steps are declared once: what a plan packs is what a kernel takes."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest

from tests.support.fixtures import ROOT
from workers.kernels import records, steps
from workers.kernels.exports import exported_step


@pytest.mark.parametrize("record", records.STEPS, ids=lambda r: r.__name__)
def test_a_kernel_takes_the_fields_of_its_step(record: type[records.Step]) -> None:
    exported_step(record)  # raises what does not fit
    assert records.STEPS[record.opcode] is record
    assert records.HEADER + len(record.__struct_fields__) <= steps.WORDS
    assert record.form.size == records.WORD * len(record.__struct_fields__)


def test_fields_lie_in_their_order_a_word_each() -> None:
    room = bytearray(80)
    steps.RmsNorm(w=7, eps=0.5, x=1, x_row=2, y=3, y_row=-4, n_rows=5, n=6).pack(room, 8)
    assert struct.unpack("=8x7qf4x8x", room) == (1, 2, 3, -4, 5, 6, 7, 0.5)


def test_what_plans_and_workers_import_holds_no_compiler() -> None:
    program = "import sys, workers.devices.cpu.device; raise SystemExit('numba' in sys.modules or 'llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
