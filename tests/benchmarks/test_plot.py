"""The picture of a benchmark shows every row."""

from __future__ import annotations

from matplotlib.figure import Figure

from benchmarks.measure import Row, plot


def test_figures_of_zero_and_below_are_in_the_picture(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, _: drawn.append(self))
    plot([Row("a", -0.01, "share"), Row("b", 0.0, "share"), Row("c", 5.0, "us", 0.5)], tmp_path / "x.svg")
    share, us = drawn[0].axes
    for axes, values in ((share, [-0.01, 0.0]), (us, [5.0, 0.5])):
        low, high = axes.get_xlim()
        # What a logarithmic axis cannot show is masked: the line has no point there.
        points = [axes.transData.transform((value, 0))[0] for value in values]
        assert all(low < value < high for value in values)
        assert all(point == point and abs(point) < 1e6 for point in points)
    assert us.get_xscale() == "log"
