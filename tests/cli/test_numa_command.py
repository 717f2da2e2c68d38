"""`kvtier numa`: works on the machine there is, for people and for machines; bad input is one line."""

from __future__ import annotations

import json

from kvtier.cli import main


def test_topo_shows_this_machine(capsys):
    assert main(["numa", "topo", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["nodes"]
    assert set(shown["allowed"]["affinity"]) <= {cpu["id"] for cpu in shown["cpus"]}
    assert "This process may use CPUs" in err
