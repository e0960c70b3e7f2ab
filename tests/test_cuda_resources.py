"""tests/cuda_resources.py: what it reads of ptxas, and what it calls a regression."""

from __future__ import annotations

from cuda_resources import faults, read_reports

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6unmask4cuda9head_scanILNS_9FloatTypeE1ELi32ELb0EEEvNS0_7HeadJobE' for 'sm_90a'
ptxas info    : Function properties for _ZN6unmask4cuda9head_scanILNS_9FloatTypeE1ELi32ELb0EEEvNS0_7HeadJobE
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 88 registers, used 2 barriers, 16 bytes cumulative stack size, 512 bytes smem
"""
ROW = ("head_scan<1, 32, false>", "90a", 88, 16, 12, 512)


def test_reads_a_report(tmp_path):
    (tmp_path / "a.cu.txt").write_text(REPORT)
    (tmp_path / "b.cu.txt").write_text("ptxas info    : (C7518) Potential Performance Loss: wgmma.mma_async instructions are serialized")
    rows, slow = read_reports(tmp_path)
    assert rows == [ROW] and len(slow) == 1 and "b.cu.txt" in slow[0]


def test_regressions():
    name, arch = ROW[:2]
    clean = (name, arch, 88, 16, 0, 512)
    table = {(name, arch): (88, 16, 512)}
    assert faults([clean], [], table) == []
    assert faults([(name, arch, 96, 16, 0, 512)], [], table) == []  # another ptxas
    for worse in ((name, arch, 97, 16, 0, 512), (name, arch, 88, 24, 0, 512), (name, arch, 88, 16, 4, 512), (name, arch, 88, 16, 0, 513)):
        assert len(faults([worse], [], table)) == 1
    assert len(faults([clean], ["C7518"], table)) == len(faults([clean], [], {})) == len(faults([], [], table)) == 1
