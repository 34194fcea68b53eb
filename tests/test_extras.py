"""What the extras are for really happens where their packages are installed; elsewhere these tests are skipped."""

import pytest

from understudy import load
from understudy.control import ppo
from understudy.control.evaluate import evaluate


def short(path, **fields) -> ppo.Config:
    sizes = {"steps": 64, "num_envs": 2, "num_steps_per_env": 16, "num_epochs": 1, "num_minibatches": 1, "hidden": (8,)}
    return ppo.Config(env="CartPole-v1", output_dir=str(path), quiet=True, **sizes, **fields)


def test_a_video_is_one_film_an_episode(tmp_path, monkeypatch):
    pytest.importorskip("moviepy")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")

    cfg = short(tmp_path / "run", video=True)
    run = ppo.train(cfg)
    evaluate(load(run.path), cfg, num_episodes=2, video=tmp_path / "two")

    assert [film.stat().st_size > 0 for film in (run.path / "video").glob("*.mp4")] == [True]
    assert len(list((tmp_path / "two").glob("*.mp4"))) == 2


def test_tensorboard_holds_what_the_metrics_hold(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = ppo.train(short(tmp_path / "run", log=("tensorboard",)))

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    for name in ("loss", "entropy", "seconds"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["steps"], pytest.approx(line[name])) for line in run.metrics]
