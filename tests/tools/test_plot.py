"""The figure of `duqpp inspect --plot`: it shows the report's numbers, and is a whole file."""

from dataclasses import replace

import pytest

from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.methods.reports import GroupReport
from duqpp.tools.inspection import Inspection, inspect_model

pytest.importorskip("matplotlib", reason="the plot extra is not installed")

from matplotlib.image import imread

from duqpp.tools.plot import check_plot_file, draw, plot


@pytest.fixture(scope="module")
def found(tiny_llama) -> Inspection:
    return inspect_model(str(tiny_llama), QuantizeConfig(samples=2, seq_len=64, max_steps=16))


def panels(inspection: Inspection) -> list:
    """Axes from left to right and top to bottom, without the colour bar."""
    parts = draw(inspection).subfigs
    return [axes for part in parts for axes in part.axes if axes.get_label() != "<colorbar>"]


def of_kind(inspection: Inspection, kind: str) -> list[GroupReport]:
    return [group for group in inspection.groups if group.name.endswith("." + kind)]


def curves(axes) -> list[list[float]]:
    return [list(line.get_ydata()) for line in axes.get_lines()]


def test_outliers_of_each_kind_before_and_after(found):
    for axes, kind in zip(panels(found)[:4], found.kinds, strict=True):
        before, after = curves(axes)
        assert before == [max(group.block_amax_before) for group in of_kind(found, kind)]
        assert after == [max(group.block_amax) for group in of_kind(found, kind)]
        assert list(axes.get_lines()[0].get_xdata()) == [0, 1]
        assert axes.get_yscale() == "log"


def test_blocks_of_the_group_with_the_largest_outlier(found):
    worst = max(found.groups, key=lambda group: max(group.block_amax_before))
    kind = worst.name.rpartition(".")[2]
    before, after, curve = panels(found)[4:7]
    reports = of_kind(found, kind)
    assert before.get_images()[0].get_array().tolist() == [g.block_amax_before for g in reports]
    assert after.get_images()[0].get_array().tolist() == [g.block_amax for g in reports]
    assert curves(curve) == [worst.block_amax_before, worst.block_amax]
    scales = [axes.get_images()[0].norm for axes in (before, after)]
    assert scales[0] is scales[1]  # one colour means one magnitude in both


def test_errors_in_percent(found):
    activation, weight, output = panels(found)[7:]
    for axes, name in ((weight, "weight_error"), (output, "output_error")):
        expected = [[100 * getattr(g, name) for g in of_kind(found, kind)] for kind in found.kinds]
        assert curves(axes) == expected
    expected = []
    for kind in found.kinds:
        for name in ("activation_error_before", "activation_error"):
            expected.append([100 * getattr(g, name) for g in of_kind(found, kind)])
    assert curves(activation) == expected


def test_every_panel_has_a_title_and_labelled_axes(found):
    axes = panels(found)
    assert len(axes) == 10
    assert all(a.get_title() and a.get_xlabel() for a in axes)
    assert all(axes[i].get_ylabel() for i in (0, 4, 6, 7, 8, 9))
    assert [bool(a.get_legend()) for a in axes] == [i in (0, 6, 9) for i in range(10)]


def test_the_file_is_a_picture_that_follows_the_data(found, tmp_path):
    plot(found, tmp_path / "a.png")
    first = imread(tmp_path / "a.png")
    assert first.shape[0] > 1000 and first.shape[1] > 1000
    assert first.std() > 0.05  # not blank
    plot(replace(found, groups=found.groups[:4]), tmp_path / "a.png")
    assert (imread(tmp_path / "a.png") != first).any()
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_one_group_with_a_block_of_zeros(suffix, start, tmp_path):
    group = GroupReport("model.layers.4.o", 0.1, 0.2, 0.1, 0.1, [0.0, 2.0], [0.0, 1.0])
    plot(Inspection("model", "method", [group], {"o": "o"}), tmp_path / f"plot{suffix}")
    assert (tmp_path / f"plot{suffix}").read_bytes().startswith(start)


def test_a_report_without_activations_cannot_be_plotted(tmp_path):
    with pytest.raises(InputError, match="inspect the float model"):
        group = GroupReport("model.layers.0.o", 0.1)
        plot(Inspection("model", "rtn", [group], {"o": "o"}), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_failed_drawing_leaves_the_earlier_file(found, tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_bytes(b"earlier")

    def half_written(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half_written)
    with pytest.raises(OSError, match="no space"):
        plot(found, file)
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("a.png", b"earlier")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plot", "must end in .png, .pdf or .svg"),
        ("plot.doc", "must end in .png, .pdf or .svg"),
        ("none/plot.png", "is no folder that can be written"),
        ("folder.png", "is a folder"),
    ],
)
def test_places_where_no_plot_can_go(name, message, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=message):
        check_plot_file(tmp_path / name)
