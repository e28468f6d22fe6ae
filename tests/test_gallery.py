"""The gallery writes what it lists, and its figures show what their titles say."""

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from html import escape
from pathlib import Path

import numpy as np
import pytest

import fusedstep as fs
from fusedstep import gallery
from fusedstep.__main__ import main
from fusedstep.gallery import figures

NAMES = [entry.name for entry in gallery.FIGURES]

# Each figure is drawn once for all tests.
ONCE = [replace(entry, function=cache(entry.function)) for entry in gallery.FIGURES]
CODE = {entry.name: entry.code for entry in ONCE}


@pytest.fixture(scope="module")
def drawn():
    return {entry.name: entry.draw() for entry in ONCE}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the whole gallery, and its page."""
    folder = tmp_path_factory.mktemp("gallery") / "new"
    ticks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "FIGURES", ONCE)
        index = gallery.write(folder, ticks.append)
    assert ticks == NAMES
    return folder, Path(index).read_text(encoding="utf-8")


def test_gallery_writes_a_picture_for_every_figure_and_nothing_else(written):
    folder, _ = written
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["index.html", *(f"{name}.png" for name in NAMES)]
    )
    for name in NAMES:
        assert (folder / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (folder / f"{name}.png").stat().st_size > 20_000


def test_gallery_page_shows_every_figure_with_caption_code_and_source(written):
    _, page = written
    assert re.findall(r'<section id="(\w+)">', page) == NAMES
    assert re.findall(r'<li><a href="#(\w+)">', page) == NAMES
    images = re.findall(r'<img src="(\w+)\.png" alt="([^"]+)"', page)
    assert [name for name, _ in images] == NAMES
    text = re.sub(r"<[^>]+>", "", page)
    for entry in gallery.FIGURES:
        for part in (entry.title, entry.caption, entry.question, entry.equation, entry.source):
            assert part.strip(), f"{entry.name} lacks a text"
            assert escape(part) in page
        assert f"def {entry.name}() -&gt; Any:" in text
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_gallery_pictures_say_their_finding_on_one_line_within_the_picture(drawn):
    for entry in gallery.FIGURES:
        figure = drawn[entry.name]
        assert figure.get_suptitle() == entry.title
        drawing = figure.canvas.get_renderer()  # a saved figure's title keeps that of its file
        box, window = figure._suptitle.get_window_extent(drawing), figure.bbox
        assert box.x0 >= 0, entry.name
        assert box.x1 <= window.width, entry.name


@pytest.mark.parametrize("name", ["rates", "relatives", "schedules"])
def test_gallery_code_runs_as_the_page_shows_it(name):
    shown = {}
    exec("from fusedstep.gallery.figures import *", shown)
    exec(CODE[name], shown)
    assert shown[name].__globals__ is shown
    assert shown[name]().axes


def test_gallery_code_is_complete_and_can_be_parsed():
    functions = {
        name
        for name, value in vars(figures).items()
        if inspect.isfunction(value) and value.__module__ == figures.__name__
    }
    for name, code in CODE.items():
        tree = ast.parse(code)
        assert tree.body[0].name == name
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        shown = {node.name for node in tree.body}
        unseen = {node.id for node in names} & functions - made - shown
        assert not unseen, f"{name} uses {unseen}, which the page does not show"


def test_gallery_covers_the_lecture():
    everything = "\n".join(CODE.values())
    for name in fs.schedules.__all__:
        if name not in ("Schedule", "from_dict"):
            assert re.search(rf"\b{name}\b", CODE["schedules"]), name
    for name in ("SGD", "Adagrad", "RMSprop", "Adadelta", "Adam", "Adamax", "NAdam"):
        assert f"fs.{name}" in everything, name
    for option in ("nesterov=True", "amsgrad=", "bias_correction=", "momentum=", "lookahead=True"):
        assert option in everything, option


# -- what the titles say ---------------------------------------------------------------------------


def lines(figure, axes=0):
    return [(line.get_label(), np.asarray(line.get_ydata())) for line in figure.axes[axes].lines]


def curve(figure, label, axes=0):
    found = [y for name, y in lines(figure, axes) if name.startswith(label)]
    assert len(found) == 1, [name for name, _ in lines(figure, axes)]
    return found[0]


def test_rates_are_in_the_five_regimes(drawn):
    titles = [ax.get_title().split("\n")[1] for ax in drawn["rates"].axes[:5]]
    assert titles == ["monotone", "one step", "oscillating", "at the limit", "diverging"]
    ends = [ax.lines[0].get_ydata()[-1] for ax in drawn["rates"].axes[5:]]
    assert ends[0] < 0.02
    assert ends[1] == 0
    assert ends[2] < 0.1
    assert ends[3] == 1
    assert ends[4] > 3


def test_best_rate_is_where_both_directions_are_alike(drawn):
    flat, sharp, worst, star = [line.get_xydata() for line in drawn["curvatures"].axes[0].lines]
    lr, value = star[0]
    assert worst[:, 1].min() == pytest.approx(value, abs=2e-3)
    assert worst[worst[:, 1].argmin(), 0] == pytest.approx(lr, abs=1e-3)
    assert np.interp(lr, *flat.T) == pytest.approx(np.interp(lr, *sharp.T), abs=1e-3)


def test_momentum_wins_in_the_ravine_without_jitter(drawn):
    jitter, creep, momentum = (y for _, y in lines(drawn["ravine"], 1))
    assert momentum[-1] < jitter[-1] / 4 < creep[-1] / 20
    turns = [int((np.diff(np.sign(y[:20])) != 0).sum()) for name, y in lines(drawn["ravine"])
             if "lr" in name]  # fmt: skip
    assert turns[0] == 19
    assert turns[1] == 0
    assert turns[2] <= 6


def test_condition_number_costs_plain_kappa_and_momentum_its_root(drawn):
    _, plain, _, heavy = (line.get_xydata() for line in drawn["condition"].axes[0].lines)
    kappa = plain[:, 0]
    late = kappa >= 30
    assert np.polyfit(np.log(kappa[late]), np.log(plain[late, 1]), 1)[0] == pytest.approx(
        1, abs=0.05
    )
    assert np.polyfit(np.log(kappa[late]), np.log(heavy[late, 1]), 1)[0] == pytest.approx(
        0.5, abs=0.06
    )
    predicted = np.interp(kappa, *drawn["condition"].axes[0].lines[0].get_xydata().T)
    np.testing.assert_allclose(plain[:, 1], predicted, rtol=0.1)


def test_nesterov_overshoots_less_and_both_forms_coincide(drawn):
    assert (
        curve(drawn["nesterov"], "Nesterov", 1).max()
        < 0.85 * curve(drawn["nesterov"], "momentum", 1).max()
    )
    ahead = next(line for line in drawn["nesterov"].axes[0].lines if line.get_label() == "Nesterov")
    seen = next(line for line in drawn["nesterov"].axes[0].lines if "original" in line.get_label())
    np.testing.assert_allclose(seen.get_xydata(), ahead.get_xydata()[1:], atol=1e-12)


def test_waits_at_the_saddle_grow_with_the_distance_but_for_adaptive_methods(drawn):
    decades = np.arange(1, 9) * np.log(10)  # the last of the line is the farthest from the ridge
    for lr in (0.1, 0.9):
        waits = curve(drawn["saddle"], f"plain, lr {lr}", 1)
        growth = waits[:-1] - waits[-1]
        np.testing.assert_allclose(growth[::-1], decades / np.log(1 + lr), atol=2)
    momentum = curve(drawn["saddle"], "momentum", 1)
    assert (np.diff(momentum) < 0).all()
    # Its factor is the larger root of z^2 - (1 + mu + lr) z + mu.
    assert momentum[0] - momentum[3] == pytest.approx(np.log(1e3) / np.log(1.316), abs=1)
    for name in ("RMSProp", "Adam"):
        assert np.ptp(curve(drawn["saddle"], name, 1)) <= 1


def test_momentum_leaves_the_local_minimum_and_plain_does_not(drawn):
    plain, momentum = (y for _, y in lines(drawn["local_minimum"], 1)[:2])
    assert plain[-1] == pytest.approx(1, abs=1e-2)
    assert momentum[-1] == pytest.approx(-1, abs=1e-2)


def test_plateau_holds_plain_for_sixty_steps_and_adam_not(drawn):
    plain, adam = curve(drawn["plateau"], "plain", 1), curve(drawn["plateau"], "Adam", 1)
    assert plain[60] > 0.9
    assert adam[30] < 0.1


def test_plateau_curves_name_their_rates_and_plain_is_seen_beneath_momentum(drawn):
    names = ["plain, lr 1", "momentum 0.9, lr 1", "Adam, lr 0.1"]
    for ax in drawn["plateau"].axes:
        own = [line for line in ax.lines if ", lr " in line.get_label()]
        assert [line.get_label() for line in own] == names
        assert len({line.get_color() for line in own}) == 3
    plain, momentum, _ = [
        line for line in drawn["plateau"].axes[0].lines if ", lr " in line.get_label()
    ]
    assert momentum.get_zorder() < plain.get_zorder()
    assert momentum.get_linewidth() > 2 * plain.get_linewidth()
    assert momentum.get_alpha() < 1


def test_adagrad_rate_dies_and_rmsprop_rate_lives(drawn):
    adagrad, rmsprop = (y for _, y in lines(drawn["adagrad_rate"])[:2])
    assert (np.diff(adagrad) <= 0).all()
    assert adagrad[1999] == pytest.approx(0.1 / np.sqrt(2000), rel=0.05)
    assert adagrad[-1] > 0.99 * adagrad[2000]
    assert rmsprop[500:2000].min() > 0.007
    assert rmsprop[-1] > 7 * rmsprop[1999]


def test_rare_features_learn_better_under_adagrad(drawn):
    sgd, adagrad = curve(drawn["sparse"], "SGD"), curve(drawn["sparse"], "AdaGrad")
    assert adagrad[-5:].mean() < 0.7 * sgd[-5:].mean()
    assert adagrad[:5].mean() < 0.5 * sgd[:5].mean()


def test_adam_without_bias_correction_steps_too_far(drawn):
    corrected = curve(drawn["bias_correction"], "with bias correction, gradients")
    plain = curve(drawn["bias_correction"], "without bias correction, gradients")
    np.testing.assert_allclose(corrected, 1, rtol=1e-6)
    assert plain[0] == pytest.approx(0.1 / np.sqrt(0.001), rel=1e-3)
    assert plain.max() == pytest.approx(6.57, abs=0.01)
    assert plain.min() > 3


def test_amsgrad_ends_at_the_best_point_and_adam_at_the_worst(drawn):
    adam, amsgrad = (y for _, y in lines(drawn["amsgrad"])[:2])
    assert adam[-1] > 0.98
    assert amsgrad[-1] < -0.98


def test_adaptive_methods_pass_the_ravine(drawn):
    found = drawn["relatives"]
    names = [name for name, _ in lines(found, 1)]
    assert names == ["Adam, lr 0.3", "Nadam, lr 0.3", "AdaMax, lr 0.3", "AdaDelta, eps 1e-4",
                     "plain, lr 0.038"]  # fmt: skip
    paths = [line.get_xydata() for line in found.axes[0].lines[1:]]  # the first is the minimum
    apart = [np.abs(steep[::2] - gentle).max()
             for steep, gentle in zip(paths[::2], paths[1::2], strict=True)]  # fmt: skip
    assert max(apart[:3]) < 1e-8
    assert apart[3] < 0.1
    assert apart[4] > 0.2
    adam, nadam, adamax = (-curve(found, name).min() for name in names[:3])
    assert adam > 1.2 * adamax > 2 * nadam > 0
    ends = {}
    for name, f in lines(found, 1):
        assert len(f) == 201
        assert f[150:].max() < (2e-5 if name[:4] in ("Adam", "Nada", "AdaM") else f[100])
        ends[name.split(",")[0]] = f[-1]
    assert ends.pop("AdaDelta") > 1 > max(ends.values())


def test_step_decay_falls_at_each_cut_and_cosine_without_jumps_both_below_constant(drawn):
    constant, step, cosine = (y for _, y in lines(drawn["digits"])[:3])
    drops = -np.diff(step)
    assert drops[6] > 0.3 * step[6]
    assert drops[12] > 0.08 * step[12]
    for cut in (6, 12):  # the fall of the stage is that of its first epoch
        assert drops[cut] > 2 * np.abs(drops[cut + 1 : cut + 6]).max()
    assert step[-1] < 0.6 * constant[-1]
    assert cosine[-1] < 0.6 * constant[-1]
    assert (np.diff(cosine[7:]) < 0.01).all()
    assert np.abs(np.diff(cosine[7:])).max() < drops[6] / 2


def test_range_test_names_its_points_between_nothing_and_the_blow_up(drawn):
    labels = [name for name, _ in lines(drawn["range_test"])]
    steepest, divergence = (float(label.rsplit(" ", 1)[1]) for label in labels[-2:])
    assert 0.01 < steepest < divergence / 3


def test_sharpness_settles_at_two_over_the_rate(drawn):
    slow, quick = (line.get_ydata() for line in drawn["edge"].axes[0].lines[::2])
    for sharpness, lr in ((slow, 0.4), (quick, 0.8)):
        assert sharpness[0] < 0.8 * 2 / lr
        np.testing.assert_allclose(sharpness[-6:], 2 / lr, rtol=0.12)


def test_small_steps_stall_rounded_to_nearest_alone(drawn):
    found = drawn["roundings"]
    exact, gap = curve(found, "float32"), 2.0**-7
    assert (curve(found, "nearest") == 1).all()
    for name, apart in (("kahan", 0.65 * gap), ("split", 0.5 * gap), ("mean of 256", 0.2 * gap)):
        np.testing.assert_allclose(curve(found, name), exact, atol=1.01 * apart, rtol=0)
    assert set(np.diff(curve(found, "stochastic")).round(6)) == {0, round(gap, 6)}
    loss = curve(found, "float32", 1)
    for name in ("stochastic", "kahan", "split"):
        np.testing.assert_allclose(curve(found, name, 1), loss, rtol=0.01)
    assert curve(found, "nearest", 1)[-1] - loss[0] > 0.6 * (loss[-1] - loss[0])


# -- where it is written ---------------------------------------------------------------------------


def test_gallery_refuses_a_place_it_cannot_write_to(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gallery, "FIGURES", [])  # nothing is drawn before it is found out
    taken = tmp_path / "file"
    taken.write_text("mine")
    assert main(["gallery", "-o", str(taken)]) == 2
    assert f"gallery: cannot write to {taken}: {taken} is a file" in capsys.readouterr().err
    assert taken.read_text() == "mine"
    assert main(["gallery", "-o", str(taken / "below")]) == 2
    assert f"{taken} is a file" in capsys.readouterr().err
    assert main(["gallery", "-o", ""]) == 2
    assert "fusedstep gallery: --output must name a folder, got ''" in capsys.readouterr().err
    with pytest.raises(ValueError, match="folder must be a path, got ''"):
        gallery.write("")
    with pytest.raises(TypeError, match="folder must be a path, got None"):
        gallery.write(None)


@pytest.mark.parametrize("name", ["index.html", "digits.png"])
def test_gallery_draws_nothing_where_a_folder_has_a_file_s_name(name, tmp_path, capsys):
    (tmp_path / name).mkdir()
    assert main(["gallery", "-o", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path / name}: it is a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_gallery_command_keeps_other_files_and_prints_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gallery, "FIGURES", gallery.FIGURES[:1])
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["gallery", "-o", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(tmp_path / "index.html")
    assert told.err == "drawing rates (1 of 1)\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "notes.txt", "rates.png"]


def test_gallery_draws_one_by_name_or_says_which_there_are():
    assert gallery.draw("curvatures").axes
    with pytest.raises(ValueError, match=r"name must be one of \['rates'.*got 'none'"):
        gallery.draw("none")


def test_gallery_is_light_to_import_and_says_what_it_needs():
    code = """
import sys, importlib.util
from fusedstep import gallery
print([m for m in ("matplotlib", "pygments", "sklearn", "scipy", "torch") if m in sys.modules])
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pygments" else find(name, *rest)
from fusedstep.__main__ import main
print(main(["gallery", "-o", "nowhere"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "1"]
    assert "pip install 'fusedstep[gallery]'" in done.stderr
