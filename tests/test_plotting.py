"""Every figure helper on tiny data: axes, legends, and what is written to disk."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from astropy.table import Table
from matplotlib.figure import Figure

from deblender import measurement, plotting

LABELS = ("LSST", "LSST+Euclid")
N = 300


def data(seed: int = 0) -> dict:
    """Ellipticities, errors and signal-to-noise ratios of N galaxies, some failed."""
    rng = np.random.default_rng(seed)
    e_in = rng.normal(0, 0.25, (N, 2))
    e_out = {k: 0.95 * e_in + rng.normal(0, 0.03, (N, 2)) for k in LABELS}
    e_out["LSST"][:5] = np.nan
    errors = {k: rng.normal(0, 0.05, N) for k in LABELS}
    errors["LSST"][:5] = np.nan
    return {
        "e_in": e_in,
        "e_out": e_out,
        "errors": errors,
        "snr": rng.lognormal(4, 1, N),
    }


def truth(seed: int) -> Table:
    rng = np.random.default_rng(seed)
    columns = {name: rng.normal(0, 0.2, N) for name in ("e1", "e2", "r_mag", "z")}
    columns["e1"][0] = np.nan
    return Table(columns)


def column(**changes) -> dict:
    d = data()
    return {
        "x": d["snr"],
        "errors": d["errors"],
        "edges": np.geomspace(5, 500, 6),
        "xlabel": "S/N",
        "ylabel": "error on $|e|$",
        "log": True,
    } | changes


def biases() -> dict[str, Table]:
    d, edges = data(), np.geomspace(5, 500, 4)
    return {
        label: measurement.binned_ellipticity_bias(d["snr"], d["e_in"], e, edges)
        for label, e in d["e_out"].items()
    }


def shear_biases() -> dict[str, Table]:
    rng, g = np.random.default_rng(3), 0.01
    samples = {}
    for shear in [(0, 0), (g, 0), (-g, 0), (0, g), (0, -g)]:
        e1, e2 = np.array(shear)[:, None] + rng.normal(0, 1e-3, (2, 50))
        samples[shear] = Table({"e1": e1, "e2": e2})
    table = measurement.shear_biases(samples)
    return {"LSST target": table, "LSST deblended": table}


def tables() -> dict[str, Table]:
    rng = np.random.default_rng(7)
    de, dr = rng.normal(0, 0.1, (2, N))
    return dict.fromkeys(LABELS, Table({"snr": data()["snr"], "de": de, "dr": dr}))


def draws() -> dict[str, np.ndarray]:
    return {label: np.random.default_rng(4).normal(size=(2, 50)) for label in LABELS}


STAMPS = np.random.default_rng(5).random((2, 3, 16, 16, 3))
HISTORY = {
    "images": [100, 200, 300],
    "loss": [9.0, 5.0, 4.0],
    "val_images": [300],
    "val_loss": [4.5],
}

FIGURES = {
    "stamps": lambda: plotting.stamps(
        STAMPS,
        titles=["input", "output", "target"],
        row_labels=["a", "b"],
        targets=np.zeros((1, 1, 2)),
        neighbours=np.full((2, 1, 3, 2), 0.5),
        field=2.0,
    ),
    "distributions": lambda: plotting.distributions({"a": truth(1), "b": truth(2)}),
    "training_curve": lambda: plotting.training_curve(dict.fromkeys(LABELS, HISTORY)),
    "corner": lambda: plotting.corner(np.random.default_rng(6).normal(size=(N, 6))),
    "ellipticity_components": lambda: plotting.ellipticity_components(
        {k: (data()["e_in"], e) for k, e in data()["e_out"].items()}
    ),
    "error_columns": lambda: plotting.error_columns(
        [
            column(ylim=(-1, 1)),
            column(x=dict.fromkeys(LABELS, data()["snr"]), log=False),
        ]
    ),
    "errors_against": lambda: plotting.errors_against(
        tables(), "snr", np.geomspace(5, 500, 6), "S/N", log=True
    ),
    "bias_against_snr": lambda: plotting.bias_against_snr(biases()),
    "shear_bias": lambda: plotting.shear_bias(shear_biases()),
    "half_widths": lambda: plotting.half_widths(
        [data()["errors"], data(1)["errors"]],
        [("S/N", data()["snr"], np.geomspace(5, 500, 4))],
        ["width of r", "width of e"],
    ),
    "lines_in_bins": lambda: plotting.lines_in_bins(
        [{label: [np.ones((2, 3)), np.ones((2, 2))] for label in LABELS}] * 2,
        [("S/N", np.geomspace(5, 500, 4)), ("blendedness", np.array([0, 0.1, 0.8]))],
        ["slope", "failed"],
    ),
    "rates": lambda: plotting.rates(
        {"drawing": {"a peer": 3.0, "fast": 40.0}, "fitting": {"another": 2e3}},
        ours=["fast"],
    ),
    "scaling": lambda: plotting.scaling(
        [1, 2, 4], {label: [10, 19, 30] for label in LABELS}, [1e3, 1e4], [1.0, 1.5]
    ),
    "posterior": lambda: plotting.posterior(
        STAMPS[:, 0], draws(), draws(), targets=np.zeros((2, 2)), field=2.0
    ),
}


def text_of(fig: Figure) -> str:
    found = [t.get_text() for legend in fig.legends for t in legend.get_texts()]
    for ax in fig.axes:
        found += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]
        found += [t.get_text() for t in [*ax.texts, *ax.get_yticklabels()]]
    return " | ".join(found)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stamps", ["input", "target", "neighbours", '"']),
        ("distributions", ["|e|", "mag", "redshift", "density"]),
        ("training_curve", [*LABELS, "images seen", "nats"]),
        ("corner", ["z_{5}", "prior"]),
        ("ellipticity_components", [*LABELS, "e_1", "e_2", "|e|", "error"]),
        ("errors_against", [*LABELS, "S/N", "galaxies", "median", "|e|", "mag"]),
        ("error_columns", [*LABELS, "S/N", "galaxies", "median"]),
        ("bias_against_snr", [*LABELS, "S/N", r"\alpha"]),
        ("shear_bias", ["LSST target", "component 2", "$m$ (%)", "$c$"]),
        ("half_widths", [*LABELS, "S/N", "width of r", "width of e"]),
        ("lines_in_bins", [*LABELS, "S/N", "blendedness", "slope", "failed"]),
        ("rates", ["a peer", "40", "per second", "this book"]),
        ("scaling", [*LABELS, "processes", "memory (GB)", "scenes"]),
        ("posterior", [*LABELS, "|e|", "(mag)"]),
    ],
)
def test_every_figure_has_axes_and_a_legend(name, words):
    fig = FIGURES[name]()
    fig.canvas.draw()
    assert fig.get_figwidth() == plotting.WIDTH
    assert fig.legends or all(ax.get_legend() for ax in fig.axes)
    assert [word for word in words if word not in text_of(fig)] == []
    assert not plt.get_fignums(), "an open figure is shown twice by Jupyter"


@pytest.mark.parametrize("name", ["error_columns", "stamps", "shear_bias"])
def test_text_is_large_enough_for_a_phone(name):
    fig = FIGURES[name]()
    fig.canvas.draw()
    texts = [t for ax in fig.axes for t in [*ax.texts, ax.xaxis.label, ax.yaxis.label]]
    texts += [t for ax in fig.axes for t in ax.get_xticklabels() + ax.get_yticklabels()]
    texts += [t for legend in fig.legends for t in legend.get_texts()]
    assert min(t.get_fontsize() for t in texts) >= 9


def test_a_figure_leaves_the_style_of_the_reader_alone():
    before = dict(plt.rcParams)
    FIGURES["error_columns"]()
    assert dict(plt.rcParams) == before


def test_architecture_is_drawn_from_the_live_models():
    from deblender import networks

    encoder, decoder = networks.encoder(10), networks.decoder(10)
    fig = plotting.architecture(encoder, decoder, frozen=True)
    assert "2,547,048" in fig.axes[0].get_title()
    assert "3,321,098" in fig.axes[1].get_title()
    kinds = [layer.__class__.__name__ for layer in encoder.layers + decoder.layers]
    blocks = [patch for ax in fig.axes for patch in ax.patches]
    assert len(blocks) == sum(kind in plotting.LAYERS for kind in kinds)
    assert {bool(p.get_hatch()) for p in fig.axes[1].patches} == {True}
    assert {"64²", "4²", "256", "mean", "width"} <= set(text_of(fig).split(" | "))
    assert "frozen" in text_of(fig)


def test_colours_follow_the_survey_and_the_centring():
    labels = ["LSST", "LSST+Euclid", "LSST, pixel centring", "LSST, peak centring"]
    styles = plotting._styles([*labels, "transfer learning", "tested on real images"])
    colours = [style["color"] for style in styles.values()]
    assert colours == "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #7f7f7f".split()
    spare = plotting._styles(["LSST", "isolated", "blended"])
    assert len({style["color"] for style in spare.values()}) == 3


def test_a_training_curve_may_have_an_epoch_without_a_number():
    lost = HISTORY | {"loss": [9.0, np.nan, 4.0], "val_loss": [np.inf]}
    fig = plotting.training_curve({"a": lost})
    low, high = fig.axes[0].get_ylim()
    assert low < 4 and high > 9
    plotting.training_curve(
        {"a": HISTORY | {"loss": [np.nan] * 3, "val_loss": [np.nan]}}
    )


def test_half_widths_are_those_of_the_errors():
    """Errors of size 0.05 have half widths near 0.05; bins of fewer than ten, none."""
    fig = FIGURES["half_widths"]()
    for ax in fig.axes:
        for line in ax.lines:
            height = line.get_ydata()
            assert np.nanmedian(height) == pytest.approx(0.05, rel=0.2)
    few = plotting.half_widths(
        [{"a": np.ones(9)}], [("x", np.ones(9), np.array([0, 2.0]))], ["y"]
    )
    assert np.isnan(few.axes[0].lines[0].get_ydata()).all()


def test_lines_in_bins_have_bars_of_the_errors_inside_their_bins():
    edges, value = np.geomspace(1, 100, 4), np.array([2.0, 3.0, 5.0])
    rows = [{label: [np.stack([value, value / 10])] for label in LABELS}]
    fig = plotting.lines_in_bins(rows, [("S/N", edges)], ["slope"])
    ends = []
    for line, _, (bars,) in fig.axes[0].containers:
        places = line.get_xdata()
        assert ((edges[:-1] < places) & (places < edges[1:])).all()
        ends.append(places)
        for bar, middle in zip(bars.get_segments(), value, strict=True):
            np.testing.assert_allclose(bar[:, 1], [0.9 * middle, 1.1 * middle])
    assert (ends[0] < ends[1]).all(), "bars of two labels would cover each other"


def test_rgb_orders_bands_and_stays_in_range():
    images = np.zeros((2, 4, 4, 6))
    images[0, ..., 3] = 5.0
    colour = plotting.rgb(images)
    assert colour.shape == (2, 4, 4, 3)
    assert (colour[0, ..., 0] > 0).all() and not colour[..., 1:].any()
    noisy = np.random.default_rng(7).normal(0, 100, images.shape)
    composite = plotting.rgb(noisy)
    assert composite.min() >= 0 and composite.max() <= 1
    brighter = plotting.rgb(images, scale=np.full(6, 0.5))
    assert brighter[0].max() > plotting.rgb(images, scale=np.full(6, 50.0))[0].max()


def test_stamps_of_single_bands_have_a_scale_bar_each():
    fig = plotting.stamps(STAMPS[:1, ..., 0], pixel_scale=[0.2, 0.1, 0.3])
    assert [len(ax.texts) for ax in fig.axes] == [1, 1, 1]
    half = [ax.get_xlim()[1] for ax in fig.axes]
    np.testing.assert_allclose(half, [1.6, 0.8, 2.4])


def test_published_figures_are_the_same_bytes_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("DEBLENDER_BUILD", str(tmp_path))
    written = []
    for _ in range(2):
        fig = FIGURES["training_curve"]()
        assert plotting.publish(fig, "fig-errors") is fig
        folder = tmp_path / "figures"
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert set(written[0]) == {"fig-errors.png", "fig-errors.pdf"}
    assert written[0] == written[1]


def test_nothing_is_written_without_a_build_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("DEBLENDER_BUILD", raising=False)
    monkeypatch.chdir(tmp_path)
    plotting.publish(plt.Figure(), "fig-empty")
    plotting.record("00_nothing", m=1.0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="figure label '../x'; accepted"):
        plotting.publish(plt.Figure(), "../x")


def test_a_figure_that_cannot_be_drawn_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DEBLENDER_BUILD", str(tmp_path))
    fig = FIGURES["error_columns"]()
    monkeypatch.setattr(fig, "savefig", lambda file, **_: file.write(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        plotting.publish(fig, "fig-broken")
    assert not list(tmp_path.rglob("*.*"))


def test_record_merges_what_one_run_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DEBLENDER_BUILD", str(tmp_path))
    monkeypatch.setattr(plotting, "_recorded", {})
    plotting.record("04_x", m=np.float32(0.5), n=np.int64(3), bad=np.nan, name="a")
    kept = plotting.record("04_x", lists=np.array([1.0, np.inf]), nested={"m": (1, 2)})
    written = json.loads((tmp_path / "metrics" / "04_x.json").read_text())
    assert written == kept
    assert written == {
        "m": 0.5,
        "n": 3,
        "bad": None,
        "name": "a",
        "lists": [1.0, None],
        "nested": {"m": [1, 2]},
    }


def test_recorded_numbers_can_be_formatted_in_the_text(tmp_path, monkeypatch):
    glued = {}
    monkeypatch.setattr(plotting, "_glue", glued.__setitem__)
    monkeypatch.setattr(plotting, "_recorded", {})
    plotting.record("04_x", m=np.float64(0.5), bad=np.nan, name="a", many=[1])
    assert [repr(glued[name]) for name in ("m", "bad")] == ["0.5", "nan"]
    plotting.record("04_x", few=np.int64(3), half=np.float32(0.5))
    assert [repr(glued[name]) for name in ("few", "half")] == ["3", "0.5"]
    assert glued["name"] == "a" and "many" not in glued


def test_posterior_without_a_measured_draw_is_an_empty_panel(recwarn):
    nothing, something = np.full((1, 5), np.nan), np.ones((1, 5))
    image = np.zeros((1, 64, 64))
    fig = plotting.posterior(image, {"lsst": nothing}, {"lsst": something})
    assert len(fig.axes[1].patches) == 0 < len(fig.axes[2].patches)
    assert not recwarn.list


def test_whole_numbers_of_a_table_are_grouped():
    page = plotting.show(
        {"network": ["a"], "blends": [1968000], "slope": ["-0.1"]}
    ).data
    assert "<td>1,968,000</td>" in page and "<td>-0.1</td>" in page
