"""Ten rounds of Flower's own simulation: clients of ranks 4, 8 and 16, one of them bad, or none.

    python -m venv FLOWER && FLOWER/bin/pip install '.[flower]' 'flwr[simulation]>=1.42'
    FLOWER/bin/python bench/flower.py

The simulation (`flwr.simulation`, on ray) runs each client as a process of its own; the server runs
`frechet_merge.merging.federated.strategy`. Each client learns updates of two linear layers by
gradient steps on examples of its own, from the server's answer cut to its rank. In the runs with a
bad client a fourth and a fifth good one join, and one more sends noise of thirty times the size of
a new adapter and says that it has a million examples.

Reported for each round: how far the mean is from the weighted mean of the good clients' dense
updates, in float64; the loss of the mean on all clients' examples, as a share of that of no
adapter at all; what the bad client counted for; and the numbers that were sent, up by rank and down
to each client. Writes bench/results/flower.csv and flower.json."""

import argparse
import os
import time
import warnings
from importlib import metadata

os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")

import torch
from adapters import about, write_rows
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from frechet_merge.merging.federated import A, B, factors_in, received, sent, strategy

M, N, STEMS = 48, 64, ("layers.0.q_proj.", "layers.1.up_proj.")
RANKS, EXAMPLES = (4, 8, 16, 8, 4), (100, 60, 20, 60, 100)
ALPHA, STEPS, RATE, BAD_EXAMPLES = 16, 30, 0.02, 10**6


def generator(seed):
    return torch.Generator().manual_seed(seed)


def wanted(client):
    "The updates that a client's examples ask for: what all share, and a little of its own."
    shared, own = generator(0), generator(1 + client)
    made = {}
    for stem in STEMS:
        common = torch.randn(M, 12, generator=shared) @ torch.randn(12, N, generator=shared)
        little = torch.randn(M, 2, generator=own) @ torch.randn(2, N, generator=own)
        made[stem] = (common + 0.5*little)/N**0.5
    return made


def examples_of(client):
    return torch.randn(EXAMPLES[client], N, generator=generator(100 + client))


def fresh(rank, seed, size=1.0):
    g, made = generator(seed), {}
    for stem in STEMS:
        made[stem + A] = size*torch.randn(rank, N, generator=g)
        made[stem + B] = size*torch.randn(M, rank, generator=g)
    return made


def as_record(state):
    return ArrayRecord({n: Array(x.contiguous().numpy()) for n, x in state.items()})


def as_tensors(record):
    return {n: torch.from_numpy(x.numpy().copy()) for n, x in record.items()}


def learnt(client, state):
    "What a client makes of the server's adapter, by Adam on its own examples."
    rank, x, target = RANKS[client], examples_of(client), wanted(client)
    mine = received(state, rank, alpha=ALPHA)
    mine = {n: p.clone().requires_grad_() for n, p in mine.items()}
    adam = torch.optim.Adam(mine.values(), RATE)
    for _ in range(STEPS):
        adam.zero_grad()
        loss = 0
        for stem in STEMS:
            delta = ALPHA/rank*mine[stem + B] @ mine[stem + A]
            loss = loss + (x @ (delta - target[stem]).mT).square().mean()
        loss.backward()
        adam.step()
    return sent({n: p.detach() for n, p in mine.items()}, alpha=ALPHA)


app = ClientApp()


@app.train()
def train(message, context):
    torch.set_num_threads(1)
    # nodes that are behind the good ones are bad
    client = int(context.node_config["partition-id"])
    good = int(message.content["config"]["good"])
    if client < good:
        state, count = learnt(client, as_tensors(message.content["arrays"])), EXAMPLES[client]
    else:
        state, count = fresh(8, client, 30**0.5), BAD_EXAMPLES
    metrics = {"num-examples": count, "client": client}
    content = {"arrays": as_record(state), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


def dense(state):
    return {stem: f.double().delta() for stem, f in factors_in(state).items()}


def loss_of(deltas, good):
    "On the examples of all good clients, as a share of that of no adapter."
    left = whole = 0.0
    for client in range(good):
        x, target = examples_of(client).double(), wanted(client)
        for stem in STEMS:
            off = target[stem].double() - deltas[stem]
            left += float((x @ off.mT).square().sum())
            whole += float((x @ target[stem].double().mT).square().sum())
    return left/whole


def row_of_round(number, replies, arrays, metrics, good, weighted):
    "What one aggregation was, by what the server was sent and what it answered."
    sizes, total, whole, bad = {}, 0.0, dict.fromkeys(STEMS, 0.0), []
    for i, reply in enumerate(replies):
        metric = reply.content["metrics"]
        state = as_tensors(reply.content["arrays"])
        client = int(metric["client"])
        if client >= good:
            bad.append(i)
            continue
        sizes[RANKS[client]] = sum(x.numel() for x in state.values())
        weight = float(metric["num-examples"]) if weighted else 1.0
        total += weight
        for stem, delta in dense(state).items():
            whole[stem] = whole[stem] + weight*delta
    ours, mean = dense(as_tensors(arrays)), {k: v/total for k, v in whole.items()}
    shares = list(dict(metrics).get("shares", []))
    counted = [float(shares[i]) for i in bad if shares]
    return {
        "round": number,
        "off": max(float((ours[k] - v).norm()/v.norm()) for k, v in mean.items()),
        "loss": loss_of(ours, good),
        "bad counts": max(counted, default=""),
        "up": " ".join(f"{rank}:{n}" for rank, n in sorted(sizes.items())),
        "down": sum(x.numel() for x in as_tensors(arrays).values()),
    }


def rows_of_run(good, bad, loss, rounds):
    "A row for each round of one simulation."
    rows, failed, server = [], [], ServerApp()

    @server.main()
    def main(grid, context):
        from flwr.app import ConfigRecord

        plan = strategy(loss=loss, fraction_evaluate=0.0, min_train_nodes=good + bad)
        inner = plan.aggregate_train

        def aggregate(number, replies):
            replies = [*replies]
            # Flower looks at what fails here, and goes on without it
            failed.extend(r for r in replies if r.has_error())
            arrays, metrics = inner(number, replies)
            rows.append(row_of_round(number, replies, arrays, metrics, good, loss is None))
            return arrays, metrics

        plan.aggregate_train = aggregate
        config = ConfigRecord({"good": good})
        start = as_record(fresh(4, 999, 0.1))
        plan.start(grid, start, num_rounds=rounds, train_config=config)

    backend = {"init_args": {"num_cpus": 2, "include_dashboard": False}}
    backend["client_resources"] = {"num_cpus": 1, "num_gpus": 0.0}
    for last in (False, False, True):
        try:
            run_simulation(server, app, num_supernodes=good + bad, backend_config=backend)
            break
        except RuntimeError:
            # on a busy machine ray may give up before it has begun
            if rows or last:
                raise
    assert not failed and len(rows) == rounds, (len(failed), len(rows))
    said = {"good": good, "bad": bad, "loss of the mean": loss or "squares"}
    return [said | r for r in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only-good", action="store_true", help="no run with a bad client")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    runs = [(3, 0, None), (5, 1, None), (5, 1, "huber"), (5, 1, "cauchy")]
    since, rows = time.time(), []
    for good, bad, loss in runs[:1] if arguments.only_good else runs:
        rows += rows_of_run(good, bad, loss, arguments.rounds)
        print(rows[-1], flush=True)
    first = [r for r in rows if not r["bad"]]
    # each aggregation is the centralised mean
    assert max(r["off"] for r in first) < 1e-6, max(r["off"] for r in first)
    if not arguments.dry:
        said = about(
            "python bench/flower.py",
            flwr=metadata.version("flwr"),
            ray=metadata.version("ray"),
            seconds=round(time.time() - since),
            worst=max(r["off"] for r in first),
        )
        write_rows("flower", rows, said)


if __name__ == "__main__":
    main()
