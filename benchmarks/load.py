"""Clients over HTTP: how long services take to answer, when nobody else asks, when many do, and beside a
query of 10 MB.

    RUN=outputs/toy uvicorn serving.service:app --port 8001 &
    python benchmarks/load.py http://127.0.0.1:8001 --run outputs/toy
    python benchmarks/load.py http://127.0.0.1:8001 http://127.0.0.1:8002 --run outputs/toy    # in turn

Reads RUN/features for texts of queries and ids of pins, which every service must know. Prints a table:
milliseconds until the whole answer is there, for 1,000 candidates of the run's own queries, and for queries
never seen over all pins. Clients ask again at once. Several services take turns of two seconds, so that what
else the machine does meets all of them alike; beside the query of 10 MB, which is asked again and again, each
has one turn.
"""

import argparse
import http.client
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
TURN = 2.0  # seconds of a service, then the next one's
LARGE = json.dumps({"query": "red chair " * 1_000_000})


def busy(url, bodies, clients, seconds):
    """Milliseconds of all answers to /rank that so many clients get in these seconds, at least one each."""
    end = time.perf_counter() + seconds

    def work(turn):
        connection, times = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600), []
        while not times or time.perf_counter() < end:
            before = time.perf_counter()
            body = bodies[turn % len(bodies)]
            connection.request("POST", "/rank", body, {"content-type": "application/json"})
            with connection.getresponse() as answer:
                answer.read()
            if answer.status != 200:
                sys.exit(f"error: {url}: answers {answer.status}")
            times.append(1e3 * (time.perf_counter() - before))
            turn += clients
        return times

    with ThreadPoolExecutor(clients) as pool:
        return [one for times in pool.map(work, range(clients)) for one in times]


def ask_too_much(url, done):
    """Asks LARGE, again and again until `done` is set; prints what came of it first."""
    said = None
    while said is None or not done.is_set():
        connection, start = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600), time.perf_counter()
        try:
            connection.request("POST", "/rank", LARGE, {"content-type": "application/json"})
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:  # refused before all of it was sent
            status = type(error).__name__
        said = said or f"{status} after {time.perf_counter() - start:.1f} s"
    print(f"{url}: {len(LARGE):,} bytes: {said}", file=sys.stderr)


def measure(urls, bodies, clients, seconds):
    """{url: milliseconds [N]}, the services in turn."""
    times = {url: [] for url in urls}
    for _ in range(max(int(seconds / TURN), 1)):
        for url in urls:
            times[url] += busy(url, bodies, clients, min(seconds, TURN))
    return times


def measure_beside(urls, bodies, clients, seconds):
    """The same, each in one turn, while it is asked too much."""
    times = {}
    for url in urls:
        done = threading.Event()
        other = threading.Thread(target=ask_too_much, args=(url, done))
        other.start()
        times[url] = busy(url, bodies, clients, seconds)
        done.set()
        other.join()
    return times


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("url", nargs="+", help="of a service: http://127.0.0.1:8001")
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "toy")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="a line of the table, for each service")
    args = parser.parse_args(argv)
    features = args.run / "features"
    texts = pq.read_table(features / "queries.parquet", columns=["query"])["query"].to_pylist()
    ids = pq.read_table(features / "pins.parquet", columns=["pin_id"])["pin_id"].to_pylist()
    some = (ids * (1_000 // len(ids) + 1))[:1_000]
    known = [json.dumps({"query": text, "candidates": some}) for text in texts]
    fresh = [json.dumps({"query": f"{text} {number}"}) for number, text in enumerate(texts)]
    print("| | clients | service | p50, ms | p99, ms | answers |\n| --- | ---: | --- | ---: | ---: | ---: |")
    for name, how, bodies, clients in (
        ("1,000 candidates", measure, known, 1),
        (f"a query never seen, {len(ids):,} pins", measure, fresh, 1),
        ("1,000 candidates", measure, known, args.clients),
        ("1,000 candidates, beside 10 MB", measure_beside, known, args.clients),
    ):
        for url, times in how(args.url, bodies, clients, args.seconds).items():
            p50, p99 = np.percentile(times, [50, 99])
            print(f"| {name} | {clients} | {url} | {p50:,.0f} | {p99:,.0f} | {len(times):,} |", flush=True)


if __name__ == "__main__":
    main()
