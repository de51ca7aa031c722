"""What memory is there decides whether llama.cpp may hold its weights twice."""

from __future__ import annotations

from anomalygpt_edge.runtime import memory
from anomalygpt_edge.runtime.llama_session import repacking_fits

GIB = 1 << 30


def test_a_control_group_is_believed_before_the_machine(tmp_path, monkeypatch):
    machine, limit, used = tmp_path / "meminfo", tmp_path / "max", tmp_path / "current"
    machine.write_text(f"MemTotal: 1 kB\nMemAvailable: {16 << 20} kB\n")
    monkeypatch.setattr(memory, "MEMORY_INFO", machine)
    monkeypatch.setattr(memory, "GROUP_FILES", ((limit, used),))
    assert memory.available_memory() == 16 * GIB  # no group
    limit.write_text("max\n")
    used.write_text(f"{GIB}\n")
    assert memory.available_memory() == 16 * GIB
    limit.write_text(f"{8 * GIB}\n")
    assert memory.available_memory() == 7 * GIB
    machine.unlink()
    limit.unlink()
    assert memory.available_memory() == float("inf")


def test_a_second_copy_only_where_there_is_room():
    seven_billion = 4 * GIB
    assert repacking_fits(seven_billion, 16 * GIB)
    assert not repacking_fits(seven_billion, 7 * GIB)  # an 8 GB device
