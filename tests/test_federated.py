"""Adapters of clients of several ranks, averaged round after round; and as a strategy of Flower,
with Flower's own messages."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from frechet_merge.merging.federated import A, B, as_adapter, average, factors_in, received, sent
from frechet_merge.merging.federated import strategy
from frechet_merge.messages import MergeError
from frechet_merge.metrics.kinds import Diagonal
from frechet_merge.metrics.kronecker import Kronecker
from frechet_merge.spaces.running import RunningMean
from frechet_merge.spaces.space import FLAT, Point

RANKS, EXAMPLES, M, N = (4, 8, 16), (100, 60, 20), 30, 40
LAYERS = ("model.layers.0.self_attn.q_proj.", "model.layers.1.mlp.up_proj.")


def fresh(rank, seed, size=1.0):
    g = torch.Generator().manual_seed(seed)
    made = {}
    for stem in LAYERS:
        made[stem + A] = size*torch.randn(rank, N, generator=g)
        made[stem + B] = size*torch.randn(M, rank, generator=g)
    return made


def dense(state):
    return {stem: f.double().delta() for stem, f in factors_in(state).items()}


def trained(state, rank, seed):
    "What a client of a rank makes of the server's adapter, and sends."
    noise = fresh(rank, seed, 0.2)
    mine = received(state, rank, alpha=2*rank)
    return sent({n: x + noise[n] for n, x in mine.items()}, alpha=2*rank)


def far(state, wanted):
    ours = dense(state)
    return max(float((ours[k] - v).norm()/v.norm()) for k, v in wanted.items())


def mean_of(clients, weights):
    total = sum(weights)
    return {
        k: sum(w/total*dense(c)[k] for w, c in zip(weights, clients)) for k in dense(clients[0])
    }


class TestRounds:
    def test_ten_rounds_equal_the_centralised_mean(self):
        state = fresh(4, 0)
        for r in range(10):
            clients = [trained(state, k, 100*r + k) for k in RANKS]
            state = average(clients, EXAMPLES).state
            assert far(state, mean_of(clients, EXAMPLES)) < 1e-6

    def test_what_is_no_factor_is_averaged_as_it_is(self):
        clients = [fresh(k, k) | {"score.weight": torch.full((2, 3), float(k))} for k in RANKS]
        found = average(clients, EXAMPLES).state
        want = sum(w*k for w, k in zip(EXAMPLES, RANKS))/sum(EXAMPLES)
        torch.testing.assert_close(found["score.weight"], torch.full((2, 3), want))

    def test_peft_reads_the_same_update(self):
        peft = pytest.importorskip("peft")
        net = torch.nn.Sequential(torch.nn.Linear(N, M))
        config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"])
        model = peft.get_peft_model(net, config)
        with torch.no_grad():
            model.base_model.model[0].lora_B["default"].weight.normal_()
        state = peft.get_peft_model_state_dict(model)
        ours = dense(sent(state, alpha=12))
        (delta,) = ours.values()
        want = model.base_model.model[0].get_delta_weight("default").detach().double()
        torch.testing.assert_close(delta, want, rtol=1e-5, atol=1e-6)
        other = average([sent(state, alpha=12)]*3).state
        peft.set_peft_model_state_dict(model, received(other, 4, alpha=12))
        got = model.base_model.model[0].get_delta_weight("default").detach().double()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class TestBadClients:
    def test_one_that_lies_about_update_and_examples(self):
        start = fresh(8, 0)
        good = [trained(start, k, k) for k in (4, 8, 8, 16)]
        bad = {n: 30*x for n, x in fresh(8, 5).items()}
        wanted = mean_of(good, [1]*4)
        assert far(average([*good, bad], [10]*4 + [10**6]).state, wanted) > 10
        for loss in ("median", "huber", "cauchy"):
            with pytest.warns(UserWarning, match="client 4 counts for"):
                found = average([*good, bad], [10]*4 + [10**6], loss=loss)
            assert found.shares[4] < 0.1 and far(found.state, wanted) < 0.5

    def test_one_that_sends_nan_is_left_out_by_name(self):
        clients = [fresh(k, k) for k in RANKS]
        clients[1][LAYERS[0] + A][0, 0] = float("nan")
        with pytest.warns(UserWarning, match="client 1 sent numbers that are not finite"):
            found = average(clients, EXAMPLES)
        assert found.used == [0, 2]
        assert far(found.state, mean_of([clients[0], clients[2]], [100, 20])) < 1e-6
        with pytest.raises(MergeError, match="no client sent"), pytest.warns(UserWarning):
            average([clients[1]])

    @pytest.mark.parametrize("bad", ["nothing", "half", "wide", "a head more"])
    @pytest.mark.parametrize("first", [True, False])
    def test_one_that_sends_something_else_does_not_stop_the_others(self, bad, first):
        good, own = [fresh(k, k) for k in RANKS], fresh(4, 7)
        odd = {
            "nothing": {},
            "half": {n: x for n, x in own.items() if n.endswith(A)},
            "wide": {n: torch.cat([x, x], -1) if n.endswith(A) else x for n, x in own.items()},
            "a head more": own | {"head.weight": torch.ones(3, 3)},
        }[bad]
        clients = [odd, *good] if first else [*good, odd]
        at = 0 if first else 3
        with pytest.warns(UserWarning, match=f"client {at} .* is left out"):
            found = average(clients)
        assert found.used == [i for i in range(4) if i != at]
        assert far(found.state, mean_of(good, [1]*3)) < 1e-6

    def test_who_is_right_is_not_guessed_without_a_majority(self):
        one, other = fresh(4, 1), fresh(8, 2)
        other = {n: torch.cat([x, x], -1) if n.endswith(A) else x for n, x in other.items()}
        with pytest.raises(MergeError, match="of different bases"):
            average([one, other])
        # a layer that is not adapted is an update of zero
        fewer = {n: x for n, x in fresh(8, 2).items() if n.startswith(LAYERS[0])}
        found = dense(average([one, fewer]).state)[LAYERS[1]]
        torch.testing.assert_close(found, dense(one)[LAYERS[1]]/2, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="one for each of 2 clients"):
            average([one, one], [1])

    def test_halves_and_strangers(self):
        with pytest.raises(MergeError, match="no other half"):
            factors_in({"x.lora_A.weight": torch.ones(2, 3)})
        with pytest.raises(MergeError, match="have no product"):
            factors_in({"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(4, 3)})
        right = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(4, 2)}
        assert len(factors_in(right)) == 1 and as_adapter(right, "client 0").adapter is not None
        with pytest.raises(MergeError, match="sends no lora_A"):
            as_adapter({"weight": torch.ones(2)}, "client 0")


class TestRunning:
    def test_order_and_metrics(self):
        torch.manual_seed(0)
        xs, ds = torch.randn(9, 4).double(), torch.rand(9, 4).double()
        ds[:, 2] = 0
        running = RunningMean()
        for i in torch.randperm(9).tolist():
            running.add(Point(xs[i], Diagonal(ds[i])), i + 1.0)
        w = torch.arange(1.0, 10).double()[:, None]
        want = (w*ds*xs).sum(0)/(w*ds).sum(0)
        want[2] = 0
        torch.testing.assert_close(running.mean, want, rtol=1e-12, atol=1e-12)

    def test_a_metric_whose_sum_grows_is_refused(self):
        pair = Kronecker((torch.eye(2), torch.eye(3)))
        with pytest.raises(ValueError, match="would grow with each point"):
            RunningMean(FLAT).add(Point(torch.ones(2, 3), pair))


class TestFlower:
    def test_without_flower_it_is_said(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "flwr.serverapp.strategy", None)
        with pytest.raises(MergeError, match="pip install 'frechet_merge.flower."):
            strategy()

    @pytest.mark.parametrize("loss", [None, "cauchy"])
    def test_ten_rounds_of_flower(self, loss, as_server):
        from flwr.app import ArrayRecord

        bad = None if loss is None else 3
        grid = Local(RANKS if loss is None else (4, 8, 16, 8, 4), bad)
        made, means = strategy(loss=loss, fraction_evaluate=0.0), []
        inner = made.aggregate_train

        def aggregate(server_round, replies):
            arrays, metrics = inner(server_round, replies)
            means.append(read(arrays))
            return arrays, metrics

        made.aggregate_train = aggregate
        result = made.start(grid, ArrayRecord(arrays_of(fresh(4, 0))), num_rounds=10)
        assert len(grid.rounds) == len(means) == 10
        for clients, mean in zip(grid.rounds, means):
            good = [c for i, c in enumerate(clients) if i != bad]
            weights = EXAMPLES if loss is None else [1]*4
            assert far(mean, mean_of(good, weights)) < (1e-6 if loss is None else 0.5)
        if loss is not None:
            shares = result.train_metrics_clientapp[10]["shares"]
            assert shares[3] < 0.01 and min(q for i, q in enumerate(shares) if i != 3) > 0.1

    def test_flowers_own_simulation(self):
        "Clients are processes of ray; the bench holds each aggregation to the centralised mean."
        pytest.importorskip("flwr", reason="[flower] has an environment of its own")
        pytest.importorskip("ray", reason="flwr[simulation] brings ray")
        command = [sys.executable, "flower.py", "--only-good", "--dry", "--rounds", "3"]
        made = subprocess.run(command, cwd=ROOT/"bench", capture_output=True, text=True)
        assert made.returncode == 0, made.stderr[-3000:]
        assert "'round': 3" in made.stdout


@pytest.fixture
def as_server(monkeypatch):
    "Who a message is from, as Flower's server sets it."
    pytest.importorskip("flwr")
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def read(record):
    "Arrays of Flower as tensors."
    return {n: torch.from_numpy(x.numpy().copy()) for n, x in record.items()}


def arrays_of(state):
    "Tensors as arrays of Flower."
    from flwr.app import Array

    return {n: Array(x.contiguous().numpy()) for n, x in state.items()}


class Local:
    "Flower's grid, whose nodes are in this process."

    def __init__(self, ranks, bad):
        self.ranks, self.bad, self.rounds = ranks, bad, []

    def get_node_ids(self):
        return [*range(1, len(self.ranks) + 1)]

    def update(self, i, state):
        "What a client sends, and of how many examples it says that it is."
        rank = self.ranks[i]
        if i == self.bad:
            return {n: 30*x for n, x in fresh(rank, i).items()}, 10**6
        return trained(state, rank, 1000*len(self.rounds) + i), EXAMPLES[i % 3]

    def send_and_receive(self, messages, *, timeout=None):
        from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

        replies, clients = [], []
        for i, message in enumerate(messages):
            update, examples = self.update(i, read(message.content["arrays"]))
            clients.append(update)
            content = {
                "arrays": ArrayRecord(arrays_of(update)),
                "metrics": MetricRecord({"num-examples": examples}),
            }
            replies.append(Message(RecordDict(content), reply_to=message))
        if clients:
            self.rounds.append(clients)
        return replies
