import json
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aligngym.core import Agent, Callback, History, TabularPolicy
from aligngym.core.callbacks import Checkpoints


class Doubling(Agent):
    """x ← 2x: what it must say after any number of iterations is known."""

    def __init__(self, limit=float("inf")):
        self.x, self.limit = torch.ones((), dtype=torch.float64), limit

    def iterate(self):
        self.x = 2 * self.x
        return {"x": float(self.x)}

    @property
    def finished(self):
        return float(self.x) >= self.limit

    def act(self, observations, *, greedy=True):
        return observations

    def evaluate(self):
        return {"x": float(self.x)}

    def state_dict(self):
        return {"x": self.x}

    def load_state_dict(self, state):
        self.x = state["x"]


class Other(Doubling):
    pass


class Recorder(Callback):
    def __init__(self, name, events):
        self.name, self.events = name, events

    def on_start(self, agent, iterations):
        self.events.append((self.name, "start", agent.iteration, iterations))

    def on_iteration(self, agent, metrics):
        self.events.append((self.name, agent.iteration, metrics["x"]))

    def on_end(self, agent):
        self.events.append((self.name, "end", agent.iteration))


class FailAt(Callback):
    def __init__(self, iteration, error=RuntimeError):
        self.iteration, self.error = iteration, error

    def on_iteration(self, agent, metrics):
        if agent.iteration == self.iteration:
            raise self.error("killed")


class StopAt(FailAt):
    def on_iteration(self, agent, metrics):
        if agent.iteration == self.iteration:
            agent.stop()


def learn(agent, *args, **options):
    return agent.learn(*args, progress=False, **options)


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder):
    """What TensorBoard itself shows for x: pairs of step and value."""
    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    return [(event.step, event.value) for event in shown.Scalars("x")]


def test_a_history_keeps_every_metric():
    history, agent = History(), Doubling()
    learn(agent, 2, callbacks=[history])
    learn(agent, 1, callbacks=[history])
    assert history["x"] == [2, 4, 8]
    with pytest.raises(KeyError):
        history["y"]


def test_callbacks_are_called_in_order():
    events = []
    agent = learn(Doubling(), 1)
    assert learn(agent, 2, callbacks=[Recorder("a", events), Recorder("b", events)]) is agent
    assert events == [
        ("a", "start", 1, 2),
        ("b", "start", 1, 2),
        ("a", 2, 4.0),
        ("b", 2, 4.0),
        ("a", 3, 8.0),
        ("b", 3, 8.0),
        ("a", "end", 3),
        ("b", "end", 3),
    ]


def test_callbacks_end_also_after_an_error():
    events = []
    with pytest.raises(RuntimeError, match="killed"):
        learn(Doubling(), 5, callbacks=[Recorder("a", events), FailAt(2)])
    assert events[-1] == ("a", "end", 2)


def test_stop_ends_one_run_and_not_the_next():
    agent = learn(Doubling(), 10, callbacks=[StopAt(3)])
    assert agent.iteration == 3
    assert learn(agent, 2).iteration == 5


def test_without_a_number_it_runs_until_finished():
    agent = learn(Doubling(limit=100))
    assert (agent.iteration, float(agent.x)) == (7, 128.0)
    assert learn(agent, 5).iteration == 7
    assert learn(Doubling(), 0).iteration == 0


def test_bad_lengths_are_refused():
    with pytest.raises(ValueError, match="-1"):
        learn(Doubling(), -1)
    with pytest.raises(ValueError, match="needs output"):
        learn(Doubling(), 3, checkpoint_every=1)
    with pytest.raises(ValueError, match="unknown tracker 'tensorbord'"):
        learn(Doubling(), 1, output="unused", trackers=["tensorbord"])


def next_second():
    """TensorBoard orders the files of a folder by their names, which begin with the second they were made in."""
    time.sleep(1.05)


def test_metrics_reach_the_file_and_tensorboard(tmp_path):
    agent = learn(Doubling(), 3, output=tmp_path)
    next_second()
    learn(agent, 2, output=tmp_path)
    expected = [(step, 2.0**step) for step in range(1, 6)]
    assert [(line["step"], line["x"]) for line in read(tmp_path)] == expected
    assert scalars(tmp_path) == expected
    assert all(line["seconds"] >= 0 for line in read(tmp_path))


def test_after_a_kill_every_step_is_recorded_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        learn(Doubling(), 10, output=tmp_path, checkpoint_every=4, callbacks=[FailAt(7, KeyboardInterrupt)])
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "x": 25')
    agent = Doubling().load(tmp_path / Checkpoints.name)
    assert agent.iteration == 4
    next_second()
    learn(agent, 6, output=tmp_path, checkpoint_every=4)
    expected = [(step, 2.0**step) for step in range(1, 11)]
    assert [(line["step"], line["x"]) for line in read(tmp_path)] == expected
    assert scalars(tmp_path) == expected


@pytest.mark.parametrize(("callbacks", "last"), [([], 10), ([StopAt(7)], 7)])
def test_the_last_checkpoint_is_the_end_of_the_run(tmp_path, callbacks, last):
    learn(Doubling(), 10, output=tmp_path, checkpoint_every=4, trackers=(), callbacks=callbacks)
    assert Doubling().load(tmp_path / Checkpoints.name).iteration == last


def test_saved_and_loaded(tmp_path):
    agent = learn(Doubling(), 3)
    agent.save(tmp_path / "agent")
    loaded = Doubling().load(tmp_path / "agent")
    assert (loaded.iteration, loaded.evaluate()) == (3, {"x": 8.0})
    assert learn(loaded, 2).evaluate() == {"x": 32.0}


def test_files_of_others_are_refused(tmp_path):
    learn(Doubling(), 1).save(tmp_path / "agent")
    with pytest.raises(ValueError, match="saved by Doubling, and this is Other"):
        Other().load(tmp_path / "agent")
    TabularPolicy(2, 2).save(tmp_path / "policy")
    with pytest.raises(ValueError, match="policy"):
        Doubling().load(tmp_path / "policy")
    with pytest.raises(ValueError, match="agent"):
        TabularPolicy.load(tmp_path / "agent")
    with pytest.raises(FileNotFoundError):
        Doubling().load(tmp_path / "nothing")


def test_a_state_that_does_not_fit_changes_nothing(tmp_path):
    class Picky(Doubling):
        def load_state_dict(self, state):
            raise ValueError("made with other arguments")

    Picky().learn(2, progress=False).save(tmp_path / "agent")
    agent = Picky()
    with pytest.raises(ValueError, match="other arguments"):
        agent.load(tmp_path / "agent")
    assert agent.iteration == 0
