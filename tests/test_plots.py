"Figures: what is drawn is what was measured, and it comes out as vector graphics."
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from dpo_lab.diagnostics import pair_frame
from dpo_lab.plots import (paper_style, plot_counterfactual, plot_frontier, plot_logratios, plot_rewards, plot_runs,
                           plot_slices, plot_sweep, save)
from dpo_lab.sweep import begin_sweep, sweep
from dpo_lab.train import Config


@pytest.fixture(scope='module')
def grid(tmp_path_factory):
    path = tmp_path_factory.mktemp('plots')/'grid'
    config = Config(log_path=str(path), max_steps=4, eval_every=2, infrequent_eval_every=0)
    return sweep(config, dpo_beta=[.1, .5], learning_rate=[1e-4, 2e-4])


@pytest.fixture(autouse=True)
def closed(): yield; plt.close('all')


def test_a_curve_is_the_metrics_table(grid):
    run = next(iter(grid.runs.values()))
    line = plot_runs(run, ['margin'], smoothing=0).axes[0].lines[0]
    assert np.allclose(line.get_ydata()[:4], run.metrics.margin[:4])


def test_every_pair_is_a_dot(grid):
    run = next(iter(grid.runs.values()))
    frame = pair_frame(run, 'test', -1)
    dots = plot_logratios(run).axes[0].collections[0].get_offsets()
    assert np.allclose(dots, frame[['chosen_logratio', 'rejected_logratio']])


def test_a_cell_of_the_heat_map_is_the_mean_of_its_points(grid):
    texts = [float(t.get_text()) for t in plot_sweep(grid, 'accuracy').axes[0].texts]
    assert np.allclose(texts, grid.table['test/accuracy'], atol=5e-4)


def made_up(path, monkeypatch, **axes):
    "A sweep whose points have ended, each with another accuracy."
    def table(sweep):
        points = pd.DataFrame([*sweep.points.values()])
        return points.assign(**{'test/accuracy': np.linspace(0, 1, len(points)), 'test/kl': .1})
    monkeypatch.setattr('dpo_lab.plots.sweep_table', table)
    return begin_sweep(Config(log_path=str(path/'grid')), axes)


def test_any_two_axes_are_a_heat_map_and_seeds_are_averaged(tmp_path, monkeypatch):
    ax = plot_sweep(made_up(tmp_path, monkeypatch, loss=['sigmoid', 'ipo'], batch_size=[8, 16], seed=[0, 1])).axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('loss', 'batch_size') and len(ax.texts) == 4


def test_one_axis_is_a_line(tmp_path, monkeypatch):
    grid = made_up(tmp_path, monkeypatch, weight_decay=[0., .1, .2])
    ax = plot_slices(grid).axes[0]
    assert len(ax.lines) == 1 and ax.get_xscale() == 'linear' and ax.get_legend() is None       # no log of 0
    with pytest.raises(ValueError, match='two axes besides the seed, and grid varies weight_decay: plot_slices'):
        plot_sweep(grid)


def test_seeds_alone_are_dots_of_the_frontier(tmp_path, monkeypatch):
    grid = made_up(tmp_path, monkeypatch, seed=[0, 1, 2])
    assert len(plot_frontier(grid).axes[0].collections[0].get_offsets()) == 3
    for picture in (plot_sweep, plot_slices):
        with pytest.raises(ValueError, match='besides the seed.*plot_runs'): picture(grid)
    assert len(plot_slices(grid, across='seed').axes[0].lines) == 1


@pytest.mark.parametrize('kind', ['.pdf', '.svg'])
def test_figures_are_vector_graphics_with_text(grid, tmp_path, kind):
    run = next(iter(grid.runs.values()))
    figures = [plot_runs(run), plot_rewards(run), plot_logratios(run), plot_counterfactual(run), plot_slices(grid),
               plot_frontier(grid), plot_sweep(grid)]
    for i, fig in enumerate(figures):
        with paper_style(): path = save(fig, tmp_path/f'{i}{kind}')
        assert path.stat().st_size > 2000
        if kind == '.svg': assert '<text' in path.read_text()


def test_mistakes_are_answered(grid, tmp_path):
    with pytest.raises(ValueError, match='choose one of .*accuracy'): plot_sweep(grid, 'acuracy')
    with pytest.raises(ValueError, match="'seed' is not an axis of grid: choose one of dpo_beta"):
        plot_sweep(grid, down='seed')
    with pytest.raises(ValueError, match='vector graphics'): save(plot_sweep(grid), tmp_path/'x.jpg')
